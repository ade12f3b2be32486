"""Prompts to scored completions: the sampler and its filters, rewards, the reward model as a judge, the task."""
