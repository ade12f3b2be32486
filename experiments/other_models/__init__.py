"""Models of other libraries as the policy: a page each, from NNX, Equinox, Haiku, Tunix and a dict of arrays."""
