"""What holds for a family, case by case of `tests/family_models.py`: each check raises an AssertionError where it does not.

python -m tests.family_checks           # print the table of all
python -m tests.family_checks --write   # and put it into README.md
"""

from tests import conftest  # isort: skip  # four fake devices, set before jax makes its backend

import functools
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import pgjax as pg
from pgjax.models.causal_lm import decode_params, logits_of
from pgjax.models.heads import head_logprobs
from pgjax.models.reward_model import from_causal_lm
from pgjax.parallel.sharding import make_mesh, param_shardings, place
from tests import page_table
from tests.compare import assert_close, assert_same_bits
from tests.family_models import CASES, GOLDENS, drawn, padded_batch, write_model

HELD = json.loads((GOLDENS / "families.json").read_text())["cases"]
LOGITS = np.load(GOLDENS / "families.npz")
TOKENS, MASK = padded_batch()
PAGE = "README.md", "tests.family_checks"
MESHES = ({"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2})
# transformers derives these from others that are the same, or reads them only where others say so.
DERIVED = {"dtype", "rope_parameters", "head_dim", "max_window_layers", "architectures"}


@functools.cache
def opened(case):
    """Load a case from a folder that transformers would open: (lm, params)."""
    with tempfile.TemporaryDirectory() as folder:
        lm, params, _ = pg.load(write_model(Path(folder), HELD[case]["config"], HELD[case]["tensors"]))
    return lm, params


@functools.partial(jax.jit, static_argnums=0)
def applied(lm, params, tokens, mask):
    return lm.apply(params, tokens, mask)


def logits(case):
    """Logits of a left-padded batch are torch's of rows alone. Longrope goes by the whole length: its rows are alone here too."""
    lm, params = opened(case)
    if case == "phi3_longrope":
        found = [applied(lm, params, row[None, real], None)[0] for row, real in zip(TOKENS, MASK, strict=True)]
    else:
        found = [np.asarray(applied(lm, params, TOKENS, MASK))[MASK]]
    assert_close(np.concatenate(found), LOGITS[case], of_max=1e-5)


def greedy(case):
    """Prefill and decode choose the tokens of torch's generate, and compute what one pass over the whole rows does."""
    lm, params = opened(case)
    new = np.array(HELD[case]["greedy"], np.int32)
    tokens, mask = np.concatenate([TOKENS, new], 1), np.pad(MASK, ((0, 0), (0, new.shape[1])), constant_values=True)
    start, length = TOKENS.shape[1], tokens.shape[1]
    states, cache = jax.jit(lm.prefill)(params, TOKENS, MASK, lm.init_cache(len(TOKENS), length))
    stepwise, weights, decode = [states], decode_params(params, lm.dtype), jax.jit(lm.decode)
    for t in range(start, length - 1):
        slots, position = mask & (np.arange(length) <= t), mask[:, :t].sum(1).astype(np.int32)
        states, cache = decode(weights, tokens[:, t], position, jnp.int32(t), slots, cache)
        stepwise.append(states)
    cached = logits_of(jnp.stack(stepwise, 1), lm.unembedding(params), cap=lm.arch.logit_cap)
    assert np.array_equal(cached.argmax(-1), new)
    assert_close(cached, applied(lm, params, tokens, mask)[:, start - 1 : -1], of_max=1e-5)


def sharded(case):
    """The loss and every gradient are finite, and on four devices those of one."""
    lm, params = opened(case)
    rows = np.array([0, 1, 2, 0])

    @jax.jit
    def update(params, tokens, mask):
        def loss(params):
            of_head = lm.hidden(params, tokens, mask), lm.unembedding(params), tokens
            logprobs = head_logprobs(*of_head, logit_cap=lm.arch.logit_cap)
            return -jnp.sum(jnp.where(mask, logprobs, 0.0)) / 9

        return jax.value_and_grad(loss)(params)

    expected = jax.device_get(update(params, TOKENS[rows], MASK[rows]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
    assert all(
        np.abs(x).max() > 0 for path, x in jax.tree_util.tree_leaves_with_path(expected) if "bias" not in str(path)
    )
    for axes in MESHES:
        mesh = make_mesh(**axes)
        with jax.set_mesh(mesh):
            on_mesh = place(jax.device_get(params), param_shardings(mesh, params))
            found = jax.device_get(update(on_mesh, TOKENS[rows], MASK[rows]))
        scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
        assert_close(found, expected, 1e-5 * scale)


def lora(case):
    """Adapters beside the kernels and inside of them are one function, and they change it."""
    lm, params = opened(case)
    adapters = pg.init_lora(jax.random.key(0), params, rank=2)
    noise = np.random.RandomState(0)
    moved = jax.tree.map(lambda x: x + 0.3 * noise.standard_normal(x.shape).astype(np.float32), adapters)
    both = pg.with_lora(params, moved)
    merged, beside, plain = (applied(lm, x, TOKENS, MASK) for x in (pg.merge_lora(both), both, params))
    assert_close(beside, merged, of_max=1e-4)
    assert np.abs(merged - plain).max() > 0.01
    assert jax.tree.structure(pg.merge_lora(both)) == jax.tree.structure(params)


def save(case):
    """A saved model is the file that transformers wrote, and its configuration says to transformers what the first one did."""
    from transformers import AutoConfig

    lm, params = opened(case)
    with tempfile.TemporaryDirectory() as folder:
        pg.save_pretrained(folder, lm, params, None)
        file = load_file(f"{folder}/model.safetensors")
        written = json.loads((Path(folder) / "config.json").read_text())
    assert {name: list(x.shape) for name, x in file.items()} == HELD[case]["tensors"]
    assert_same_bits(file, {name: drawn(name, x.shape) for name, x in file.items()})
    ours, theirs = (AutoConfig.for_model(**config).to_dict() for config in (written, HELD[case]["config"]))
    free = DERIVED | ({"intermediate_size"} if "moe_intermediate_size" in theirs else set())
    assert {name: value for name, value in theirs.items() if name not in free and ours.get(name) != value} == {}
    for ours_of, theirs_of in zip(*map(ropes, (ours, theirs)), strict=True):
        assert theirs_of == {name: ours_of.get(name) for name in theirs_of}


def ropes(config):
    """List the ropes of a configuration: one a type of layer, or one."""
    given = config["rope_parameters"]
    each = list(given.values()) if "full_attention" in given else [given]
    return [{name: value for name, value in one.items() if name != "type"} for one in each]


def reward_model(case):
    """A classifier's scores are torch's, and it is saved as it was read."""
    scores = HELD[case].get("scores")
    if scores is None:  # transformers has no classifier of the family; pgjax opens what it writes
        rm, params = from_causal_lm(*opened(case), jax.random.key(0))
        with tempfile.TemporaryDirectory() as folder:
            pg.save_reward_model(folder, rm, params, None)
            assert_same_bits(pg.load_reward_model(folder)[1], params)
        return
    outside = [name for name in HELD[case]["tensors"] if name in ("lm_head.weight", "embed_out.weight")]
    shapes = {name: x for name, x in HELD[case]["tensors"].items() if name not in outside}
    shapes["score.weight"] = [1, opened(case)[0].arch.width]
    config = {**HELD[case]["config"], "architectures": [HELD[case]["classifier"]], "num_labels": 1}
    with tempfile.TemporaryDirectory() as folder:
        rm, params, _ = pg.load_reward_model(write_model(Path(folder) / "in", config, shapes))
        pg.save_reward_model(f"{folder}/out", rm, params, None)
        assert_same_bits(*(load_file(f"{folder}/{name}/model.safetensors") for name in ("out", "in")))
        assert (
            json.loads((Path(folder) / "out" / "config.json").read_text())["architectures"] == config["architectures"]
        )
    if case == "phi3_longrope":
        found = np.concatenate([rm.apply(params, row[None, real]) for row, real in zip(TOKENS, MASK, strict=True)])
    else:
        found = jax.jit(rm.apply)(params, TOKENS, MASK)
    assert_close(found, scores, of_max=1e-5)


CHECKS = {
    "logits": logits,
    "greedy": greedy,
    "sharded": sharded,
    "LoRA": lora,
    "save": save,
    "reward model": reward_model,
}


def holds(check, case):
    """Say whether a check passes."""
    try:
        check(case)
    except AssertionError as error:
        print(f"{case}: {error}", file=sys.stderr)
        return False
    return True


def table():
    """Try everything with every family: a table in Markdown."""
    head = f"| family | {' | '.join(CHECKS)} |\n|{' --- |' * (len(CHECKS) + 1)}\n"
    of_family = {}
    for case in CASES:
        of_family.setdefault(HELD[case]["config"]["model_type"], []).append(case)
    return head + "".join(
        f"| {name} | {' | '.join('yes' if all(holds(check, x) for x in cases) else '**no**' for check in CHECKS.values())} |\n"
        for name, cases in of_family.items()
    )


def of_page():
    """Read the table that the page shows."""
    return page_table.of_page(*PAGE)


if __name__ == "__main__":
    assert conftest
    page_table.show(*PAGE, table())
