"""Training: processes, optimizer steps, checkpoints, exports, run folders and metrics."""
