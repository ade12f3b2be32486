"""Convert Hugging Face's config.json to and from an `Architecture`; an unknown option is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture
from pgjax.models.io.families import FAMILIES
from pgjax.models.io.families.fields import ACTIVATION_NAMES, check_only


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Read an architecture from the fields of a Hugging Face config.json.

    Args:
        config: the parsed file, of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Returns:
        The architecture.

    Raises:
        UserError: for an unknown family, activation or rope type, a missing field, or an option that is not
            implemented; the message names the value and lists what is supported.

    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> architecture_of(config).mlp_width
    64
    >>> architecture_of({"model_type": "mamba"})
    Traceback (most recent call last):
    pgjax.UserError: model_type 'mamba' is not supported; supported: cohere2, ...
    """
    name = config.get("model_type")
    if name is None:
        raise UserError("the configuration has no field 'model_type'")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"model_type {name!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[name]
    fields = {**family.defaults, **config}
    check_only(fields, family.only)
    return family.read(fields)


def config_of(arch: Architecture) -> dict[str, Any]:
    """Write an architecture as the fields of a Hugging Face config.json, readable by transformers 4 and 5.

    Args:
        arch: an architecture that its family can express.

    Returns:
        A dict for JSON, without token ids and dtype.

    Raises:
        UserError: when the family has no field for one of the architecture's options; the message names them.

    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> config_of(architecture_of(config))["n_inner"]
    64
    """
    if arch.known_ids is not None:  # which the tokenizer's files say
        arch = dataclasses.replace(arch, known_ids=None)
    if arch.family not in FAMILIES:
        raise UserError(f"family {arch.family!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    if arch.activation not in ACTIVATION_NAMES:
        raise UserError(f"activation {arch.activation!r} is not supported; supported: {', '.join(ACTIVATION_NAMES)}")
    family = FAMILIES[arch.family]
    config = {"architectures": [family.lm], "model_type": arch.family, **family.write(arch)}
    back = architecture_of(config)
    lost = [name for name in arch.__dataclass_fields__ if vars(arch)[name] != vars(back)[name]]
    if lost:
        listed = ", ".join(f"{name}={vars(arch)[name]!r}" for name in lost)
        raise UserError(f"family {arch.family!r} in Hugging Face layout cannot express {listed}")
    return config


def classifier_config_of(arch: Architecture) -> dict[str, Any]:
    """Write the config.json of a sequence classifier with one label, as reward models are saved.

    Args:
        arch: as in `config_of`.

    Returns:
        A dict for JSON, without token ids and dtype.

    Raises:
        UserError: as in `config_of`.

    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> classifier_config_of(architecture_of(config))["architectures"]
    ['GPT2ForSequenceClassification']
    """
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1, "problem_type": "regression"}
    return {**config_of(arch), "architectures": [FAMILIES[arch.family].classifier], **labels}


def labels_of(config: Mapping[str, Any]) -> list[str] | None:
    """List the labels of a sequence classifier's config.json; None where it names neither labels nor their number.

    Args:
        config: the parsed file.

    Returns:
        One name a label, in the order of the scores.

    >>> labels_of({"id2label": {"1": "good", "0": "bad"}}), labels_of({"num_labels": 1})
    (['bad', 'good'], ['LABEL_0'])
    """
    names, number = config.get("id2label"), config.get("num_labels")
    if names is not None:
        return [str(names[key]) for key in sorted(names, key=int)]
    return None if number is None else [f"LABEL_{i}" for i in range(int(number))]
