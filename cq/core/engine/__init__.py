"""Who runs the parts of a checkpoint. `local` runs them on this machine's threads."""
