"""Multi-head self-attention over packed rows."""
