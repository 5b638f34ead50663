"""BEST-RQ pretraining, CTC fine-tuning and evaluation of speech encoders, in plain PyTorch."""
