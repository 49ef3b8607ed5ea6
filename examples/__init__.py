"""Worked examples, each small enough to run on a laptop."""
