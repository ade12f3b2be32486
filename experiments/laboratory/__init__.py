"""The exact token MDP, and what estimators and algorithms do on it."""
