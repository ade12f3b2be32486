"""Five chapters from a parabola to PPO, and the small language model that they share."""
