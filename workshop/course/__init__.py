"""What the course wants handed in."""
