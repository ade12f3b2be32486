"""What an iteration refuses: options that do not go together, batches that do not divide, arrays that it would give away."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pgjax.core.checks import check_whole
from pgjax.core.errors import UserError
from pgjax.core.importance import LEVELS
from pgjax.learning.algorithm import Algorithm, check_algorithm
from pgjax.learning.optimizer import TrainState
from pgjax.models.architecture import Architecture
from pgjax.models.causal_lm import CausalLM, Params


def check_options(
    algorithm: Algorithm, epochs: int, kl_target: float | None, *, plain: bool, teacher_force: bool | None
) -> None:
    """Refuse options of `iteration` that do not go together.

    Args:
        algorithm: what learns.
        epochs: passes over an iteration's completions.
        kl_target: nats a sequence, or None.
        plain: whether the sampler draws from the policy itself, without filters or an importance cap.
        teacher_force: as of `iteration`.

    Raises:
        UserError: with the values.

    Example:
        >>> import pgjax as pg
        >>> check_options(pg.rloo(), 2, None, plain=True, teacher_force=None)
        Traceback (most recent call last):
        pgjax.UserError: epochs=2 would learn from samples of an older policy as if they were the present one's: ...
    """
    check_algorithm(algorithm)
    if algorithm.on_policy and epochs > 1:
        raise UserError(
            f"epochs={epochs} would learn from samples of an older policy as if they were the present one's: the loss of "
            "this algorithm holds for one update a rollout; leave epochs at 1, or choose one with a clipped ratio"
        )
    if kl_target is not None and not algorithm.kl_coef > 0:
        raise UserError(f"kl_target={kl_target} adapts kl_coef by factors: it must start above 0")
    if teacher_force is False and not plain:
        raise UserError(
            "teacher_force=False takes the sampler's log-probabilities for the policy's, but top_k, top_p, min_p, "
            "min_new_tokens and importance_cap make them differ: leave it out"
        )


def check_importance(cap: float | None, level: str, floor: float | None) -> None:
    """Refuse importance weights that cannot work.

    Args:
        cap: as of `programs.experience`.
        level: likewise.
        floor: likewise.

    Raises:
        UserError: with the value.

    Example:
        >>> check_importance(None, "sequence", None)
        Traceback (most recent call last):
        pgjax.UserError: importance_level='sequence' says how samples are weighed: it needs importance_cap, their largest weight
    """
    if level not in LEVELS:
        raise UserError(f"importance_level must be one of {', '.join(LEVELS)}, got {level!r}")
    if cap is None and (floor is not None or level != "token"):
        given = f"importance_level={level!r}" if floor is None else f"importance_floor={floor}"
        raise UserError(f"{given} says how samples are weighed: it needs importance_cap, their largest weight")
    if floor is not None and cap is not None and not 0 <= floor < cap:
        raise UserError(f"importance_floor must be from 0 to below importance_cap={cap}, got {floor}")


def check_packing(lm: CausalLM, pack_tokens: int | None, microbatches: int) -> None:
    """Refuse packed rows of a model that cannot be told its segments, and two numbers that say the same."""
    if pack_tokens is None:
        return
    check_whole("pack_tokens", pack_tokens, 1)
    if not isinstance(lm.arch, Architecture):
        raise UserError(
            "pack_tokens packs rows for pgjax's own transformer, not for a model made by pg.bundle: leave it out"
        )
    if lm.arch.rope is not None and lm.arch.rope.scaling == "longrope":
        raise UserError(
            "pack_tokens joins sequences in longer rows, for which longrope would take its other factors: leave it out"
        )
    if microbatches != 1:
        raise UserError(
            f"pack_tokens={pack_tokens} says how much is computed at once, and so does microbatches={microbatches}: leave one "
            "of them out"
        )


def check_rows(rows: int, minibatches: int, microbatches: int, group: int) -> None:
    """Refuse a batch that does not divide into whole groups and equal parts."""
    if rows % (minibatches * microbatches):
        raise UserError(
            f"a batch of {rows} does not divide into minibatches={minibatches} times microbatches={microbatches}: make "
            f"it a multiple of {minibatches * microbatches}"
        )
    if rows % group:
        raise UserError(
            f"a batch of {rows} does not divide into groups of {group} completions of a prompt: make it a multiple of "
            f"{group}"
        )


def check_scores(shape: tuple[int, ...], rows: int, max_new_tokens: int) -> None:
    """Refuse scores that are neither one a completion nor one a token."""
    if shape not in ((rows,), (rows, max_new_tokens)):
        raise UserError(
            f"scores of shape {shape} for {rows} completions: give one each, or [{rows}, {max_new_tokens}], one for each token"
        )


def check_trained(params: Params) -> None:
    """Refuse parameters that have no gradient."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)):
            raise UserError(
                f"parameters are trained, but {jax.tree_util.keystr(path)} is {getattr(x, 'dtype', type(x).__name__)}: "
                "give floating-point arrays alone, and keep the rest in the functions of the model"
            )


def check_kept(learner: TrainState, **kept: Params | None) -> None:
    """Refuse to give away arrays that are needed afterwards."""
    given = set().union(*map(_buffers, jax.tree.leaves(learner.params)))
    for name, tree in kept.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if given & _buffers(x):
                raise UserError(
                    f"{name}{jax.tree_util.keystr(path)} is an array of the state, which learn gives away: pass a copy, "
                    f"{name}=jax.tree.map(jnp.copy, ...), when the iteration is made"
                )


def _buffers(x: Any) -> set[int]:
    """Find where the parts of an array on this process's devices lie: two arrays may be one memory."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer) or x.is_deleted():
        return set()
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return {part.data.unsafe_buffer_pointer() for part in x.addressable_shards if part.data.size}


def check_reference(algorithm: Algorithm, reference: Params | None) -> None:
    """Refuse a penalty to a reference that is not there."""
    for name, coef in {"kl_coef": algorithm.kl_coef, "kl_loss_coef": algorithm.kl_loss_coef}.items():
        if coef != 0 and reference is None:
            raise UserError(f"{name}={coef} penalises the KL to a reference: give its parameters, or {name}=0")
