"""Byte-range access to local and remote files."""
