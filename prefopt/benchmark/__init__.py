"""Speed, measured: `scripts/benchmark.py`. Ratios of ways that take turns in one process; never a verdict of a test."""
