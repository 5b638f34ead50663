"""Preparation of a corpus: from audio and labels to a dataset of log-mel shards."""
