"""The Flax causal LM, its weights in and out, and its heads."""
