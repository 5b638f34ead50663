"""Scripts of published experiments."""
