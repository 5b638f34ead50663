"""Inference on long recordings, in overlapping windows or as a stream."""
