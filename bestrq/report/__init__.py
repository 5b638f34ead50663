"""Reports of evaluations: result files, comparisons, charts and HTML pages."""
