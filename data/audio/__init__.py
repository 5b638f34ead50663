"""Audio files: search, headers and decoding."""
