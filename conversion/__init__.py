"""Converters from the original checkpoints, one module per source; each also runs as a script."""
