"""Losses over the lattice of a transducer."""
