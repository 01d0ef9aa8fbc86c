"""How the pictures, the judges and the numbers were made, and the course's paperwork."""
