"""Two real processes with two fake devices each: `start` launches them, and `python -m tests.pair` is what they run."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import ppo as script
from experiments import reward_model, sft
from pgjax.core.errors import UserError
from pgjax.parallel import batch_rows, processes, sharding
from pgjax.rollout.judge import ModelJudge
from pgjax.run import devices
from tests.compile_options import xla_flags

MESH = "data=2,fsdp=2"
CALLS: list[int] = []  # completions in each call of a reward, in this process


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def start(arguments: list[str], *, devices: int = 2, variables: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start a Python process with fake devices of its own, in which little time goes into compiling."""
    environment = {
        **os.environ,
        "XLA_FLAGS": xla_flags(devices),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **(variables or {}),
    }
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, cwd=Path(__file__).parents[1], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(processes: list[subprocess.Popen], *, seconds: float = 500) -> list[tuple[int, str, str]]:
    """Wait for processes: exit code, what was printed, and what went to the error stream, of each."""
    try:
        found = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


def vowels(prompts, completions, **columns):
    """A black box: the share of letters up to m among the completion's; it prints on each process."""
    print(f"judging on {jax.process_index()}")
    CALLS.append(len(completions))
    return [sum(c < "m" for c in text) / max(len(text), 1) for text in completions]


def broken_on_one(prompts, completions, **columns):
    """A black box that fails on process 1 in the second iteration, after the evaluation and the first."""
    CALLS.append(len(completions))
    if jax.process_index() == 1 and len(CALLS) == 3:
        raise KeyError("no such judge")
    return [0.0] * len(completions)


def stopping_one(prompts, completions, **columns):
    """A black box during which process 1 is told to stop, in the second iteration."""
    CALLS.append(len(completions))
    if jax.process_index() == 1 and len(CALLS) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return [0.0] * len(completions)


def own_rows():
    """Prompts that are others on each process, as files of one name on two hosts may be."""
    return [{"prompt": f"say {jax.process_index()}"}]


def crossed_mesh(*, data: int, tensor: int, devices: list[jax.Device]) -> Mesh:
    """A mesh whose tensor axis goes from process to process, so that both hold every row."""
    return Mesh(np.array(devices).reshape(tensor, data).T, ("data", "tensor"))


def make_config(folder: Path, output: str, **fields) -> script.Config:
    """The run that is the same with one process and with two; its model, reward model and prompts lie in the folder."""
    prompts, model, judge = (str(folder / name) for name in ("prompts.jsonl", "model", "judge"))
    defaults = script.Config(
        model=model, prompts=prompts, held_out=prompts, rewards=(f"{__name__}:vowels",), reward_model=judge,
        reward_model_weight=0.1, output=folder / output, mesh=MESH, steps=3, batch_size=8, max_new_tokens=6, minibatches=2,
        microbatches=1, learning_rate=1e-2, warmup_updates=0, eval_samples=2, samples_every=1, save_every=100,
        kl_target=1.0, kl_horizon=100.0,
    )  # fmt: skip
    return dataclasses.replace(defaults, **fields)


def learn(folder: Path, output: str, **flags) -> list[Path]:
    """Fine-tune on texts and learn adapters from pairs, both of which lie in the folder: the run folders."""
    texts = str(folder / "texts.jsonl")
    shared = {
        "model": str(folder / "model"),
        "held_out": texts,
        "batch_size": 4,
        "microbatches": 1,
        "mesh": MESH,
        **flags,
    }
    tuned, judge = folder / output / "tuned", folder / output / "judge"
    sft.main(sft.Config(data=texts, output=tuned, max_length=48, epochs=2, **shared))
    reward_model.main(reward_model.Config(pairs=texts, output=judge, lora_rank=2, learning_rate=1e-3, **shared))
    return [tuned, judge]


def one_infinite_score() -> None:
    """Fetch a reward model's scores, one of which is infinite."""
    mesh = sharding.make_mesh(data=-1)
    own = batch_rows.rows_to_judge(mesh, 8)
    scores = batch_rows.feed(mesh, np.array([np.inf if row == 5 else 0.0 for row in own], np.float32))
    judge = ModelJudge(None, None, 1.0, None, False, mesh)  # type: ignore[arg-type]
    judge.fetch(scores, lambda row: (f"row {row}", f"on {jax.process_index()}"), own)


def caught(work) -> list[Any]:
    """The kind and the text of what a function raises, and whether all processes know of it."""
    try:
        work()
    except Exception as error:
        return [type(error).__name__, str(error), processes.is_raised_on_all(error)]
    return []


class Refused(UserError):
    """An error that is not made from its text."""

    def __init__(self, *, row: int) -> None:
        super().__init__(f"row {row} is empty")


def refuse() -> None:
    """Raise such an error."""
    raise Refused(row=3)


def exact(process: int) -> bool:
    """Exchange floats that have no short text, NaN among them: whether all came as they were."""
    values = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
    values[:, 0] = np.nan
    found = processes.gather(values[process])
    return all(x.dtype == np.float32 and x.tobytes() == y.tobytes() for x, y in zip(found, values, strict=True))


def main(process: int, port: int, folder: Path, part: str) -> None:
    """Try the agreements, train, then train with a reward that fails on one process; write down what happened.

    As the part "stages": fine-tune and learn from pairs.
    """
    found: dict[str, Any] = {}
    flags = {"distributed": True, "coordinator": f"localhost:{port}", "num_processes": 2, "process_id": process}
    processes.initialize(f"localhost:{port}", 2, process)
    if part == "stages":
        learn(folder, "learned", **flags)
        return
    found["gathered"] = processes.gather({"process": process, "text": "x" * 3000 * process})
    found["any"] = [processes.any_process(process == 1), processes.any_process(False)]
    found["exact"] = exact(process)
    found["on process 0"] = processes.on_process_0(lambda: f"by {jax.process_index()}")
    found["differ"] = caught(lambda: processes.agree("the command", {"seed": process, "steps": 3}))
    found["steps"] = caught(lambda: script.main(make_config(folder, "never", steps=3 + process, **flags)))
    found["unfit"] = caught(lambda: script.main(make_config(folder, "never", **{**flags, "mesh": "data=3"})))
    other = {"prompts": f"{__name__}:own_rows", "held_out": f"{__name__}:own_rows", **flags}
    found["prompts"] = caught(lambda: script.main(make_config(folder, "never", **other)))
    found["uneven"] = caught(lambda: script.main(make_config(folder, "never", batch_size=6, minibatches=1, **flags)))
    with mock.patch.object(devices, "_appears", lambda path: process == 0):  # as where process 1 has another disk
        found["apart"] = caught(lambda: devices.shared_folder(folder / "apart" / "run"))
    found["shared"] = str(devices.shared_folder(Path(f"{folder}/of{process}/run")))
    found["broke"] = caught(lambda: processes.on_process_0(lambda: [][process]))
    found["refused"] = caught(lambda: processes.on_process_0(refuse))
    found["infinite"] = caught(one_infinite_score)
    found["figures"] = script.main(make_config(folder, "two", **flags))
    found["calls"], CALLS[:] = list(CALLS), []
    with mock.patch.object(devices.sharding, "make_mesh", crossed_mesh):
        script.main(make_config(folder, "crossed", steps=1, eval_samples=1, mesh="data=2,tensor=2", **flags))
    found["crossed_calls"], CALLS[:] = list(CALLS), []
    broken = make_config(folder, "broken", rewards=(f"{__name__}:broken_on_one",), **flags)
    found["broken"], CALLS[:] = caught(lambda: script.main(broken)), []
    stopped = make_config(folder, "stopped", rewards=(f"{__name__}:stopping_one",), **flags)
    found["stopped"] = caught(lambda: script.main(stopped))
    (folder / f"found{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    from tests import pair  # the module that rewards are loaded from, not this copy of it

    pair.main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
