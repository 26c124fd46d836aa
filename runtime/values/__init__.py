"""How values go in and out."""
