"""Pretraining: BEST-RQ objective, targets, masks and reports."""
