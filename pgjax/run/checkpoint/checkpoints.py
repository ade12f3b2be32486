"""Save and restore training state with orbax; no other file sees orbax."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import gc
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath  # the paths that orbax takes

from pgjax.core.errors import UserError
from pgjax.parallel import processes
from pgjax.run.checkpoint.arrays import Leaf, as_global, recommit, shorten, stored_leaves, target, tree_differences
from pgjax.run.checkpoint.digest import leaf_digests
from pgjax.run.checkpoint.files import changed_sizes, read_record, reason, rename_damaged, write_record
from pgjax.run.checkpoint.records import other_fields

Tree = Any
_STATE = "state"  # the folder of the arrays in a snapshot
_UNFINISHED = ".unfinished"  # ends the name of a snapshot's folder until it is whole


class BadCheckpoint(UserError):
    """A checkpoint is damaged, or of another run or model; the message names it.

    >>> BadCheckpoint("the checkpoint of step 3 in runs/haiku/checkpoints is damaged")
    BadCheckpoint('the checkpoint of step 3 in runs/haiku/checkpoints is damaged')
    """


class SaveFailed(Exception):
    """A state could not be saved, as on a full disk; the checkpoints before it are as they were.

    >>> SaveFailed("step 4 could not be saved in runs/haiku/checkpoints")
    SaveFailed('step 4 could not be saved in runs/haiku/checkpoints')
    """


@dataclasses.dataclass
class _Save:
    """A save under way: all processes write their parts, then process 0 makes a snapshot of them."""

    step: int
    score: float | None
    superseded: list[int]  # older steps that go once this one is a snapshot
    finish: Callable[[], None]  # makes it one; for process 0
    work: concurrent.futures.Future[Any]  # of this process: first to write its part, then to finish
    written: bool = False  # by all processes


class Checkpoints:
    """Keep the last few training states of a run in a folder.

    A checkpoint is a tree of arrays (`state`: parameters, optimizer state, typed keys, in any sharding) and a
    JSON object (`extra`: the step, for one). It appears under its final name, and its record is written, only when it is
    whole: so a killed save leaves the one before it as the latest. It holds a digest of every array, by which a restored
    state is checked to the bit. Under several processes all of them call every method, and each writes and reads its own
    part; a save counts once all have written theirs, which they tell each other in `poll` and `wait`.

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
        self.folder = Path(folder).absolute()
        self._keep, self._keep_best = keep, keep_best
        self._made_from = None if made_from is None else json.loads(json.dumps(dict(made_from), allow_nan=False))
        self._handler = ocp.StandardCheckpointHandler()
        self._disk = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: _Save | None = None
        # One process looks, so that all know of the same snapshots: between hosts a new file may take a while to be seen
        self._scores: dict[int, float | None] = dict(processes.on_process_0(self._scores_on_disk))

    def save(self, step: int, state: Tree, extra: Mapping[str, Any], *, score: float | None = None) -> bool:
        """Save a state in the background.

        The state is safe when this returns: its buffers may be donated to the next update at once. Disk errors
        surface here, or in the next `poll`, `wait`, `save` or `close`.

        Args:
            step: the number of finished training steps; above every step saved before.
            state: a tree of arrays.
            extra: a JSON object (tuples come back as lists).
            score: how good the state is, higher being better; None where nobody knows.

        Returns:
            True; False when this step is saved already, in which case nothing is done.

        Raises:
            UserError: a later step is saved already, or a leaf is not an array.
            ValueError: `extra` holds NaN or inf.
            SaveFailed: this save or the one before it did not reach the disk, on some process.
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
        state = jax.tree.map(as_global, state)
        score = None if score is None or not np.isfinite(score) else float(score)
        extra = json.loads(json.dumps(dict(extra), allow_nan=False))
        record = {"extra": extra, "made_from": self._made_from, "score": score, "digests": leaf_digests(state)}
        unfinished, old = self.folder / f"{step}{_UNFINISHED}", self._superseded(step, score)
        finish = functools.partial(self._finish, unfinished, record, old)
        self._saving = _Save(step, score, old, finish, self._disk.submit(self._make_folder, unfinished))
        self._join(self._saving)
        # in the other thread, since this one may run an event loop already, as a notebook's does
        begun = self._disk.submit(lambda: asyncio.run(self._begin(unfinished / _STATE, state)))
        self._saving.work = begun
        self._join(self._saving)
        self._saving.work = self._disk.submit(_write, begun.result(), finish if jax.process_count() == 1 else None)
        return True

    def steps(self) -> list[int]:
        """List the steps whose checkpoints are on disk, oldest first."""
        return sorted(self._scores)

    def latest(self) -> int | None:
        """Give the latest saved step, None when there is none."""
        return max(self._scores, default=None)

    def best(self) -> int | None:
        """Give the step of the highest score among those saved with one, the later of equals; None when there is none."""
        return _best(self._scores)

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
            bad = self._unreadable(step, f"its bits are not those that were saved: {shorten(other)}", at=other[0])
            raise processes.raised_on_all(bad)
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
                bad: processes.on_process_0(functools.partial(rename_damaged, self.folder / str(bad)))
                for bad in reasons
            }
            self._scores = {step: score for step, score in self._scores.items() if step not in reasons}
            return state, extra, [f"{why}; it lies in {places[step]} now" for step, why in reasons.items()]
        none = f"no checkpoint in {self.folder} is good, so none is used: {'; '.join(reasons.values())}"
        raise processes.raised_on_all(
            BadCheckpoint(f"{none}; where that cannot be mended, start anew in another folder")
        )

    def poll(self) -> None:
        """Go on with a save under way where its work so far is done, without waiting for more.

        Raises:
            SaveFailed: on all processes, where one could not write its part.
        """
        if self._saving is not None and not processes.any_process(not self._saving.work.done()):
            self._advance(self._saving)

    def wait(self) -> None:
        """Wait until every save is on disk.

        Raises:
            SaveFailed: on all processes, where one did not get there.
        """
        while self._saving is not None:
            self._advance(self._saving)

    def close(self) -> None:
        """Wait until every save is on disk, and end the thread that writes.

        Raises:
            SaveFailed: one did not get there.
        """
        try:
            self.wait()
        finally:
            self._disk.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or processes.is_raised_on_all(error):
            self.close()
        else:  # the others may never come to finish a save together
            self._disk.shutdown()

    def _advance(self, saving: _Save) -> None:
        """Wait for the work under way of all processes; then begin what follows it, or count the snapshot in."""
        self._join(saving)
        if jax.process_count() > 1 and not saving.written:
            saving.written = True
            saving.work = self._disk.submit(saving.finish if processes.is_process_0() else lambda: None)
            return
        self._scores[saving.step] = saving.score
        for step in saving.superseded:
            del self._scores[step]
        self._saving = None

    def _join(self, saving: _Save) -> None:
        """Wait for the work under way, and raise on all processes where it failed on one."""
        why = None
        try:
            saving.work.result()
        except Exception as error:  # whatever the file system or tensorstore raises
            why = reason(error)
            error.__traceback__ = error.__context__ = error.__cause__ = None
        if why is not None:
            gc.collect()  # the writers of the other arrays hang on those, and would fail again when Python ends
        for process, message in enumerate(processes.gather(why)):
            if message is not None:
                where = f"process {process}: " if jax.process_count() > 1 else ""
                raise processes.raised_on_all(self._given_up(saving, where + message))

    def _given_up(self, saving: _Save, why: str) -> SaveFailed:
        """Remove the pieces of a save that failed; say which step, why, and which older one is there."""
        self._saving = None

        def clear() -> bool:
            for left in self.folder.glob(f"*{_UNFINISHED}"):
                shutil.rmtree(left, ignore_errors=True)
            return (self.folder / str(saving.step)).exists()

        if processes.on_process_0(clear):
            self._scores[saving.step] = saving.score
            return SaveFailed(
                f"step {saving.step} is saved in {self.folder}, but an older one cannot be removed ({why})"
            )
        kept = self.latest()
        older = "no earlier one was there" if kept is None else f"step {kept} is kept and can be restored"
        return SaveFailed(f"step {saving.step} could not be saved in {self.folder} ({why}); {older}")

    def _make_folder(self, unfinished: Path) -> None:
        """Make the folder of a save, and remove those of saves that were killed."""
        if processes.is_process_0():
            for left in self.folder.glob(f"*{_UNFINISHED}"):
                shutil.rmtree(left)
            unfinished.mkdir(parents=True)

    async def _begin(self, folder: Path, state: Tree) -> list[Any]:
        """Copy the arrays to the host, and begin to write this process's part of them."""
        return await self._handler.async_save(epath.Path(folder), args=ocp.args.StandardSave(state)) or []

    def _finish(self, unfinished: Path, record: Mapping[str, Any], superseded: list[int]) -> None:
        """Make a snapshot of what all processes have written, and remove older ones."""
        self._handler.finalize(epath.Path(unfinished) / _STATE)
        write_record(unfinished, record)
        unfinished.rename(unfinished.with_name(unfinished.name.removesuffix(_UNFINISHED)))
        for step in superseded:
            shutil.rmtree(self.folder / str(step))

    def _superseded(self, step: int, score: float | None) -> list[int]:
        """List the steps that go once another one is saved: all but the latest ones and the best."""
        scores = {**self._scores, step: score}
        stay = {*sorted(scores)[-self._keep :], _best(scores) if self._keep_best else step}
        return [old for old in sorted(scores) if old not in stay]

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise processes.raised_on_all(UserError(f"{self.folder} holds no checkpoint"))
        if step is not None and step not in steps:
            missing = f"{self.folder} holds no checkpoint of step {step}, only of steps {steps}"
            raise processes.raised_on_all(UserError(missing))
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

        found = [message for message in processes.gather_results(attempt) if message is not None]
        if found:
            raise processes.raised_on_all(BadCheckpoint(found[0]))
        return result

    def _record(self, step: int) -> dict[str, Any]:
        """Read what is kept in JSON beside the arrays."""
        try:
            return read_record(self.folder / str(step))
        except ValueError as error:
            raise self._unreadable(step, str(error)) from error

    def _scores_on_disk(self) -> list[tuple[int, float | None]]:
        """Find the snapshots, and what score each was saved with."""
        steps = [int(path.name) for path in self.folder.glob("*") if path.name.isdecimal() and path.is_dir()]
        found: list[tuple[int, float | None]] = []
        for step in sorted(steps):
            try:
                found.append((step, read_record(self.folder / str(step))["score"]))
            except UserError:  # this is reported when somebody wants to restore it
                found.append((step, None))
        return found

    def _check_record(self, step: int, wanted: Mapping[str, Leaf]) -> None:
        """Refuse another run, and another tree before orbax does: it would cast another dtype in silence."""
        record = self._record(step)
        try:
            metadata = self._handler.metadata(self.folder / str(step) / _STATE)
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
        if lines := tree_differences(wanted, stored):
            raise BadCheckpoint(f"{name} is of another state: {shorten(lines)}")

    def _check_sizes(self, step: int) -> None:
        if changed := changed_sizes(self.folder / str(step), self._record(step)["sizes"]):
            raise self._unreadable(step, shorten(changed))

    def _read_state(self, step: int, targets: Tree) -> Tree:
        """Read this process's part of the arrays."""
        try:
            return self._handler.restore(self.folder / str(step) / _STATE, args=ocp.args.StandardRestore(targets))
        except Exception as error:  # orbax raises plain Exception when it meets a truncated file
            found = re.search(r"""'path': '([^/']+)/'|"([^"/]+)/\.zarray\"""", str(error))
            raise self._unreadable(step, reason(error), at=found and (found.group(1) or found.group(2))) from error

    def _unreadable(self, step: int, why: str, *, at: str | None = None) -> BadCheckpoint:
        """Name the damaged checkpoint, the array concerned, and what the user can do."""
        others = [other for other in self.steps() if other < step]
        leaf = f" at {at}" if at else ""
        mend = (
            f'; resume_from="last-good" goes on from step {others[-1]}, or an older one that is good' if others else ""
        )
        return BadCheckpoint(f"the checkpoint of step {step} in {self.folder} is damaged{leaf}{mend} ({why})")


def _best(scores: Mapping[int, float | None]) -> int | None:
    scored = [(score, step) for step, score in scores.items() if score is not None]
    return max(scored)[1] if scored else None


def _write(writes: Sequence[Any], then: Callable[[], None] | None) -> None:
    """Wait until what orbax has begun is written; then do what follows."""
    for future in writes:
        future.result()
    if then is not None:
        then()
