"""Benchmarks against other systems in the same run; each prints a line of JSON last."""
