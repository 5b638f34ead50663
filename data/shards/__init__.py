"""Tools on datasets: `python -m data.shards COMMAND`."""
