"""From a dataset to batches: order, cutting, packing, loader."""
