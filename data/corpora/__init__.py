"""Corpora: one module each, listed in `registry.py`."""
