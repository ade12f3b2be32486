"""Tunix's sampler, and the gradient of its PPO policy loss, on its own Llama model with the same weights.

    PYTHON -m benchmarks.peers.tunix      # started by `benchmarks.worker`

PYTHON is one with google-tunix. Of the families that pgjax loads, Tunix has Llama without scaled rope as we write it; its
Llama reads the folder's weights by Tunix's own loader. Tunix 0.1.7 turns positions by a rope of base 1,000,000 whatever its
config says, so on a model with another base (SmolLM2 has 100,000) the work is the same and the numbers are not. Its PPO has
the critic as a second network: the learner here is its policy loss alone, without values, which is less than ours does.
No end of sequence: the sampler's stop id does not exist.
Set-up: "task" (rollout, learner), "folder", "dtype", and the task's arrays, as for `torch_model`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl import algo_core, common

from benchmarks.peers.protocol import Parent

NOTHING = -1  # an id that no token has: nothing ends a sequence, nothing is padding


class Ids:
    """A tokenizer whose text is the ids, for prompts that are ids already."""

    def encode(self, text: str, **_: Any) -> list[int]:
        """Read ids."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        """Return no text: nothing reads it."""
        return ""

    def bos_id(self) -> int:
        """Return an id that stands for none."""
        return 0

    def eos_id(self) -> int:
        """Return an id that stands for none."""
        return NOTHING

    def pad_id(self) -> int:
        """Return an id that stands for none."""
        return NOTHING


def load(setup: dict[str, Any]) -> tuple[Any, Any]:
    """Load the model by Tunix's loader; give its config too."""
    written = json.loads((Path(setup["folder"]) / "config.json").read_text(encoding="utf-8"))
    config = llama.ModelConfig(
        num_layers=written["num_hidden_layers"], vocab_size=written["vocab_size"], embed_dim=written["hidden_size"],
        hidden_dim=written["intermediate_size"], num_heads=written["num_attention_heads"], head_dim=written["head_dim"],
        num_kv_heads=written["num_key_value_heads"], rope_theta=int(written["rope_theta"]), norm_eps=written["rms_norm_eps"],
        weight_tying=written["tie_word_embeddings"],
    )  # fmt: skip
    return create_model_from_safe_tensors(setup["folder"], config, dtype=jnp.dtype(setup["dtype"])), config


def rollout(setup: dict[str, Any]) -> Callable[..., dict[str, float]]:
    """Return a call that samples so many tokens a prompt with Tunix's sampler: temperature 1, no filter, no early end."""
    model, config = load(setup)
    texts = [" ".join(map(str, ids)) for ids in setup["prompts"]]
    length = len(setup["prompts"][0])

    @functools.cache
    def sampler(new_tokens: int) -> Sampler:
        size = length + new_tokens
        cache = CacheConfig(
            cache_size=size, num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
        )
        return Sampler(model, Ids(), cache)

    def run(new_tokens: int) -> dict[str, float]:
        found = sampler(new_tokens)(
            texts, max_generation_steps=new_tokens, max_prompt_length=length, eos_tokens=[NOTHING], temperature=1.0,
            top_p=1.0, seed=0,
        )  # fmt: skip
        return {"new_tokens": float(np.mean([len(row) for row in found.tokens]))}

    return run


def learner(setup: dict[str, Any]) -> Callable[..., dict[str, float]]:
    """Return a call that computes Tunix's PPO policy loss and its gradient by every weight; it gives the loss."""
    model, _ = load(setup)
    tokens, window = jnp.asarray(setup["tokens"], jnp.int32), setup["window"]
    ones = jnp.ones((len(tokens), window), bool)
    example = common.TrainExample(
        prompt_ids=tokens[:, :-window], prompt_mask=tokens[:, :-window] >= 0, completion_ids=tokens[:, -window:],
        completion_mask=ones, advantages=jnp.asarray(setup["advantages"]), ref_per_token_logps=None,
        old_per_token_logps=jnp.asarray(setup["old_logprobs"]),
    )  # fmt: skip
    options = SimpleNamespace(
        epsilon_low=setup["clip_eps"], epsilon_high=setup["clip_eps"], epsilon_c=None, entropy_coef=None, kl_coef=0.0
    )

    def loss(model: Any, example: Any) -> Any:
        return algo_core.ppo_policy_loss_fn(model, example, options, NOTHING, NOTHING)

    step = nnx.jit(nnx.value_and_grad(loss, has_aux=True))

    def run() -> dict[str, float]:
        (found, _), _ = jax.block_until_ready(step(model, example))
        return {"loss": float(found)}

    return run


TASKS: dict[str, Callable[[dict[str, Any]], Callable[..., dict[str, float]]]] = {"rollout": rollout, "learner": learner}


if __name__ == "__main__":
    parent = Parent()
    work = TASKS[parent.setup["task"]](parent.setup)
    parent.ready("google-tunix", "jax", "flax")
    parent.serve(work)
