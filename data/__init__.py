"""The data engine: audio to log-mel shards, and shards to packed rows. Knows nothing of models."""
