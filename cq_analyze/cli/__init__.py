"""The commands that look: `cq analyze`, `cq template`, `cq verify`; options to functions, results
to text."""
