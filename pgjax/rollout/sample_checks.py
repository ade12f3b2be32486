"""What the sampler refuses, on the host, before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from pgjax.core.checks import check_whole
from pgjax.core.errors import UserError
from pgjax.models.causal_lm import CausalLM
from pgjax.models.shared_prompts import check_groups


def check_lanes(lanes: int | None, parts: int, group_size: int) -> None:
    """Refuse lanes that the parts of the mesh and whole groups cannot share."""
    if lanes is None:
        return
    check_whole("lanes", lanes, 1)
    if lanes % (parts * group_size):
        over = f" over {parts} parts of the mesh" if parts > 1 else ""
        raise UserError(
            f"lanes={lanes} do not divide into groups of {group_size}{over}: make it a multiple of {parts * group_size}"
        )


def check_prompts(
    lm: CausalLM, prompts: jax.Array | np.ndarray, mask: jax.Array | np.ndarray, new: int, group_size: int
) -> None:
    """Refuse prompts that are not rows of ids padded on the left, as far as their values are known here."""
    if prompts.ndim != 2 or prompts.shape != mask.shape or 0 in prompts.shape:
        raise ValueError(f"prompts and prompt_mask must both be [B, P], got {prompts.shape} and {mask.shape}")
    check_whole("max_new_tokens", new, 1)
    check_groups(prompts.shape, 0, group_size)
    length, limit = prompts.shape[1] + new, lm.arch.max_positions
    if length > limit:
        raise ValueError(
            f"prompts of {prompts.shape[1]} tokens with max_new_tokens={new} need {length} positions, but the model has "
            f"{limit}: shorten the prompts or the completions"
        )
    known_mask, known = _known(mask), _known(prompts)
    if known_mask is not None:
        real_last = known_mask[:, -1] & (known_mask[:, 1:] >= known_mask[:, :-1]).all(1)
        if not real_last.all():
            row = int(np.argmin(real_last))
            raise ValueError(
                f"row {row} of prompt_mask is not padding on the left and then tokens: pad with data.left_pad"
            )
        if known is not None and (odd := known_mask & ((known < 0) | (known >= lm.arch.vocab_size))).any():
            row, column = np.argwhere(odd)[0]
            raise ValueError(
                f"row {row} of prompts holds the id {known[row, column]}, outside the vocabulary of {lm.arch.vocab_size}"
            )
        shown = None if known is None else np.where(known_mask, known, -1)
        if shown is not None and (odd := (shown != np.repeat(shown[::group_size], group_size, axis=0)).any(1)).any():
            row = int(np.argmax(odd))
            raise ValueError(
                f"row {row} of prompts is not that of row {row - row % group_size}, but group_size={group_size}"
            )


def _known(x: Any) -> np.ndarray | None:
    """Bring a value to the host by an explicit transfer; None for a tracer or one that lies on other processes."""
    if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(jax.device_get(x))


def check_options(vocab: int, temperature: Any, top_k: Any, top_p: Any, min_p: Any, eos_ids: Sequence[int]) -> None:
    """Refuse numbers that no sampler takes, and ends of sequence that are no ids."""

    def check(name: str, value: Any, ok: Callable[[float], bool], meant: str) -> None:
        known = None if value is None else _known(value)
        if known is not None and (known.ndim or not ok(float(known))):
            raise ValueError(f"{name} must be {meant}, got {value}")

    check("temperature", temperature, lambda x: 0 <= x < float("inf"), "a finite number not below 0 (0 is greedy)")
    check(
        "top_k", top_k, lambda x: 1 <= x < 2**31 and x == int(x), "a whole number of at least 1 and below 2^31, or None"
    )
    check("top_p", top_p, lambda x: 0 < x <= 1, "above 0 and at most 1, or None")
    check("min_p", min_p, lambda x: 0 <= x <= 1, "from 0 to 1, or None")
    if not isinstance(eos_ids, Collection):
        raise ValueError(f"eos_ids must be a sequence of ids, got {eos_ids!r}")
    for eos in eos_ids:
        if not 0 <= eos < vocab or eos != int(eos):
            raise ValueError(f"eos_ids holds {eos}, no id of the vocabulary of {vocab}")
