"""Families of models as data: TOML files, read by `cq.core.recipe`."""
