"""The command line: streams, shared options, and the root that finds commands through entry
points."""
