"""What a run trains: all parameters of its language model, or low-rank adapters to them (Hu et al. 2021)."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import Mesh

import pgjax as pg
from experiments import checks
from experiments.task import fold_in
from pgjax.sharding import init_sharded


def freeze(params: dict[str, Any], config: Any, mesh: Mesh | None = None) -> tuple[Any | None, dict[str, Any]]:
    """Divide parameters into what stays as it is and what is trained; `pg.with_lora` puts the two together.

    Args:
      params: of a language model, or of one under "lm" with a head beside it, which is trained.
      config: with `lora_rank`, `lora_alpha` and `seed`.
      mesh: that the parameters lie on, or None.

    Returns:
      The model's parameters; and adapters to them, with the head. Without a rank None, and all parameters.

    Example:
      >>> from experiments.sft import Config
      >>> freeze({"layers": {}}, Config())
      (None, {'layers': {}})
    """
    if config.lora_rank is None:
        return None, params
    init = functools.partial(pg.init_lora, rank=config.lora_rank, alpha=config.lora_alpha)
    key = fold_in(jax.random.key(config.seed), 2**32 - 2)  # no step of a run, nor its evaluation, folds in this number
    adapters = init_sharded(init, key, params.get("lm", params), mesh=mesh)
    return ({"lm": params["lm"]}, {**params, "lm": adapters}) if "lm" in params else (params, adapters)


def check(config: Any) -> None:
    """Refuse a rank and an alpha that mean nothing."""
    if config.lora_rank is not None:
        checks.at_least_one(config, "lora_rank")
    checks.above_zero(config, "lora_alpha")
