"""Speech recognition models: CTC, transducers and their losses, SpecAugment."""
