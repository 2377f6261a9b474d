"""A page about a run folder, made without torch: `python -m report out/...`."""
