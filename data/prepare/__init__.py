"""Preparation: from a corpus to a dataset."""
