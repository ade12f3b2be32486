"""Pad rows of token ids: prompts on the left, whole texts on the right; bucket lengths, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pgjax.core.errors import UserError

_SMALLEST_BUCKET = 16


def left_pad(ids: Sequence[Sequence[int]], pad_id: int, *, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pad sequences on the left, so that every prompt ends in the same column.

    Args:
      ids: token ids of each row, none empty.
      pad_id: the id of padding; it may occur in the rows too: only the mask tells padding from tokens.
      length: columns P of the result; None is the longest row.

    Returns:
      tokens [B, P] int32 and attention mask [B, P] bool, False on padding.

    Raises:
      UserError: no rows, an empty row, or one longer than ``length``.

    Example:
      >>> tokens, mask = left_pad([[5, 6, 7], [8]], 0)
      >>> tokens.tolist(), mask.astype(int).tolist()
      ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    """
    if len(ids) == 0:
        raise UserError("there are no rows to pad")
    lengths = [len(row) for row in ids]
    width = max(lengths) if length is None else length
    if min(lengths) == 0:
        raise UserError(f"row {lengths.index(0)} (counted from 0) holds no tokens")
    if max(lengths) > width:
        raise UserError(f"row {lengths.index(max(lengths))} has {max(lengths)} tokens, more than the length {width}")
    tokens = np.full((len(ids), width), pad_id, np.int32)
    mask = np.zeros((len(ids), width), np.bool_)
    for row, sequence in enumerate(ids):
        tokens[row, width - len(sequence) :] = sequence
        mask[row, width - len(sequence) :] = True
    return tokens, mask


def bucket_length(n: int) -> int:
    """Round a length up to 16, 24, 32, 48, 64, 96, 128, ...: 2^k and 1.5 * 2^k.

    A program is compiled for each padded length. These lengths give at most two programs for each doubling, and padding
    is less than half of a row (beyond 16 tokens).

    Args:
      n: length in tokens, at least 1.

    Returns:
      The smallest such length that is at least ``n``.

    Raises:
      UserError: n < 1.

    Example:
      >>> [bucket_length(n) for n in (1, 17, 32, 33, 49, 100)]
      [16, 24, 32, 48, 64, 128]
    """
    if n < 1:
        raise UserError(f"a length of {n} tokens has no bucket: it must be at least 1")
    bucket = _SMALLEST_BUCKET
    while bucket < n:
        if bucket + bucket // 2 >= n:
            return bucket + bucket // 2
        bucket *= 2
    return bucket


def right_pad(ids: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad sequences on the right with zeros; only the mask tells padding from tokens.

    Args:
      ids: token ids of each row.
      length: columns T of the result; at least the longest row.

    Returns:
      tokens [B, T] int32 and attention mask [B, T] bool.

    Example:
      >>> tokens, mask = right_pad([[5, 6], [7]], 3)
      >>> tokens.tolist(), mask.sum(1).tolist()
      ([[5, 6, 0], [7, 0, 0]], [2, 1])
    """
    tokens, mask = np.zeros((len(ids), length), np.int32), np.zeros((len(ids), length), np.bool_)
    for row, sequence in enumerate(ids):
        tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, True
    return tokens, mask
