"""Speed beside other systems, measured in one run; each prints a JSON line last."""
