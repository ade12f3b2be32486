"""Save and restore training state with orbax; no other file sees orbax."""

from __future__ import annotations

import functools
import gc
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from pgjax.core.errors import UserError
from pgjax.parallel import processes
from pgjax.run.checkpoint.arrays import Leaf, differences, recommit, shared, shorten, stored_leaves, target
from pgjax.run.checkpoint.barrier import made_unanimous, reason
from pgjax.run.checkpoint.digest import leaf_digests
from pgjax.run.checkpoint.files import changed_sizes, note_sizes, put_aside, read_record, sealed
from pgjax.run.checkpoint.records import other_fields

Tree = Any


class BadCheckpoint(ValueError):
    """A checkpoint is damaged, or of another run or model; the message names it.

    >>> BadCheckpoint("the checkpoint of step 3 in runs/haiku/checkpoints is damaged")
    BadCheckpoint('the checkpoint of step 3 in runs/haiku/checkpoints is damaged')
    """


class SaveFailed(Exception):
    """A state could not be saved, as on a full disk; the checkpoints before it are as they were.

    >>> SaveFailed("step 4 could not be saved in runs/haiku/checkpoints")
    SaveFailed('step 4 could not be saved in runs/haiku/checkpoints')
    """


@functools.cache
def _quiet() -> None:
    """Keep orbax's notes on its own internals off the user's terminal; what fails comes as an exception anyway.

    Where one file cannot be written, those of the other arrays fail too, or find their event loop gone; each says so.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(
        lambda record: ".orbax-checkpoint-tmp" not in str(record.exc_info) and "orbax" not in record.getMessage()
    )
    report = sys.unraisablehook

    def report_others(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            report(raised)

    sys.unraisablehook = report_others


class _LatestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Preserve the last few checkpoints, and the one of the highest score."""

    def __init__(self, keep: int, best: Callable[[], int | None]) -> None:
        self.keep = keep
        self.best = best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        latest = [info.step for info in checkpoints[-self.keep :]]
        return [info.step in latest or info.step == self.best() for info in checkpoints]


class Checkpoints:
    """Keep the last few training states of a run in a folder.

    A checkpoint is a tree of arrays (`state`: parameters, optimizer state, typed keys, in any sharding) and a
    JSON object (`extra`: the step, the place in the data). It appears under its final name only when it is whole,
    so a killed save leaves the one before it as the latest. It holds a digest of every array, by which a restored
    state is checked to the bit. Under several processes all of them call every method, and each writes and reads
    its own part.

    Args:
        folder: where the checkpoints lie, one folder a step; made if it is not there. All processes see it.
        keep: how many of the latest checkpoints stay on disk.
        keep_best: whether the one that was saved with the highest score stays too.
        made_from: JSON object of what else decides the run: its config, and the sources and digests of models that
            stay as they are. It is kept with each state, and a state made from anything else is not restored. None: any
            state is.

    Raises:
        ValueError: `keep` is below 1.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp
        >>> from pgjax.run.checkpoint.checkpoints import Checkpoints
        >>> state = {"w": jnp.arange(3.0), "key": jax.random.key(0)}
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     _ = checkpoints.save(10, state, {"kl_coef": 0.05})
        ...     restored, extra = checkpoints.restore(state)
        >>> restored["w"], extra
        (Array([0., 1., 2.], dtype=float32), {'kl_coef': 0.05})
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        keep_best: bool = False,
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        if keep < 1:
            raise UserError(f"keep must be at least 1 checkpoint, got {keep}")
        _quiet()
        self.folder = Path(folder).absolute()
        self._made_from = None if made_from is None else json.loads(json.dumps(dict(made_from), allow_nan=False))
        self._saving: int | None = None  # the step whose save was begun last
        self._failure: str | None = None  # why it did not get to the disk
        policy = _LatestAndBest(keep, self.best if keep_best else lambda: None)
        # handlers by name: without them a new manager cannot read the tree of a checkpoint it did not write
        handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
        asynchronous = None
        if jax.process_count() > 1:
            barrier = made_unanimous(handlers, ocp.multihost.get_barrier_sync_fn())
            asynchronous = ocp.AsyncOptions(barrier_sync_fn=barrier)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, create=True, cleanup_tmp_directories=True, async_options=asynchronous
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        found = {step: self._score_on_disk(step) for step in self._manager.all_steps()}
        self._scores = {step: score for step, score in found.items() if score is not None}

    def save(self, step: int, state: Tree, extra: Mapping[str, Any], *, score: float | None = None) -> bool:
        """Save a state in the background.

        The state is safe when this returns: its buffers may be donated to the next update at once. Disk errors
        surface in the next `save`, `wait` or `close`.

        Args:
            step: the number of finished training steps; above every step saved before.
            state: a tree of arrays.
            extra: a JSON object (tuples come back as lists).
            score: how good the state is, higher being better; None where nobody knows.

        Returns:
            True; False when this step is saved already, in which case nothing is done.

        Raises:
            ValueError: a later step is saved already, a leaf is not an array, or `extra` holds NaN or inf.
            SaveFailed: this save or the one before it did not reach the disk.
        """
        self.wait()
        latest = self.latest()
        if latest == step:
            return False
        if latest is not None and latest > step:
            raise UserError(f"{self.folder} holds step {latest} already, so step {step} cannot be saved in it")
        if isinstance(state, jax.Array):
            raise UserError("state must be a tree of arrays, such as a dict, not one array")
        stored_leaves(state)
        state = jax.tree.map(shared, state)
        score = None if score is None or not np.isfinite(score) else float(score)
        extra = json.loads(json.dumps(dict(extra), allow_nan=False))
        record = {"extra": extra, "made_from": self._made_from, "score": score, "digests": leaf_digests(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(sealed(record)))
        if score is not None:
            self._scores[step] = score
        self._saving = step
        try:
            return bool(self._manager.save(step, args=args, force=True))
        except (OSError, RuntimeError, ValueError) as error:  # as where no folder can be made
            self._give_up(error)
        self.wait()
        return False

    def steps(self) -> list[int]:
        """List the steps whose checkpoints are on disk or on their way there, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Give the latest saved step, None when there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Give the step of the highest score among those saved with one, the later of equals; None when there is none."""
        scored = [step for step in self.steps() if step in self._scores]
        return max(scored, key=lambda step: (self._scores[step], step), default=None)

    def restore(self, state_like: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """Restore a state, bit for bit, onto the shardings asked for.

        Args:
            state_like: a tree of arrays or of `jax.ShapeDtypeStruct`: the structure, shapes, dtypes and
                shardings wanted. A leaf without a sharding comes back uncommitted, on the default device.
            step: which checkpoint; None for the latest.

        Returns:
            The state and the `extra` that was saved with it.

        Raises:
            ValueError: there is no such checkpoint.
            BadCheckpoint: it cannot be read, is not what was saved, or holds another run, another tree, other shapes
                or other dtypes; the folder, the step and the array concerned are named.
        """
        self.wait()
        step = self._existing(step)
        self._agreed(lambda: self._check_record(step, stored_leaves(state_like)))
        targets = jax.tree.map(target, state_like)
        state = self._agreed(lambda: self._read_state(step, targets))
        digests = self._record(step)["digests"]
        other = [name for name, number in leaf_digests(state).items() if digests[name] != number]
        if other:
            raise self._unreadable(step, f"its bits are not those that were saved: {shorten(other)}", at=other[0])
        self._agreed(lambda: self._check_sizes(step))
        return jax.tree.map(recommit, state_like, state), self._record(step)["extra"]

    def restore_last_good(self, state_like: Tree) -> tuple[Tree, dict[str, Any], list[str]]:
        """Restore the newest state that is whole and of this run, and put newer ones that are not out of the way.

        Their folders are renamed to STEP.damaged, so that a run that goes on can save those steps again.

        Args:
            state_like: as for `restore`.

        Returns:
            The state, its `extra`, and for each newer checkpoint what is wrong with it and where it lies now.

        Raises:
            ValueError: there is no checkpoint.
            BadCheckpoint: none is good; nothing is renamed then.
        """
        self.wait()
        self._existing(None)
        reasons: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                state, extra = self.restore(state_like, step)
            except BadCheckpoint as bad:
                reasons[step] = str(bad)
                continue
            places = {
                bad: processes.on_process_0(functools.partial(put_aside, self.folder / str(bad))) for bad in reasons
            }
            self._manager.reload()
            return state, extra, [f"{why}; it lies in {places[step]} now" for step, why in reasons.items()]
        raise BadCheckpoint(
            f"no checkpoint in {self.folder} is good, so none is used: "
            + "; ".join(reasons.values())
            + "; where that cannot be mended, start anew in another folder"
        )

    def failed(self) -> bool:
        """Say whether a save in the background has failed on this process; `wait` then raises it on all."""
        if not self._manager.is_saving_in_progress():
            self._join()
        return self._failure is not None

    def wait(self) -> None:
        """Wait until every save is on disk.

        Raises:
            SaveFailed: one did not get there.
        """
        self._join()
        if processes.any_process(self._failure is not None):
            raise self._unsaved()

    def close(self) -> None:
        """Wait until every save is on disk, and let go of the folder.

        Raises:
            SaveFailed: one did not get there.
        """
        self._join()
        self._manager.close()
        if self._failure is not None:  # each process for itself: some may have failed on their way here
            raise self._unsaved()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _join(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever the file system or tensorstore raised in the background
            self._give_up(error)
        if self._saving is not None and jax.process_index() == 0:
            note_sizes(self.folder / str(self._saving))

    def _give_up(self, error: Exception) -> None:
        """Take note of a save that failed, remove its pieces, and take in what is on disk."""
        self._failure = reason(error)
        error.__traceback__ = error.__context__ = error.__cause__ = None
        gc.collect()  # the writers of the other arrays hang on those, and would fail again when Python ends
        if jax.process_index() == 0:
            for piece in self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
                shutil.rmtree(piece, ignore_errors=True)
        self._manager.reload()
        if self._saving is not None and self._saving not in self.steps():
            self._scores.pop(self._saving, None)

    def _unsaved(self) -> SaveFailed:
        """Say what could not be saved and why, and which older one is there, once."""
        why, self._failure = self._failure or "on another process", None
        if self._saving in self.steps():
            return SaveFailed(
                f"step {self._saving} is saved in {self.folder}, but an older one cannot be removed ({why})"
            )
        kept = self.latest()
        older = "no earlier one was there" if kept is None else f"step {kept} is kept and can be restored"
        return SaveFailed(f"step {self._saving} could not be saved in {self.folder} ({why}); {older}")

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no checkpoint")
        if step is not None and step not in steps:
            raise UserError(f"{self.folder} holds no checkpoint of step {step}, only of steps {steps}")
        return steps[-1] if step is None else step

    def _agreed(self, work: Callable[[], Any]) -> Any:
        """Read a part of a checkpoint; where one process cannot, none goes on."""
        result: Any = None

        def attempt() -> str | None:
            nonlocal result
            try:
                result = work()
            except BadCheckpoint as bad:
                return str(bad)
            return None

        said = [message for message in processes.gather_results(attempt) if message is not None]
        if said:
            raise BadCheckpoint(said[0])
        return result

    def _record(self, step: int) -> dict[str, Any]:
        """Read what is kept in JSON beside the arrays."""
        try:
            return read_record(self.folder / str(step))
        except ValueError as error:
            raise self._unreadable(step, str(error)) from error

    def _score_on_disk(self, step: int) -> float | None:
        try:
            return self._record(step)["score"]
        except BadCheckpoint:  # said when somebody wants to restore it
            return None

    def _check_record(self, step: int, wanted: Mapping[str, Leaf]) -> None:
        """Refuse another run, and another tree before orbax does: it would cast another dtype in silence."""
        record = self._record(step)
        try:
            metadata = ocp.StandardCheckpointHandler().metadata(self.folder / str(step) / "state")
            stored = {
                leaf.name: Leaf(tuple(leaf.shape), np.dtype(leaf.dtype))
                for leaf in jax.tree.leaves(metadata.tree)
                if isinstance(leaf, ocp.metadata.ArrayMetadata)
            }
        except Exception as error:  # a damaged index surfaces as KeyError, AttributeError, JSON errors and more
            raise self._unreadable(step, reason(error)) from error
        here = record["made_from"] if self._made_from is None else self._made_from
        name = f"the checkpoint of step {step} in {self.folder}"
        if lines := other_fields(record["made_from"] or {}, here or {}, ("there", "here")):
            raise BadCheckpoint(f"{name} is of another run: {shorten(lines)}; give what it was started with")
        if lines := differences(wanted, stored):
            raise BadCheckpoint(f"{name} is of another state: {shorten(lines)}")

    def _check_sizes(self, step: int) -> None:
        if changed := changed_sizes(self.folder / str(step)):
            raise self._unreadable(step, shorten(changed))

    def _read_state(self, step: int, targets: Tree) -> Tree:
        """Read this process's part of the arrays; without the manager, which would wait for processes that failed."""
        try:
            return ocp.StandardCheckpointHandler().restore(
                self.folder / str(step) / "state", args=ocp.args.StandardRestore(targets)
            )
        except Exception as error:  # orbax raises plain Exception when it meets a truncated file
            found = re.search(r"""'path': '([^/']+)/'|"([^"/]+)/\.zarray\"""", str(error))
            raise self._unreadable(step, reason(error), at=found and (found.group(1) or found.group(2))) from error

    def _unreadable(self, step: int, why: str, *, at: str | None = None) -> BadCheckpoint:
        """Name the damaged checkpoint, the array concerned, and what the user can do."""
        others = [other for other in self.steps() if other < step]
        leaf = f" at {at}" if at else ""
        mend = (
            f"; to go on from step {others[-1]}, or an older one that is good: --resume-from last-good"
            if others
            else ""
        )
        return BadCheckpoint(f"the checkpoint of step {step} in {self.folder} is damaged{leaf}{mend} ({why})")
