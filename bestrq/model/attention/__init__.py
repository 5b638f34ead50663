"""Multi-head self-attention over packed rows, and the ways of reckoning it."""
