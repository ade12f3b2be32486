"""The arrays that pgjax and its peers are both given, and the file that a peer's answers go to. NumPy only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SEED = 3  # the first with which the arrays reach every branch of the losses
ROWS, PROMPT, COMPLETION, VOCABULARY, GROUP = 6, 3, 5, 7, 3
LENGTHS = (5, 3, 1, 4, 2, 5)  # sampled tokens a row
HOLES = ((0, 1), (3, 2))  # places inside a completion that the policy did not sample
EMPTY = 2  # the row that `mask_empty_row` leaves out whole
CLIP, CLIP_HIGH, DUAL_CLIP, VALUE_CLIP = 0.2, 0.3, 1.5, 0.25
TEMPERATURE, DISCOUNT, KL_COEF, CENTER = 0.7, 0.9, 0.3, 0.05
TARGET_KL, HORIZON, CONTROLLER_KLS = 6.0, 1000, (6.6, 3.0, 30.0)  # within the bound, below it, above it


@dataclass(frozen=True)
class Inputs:
    """Values that float32 holds exactly, so a peer may compute in float64 on the same numbers."""

    tokens: np.ndarray  # [B, P + N] prompts and completions
    logits: np.ndarray  # [B, P + N, V]
    ref_logits: np.ndarray  # [B, P + N, V]
    mask: np.ndarray  # [B, N] boolean, uneven; nothing after it
    mask_holes: np.ndarray  # [B, N] the same with holes inside
    mask_empty_row: np.ndarray  # [B, N] the same with one row empty
    logprobs: np.ndarray  # [B, N] of the completions, as everything below with that shape
    old_logprobs: np.ndarray
    ref_logprobs: np.ndarray
    advantages: np.ndarray
    values: np.ndarray
    old_values: np.ndarray
    rewards: np.ndarray
    returns: np.ndarray
    scores: np.ndarray  # [B] rows of one prompt adjacent, GROUP of them
    chosen: np.ndarray  # [B]
    rejected: np.ndarray  # [B]
    margin: np.ndarray  # [B]


def inputs(seed: int = SEED) -> Inputs:
    """Draw everything from one seed."""
    draw = np.random.default_rng(seed)
    places = np.arange(COMPLETION)[None, :]
    mask = places < np.array(LENGTHS)[:, None]
    holes, empty = mask.copy(), mask.copy()
    holes[tuple(np.array(HOLES).T)] = False
    empty[EMPTY] = False

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(np.float32)

    whole = (ROWS, PROMPT + COMPLETION)
    part = (ROWS, COMPLETION)
    logprobs = -np.abs(normal(*part)) - np.float32(0.1)
    values = normal(*part)
    return Inputs(
        tokens=draw.integers(0, VOCABULARY, whole),
        logits=2 * normal(*whole, VOCABULARY),
        ref_logits=2 * normal(*whole, VOCABULARY),
        mask=mask,
        mask_holes=holes,
        mask_empty_row=empty,
        logprobs=logprobs,
        old_logprobs=logprobs + np.float32(0.4) * normal(*part),
        ref_logprobs=logprobs + np.float32(0.5) * normal(*part),
        advantages=normal(*part),
        values=values,
        old_values=values + np.float32(0.5) * normal(*part),
        rewards=normal(*part),
        returns=normal(*part),
        scores=normal(ROWS),
        chosen=normal(ROWS),
        rejected=normal(ROWS),
        margin=np.abs(normal(ROWS)),
    )


def entry(function: str, value: Any, gradient: Any = None) -> dict[str, Any]:
    """Say which function of the peer gave these numbers, and with respect to what its gradient is."""
    found = {"function": function, "value": _rounded(value)}
    return found if gradient is None else {**found, "gradient": _rounded(gradient)}


def write(
    package: str,
    version: str,
    made_by: str,
    entries: dict[str, dict[str, Any]],
    *,
    name: str = "",
    folder: str = "peers",
) -> None:
    """Write one peer's answers to tests/goldens/FOLDER/NAME.json, an entry a line."""
    head = {"package": package, "version": version, "seed": SEED, "made_by": f"tests/goldens/{folder}/{made_by}"}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    body = ",\n".join(f"    {json.dumps(key)}: {json.dumps(found)}" for key, found in entries.items())
    text = "{\n" + ",\n".join([*lines, '  "entries": {\n' + body + "\n  }"]) + "\n}\n"
    (HERE.parent / folder / f"{name or package}.json").write_text(text)


def _rounded(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return [_rounded(item) for item in x]
    array = np.asarray(x, np.float64)
    if array.ndim:
        return [_rounded(item) for item in array]
    return float(f"{float(array):.9g}")
