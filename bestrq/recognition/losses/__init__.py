"""Transducer losses in bounded memory: plain, pruned, with durations."""
