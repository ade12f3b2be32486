"""Where a tokenizer and an embedding differ in size: rows for the tokens beyond it, and ids that only pad it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from pgjax.models.architecture import Architecture
from pgjax.models.io.tensors import Box, Tensors
from pgjax.models.io.tokenizer import largest_id

_BY_TOKEN = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "lm_head.weight",
    "embed_out.weight",
)  # how the names end of tensors with a row a token
_ROWS = 8192  # read at a time


def with_rows(arch: Architecture, tensors: Tensors, vocab_size: int) -> tuple[Architecture, Tensors]:
    """Give a checkpoint's embedding, and its unembedding where that is another, more rows: each the mean of those there.

    A new token is then about as likely as the average one; with small random rows it may take all of the probability
    (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html).

    Args:
        arch: the architecture of the checkpoint.
        tensors: the checkpoint; nothing is read yet.
        vocab_size: the new number of rows, larger than arch.vocab_size.

    Returns:
        The architecture and the checkpoint, with more rows.

    Example:
        >>> from pgjax.models.io.config import architecture_of
        >>> arch = architecture_of({"model_type": "gpt2", "vocab_size": 2, "n_embd": 2, "n_layer": 1, "n_head": 1})
        >>> rows = np.array([[1.0, 2.0], [3.0, 6.0]])
        >>> old = Tensors("", {"wte.weight": (2, 2)}, lambda name, box: rows[tuple(slice(*span) for span in box)])
        >>> arch, new = with_rows(arch, old, 3)
        >>> arch.vocab_size, new.shapes, new.read("wte.weight", ((1, 3), (0, 2))).tolist()
        (3, {'wte.weight': (3, 2)}, [[3.0, 6.0], [2.0, 4.0]])
    """
    of_tokens = [name for name in tensors.shapes if name.endswith(_BY_TOKEN)]
    grown = {name for name in of_tokens if tensors.shapes[name][0] == arch.vocab_size}  # others will be refused

    @functools.cache
    def mean(name: str) -> np.ndarray:
        rows, width = tensors.shapes[name]
        boxes = (((begin, min(begin + _ROWS, rows)), (0, width)) for begin in range(0, rows, _ROWS))
        sums = [np.asarray(tensors.read(name, box), np.float32).sum(0, dtype=np.float64) for box in boxes]
        return (np.sum(sums, axis=0) / rows).astype(np.float32)

    def read(name: str, box: Box) -> np.ndarray:
        rows = tensors.shapes[name][0] if name in grown else None
        if rows is None or box[0][1] <= rows:
            return tensors.read(name, box)
        begin, end = box[0]
        new = np.tile(mean(name)[slice(*box[1])], (end - max(begin, rows), 1))
        if begin >= rows:
            return new
        old = tensors.read(name, ((begin, rows), box[1]))
        return np.concatenate([old, new.astype(old.dtype)])

    shapes = {name: (vocab_size, *shape[1:]) if name in grown else shape for name, shape in tensors.shapes.items()}
    return dataclasses.replace(arch, vocab_size=vocab_size), Tensors(tensors.origin, shapes, read)


def with_known_ids(arch: Architecture, tokenizer: Any) -> Architecture:
    """Say which ids a model's tokenizer knows, where the embedding is padded beyond them: the others have probability 0.

    Args:
        arch: the model's architecture.
        tokenizer: whose ids all have a row in the embedding.

    Returns:
        It, with its `known_ids`; None there where each row of the embedding has its id.
    """
    known = largest_id(tokenizer) + 1
    return dataclasses.replace(arch, known_ids=known if known < arch.vocab_size else None)
