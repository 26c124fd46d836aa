"""What people look with."""
