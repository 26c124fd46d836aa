"""What people program with."""
