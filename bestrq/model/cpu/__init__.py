"""Workarounds for slow CPU kernels of torch (skip them on a first read): attention, dropout, depthwise convolution."""
