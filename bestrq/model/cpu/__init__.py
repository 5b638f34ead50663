"""Workarounds for slow CPU kernels of torch, skippable on a first read: attention, dropout, depthwise convolution."""
