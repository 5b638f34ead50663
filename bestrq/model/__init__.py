"""Conformer encoder: settings, attention, convolution, positions, packed rows, streaming."""
