"""Decoding of frame scores to tokens: greedy search, beam search, shallow fusion."""
