"""The dataset format: reading and writing."""
