"""Damaged, foreign and unsaved checkpoints: each is named, none is used in silence, and the older one stays."""

import asyncio
import dataclasses
import gc
import json
import logging
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax.run import logs, loop
from pgjax.run.checkpoint.arrays import stored_leaves
from pgjax.run.checkpoint.checkpoints import BadCheckpoint, Checkpoints, SaveFailed
from pgjax.run.checkpoint.digest import digest, leaf_digests
from pgjax.run.checkpoint.resume import go_on
from pgjax.run.exits import plain_errors
from tests.sizes import campaign_but_for
from tests.tiny import ARCHITECTURES
from tests.two_processes_snapshots import full_disk

RUN = {"config": {"learning_rate": 0.1, "seed": 0}, "reference": "tiny (digest 12)"}


def state_of(step):
    return {
        "body": {"w": jax.random.normal(jax.random.key(step), (128, 64)), "b": jnp.arange(7) + step},
        "key": jax.random.key(step),
    }


def same(one, other):
    return leaf_digests(one) == leaf_digests(other)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Steps 3 and 4 of a run, written once; tests copy them."""
    folder = tmp_path_factory.mktemp("good") / "checkpoints"
    with Checkpoints(folder, made_from=RUN) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, state_of(step), {"step": step})
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "checkpoints"))


def largest(folder, step):
    return max(
        (path for path in (folder / str(step)).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(bytes(content))


def truncate(folder):
    file = largest(folder, 4)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def put_arrays_of_another_step(folder):
    """The arrays are whole and fit: only their digests tell."""
    shutil.rmtree(folder / "4" / "state")
    shutil.copytree(folder / "3" / "state", folder / "4" / "state")


def save_over(folder, state, made_from):
    shutil.rmtree(folder / "4")
    with Checkpoints(folder, made_from=made_from) as checkpoints:
        checkpoints.save(4, state, {"step": 4})


OTHER_MODEL = {**state_of(4), "body": {"w": jnp.zeros((128, 32)), "b": jnp.arange(7)}}
OTHER_DTYPE = {**state_of(4), "body": {"w": jnp.zeros((128, 64), jnp.bfloat16), "b": jnp.arange(7)}}
OTHER_RUN = {**RUN, "config": {"learning_rate": 0.5, "seed": 0}}
OTHER_REFERENCE = {**RUN, "reference": "tiny (digest 34)"}
DAMAGE = {
    "truncated": (truncate, "damaged"),
    "a byte": (lambda folder: flip(largest(folder, 4)), "damaged"),
    "a few bytes of a file that nobody reads": (lambda folder: cut_the_index(folder), r"has \d+ bytes of \d+"),
    "a file is gone": (lambda folder: largest(folder, 4).unlink(), "damaged"),
    "no index": (lambda folder: (folder / "4" / "state" / "manifest.ocdbt").unlink(), "damaged"),
    "empty metadata": (lambda folder: (folder / "4" / "state" / "_METADATA").write_text(""), "damaged"),
    "no record, as where a process could not write": (lambda folder: (folder / "4" / "record.json").unlink(), "damaged"),
    "empty record": (lambda folder: (folder / "4" / "record.json").write_text(""), "damaged"),
    "no JSON object": (lambda folder: (folder / "4" / "record.json").write_text("[1]"), "damaged"),
    "a number in the record": (lambda folder: edit_record(folder), "is not what was saved"),
    "arrays of another step": (put_arrays_of_another_step, "its bits are not those that were saved: body.b; body.w; key"),
    "an alien folder": (lambda folder: alien(folder), "damaged"),
    "another model": (lambda folder: save_over(folder, OTHER_MODEL, RUN), r"body.w is float32\[128, 32\]"),
    "another dtype": (lambda folder: save_over(folder, OTHER_DTYPE, RUN), r"body.w is bfloat16"),
    "another run": (lambda folder: save_over(folder, state_of(4), OTHER_RUN), "learning_rate: 0.5 there, 0.1 here"),
    "another reference": (
        lambda folder: save_over(folder, state_of(4), OTHER_REFERENCE),
        r"another run: reference: 'tiny \(digest 34\)' there, 'tiny \(digest 12\)' here",
    ),
}  # fmt: skip


def cut_the_index(folder):
    """The arrays come back whole all the same, so only the length tells."""
    file = max((folder / "4" / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-20])


def edit_record(folder):
    file = folder / "4" / "record.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"extra": {"step": 5}}))


def alien(folder):
    shutil.rmtree(folder / "4")
    (folder / "4").mkdir()
    (folder / "4" / "holiday.txt").write_text("sun")


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_what_is_wrong_is_named_and_the_newest_good_one_is_used_only_where_asked(folder, damage, message, capsys):
    damage(folder)
    with Checkpoints(folder, made_from=RUN) as checkpoints:
        assert checkpoints.latest() == 4
        with pytest.raises(BadCheckpoint, match=message) as error:
            go_on(checkpoints, state_of(0), resume=True)
        assert f"step 4 in {folder}" in str(error.value)
        restored, start = go_on(checkpoints, state_of(0), resume=True, resume_from="last-good")
        assert start == 3 and same(restored, state_of(3))
        said = capsys.readouterr().out.splitlines()
        assert said[-1] == "going on after step 3" and len(said) == 2
        assert said[0].startswith("left out: the checkpoint of step 4") and "4.damaged now" in said[0]
        checkpoints.save(4, state_of(4), {"step": 4})  # the run comes to the step once more
        assert same(checkpoints.restore(state_of(0))[0], state_of(4))
    assert (folder / "4.damaged").exists()


def test_a_flipped_byte_in_any_file_is_found_or_changes_nothing(folder):
    found = 0
    files = [path for path in (folder / "4").rglob("*") if path.is_file() and path.stat().st_size > 0]
    with Checkpoints(folder, made_from=RUN) as checkpoints:
        for file in files:
            whole = file.read_bytes()
            flip(file)
            try:
                restored, extra = checkpoints.restore(state_of(0))
            except BadCheckpoint:
                found += 1
            else:
                assert same(restored, state_of(4)) and extra == {"step": 4}, file
            file.write_bytes(whole)
    assert found >= 5


def test_where_none_is_good_each_is_named_and_nothing_is_moved(folder):
    for step in (3, 4):
        flip(largest(folder, step))
    before = sorted(path.name for path in folder.iterdir())
    none = r"no checkpoint in .* is good, .*of step 4.*of step 3"
    with Checkpoints(folder, made_from=RUN) as checkpoints, pytest.raises(BadCheckpoint, match=none):
        checkpoints.restore_last_good(state_of(0))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_step_that_is_damaged_twice_is_put_aside_twice(folder):
    for _ in range(2):
        flip(largest(folder, 4))
        with Checkpoints(folder, made_from=RUN) as checkpoints:
            assert checkpoints.restore_last_good(state_of(0))[1] == {"step": 3}
            checkpoints.save(4, state_of(4), {"step": 4})
    assert (folder / "4.damaged").exists() and (folder / "4.damaged.1").exists()


def test_folders_of_others_among_the_checkpoints_are_left_alone(folder):
    (folder / "notes").mkdir()
    (folder / "12").write_text("not a folder")
    with Checkpoints(folder, made_from=RUN, keep=1) as checkpoints:
        assert checkpoints.steps() == [3, 4]
        checkpoints.save(5, state_of(5), {"step": 5})
        checkpoints.wait()
        assert checkpoints.steps() == [5] and (folder / "notes").exists() and (folder / "12").exists()


def test_the_best_one_stays_beside_the_latest(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_best=True) as checkpoints:
        assert checkpoints.best() is None
        for step, score in enumerate([0.1, 0.7, 0.3, float("nan"), 0.2, None], start=1):
            checkpoints.save(step, {"w": jnp.full((2,), float(step))}, {}, score=score)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6] and checkpoints.best() == 2
    with Checkpoints(tmp_path, keep=2, keep_best=True) as checkpoints:  # another process knows it too
        assert checkpoints.best() == 2
        for step, score in ((7, 0.7), (8, 0.1), (9, 0.6)):
            checkpoints.save(step, {"w": jnp.full((2,), float(step))}, {}, score=score)
        checkpoints.wait()
        assert checkpoints.steps() == [7, 8, 9] and checkpoints.best() == 7
        np.testing.assert_array_equal(checkpoints.restore({"w": jnp.zeros(2)}, step=7)[0]["w"], 7.0)


def big(step):
    return {"w": jax.random.normal(jax.random.key(step), (512, 1024))}


def test_a_full_disk_is_told_in_one_line_and_the_older_one_stays(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, big(1), {"step": 1})
        checkpoints.wait()
        with full_disk(300_000):
            checkpoints.save(2, big(2), {"step": 2})
            with pytest.raises(SaveFailed) as failed:
                checkpoints.wait()
        message = str(failed.value)
        assert "step 2 could not be saved" in message and "File too large" in message and "step 1 is kept" in message
        assert "\n" not in message and len(message) < 400
        assert [path.name for path in tmp_path.iterdir()] == ["1"], "no pieces stay behind"
        assert checkpoints.latest() == 1
        assert same(checkpoints.restore(big(0))[0], big(1))
        checkpoints.save(2, big(2), {"step": 2})  # there is room again
        assert same(checkpoints.restore(big(0))[0], big(2))
        checkpoints.wait()
        assert checkpoints.steps() == [2]


@pytest.mark.campaign
def test_an_older_one_that_cannot_be_removed_is_not_called_a_failed_save(tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise OSError(5, "Input/output error")

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, big(1), {}, score=1.0)
        checkpoints.wait()
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", refused)
            checkpoints.save(2, big(2), {}, score=2.0)
            with pytest.raises(
                SaveFailed, match=r"step 2 is saved in .* an older one cannot be removed \(Input/output"
            ):
                checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best()) == ([1, 2], 2)


def test_no_other_word_is_told_about_a_full_disk_by_a_script(tmp_path, monkeypatch, caplog):
    # The bug: a traceback of "Event loop is closed" for each array that could not be written either.
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: told.append(raised.exc_value))
    many = {f"w{i}": jax.random.normal(jax.random.key(i), (64, 100)) for i in range(40)}

    def save_twice():
        with plain_errors(), Checkpoints(tmp_path) as checkpoints, full_disk(20_000):
            with pytest.raises(SaveFailed):
                checkpoints.save(1, many, {})
                checkpoints.wait()
            assert checkpoints.latest() is None
            checkpoints.save(1, many, {})  # and again, with the pieces gone
            checkpoints.wait()

    with pytest.raises(SystemExit, match=r"error: .*no earlier one was there"):
        save_twice()
    gc.collect()
    assert told == [] and caplog.text == ""


def test_a_write_that_failed_without_a_traceback_is_left_out_too(caplog):
    # The bug: tensorstore's futures name neither orbax nor a line of code.
    words = 'Future exception was never retrieved\nfuture: <Future finished exception=ValueError(\'Error writing "w/0.0" in '
    with plain_errors():
        logging.getLogger("asyncio").error(words + "OCDBT database at local file ...')>")
        logging.getLogger("asyncio").error(words + "my own file')>")
    assert [record.message for record in caplog.records] == [words + "my own file')>"]


@pytest.mark.parametrize("library, told", [("orbax", False), ("of_the_user", True)])
def test_of_failures_that_nobody_waits_for_orbaxs_alone_are_left_out(library, told, caplog):
    # The bug: a save that failed in several gathered tasks was told by asyncio, in words that do not name orbax.
    text, names = "async def write():\n    raise OSError('no space left')", {}
    exec(compile(text, f"/site-packages/{library}/write.py", "exec"), names)

    async def gather_and_forget():
        pieces = asyncio.gather(names["write"](), names["write"]())
        await asyncio.sleep(0.01)
        del pieces
        gc.collect()

    with plain_errors():
        asyncio.run(gather_and_forget())
    assert ("no space left" in caplog.text) is told


def test_logging_and_hooks_of_the_process_are_left_as_they_are(tmp_path):
    # The bug: absl's logger was set to CRITICAL and the hook replaced as soon as there was a Checkpoints.
    before = logging.getLogger("absl").level, list(logging.getLogger("asyncio").filters), sys.unraisablehook
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)}, {})
    with plain_errors():
        pass
    assert before == (logging.getLogger("absl").level, logging.getLogger("asyncio").filters, sys.unraisablehook)


def train(folder, *, steps, save_every, start=0, state=None, on_step=lambda i: None):
    def step(state, i, work):
        on_step(i)
        return {"w": state["w"] + 1}, {"x": state["w"][0, 0]}, None

    with Checkpoints(folder) as checkpoints:
        return loop.run(
            big(1) if state is None else state, steps=steps, start=start, prepare=lambda state, i: None, step=step,
            check=lambda done, metrics: None, report=lambda done, metrics, samples: None, checkpoints=checkpoints,
            save_every=save_every,
        )  # fmt: skip


@pytest.mark.campaign
@pytest.mark.parametrize("last", campaign_but_for([False, True], False), ids=["on the way", "at the end"])
def test_a_run_that_cannot_save_ends_in_one_line_and_goes_on_from_the_older_one(tmp_path, last, capsys):
    seen = []
    train(tmp_path, steps=2, save_every=2)
    with full_disk(300_000), pytest.raises(SystemExit) as stopped, plain_errors():
        train(
            tmp_path, steps=3 if last else 50, save_every=3, start=2, state=big(1), on_step=seen.append
        )  # fmt: skip
    line = str(stopped.value)
    assert line.startswith("error: step 3 could not be saved") and "step 2 is kept" in line and "--resume" in line
    assert "\n" not in line
    assert last or seen[-1] < 49, "it noticed only when it wanted to save again"
    with Checkpoints(tmp_path) as checkpoints:
        state, start = go_on(checkpoints, big(0), resume=True)
    assert start == 2 and same(state, {"w": big(1)["w"] + 1 + 1})
    train(tmp_path, steps=3, save_every=3, start=start, state=state)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3


@pytest.mark.campaign
def test_what_ended_a_run_is_not_hidden_by_a_full_disk(tmp_path, capsys):
    def fail(i):
        if i == 1:
            raise RuntimeError("the reward is down")

    with full_disk(300_000), pytest.raises(RuntimeError, match="the reward is down"):
        train(tmp_path, steps=5, save_every=100, on_step=fail)
    assert "step 1 could not be saved" in capsys.readouterr().out


def test_a_digest_sees_every_bit_and_no_sharding():
    x = jax.random.normal(jax.random.key(0), (8, 12))
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = [(), ("a",), (None, "b"), ("b", "a"), (("a", "b"),)]
    put = [jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec))) for spec in specs]
    assert {digest({"x": y}) for y in [x, *put]} == {digest({"x": x})}
    bits = np.asarray(x).view(np.uint32)
    flipped = []
    for bit in range(32):
        other = bits.copy()
        other[3, 5] ^= np.uint32(1 << bit)
        flipped.append(digest({"x": jnp.asarray(other.view(np.float32))}))
    assert len({*flipped, digest({"x": x})}) == 33
    assert digest({"x": x[::-1]}) != digest({"x": x}), "the order of the elements counts"
    assert digest({"x": x.reshape(12, 8)}) != digest({"x": x}) and digest({"y": x}) != digest({"x": x})


@pytest.mark.parametrize("dtype", ["bool", "int8", "bfloat16", "float16", "int32", "float32"])
def test_a_digest_takes_every_kind_of_array(dtype):
    x = jnp.arange(6).astype(dtype)
    other = x.at[4].set(~x[4] if dtype == "bool" else 5)
    assert leaf_digests({"x": x}) == leaf_digests({"x": np.asarray(x)}) != leaf_digests({"x": other})


def test_a_digest_takes_keys_and_64_bits():
    assert leaf_digests({"k": jax.random.key(1)}) == leaf_digests({"k": jax.random.key_data(jax.random.key(1))})
    x = np.array([1.0, 2.0**-40 + 1.0])
    assert leaf_digests({"x": x}) != leaf_digests({"x": np.array([1.0, 1.0])})
    assert stored_leaves({"x": x})["x"].dtype == np.float64


@pytest.mark.campaign
def test_a_model_that_does_not_fit_on_the_disk_is_one_line(tmp_path):
    arch = dataclasses.replace(ARCHITECTURES["llama"], vocab_size=4000)
    lm = pg.causal_lm(arch)
    with full_disk(50_000), pytest.raises(SystemExit, match=r"error: .*File too large.*make room"), plain_errors():
        pg.save_pretrained(tmp_path / "policy", lm, lm.init(jax.random.key(0)), None)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_takes_no_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: .*Not a directory"), plain_errors():
        logs.open_run(tmp_path / "file" / "run", {}, resume=False)


def test_going_on_without_a_snapshot_is_said(tmp_path, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        assert go_on(checkpoints, {"w": jnp.zeros(2)}, resume=True)[1] == 0
    assert "holds no snapshot: the run starts from the beginning" in capsys.readouterr().out
