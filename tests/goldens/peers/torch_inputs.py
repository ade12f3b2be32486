"""The shared arrays as torch tensors, and what the scripts of the torch peers have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import shared
import torch

X = SimpleNamespace(
    **{
        key: torch.tensor(value, dtype=torch.float64 if value.dtype.kind == "f" else None)
        for key, value in dataclasses.asdict(shared.inputs()).items()
    }
)
POSITIONS = slice(shared.PROMPT - 1, -1)  # those whose logits are of the completion's tokens


def value_and_gradient(function: Callable[[Any], Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Call a scalar function and differentiate it."""
    x = x.clone().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def controlled(kind: type) -> list[float]:
    """Update a controller of the KL's weight once for each of three measurements."""
    found = []
    for kl in shared.CONTROLLER_KLS:
        controller = kind(shared.KL_COEF, shared.TARGET_KL, shared.HORIZON)
        controller.update(kl, shared.ROWS)
        found.append(controller.value)
    return found
