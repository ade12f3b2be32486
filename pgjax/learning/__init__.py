"""Scores to an update: algorithms, the iteration, its compiled programs, the optimizer; fine-tuning and reward models."""
