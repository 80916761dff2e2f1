"""Data sets: images, and the tokens they are encoded to once."""
