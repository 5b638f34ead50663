"""Published dev and test splits."""
