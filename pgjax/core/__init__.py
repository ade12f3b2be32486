"""The pure core: masks, log-probabilities, advantages, KL, losses, the trust region. It imports jax and chex, nothing else."""
