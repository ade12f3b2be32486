"""A run folder is never mixed up with another, and no step is lost or written twice."""

import datetime
import json
import math
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.run.logs import Writer, open_run, read_metrics
from tests.two_processes_snapshots import full_disk

CONFIG = {"steps": 10, "model": "tiny", "ppo": {"clip_eps": 0.2, "coefs": (1, 2)}, "output": Path("runs/a")}


def test_new_run_in_a_used_folder_is_refused_with_both_mends(tmp_path):
    open_run(tmp_path / "run", CONFIG, resume=False)
    with pytest.raises(ValueError, match=r"run is not empty: resume .*another one"):
        open_run(tmp_path / "run", CONFIG, resume=False)


def test_folder_with_foreign_files_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: choose another one"):  # there is no run to resume
        open_run(tmp_path, CONFIG, resume=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_run_that_was_killed_in_its_first_file_can_start_again(tmp_path):
    (tmp_path / "config.json.part").write_text('{"ste')
    assert json.loads((open_run(tmp_path, CONFIG, resume=False) / "config.json").read_text())["steps"] == 10


def test_empty_folder_takes_a_run_but_a_file_does_not(tmp_path):
    run = open_run(tmp_path, CONFIG, resume=False)
    assert json.loads((run / "config.json").read_text())["ppo"] == {"clip_eps": 0.2, "coefs": [1, 2]}
    with pytest.raises(ValueError, match="is a file"):
        open_run(tmp_path / "config.json", CONFIG, resume=False)
    with pytest.raises(ValueError, match=r"can't be made .*choose another one"):
        open_run(tmp_path / "config.json" / "below", CONFIG, resume=False)


def test_resume_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no run to resume in .*nowhere"):
        open_run(tmp_path / "nowhere", CONFIG, resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_resume_with_the_same_config_goes_on(tmp_path):
    open_run(tmp_path, CONFIG, resume=False)
    assert open_run(tmp_path, CONFIG, resume=True) == tmp_path


def test_resume_with_another_config_names_every_field_and_both_values(tmp_path):
    open_run(tmp_path, CONFIG, resume=False)
    other = {"steps": 20, "ppo": {"clip_eps": 0.0, "coefs": (1, 2)}, "output": Path("runs/a"), "seed": 1}
    with pytest.raises(ValueError) as error:
        open_run(tmp_path, other, resume=True)
    text = str(error.value)
    assert "steps: 10 in the run, 20 now" in text and "ppo.clip_eps: 0.2 in the run, 0.0 now" in text
    assert "model: 'tiny' in the run, '(not set)' now" in text and "seed: '(not set)' in the run, 1 now" in text
    assert "coefs" not in text and "output" not in text
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 10


def test_fields_that_may_change_do_and_are_written_down(tmp_path):
    open_run(tmp_path, CONFIG, resume=False)
    longer = CONFIG | {"steps": 20, "ppo": {"clip_eps": 0.3, "coefs": (1, 2)}}
    with pytest.raises(ValueError, match=r"clip_eps") as error:
        open_run(tmp_path, longer, resume=True, may_change={"steps"})
    assert "steps" not in str(error.value)
    open_run(tmp_path, longer, resume=True, may_change={"steps", "ppo"})
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 20


def test_metrics_are_on_disk_before_close(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(0, {"objective/scores": np.float32(0.5), "loss/value_avg": jnp.float32(0.25)})
        assert read_metrics(tmp_path) == [{"step": 0, "objective/scores": 0.5, "loss/value_avg": 0.25}]


def test_metrics_are_strict_json_when_a_number_is_not_finite(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(0, {"a": math.nan, "b": jnp.float32(jnp.inf), "c": 1.0})
        writer.write_samples(0, [{"prompt": "p", "completion": "c", "score": math.nan}])

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for name in ("metrics.jsonl", "samples.jsonl"):
        row = json.loads((tmp_path / name).read_text(), parse_constant=refuse)
        assert None in row.values()
    row = read_metrics(tmp_path)[0]
    assert math.isnan(row["a"]) and math.isnan(row["b"]) and row["c"] == 1.0


def test_samples_may_hold_what_json_has_not(tmp_path):
    # The bug: a traceback after the first step where a message of the prompt has a date.
    message = {"role": "user", "content": "hi", "at": datetime.datetime(2026, 1, 2), "weight": math.nan}
    with Writer(tmp_path) as writer:
        writer.write_samples(1, [{"prompt": [message], "completion": "c", "score": np.float32(0.5)}])
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {
        "step": 1,
        "prompt": [{"role": "user", "content": "hi", "at": "2026-01-02T00:00:00", "weight": None}],
        "completion": "c",
        "score": 0.5,
    }


def test_resume_writes_no_step_twice(tmp_path):
    with Writer(tmp_path) as writer:
        for step in range(6):
            writer.write(step, {"x": float(step)})
            writer.write_samples(step, [{"prompt": "p", "completion": "old", "score": 0.0}])
    with Writer(tmp_path, start_step=4) as writer:  # the last checkpoint was made after 4 steps: 0 to 3
        writer.write(4, {"x": 40.0})
        writer.write_samples(4, [{"prompt": "p", "completion": "new", "score": 0.0}])
    assert [(row["step"], row["x"]) for row in read_metrics(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["completion"]) for row in samples[3:]] == [(3, "old"), (4, "new")]


def test_line_cut_short_by_a_kill_does_not_spoil_the_file(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(0, {"x": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "x"')
    assert read_metrics(tmp_path) == [{"step": 0, "x": 1.0}]
    with Writer(tmp_path, start_step=1) as writer:
        writer.write(1, {"x": 2.0})
    assert [row["x"] for row in read_metrics(tmp_path)] == [1.0, 2.0]


def test_damaged_line_is_named_by_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": oops}\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(tmp_path)


def test_unicode_samples_keep_their_line_breaks(tmp_path):
    completion = "a\u2028b\nc\r\n\u4fb3\u53e5 \x1b[31m"
    with Writer(tmp_path) as writer:
        writer.write_samples(2, [{"prompt": "p", "completion": completion, "score": 1.5}])
    with Writer(tmp_path, start_step=3):
        pass
    row = json.loads((tmp_path / "samples.jsonl").read_text(encoding="utf-8"))
    assert row == {"step": 2, "prompt": "p", "completion": completion, "score": 1.5}


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    for start_step in (0, 3):
        with Writer(tmp_path, start_step=start_step) as writer:
            writer.write(3, {"objective/kl": 0.5 + start_step})
    first, second = (event_file(path) for path in sorted(tmp_path.glob("events.out.tfevents.*")))
    scalars = [(event.step, v.tag, v.simple_value) for event in first + second for v in event.summary.value]
    assert scalars == [(3, "objective/kl", 0.5), (3, "objective/kl", 3.5)]
    # TensorBoard drops what stands at this step and after it in the earlier file
    starts = [event.step for event in second if event.session_log.status == event.session_log.START]
    assert starts == [3] and not any(event.session_log.status for event in first)


def test_events_need_no_thread_that_a_full_disk_could_end(tmp_path):
    # The bug: that thread dies, nobody hears of it, and a later write waits for ever.
    before = threading.active_count()
    with Writer(tmp_path) as writer:
        writer.write(1, {"x": 1.0})
        assert threading.active_count() == before
        with full_disk(0), pytest.raises(OSError):
            writer.write(2, {"x": 2.0})
        writer.write(3, {"x": 3.0})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    assert {1, 3} <= {event.step for event in event_file(path) if event.summary.value}


def event_file(path):
    """Read a TFRecord file of events: length (8 bytes), its checksum (4), the bytes, their checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    raw, at, events = path.read_bytes(), 0, []
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 8], "little")
        events.append(Event.FromString(raw[at + 12 : at + 12 + length]))
        at += 16 + length
    return events


@pytest.mark.parametrize("text", [b'{"steps": 10', b"[1]", b"\xff\xfe\x00"])
def test_damaged_config_is_named_on_resume(tmp_path, text):
    open_run(tmp_path, {"steps": 10}, resume=False)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        open_run(tmp_path, {"steps": 10}, resume=True)


@pytest.mark.parametrize("line", [b"null\n", b"\xff\xfe\n", b"[]\n"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)
