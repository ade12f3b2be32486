"""Speeds beside their limits and beside what one would use instead; `python -m benchmarks` runs them all."""
