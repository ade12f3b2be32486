"""The report page holds what a run logged, harms nobody with a model's text, and works in a browser that has no network."""

import json
import math
import re
import shutil
import subprocess

import pytest

from experiments import report as script
from pgjax.core.errors import UserError
from pgjax.run import logs
from pgjax.run.report import page, versions
from pgjax.run.report.page import completions, curve, report_at_end, run_data, seconds, write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = (
    "</script><script>document.title = 'broken'</script>",
    "<img src=x onerror=\"document.title = 'broken'\">",
    "<!-- <script> {{DATA}} & \u2028 \ud800 \x00\x1b[2J \u202e",
    "long " * 20_000,
)


def write_run(folder, *, texts=("a sky",), steps=3):
    logs.open_run(folder, {"seed": 0, "prompts": NASTY[0]}, resume=False)
    with logs.Writer(folder) as writer:
        for step in range(steps):
            times = {"timing/rollout": 2.0, "timing/reward": 1.0, "timing/score": 1.5, "timing/update": 3.0}
            evaluation = {"eval/scores": 0.1 + step / 10, "eval/scores_stderr": 0.02}
            scores = {"objective/scores": math.nan if step == 1 else 0.5 + step}
            writer.write(step, {**scores, **evaluation, **times, "timing/iteration": 7.0})
            rows = [
                {"prompt": text, "completion": f"{text} {i}", "score": i + step / 10} for i, text in enumerate(texts)
            ]
            writer.write_samples(step, rows)
    versions.record_versions(folder, 0)
    return folder


def embedded(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, flags=re.DOTALL)[1])


def test_the_page_holds_the_run_and_no_text_of_it_is_markup(tmp_path):
    text = write_report([write_run(tmp_path / "<b>run", texts=NASTY)], tmp_path / "new" / "page.html").read_text(
        "ascii"
    )
    (run,) = embedded(text)
    assert run["completions"]["prompt"][:3] == list(NASTY[:3])
    assert run["completions"]["prompt"][3].endswith("[... 80,000 more characters]")
    assert run["config"]["prompts"] == NASTY[0] and run["versions"][0]["jax"][0].isdigit()
    assert text.count("<script") == 2 and "<img" not in text and "<b>" not in text
    assert "default-src 'none'" in text and not re.search(r"(src|href)=", text.split('id="data"')[0])


def test_curves_keep_errors_and_tell_of_values_that_are_not_finite(tmp_path):
    curves = run_data(write_run(tmp_path / "run"))["curves"]
    assert curves["objective/scores"] == {
        "steps": [0, 2],
        "values": [0.5, 2.5],
        "errors": [None] * 2,
        "lost": [1],
        "every": 1,
    }
    assert curves["eval/scores"]["errors"] == [0.02] * 3 and "eval/scores_stderr" not in curves
    assert curve([{"step": 1, "x": math.inf}], "x")["steps"] == []


def test_long_curves_are_averaged_and_those_with_errors_thinned(monkeypatch):
    monkeypatch.setattr(page, "POINTS", 2)
    rows = [{"step": step, "x": float(step), "y": float(step), "y_stderr": 0.5} for step in range(5)]
    assert curve(rows, "x") | {"lost": 0} == {
        "steps": [2, 4],
        "values": [1.0, 3.5],
        "errors": [None] * 2,
        "lost": 0,
        "every": 3,
    }
    assert curve(rows, "y")["values"] == [2.0, 4.0] and curve(rows, "y")["errors"] == [0.5, 0.5]


def test_the_seconds_of_the_parts_add_up_to_the_iterations(tmp_path):
    parts = seconds(logs.read_metrics(write_run(tmp_path / "run")))
    assert parts == {"sampler": 6.0, "reward": 3.0, "other models": 1.5, "learner": 9.0, "rest": 1.5}
    assert seconds([{"step": 0, "eval/loss": 1.0}]) == {}


def test_samples_that_are_too_many_are_counted(monkeypatch):
    monkeypatch.setattr(page, "COMPLETIONS", 4)
    found = completions(
        [{"step": step, "prompt": [{"role": "user"}], "completion": "", "score": None} for step in range(7)]
    )
    assert (found["step"], found["left_out"]) == ([0, 1, 5, 6], 3)
    assert found["prompt"][0] == '[{"role": "user"}]' and found["score"][0] is None


def test_a_page_that_fails_ends_no_run(tmp_path, capsys):
    (write_run(tmp_path / "run") / logs.METRICS).write_text("no row\n")
    report_at_end(tmp_path / "run")
    assert capsys.readouterr().out.startswith("no report page: UserError: ")
    assert not (tmp_path / "run" / page.REPORT).exists()
    with pytest.raises(UserError, match="there is no run in"):
        write_report([tmp_path / "nowhere"], tmp_path / "page.html")


def test_versions_outlive_a_line_cut_short_and_damage_ends_no_run(tmp_path, capsys):
    (tmp_path / versions.VERSIONS).write_text('{"step": 0, "jax": "1"}\n{"step": 2, "ja')
    versions.record_versions(tmp_path, 3)
    assert [row["step"] for row in versions.read_versions(tmp_path)] == [0, 3]
    (tmp_path / versions.VERSIONS).write_text("no row\n")
    versions.record_versions(tmp_path, 4)
    assert capsys.readouterr().out.startswith("no versions are recorded: ")


def test_the_script_lays_runs_over_each_other(tmp_path):
    runs = (write_run(tmp_path / "a"), write_run(tmp_path / "b", texts=()))
    assert script.main(script.Config(runs[:1])) == tmp_path / "a" / "report.html"
    found = embedded(script.main(script.Config(runs, tmp_path / "both.html")).read_text())
    assert [run["name"] for run in found] == ["a", "b"]
    with pytest.raises(UserError, match="no run is named"):
        script.main(script.Config(()))


ACTIONS = """
<script>
window.addEventListener("load", () => {
  const cells = n => [...document.querySelectorAll(`.completions td:nth-child(${n})`)].map(c => c.textContent);
  const timed = act => {
    const begun = performance.now();
    act();
    document.body.offsetHeight;  // laid out
    return performance.now() - begun;
  };
  const input = (label, value) => {
    const field = document.querySelector(`[aria-label="${label}"]`);
    field.value = value;
    field.dispatchEvent(new Event(field.tagName === "SELECT" ? "change" : "input"));
  };
  const button = name => document.querySelector(`.completions button[data-name=${name}]`);
  const count = what => document.querySelectorAll(what).length;
  const found = {figures: count("#panels figure"), images: document.images.length, seconds: {}};
  found.seconds.sort = timed(() => button("score").click());
  found.best = cells(2)[0];
  found.seconds.back = timed(() => button("score").click());
  found.worst = cells(2)[0];
  found.seconds.filter = timed(() => input("text", "NEEDLE"));
  found.needles = cells(4).length;
  input("text", "");
  input("step", "2");
  found.steps = [...new Set(cells(1))];
  document.getElementById("log").click();
  document.getElementById("more").open = true;
  found.cards = count("#compare .card");
  found.title = document.title;
  setTimeout(() => {
    found.all = count("#more figure");
    document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
  }, 300);
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_a_browser_sorts_filters_and_compares_20_000_completions_without_a_pause_or_an_error(tmp_path):
    texts = [*NASTY, *("sky" * 20 + f" {i} needle"[: 8 if i % 1000 else None] for i in range(6700 - len(NASTY)))]
    path = write_report([write_run(tmp_path / "run", texts=texts)], tmp_path / "page.html")
    path.write_text(path.read_text() + ACTIONS)
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=3000",
    ]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line][:3]
    found = json.loads(re.search("FOUND(.*)END", done.stdout)[1])
    assert found["title"] == "run" and found["images"] == 0
    assert found["best"] == "6699.200" and found["worst"] == "0.000" and found["steps"] == ["2"]
    assert found["needles"] == 21 and found["cards"] == 2 and found["figures"] == 1 and found["all"] == 7
    assert max(found["seconds"].values()) < 1500, found["seconds"]  # milliseconds
