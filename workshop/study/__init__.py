"""The experiments that are compared with the shipped model."""
