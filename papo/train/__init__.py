"""A run: its parts, and the order of its stages."""
