"""On-disk format of datasets: reader, index and writer."""
