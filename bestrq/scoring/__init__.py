"""Error rates, their breakdowns and significance."""
