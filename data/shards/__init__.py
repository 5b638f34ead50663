"""Tools on finished datasets."""
