"""The scripts on a mesh of four devices: the numbers of one device, and errors that come before any work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from experiments import ppo, reward_model, rlhf, sft
from experiments.study import pairs, rlhf_stages
from pgjax.parallel import sharding
from pgjax.rollout.task import make_task
from pgjax.run import devices, logs
from tests.compare import assert_same_metrics
from tests.tiny_task import EARLY_LETTERS, save_tiny_task, task_config

pytestmark = pytest.mark.usefixtures("no_pictures")

MESH = "data=2,fsdp=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_task(tmp_path_factory.mktemp("mesh"))


@pytest.mark.campaign
def test_fine_tuning_on_a_mesh(folder):
    config = sft.Config(
        model=str(folder / "model"), data=str(folder / "texts.jsonl"), held_out=str(folder / "texts.jsonl"), max_length=16,
        epochs=2, batch_size=8, microbatches=2, learning_rate=1e-2, output=folder / "sft",
    )  # fmt: skip
    sft.main(config)
    sft.main(dataclasses.replace(config, mesh=MESH, remat=True, output=folder / "sft_mesh"))
    assert_same_metrics(*(logs.read_metrics(folder / run) for run in ("sft_mesh", "sft")), rtol=1e-5, atol=2e-6)
    one, other = (jax.tree.leaves(pg.load(folder / name / "model")[1]) for name in ("sft", "sft_mesh"))
    for x, y in zip(one, other, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.mark.campaign
def test_a_reward_model_on_a_mesh(folder):
    config = reward_model.Config(
        model=str(folder / "model"), pairs=str(folder / "pairs.jsonl"), held_out=str(folder / "pairs.jsonl"), batch_size=8,
        microbatches=2, learning_rate=1e-2, output=folder / "rm",
    )  # fmt: skip
    reward_model.main(config)
    reward_model.main(dataclasses.replace(config, mesh=MESH, output=folder / "rm_mesh"))
    assert_same_metrics(*(logs.read_metrics(folder / run) for run in ("rm_mesh", "rm")), rtol=1e-4, atol=2e-6)


@pytest.mark.campaign
def test_pairs_are_sampled_on_a_mesh(folder):
    def sampled(mesh):
        lm, params, tokenizer = pg.load(folder / "model", mesh=mesh)
        task = make_task(
            lm, tokenizer, [], None, [[{"prompt": "sky:"}] * 6], chat=False, max_new_tokens=4, temperature=1.0, mesh=mesh
        )  # fmt: skip
        return pairs.complete(task, params, task.prompt_sets[0], 4, jax.random.key(0))

    alone = sampled(None)
    with devices.on_devices(devices.Flags(mesh=MESH)) as mesh:
        spread = sampled(mesh)
    assert alone == spread and len(set(alone[0])) > 1


def test_every_stage_runs_where_the_whole_does(folder, monkeypatch):
    asked = []
    for module in (sft, reward_model, ppo):
        monkeypatch.setattr(module, "main", lambda config: asked.append(config))
    config = rlhf.Config(mesh=MESH, init_timeout=7.0, output=folder / "rlhf")
    for stage in ("sft", "reward_model", "ppo"):
        rlhf_stages.WORK[stage](config, folder / "rlhf", False)
    assert [(stage.mesh, stage.init_timeout) for stage in asked] == [(MESH, 7.0)] * 3
    assert not set(devices.MACHINE) & {name.split(".")[-1] for name in rlhf_stages.stage_config(config, "ppo")}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mesh": "data=3"}, "data=3 needs 3 devices, but there are 4"),
        ({"mesh": "rows=4"}, "rows"),
        ({"mesh": "data=4", "batch_size": 6, "minibatches": 1}, "batch_size: 6 rows"),
        (
            {"mesh": "data=4", "batch_size": 8, "minibatches": 2, "microbatches": 2},
            "batch_size=8 / parts=4",
        ),
        ({"mesh": "tensor=4", "batch_size": 8}, "tensor=4"),  # of two heads
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(folder, fields, words):
    prompts = str(folder / "prompts.jsonl")
    config = ppo.Config(
        model=str(folder / "model"), prompts=prompts, held_out=prompts, output=folder / "refused", microbatches=1,
        rewards=(EARLY_LETTERS,),
    )  # fmt: skip
    with pytest.raises(ValueError, match=words):
        ppo.main(dataclasses.replace(config, **fields))
    assert not (folder / "refused").exists()


def test_idle_devices_are_told_once(capsys):
    devices._tell_idle.cache_clear()
    for _ in range(2):
        with devices.on_devices(devices.Flags()) as mesh:
            assert mesh is None
    assert capsys.readouterr().out.count("one of 4 devices is used: a mesh of data=-1") == 1


def test_the_mesh_is_left_behind(folder):
    with devices.on_devices(devices.Flags(mesh="data=-1")) as mesh:
        assert sharding.ambient_mesh() is not None and mesh.shape == {"data": 4}
    assert sharding.ambient_mesh() is None


def loaded(script, config, monkeypatch):
    """The language model that a script loads, at which it is stopped."""

    class Loaded(Exception):
        pass

    def load(source, **options):
        raise Loaded(pg_load(source, **options)[0])

    pg_load = pg.load
    monkeypatch.setattr(pg, "load", load)
    with pytest.raises(Loaded) as stopped:
        script.main(config)
    return stopped.value.args[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
@pytest.mark.parametrize("script", [ppo, sft, reward_model])
def test_the_dtype_is_what_the_flag_says(folder, tmp_path, monkeypatch, script, dtype):
    # The bug: no script has such a flag.
    lm = loaded(script, task_config(script, folder, tmp_path, dtype=dtype, batch_size=8), monkeypatch)
    assert jnp.dtype(lm.dtype).name == ("float32" if dtype is None else dtype)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("script", [ppo, sft, reward_model])
def test_what_is_computed_again_is_what_the_flag_says(folder, tmp_path, monkeypatch, script, remat):
    lm = loaded(script, task_config(script, folder, tmp_path, remat=remat, batch_size=8), monkeypatch)
    assert (
        lm
        == pg.causal_lm(lm.arch, dtype=lm.dtype, remat=remat)
        != pg.causal_lm(lm.arch, dtype=lm.dtype, remat=not remat)
    )
