"""Data engine: audio to log-mel shards, and shards to packed rows. Independent of models."""
