"""Transcripts with word times and their file formats."""
