"""Byte ranges of local and remote files."""
