"""One process: its channels, its lock, its table."""
