"""What a run trains: all parameters of its language model, or low-rank adapters to them (Hu et al. 2021)."""

from __future__ import annotations
