"""CPU implementations: the attention loop over segments and dropout."""
