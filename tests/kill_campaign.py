"""Kill a PPO training again and again, let it go on each time, and hold its end against that of one left in peace.

    python -m tests.kill_campaign --kills 20 --steps 16 --moves     # the whole of it: tests/test_kills.py runs a smaller one
    python -m tests.kill_campaign --kills 0 --moves                 # only moved between 1 device, fsdp=4 and data=4

--moves checks that the state is restored bit for bit on every mesh, and prints how far a run that moves ends from one that stays:
sums round otherwise there, and Adam divides by small numbers.

The training is `experiments.ppo` on a tiny model, with Adam and the critic, and a snapshot after every step. It is killed by
SIGKILL, SIGTERM and SIGINT in turn: at random moments from its first instruction on, and every other time in the middle of a
save, which is told by the unfinished folder of a snapshot. What it imports is imported once, before it is forked; nothing of
jax has run by then.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import grain  # noqa: F401  what a child would import, as far as it takes time
import jax
import numpy as np
import tensorboardX  # noqa: F401
from safetensors.numpy import load_file
from transformers import AutoTokenizer  # noqa: F401

from experiments import ppo
from pgjax.run import logs, session
from pgjax.run.checkpoint.resume import last_step
from pgjax.run.exits import plain_errors
from tests.compile_options import xla_flags
from tests.tiny_task import EARLY_LETTERS, save_tiny_model

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STOPPED, BROKEN = 1, 3  # exit codes of a process that said why it stops, and of one that met an error
CLOCKS = ("timing/", "perf/")  # figures that no two runs share


class Kill(NamedTuple):
    """One of the campaign's kills, and what it met."""

    by: str
    after: float  # seconds after the start
    saving: bool  # whether a snapshot was being written
    steps: int  # of the last whole snapshot


def configuration(root: Path, steps: int) -> ppo.Config:
    """Adam, the critic, an adaptive KL coefficient, more prompts than a batch holds, and a snapshot after every step."""
    prompts = root / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("a", "bcd", "ef", "ghij", "k"))
    )
    return ppo.Config(
        model=str(root / "model"), prompts=str(prompts), held_out=str(prompts), rewards=(EARLY_LETTERS,),
        output=root / "run", steps=steps, batch_size=8, max_new_tokens=4, minibatches=2, microbatches=1, epochs=2,
        learning_rate=1e-2, warmup_updates=4, decay=True, kl_target=0.5, kl_horizon=50.0, eval_samples=1, samples_every=4,
        save_every=1, keep=2, keep_best=True,
    )  # fmt: skip


def forked(work: Callable[[], Any], log: Path) -> int:
    """Do work in a forked process that writes what it prints into a file; give its id."""
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT}
    )  # outside of `try` it would lead back into the parent's code
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return child
    code = BROKEN
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with log.open("a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        jax.config.update("jax_compilation_cache_dir", str(log.parent / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        work()
        code = 0
    except SystemExit as stopped:  # told by plain_errors
        print(stopped.code)
        code = STOPPED
    except BaseException:
        traceback.print_exc()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        sys.stdout.flush()
        os._exit(code)


def start(config: ppo.Config, log: Path) -> int:
    """Begin the training, or go on with it, in a process of its own."""

    def work() -> None:
        os.environ["XLA_FLAGS"] = xla_flags(1 if config.mesh is None else 4)
        session.plot_curves = lambda folder: None  # drawing takes seconds
        begun = (config.output / logs.CONFIG).exists()
        with plain_errors():
            ppo.main(dataclasses.replace(config, resume=begun))

    return forked(work, log)


def ended(child: int, wait: bool = False) -> int | None:
    """Give a process's exit code, below 0 for a signal; None while it runs."""
    found, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def saving(run: Path, since: float) -> bool:
    """Say whether a snapshot is under way, by the folder that it has until it is whole; one that a kill left is older."""
    with contextlib.suppress(FileNotFoundError):  # it has just become whole
        return any(path.stat().st_mtime > since for path in (run / "checkpoints").glob("*.unfinished"))
    return False


def one_kill(
    config: ppo.Config, log: Path, rng: random.Random, seconds: float, by: signal.Signals, in_a_save: bool
) -> tuple[Kill | None, int]:
    """Start the training and kill it at a random moment or in a save; None where it ended before, and its exit code."""
    moment = rng.uniform(0.0, seconds)
    skip = rng.randrange(min(6, config.steps // 2))  # saves to let pass first
    since, begun, child, left = time.time(), time.monotonic(), start(config, log), False
    while (code := ended(child)) is None:
        now_saving = saving(config.output, since)
        if in_a_save:
            skip -= left and now_saving
            left = not now_saving
            due = now_saving and skip < 0 and time.monotonic() - begun > 0.5
        else:
            due = time.monotonic() - begun > moment
        if due:
            os.kill(child, by)
            code = ended(child, wait=True)
            return Kill(by.name, time.monotonic() - begun, now_saving, last_step(config.output)), code or 0
        time.sleep(0.002)
    return None, code


def results(run: Path) -> dict[str, Any]:
    """Read off a finished run all that must not depend on how often it was killed."""
    last = last_step(run)
    record = json.loads((run / "checkpoints" / str(last) / "record.json").read_text())
    rows = [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in logs.read_metrics(run)]
    return {
        "step": last,
        "digests of the state": record["digests"],
        "policy": (run / "policy" / "model.safetensors").read_bytes(),
        "best policy": (run / "policy_best" / "model.safetensors").read_bytes(),
        "metrics": rows,
        "samples": (run / "samples.jsonl").read_text(),
        "kept": sorted(path.name for path in (run / "checkpoints").iterdir()),
    }


def differing_results(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Name what differs between two finished runs."""
    return [name for name in one if one[name] != other[name]]


def in_peace(root: Path, config: ppo.Config) -> tuple[dict[str, Any], float]:
    """Train without a disturbance, twice: the results, and the seconds once all programs are in the cache."""
    assert ended(forked(lambda: save_tiny_model(root / "model"), root / "model.log"), wait=True) == 0
    steps = config.steps
    peace = dataclasses.replace(config, output=root / "peace")
    assert ended(start(peace, root / "peace.log"), wait=True) == 0, (root / "peace.log").read_text()
    expected = results(peace.output)
    assert [row["step"] for row in expected["metrics"] if "objective/scores" in row] == list(range(1, steps + 1))
    begun = time.monotonic()
    again = dataclasses.replace(config, output=root / "again")
    assert ended(start(again, root / "again.log"), wait=True) == 0  # programs come from the cache now
    seconds = time.monotonic() - begun
    assert not differing_results(expected, results(again.output)), "two undisturbed runs differ"
    print(f"{steps} steps undisturbed: {seconds:.1f} s", flush=True)
    return expected, seconds


def campaign(
    root: Path, config: ppo.Config, expected: dict[str, Any], seconds: float, *, kills: int, seed: int
) -> list[Kill]:
    """Kill trainings `kills` times; each that ends is compared with the one left in peace.

    Raises:
        AssertionError: an end that differs, or a process that ended in another way than it was told to.
    """
    rng, done, number = random.Random(seed), [], 0
    while True:
        run = dataclasses.replace(config, output=root / f"run-{number}")
        log, code = root / f"run-{number}.log", STOPPED
        while len(done) < kills:
            by, in_a_save = SIGNALS[len(done) % 3], len(done) % 2 == 0
            kill, code = one_kill(run, log, rng, seconds, by, in_a_save)
            if kill is not None:
                done.append(kill)
                print(
                    f"{len(done)}: {kill.by} after {kill.after:.2f} s, saving: {kill.saving}, {kill.steps} steps",
                    flush=True,
                )
                allowed = (0, STOPPED, -getattr(signal, kill.by))
                said = log.read_text()  # a Ctrl-C before the loop begins comes out of whatever it met, as Python has it
                startled = code == BROKEN and kill.by == "SIGINT" and "KeyboardInterrupt" in said
                assert code in allowed or startled, f"{kill} ended with {code}: {said}"
            if code == 0:  # at its end; or Python lost the Ctrl-C in a callback, as it may outside of the loop
                break
        if code != 0:
            code = ended(start(run, log), wait=True)
        assert code == 0, log.read_text()
        other = differing_results(expected, results(run.output))
        assert not other, f"after {len(done)} kills the run ends otherwise: {', '.join(other)}"
        if len(done) >= kills:
            return done
        number += 1


def stopped_after(config: ppo.Config, steps: int, log: Path) -> int:
    """Train until at least this step is saved, stop by SIGINT, and give the last step saved."""
    child = start(config, log)
    while last_step(config.output) < steps:
        assert ended(child) is None, log.read_text()
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert ended(child, wait=True) == STOPPED, log.read_text()
    return last_step(config.output)


def parameters(folder: Path) -> np.ndarray:
    """Read all of a policy's parameters as one row."""
    return np.concatenate([x.ravel() for _, x in sorted(load_file(folder / "model.safetensors").items())])


def moves(root: Path, config: ppo.Config, expected: dict[str, Any]) -> dict[str, float]:
    """Begin on one device, go on over fsdp=4, end over data=4; give how far its end is from that of the one left in peace.

    On every mesh the same snapshot is restored too, with no step left to take: what is exported then has the same bits.
    """
    run, log = dataclasses.replace(config, output=root / "moved"), root / "moved.log"
    done = stopped_after(run, config.steps // 3, log)
    whole = []
    for mesh in (None, "fsdp=4", "data=4"):
        still = dataclasses.replace(run, output=root / f"still-{mesh}", steps=done, mesh=mesh)
        shutil.copytree(run.output, still.output)
        assert ended(start(still, log), wait=True) == 0, log.read_text()
        whole.append((still.output / "policy" / "model.safetensors").read_bytes())
    assert whole[0] == whole[1] == whole[2], "the state is not restored bit for bit on every mesh"
    stopped_after(dataclasses.replace(run, mesh="fsdp=4"), 2 * config.steps // 3, log)
    assert ended(start(dataclasses.replace(run, mesh="data=4"), log), wait=True) == 0, log.read_text()
    found = results(run.output)
    assert found["step"] == expected["step"]
    names = ("objective/scores", "objective/kl", "loss/value_avg", "kl_coef")
    rows = [{row["step"]: row for row in side["metrics"] if "objective/scores" in row} for side in (found, expected)]
    assert rows[0].keys() == rows[1].keys()
    far = {name: max(abs(rows[0][i][name] - rows[1][i][name]) for i in rows[0]) for name in names if name in rows[0][1]}
    apart = np.abs(parameters(run.output / "policy") - parameters(root / "peace" / "policy"))
    moved = np.abs(parameters(root / "peace" / "policy") - parameters(root / "model"))
    return {**far, "parameters, at most": float(apart.max()), "they moved, at most": float(moved.max())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a campaign and print what it met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moves", action="store_true")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        begun = time.monotonic()
        config = configuration(root, options.steps)
        expected, seconds = in_peace(root, config)
        if options.moves:
            far = moves(root, config, expected)
            print("moved, largest differences: " + json.dumps(far), flush=True)
            assert far["they moved, at most"] > 0.1 and far["parameters, at most"] < 1e-3
            assert far["objective/scores"] == 0 and far["objective/kl"] < 1e-3 and far["loss/value_avg"] < 1e-3
        done = campaign(root, config, expected, seconds, kills=options.kills, seed=options.seed)
        print(
            f"{len(done)} kills in {time.monotonic() - begun:.0f} s, {sum(kill.saving for kill in done)} of them while a "
            "snapshot was written: every run ended bit for bit as the undisturbed one"
        )


if __name__ == "__main__":
    main()
