"""What a config may not hold, refused by a UserError that names the field and the number it has."""

from __future__ import annotations

import json
import math
from typing import Any, cast

from pgjax.core.errors import UserError
from pgjax.models.io.chat_template import as_date
from pgjax.run.trackers import check_trackers


def require(ok: bool, message: str) -> None:
    """Refuse a condition that does not hold, with a message for the user.

    Example:
      >>> require(3 > 4, "three must be above four")
      Traceback (most recent call last):
      pgjax.UserError: three must be above four
    """
    if not ok:
        raise UserError(message)


def at_least_one(config: Any, *names: str, of: str = "") -> None:
    """Refuse fields of a config that are below 1; `of` stands before a name in the message.

    Example:
      >>> from types import SimpleNamespace
      >>> at_least_one(SimpleNamespace(epochs=1, batch_size=0), "epochs", "batch_size", of="sft.")
      Traceback (most recent call last):
      pgjax.UserError: sft.batch_size must be at least 1, got 0
    """
    at_least(config, 1, *names, of=of)


def at_least(config: Any, least: int, *names: str, of: str = "") -> None:
    """Refuse fields of a config that are below a number; None passes, `of` stands before a name in the message.

    Example:
      >>> from types import SimpleNamespace
      >>> at_least(SimpleNamespace(max_length=1), 2, "max_length")
      Traceback (most recent call last):
      pgjax.UserError: max_length must be at least 2, got 1
    """
    for name, value in _of(config, names):
        require(value is None or value >= least, f"{of}{name} must be at least {least}, got {value}")


def not_negative(config: Any, *names: str) -> None:
    """Refuse fields of a config that are below 0 or not finite; None passes.

    Example:
      >>> from types import SimpleNamespace
      >>> not_negative(SimpleNamespace(warmup_updates=0, weight_decay=-0.1), "warmup_updates", "weight_decay")
      Traceback (most recent call last):
      pgjax.UserError: weight_decay must be finite and not below 0, got -0.1
    """
    for name, value in _of(config, names):
        require(value is None or 0 <= value < math.inf, f"{name} must be finite and not below 0, got {value}")


def above_zero(config: Any, *names: str) -> None:
    """Refuse fields of a config that are 0, below, or not finite; None passes.

    Example:
      >>> from types import SimpleNamespace
      >>> above_zero(SimpleNamespace(max_grad_norm=0.0), "max_grad_norm")
      Traceback (most recent call last):
      pgjax.UserError: max_grad_norm must be above 0, got 0.0
    """
    for name, value in _of(config, names):
        require(value is None or 0 < value < math.inf, f"{name} must be above 0, got {value}")


def seed_fits(config: Any) -> None:
    """Refuse a seed that is no number of 32 bits.

    Example:
      >>> from types import SimpleNamespace
      >>> seed_fits(SimpleNamespace(seed=-1))
      Traceback (most recent call last):
      pgjax.UserError: seed must be from 0 to 2^32 - 1, got -1
    """
    require(0 <= config.seed < 2**32, f"seed must be from 0 to 2^32 - 1, got {config.seed}")


def check_run(config: Any) -> None:
    """Refuse values of the fields that all training runs have: those of `session.RunFlags`, and the parts of a batch.

    Example:
      >>> from experiments.sft import Config
      >>> check_run(Config(keep=0))
      Traceback (most recent call last):
      pgjax.UserError: keep must be at least 1, got 0
    """
    at_least_one(config, "batch_size", "microbatches", "held_out_rows", "save_every", "keep")
    not_negative(config, "learning_rate", "warmup_updates", "weight_decay")
    above_zero(config, "max_grad_norm")
    divides(config, "batch_size", "microbatches")
    seed_fits(config)
    check_lora(config)
    check_template(config)
    check_trackers(config.track)


def check_template(config: Any) -> None:
    """Refuse what no chat template can be given.

    Example:
      >>> from types import SimpleNamespace
      >>> check_template(SimpleNamespace(template_args=None, template_date="30 Nov"))
      Traceback (most recent call last):
      pgjax.UserError: the date of the chat template is '30 Nov', not one like 2026-11-30
    """
    json_object(config, "template_args")
    if config.template_date is not None:
        as_date(config.template_date)


def json_object(config: Any, name: str) -> dict[str, Any] | None:
    """Read a field of a config that holds a JSON object as text; None passes.

    Example:
      >>> from types import SimpleNamespace
      >>> json_object(SimpleNamespace(template_args="{enable_thinking: false}"), "template_args")
      Traceback (most recent call last):
      pgjax.UserError: template_args must be a JSON object like {"enable_thinking": false}, got '{enable_thinking: false}'
    """
    text = vars(config)[name]
    try:
        found = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        found = text
    require(
        text is None or isinstance(found, dict),
        f'{name} must be a JSON object like {{"enable_thinking": false}}, got {text!r}',
    )
    return cast("dict[str, Any] | None", found)


def check_length(length: int | None, positions: int) -> None:
    """Refuse a longest sequence that the model's positions cannot hold; None passes.

    Example:
      >>> check_length(65, 64)
      Traceback (most recent call last):
      pgjax.UserError: max_length=65 is more than the model's 64 positions
    """
    require(
        length is None or length <= positions, f"max_length={length} is more than the model's {positions} positions"
    )


def _of(config: Any, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(name, vars(config)[name]) for name in names]


def check_lora(config: Any) -> None:
    """Refuse a rank and an alpha that mean nothing, and adapters to no model."""
    if config.lora_rank is not None:
        at_least_one(config, "lora_rank")
        require(config.model is not None, f"lora_rank={config.lora_rank} adapts a model that is there: give model too")
    above_zero(config, "lora_alpha")


def divides(config: Any, whole: str, *parts: str) -> None:
    """Refuse a field of a config that the product of some others does not divide.

    Example:
      >>> from experiments.sft import Config
      >>> divides(Config(batch_size=6, microbatches=4), "batch_size", "microbatches")
      Traceback (most recent call last):
      pgjax.UserError: batch_size=6 does not divide into microbatches=4
    """
    (_, size), *counts = _of(config, (whole, *parts))
    told = " times ".join(f"{name}={count}" for name, count in counts)
    require(size % math.prod(count for _, count in counts) == 0, f"{whole}={size} does not divide into {told}")
