"""Readers of word times in the formats of other programs."""
