"""What the policy is given and what rewards see, with every kind of tokenizer and template: no token more, no space lost."""

import dataclasses
import datetime
import itertools
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from experiments import ppo, sft
from experiments.study.pairs import Written, write_pairs
from pgjax.core.errors import UserError
from pgjax.data.prompts import completion_texts, encode_prompts
from pgjax.data.tokens import encode_parts
from pgjax.models.io.chat_template import set_template
from pgjax.rollout import judge
from pgjax.rollout.rewards import check_reward
from pgjax.rollout.scoring import RewardError, score
from pgjax.rollout.task import make_task
from pgjax.run import checks, session
from tests.tiny import ARCHITECTURES
from tests.tiny_task import save_tiny_model, task_config
from tests.tokenizer_kinds import KINDS, TEMPLATES, with_template

USER = {"role": "user", "content": "The film was"}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


def sampled(tokenizer, prompt, pieces):
    """A row that holds a prompt and what was sampled behind it, padded on both sides, and which of it was sampled."""
    before = encode_parts([[prompt]], tokenizer, special=True)[0][0][0]
    going_on = encode_parts([["The film", piece] for piece in pieces], tokenizer, special=False)[0]
    ids = [*itertools.chain.from_iterable(after for _, after in going_on), tokenizer.eos_token_id]
    row = [0, *before, *ids, 0]
    mask = np.zeros(len(row), bool)
    mask[1 + len(before) : -1] = True
    return row, mask, ids


def new_task(tokenizer, rows, judges=(), **options):
    options = {"chat": False, "max_new_tokens": 4, "temperature": 1.0, **options}
    return make_task(pg.causal_lm(ARCHITECTURES["llama"]), tokenizer, judges, None, [rows], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_begins_once_and_never_ends_by_itself(kind):
    tokenizer = KINDS[kind]()
    adds = bool(tokenizer("")["input_ids"])
    plain, begun, ended = encode_prompts(["The film was", "<s>The film was", "no</s>"], tokenizer, chat=False)
    assert plain.count(tokenizer.bos_token_id) == int(adds) and begun.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in plain + begun and ended[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "dates"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_prompt_has_the_ids_of_transformers_and_an_assistants_last_words_go_on(kind, template):
    tokenizer = with_template(kind, template)
    prompts = [[USER], [USER, {"role": "assistant", "content": "The answer is", "name": None}], "The film was"]
    opened, continued, text = encode_prompts(prompts, tokenizer, chat=True)
    theirs = {"tokenize": True, "return_dict": False}
    assert opened == text == tokenizer.apply_chat_template([USER], add_generation_prompt=True, **theirs)
    last = {"role": "assistant", "content": "The answer is"}
    assert continued == tokenizer.apply_chat_template([USER, last], continue_final_message=True, **theirs)
    assert max(ids.count(tokenizer.bos_token_id) for ids in (opened, continued)) <= 1
    assert tokenizer.decode(continued).endswith("The answer is")


def test_the_tools_of_a_row_reach_its_prompt_and_rewards_or_it_is_told_that_they_do_not(capsys):
    rows = [{"prompt": [USER], "tools": json.dumps([CLOCK])}, {"prompt": [USER], "tools": [{**CLOCK, "strict": None}]}]
    task = new_task(
        with_template("byte-level", "tools"), [*rows, {"prompt": [USER], "tools": None}], chat=True, max_new_tokens=1
    )
    first, second, none = task.prompt_sets[0]
    assert first.ids == second.ids != none.ids and first.row["tools"] == rows[0]["tools"]
    assert '"name": "clock"' in task.tokenizer.decode(first.ids) and not capsys.readouterr().out
    new_task(with_template("byte-level", "ChatML"), rows, chat=True)
    assert "names no tools: of the column 'tools', which 2 rows fill" in capsys.readouterr().out
    new_task(KINDS["byte-level"](), [{**row, "prompt": "no"} for row in rows])
    assert "without a chat template no tools are written: of the column 'tools', which 2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"row 0 .*the column 'tools' is 'a hammer', not a list of JSON schemas"):
        new_task(task.tokenizer, [{"prompt": [USER], "tools": "a hammer"}], chat=True)


@pytest.mark.parametrize("cleans", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_is_the_text_that_it_adds(kind, cleans):
    tokenizer = KINDS[kind]()
    tokenizer.clean_up_tokenization_spaces = cleans
    row, mask, ids = sampled(tokenizer, "The film was", [" great", " , I am", "<think>", "no", "</think>", "yes"])
    tokens, mask = np.array([row]), mask[None]
    assert completion_texts(tokens, mask, tokenizer) == [" great , I amnoyes"]
    assert completion_texts(tokens, mask, tokenizer, keep_special=True) == [" great , I am<think>no</think>yes"]
    assert completion_texts(tokens, mask & False, tokenizer) == [""]
    told = {}

    def reward(prompts, completions, completion_ids, *, raw_completions, ended, **columns):
        told.update(ids=completion_ids, raw=raw_completions, texts=completions, ended=ended, columns=columns)
        return [0.0]

    task = new_task(tokenizer, [{"prompt": "The film was", "topic": "film"}], [reward])
    rollout = pg.Rollout(*map(jnp.asarray, (tokens, tokens > 0, mask, 0.0 * mask)))
    judged = task.judge(task.prompt_sets[0], rollout)
    assert told == {
        "ids": [ids], "raw": [" great , I am<think>no</think>yes"], "texts": [" great , I amnoyes"],
        "columns": {"topic": ["film"]}, "ended": [True],
    }  # fmt: skip
    assert judged.shown == [(0, "The film was", " great , I amnoyes")] and judged.ended.tolist() == [True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_with_another_tokenizer_and_pairs_read_what_was_written(kind, tmp_path):
    tokenizer, other = KINDS[kind](), KINDS["byte-level"]()
    row, mask, ids = sampled(tokenizer, "The film was", [" great", "<think>", "no"])
    seen = []
    reader = types.SimpleNamespace(queue=lambda prompts, rollout, read: seen.append(read()))
    task = new_task(tokenizer, [{"prompt": "The film was"}])._replace(reward_model=reader)
    rollout = pg.Rollout(*map(jnp.asarray, ([row], np.array([row]) > 0, mask[None], 0.0 * mask[None])))
    task.queue_reward_model(task.prompt_sets[0], rollout)
    [(texts, ended)] = seen
    assert texts == [" great<think>no"] and ended.tolist() == [True]
    rm = types.SimpleNamespace(arch=ARCHITECTURES["llama"])
    tokens, attention = judge.ModelJudge(rm, None, 1.0, other, chat=False).translated(
        [{"prompt": "The film was"}], texts, ended
    )
    assert other.decode(tokens[attention]) == "The film was great<think>no</s>"
    two = Written([" great", "no"], [" great<think>no", "no"], ["</s>", ""], [ids, ids])
    write_pairs(
        tmp_path / "pairs.jsonl", f"{__name__}:length", [{"prompt": "The film was"}] * 2, two, scale=8.0, seed=0
    )
    pair = json.loads((tmp_path / "pairs.jsonl").read_text())
    assert {pair["chosen"], pair["rejected"]} == {" great<think>no</s>", "no"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_with_another_tokenizer_reads_the_tools_of_a_prompt(kind):
    # The bug: only the policy's prompt names the tools; the reward model scores an answer to another question.
    other = with_template(kind, "tools")
    rm = judge.ModelJudge(types.SimpleNamespace(arch=ARCHITECTURES["llama"]), None, 1.0, other, chat=True)
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    rows = [{"prompt": "What is", "tools": json.dumps(tools)}, {"prompt": "What is", "tools": None}]
    messages = [{"role": "user", "content": "What is"}, {"role": "assistant", "content": "3"}]
    lengths = rm.prompt_lengths(rows, [])
    expected = [other.apply_chat_template(messages[:1], tools=x, add_generation_prompt=True) for x in (tools, None)]
    assert lengths == [len(x["input_ids"]) for x in expected]
    tokens, attention = rm.translated(rows, ["3", "3"], np.array([False, False]))
    whole = [other.apply_chat_template(messages, tools=x)["input_ids"] for x in (tools, None)]
    for found, ids in zip(
        (row[kept].tolist() for row, kept in zip(tokens, attention, strict=True)), whole, strict=True
    ):
        assert found == ids[: len(found)] and len(ids) - len(found) <= 4, "but for the end of the turn"


def length(prompts, completions, completion_ids=None):
    assert completion_ids is not None
    return [float(len(text)) for text in completions]


def test_what_no_reward_names_is_neither_made_nor_given(monkeypatch):
    got = []
    plain = lambda prompts, completions, **columns: got.append(columns) or [0.0]
    naming = lambda prompts, completions, completion_ids: got.append(completion_ids) or [0.0]
    score([plain, naming], None, ["a"], ["b"], on_request={"completion_ids": [[1]]})
    assert got == [{}, [[1]]]
    check_reward(naming)
    with pytest.raises(UserError, match="a column may not be called 'completion_ids'"):
        check_reward(plain, ["completion_ids"])
    with pytest.raises(RewardError, match="completion_ids"):
        score([naming], None, ["a"], ["b"])


def test_an_overlong_prompt_leaves_out_its_row_and_says_which(capsys):
    tokenizer, positions = KINDS["byte-level"](), ARCHITECTURES["llama"].max_positions
    rows = [{"prompt": "no"}, {"prompt": "x" * positions}, {"prompt": "yes"}]
    task = new_task(tokenizer, rows, places=[["p.jsonl, line 1", "p.jsonl, line 2", "p.jsonl, line 3"]])
    assert [prompt.row["prompt"] for prompt in task.prompt_sets[0]] == ["no", "yes"] and max(task.widths) < 8
    line = f"in the {positions} positions of the model: p.jsonl, line 2 ({positions} tokens)"
    assert capsys.readouterr().out.strip() == f"left out 1 row, whose prompt leaves no room for max_new_tokens=4 {line}"
    options = {"chat": False, "max_new_tokens": 4, "temperature": 1.0}
    make_task(pg.causal_lm(ARCHITECTURES["llama"]), tokenizer, [], None, [rows[:1], rows], **options)
    assert capsys.readouterr().out.startswith("held-out prompts: left out 1 row, whose prompt leaves no room")
    with pytest.raises(UserError, match=r"no row is left: left out 1 row, .*row 0 .*Shorten the prompts"):
        new_task(tokenizer, rows[1:2])


def test_a_run_goes_on_another_day_with_the_prompts_of_its_first(tmp_path, monkeypatch, no_pictures):
    folder = save_tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%d') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    (tmp_path / "texts.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    fields = {"chat": True, "epochs": 1, "batch_size": 1, "max_length": 16, "eval_every": 1, "save_every": 1}
    config = task_config(sft, tmp_path, tmp_path / "run", **fields)
    today = lambda day: types.SimpleNamespace(date=types.SimpleNamespace(today=lambda: datetime.date(2026, 11, day)))
    monkeypatch.setattr(session, "datetime", today(29))
    sft.main(config)
    monkeypatch.setattr(session, "datetime", today(30))
    sft.main(dataclasses.replace(config, resume=True))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["template_date"] == "2026-11-29"
    saved = json.loads((tmp_path / "run" / "model" / "tokenizer_config.json").read_text())
    assert saved["chat_template_date"] == "2026-11-29"
    with pytest.raises(UserError, match="template_date: '2026-11-29' in the run, '2026-11-30' now"):
        sft.main(dataclasses.replace(config, resume=True, template_date="2026-11-30"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"template_args": "{enable_thinking: false}"}, "template_args must be a JSON object like"),
        ({"template_args": "[1]"}, "template_args must be a JSON object like"),
        ({"template_date": "30 Nov"}, "the date of the chat template is '30 Nov', not one like 2026-11-30"),
    ],
)
def test_a_bad_template_flag_is_one_line_before_anything_is_loaded(fields, message):
    with pytest.raises(UserError, match=message):
        checks.check_run(ppo.Config(**fields))


def test_reward_models_whose_template_has_other_arguments_read_texts():
    policy, other = with_template("byte-level", "thoughts"), with_template("byte-level", "thoughts")
    set_template(policy, args={"enable_thinking": False}, date="2026-11-30")
    assert judge.tokenizer_differences(policy, other, chat=True) == ["chat template's arguments"]
    assert judge.tokenizer_differences(policy, other, chat=False) == []
