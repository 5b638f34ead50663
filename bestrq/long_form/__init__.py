"""Inference on whole recordings in windows."""
