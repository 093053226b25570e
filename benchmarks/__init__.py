"""Speed, as ratios against references of the same run (benchmarks/README.md)."""
