"""What we do for others."""
