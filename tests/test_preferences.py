"""Preferences: rows checked to the line, ids as a policy samples them, the loss in float64, and figures that can be trusted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax.data.preferences import (
    Answered,
    EncodedPair,
    Reference,
    check_answers,
    check_pairs,
    encode_answers,
    encode_pairs,
    encode_references,
)
from pgjax.data.sources import load_rows
from pgjax.learning.optimizer import adamw, init_state
from pgjax.learning.reward_learning import calibration, features, pair_batch, pair_metrics, pair_scores, update
from pgjax.models.io.stops import STOP_IDS
from tests.goldens.reward_cases import END, end_padded_tokenizer, random_params
from tests.tiny import ARCHITECTURES

RM = pg.reward_model(ARCHITECTURES["llama"])
USER = {"role": "user", "content": "Sky?"}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def bot(text):
    return {"role": "assistant", "content": text}


def placed(*rows):
    return [(f"line {number}", row) for number, row in enumerate(rows, start=1)]


def row(**change):
    return {"prompt": "Sky?", "chosen": " blue", "rejected": " green", **change}


def random_pairs(count, seed=0):
    """Pairs that share a prompt and end with id 2, of all lengths."""
    draw = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt, lengths = draw.integers(3, 23, draw.integers(1, 6)).tolist(), draw.integers(1, 12, 2)
        answers = [[*prompt, *draw.integers(3, 23, length).tolist(), 2] for length in lengths]
        pairs.append(EncodedPair(*answers, margin=float(draw.integers(0, 3))))
    return pairs


# --- rows ------------------------------------------------------------------------------------------------------------


def test_every_way_to_write_a_pair_is_read_as_the_same_pair():
    ways = [
        row(prompt=[USER]),
        {"prompt": [USER], "chosen": [bot(" blue")], "rejected": [bot(" green")]},
        {"prompt": "Sky?", "chosen": [bot(" blue")], "rejected": [bot(" green")]},
        {"prompt": "Sky?", "chosen": [USER, bot(" blue")], "rejected": [USER, bot(" green")]},
        {"chosen": [USER, bot(" blue")], "rejected": [USER, bot(" green")]},
    ]
    for way in ways:
        (pair,) = check_pairs(placed(way)).kept
        wraps = bot if isinstance(way["chosen"], list) else str  # a message is written by the chat template
        assert pair.chosen == Answered([USER], wraps(" blue")) and pair.rejected == Answered([USER], wraps(" green"))
        in_json = {name: json.dumps(x) if isinstance(x, list) else x for name, x in way.items()}  # as CSV has it
        assert check_pairs(placed(in_json)).kept == [pair]
    assert check_pairs(placed(row())).kept[0].chosen == Answered("Sky?", " blue")


def test_a_conversation_of_several_turns_is_judged_by_its_last_answer():
    turns = [USER, bot(" blue"), {"role": "user", "content": "And at night?"}]
    (pair,) = check_pairs(placed({"chosen": [*turns, bot(" black")], "rejected": [*turns, bot(" red")]})).kept
    assert pair.chosen == Answered(turns, bot(" black"))
    more = {"prompt": [USER], "chosen": [*turns[1:], bot(" black")], "rejected": [*turns[1:], bot(" red")]}
    assert check_pairs(placed(more)).kept[0].chosen == pair.chosen


def test_equal_and_empty_answers_are_left_out_with_their_lines_and_the_rest_stays():
    pairs = check_pairs(placed(row(), row(chosen=" green"), row(rejected=""), row(chosen=" \n"), row(chosen=" red")))
    assert [pair.place for pair in pairs.kept] == ["line 1", "line 5"]
    assert pairs.notes() == [
        "left out 1 row, two equal answers: line 2",
        "left out 2 rows, an empty answer: line 3; line 4",
    ]
    many = check_pairs(placed(row(), *[row(chosen=" green")] * 8)).notes()
    assert many == ["left out 8 rows, two equal answers: line 2; line 3; line 4; line 5; line 6 and 3 more"]


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"prompt": "a", "chosen": "b"}, "line 1: there is no column 'rejected'; the columns are 'prompt', 'chosen'"),
        ({"prompt": "a", "rejected": "b"}, "line 1: there is no column 'chosen'"),
        ({"chosen": "a", "rejected": "b"}, "line 1: there is no column 'prompt'; the columns are 'chosen', 'rejected'"),
        (row(prompt=""), "line 1: the prompt is empty"),
        (row(prompt=3), "line 1: the prompt is 3"),
        (row(chosen=3), "line 1: the column 'chosen' is 3"),
        (row(rejected=None), "line 1: the column 'rejected' is None"),
        (row(rejected=[]), "line 1: the column 'rejected' is an empty list"),
        (row(chosen=[USER]), "line 1: 'chosen' ends with the role 'user', not 'assistant'"),
        (row(chosen=[{"role": "assistant"}]), "line 1: a message is"),
        ({"chosen": [bot("a")], "rejected": [bot("b")]}, "line 1: the prompt is None"),
        (
            {"chosen": [USER, bot("a")], "rejected": [{**USER, "content": "Sea?"}, bot("b")]},
            "line 1: 'chosen' and 'rejected' answer different prompts",
        ),
        *((row(margin=x), "line 1: the margin is") for x in (-0.5, float("nan"), float("inf"), "wide", None, True)),
    ],
)
def test_a_row_that_cannot_be_a_pair_is_named_by_its_place(bad, message):
    with pytest.raises(ValueError) as raised:
        check_pairs(placed(bad))
    assert str(raised.value).startswith(message)


def test_rows_of_other_columns_and_nothing_left_are_named():
    with pytest.raises(ValueError, match="line 2: its columns differ"):
        check_pairs(placed(row(), {"chosen": [USER, bot("a")], "rejected": [USER, bot("b")]}))
    with pytest.raises(ValueError, match="no pair is left to learn from: left out 1 row, two equal answers: line 1"):
        check_pairs(placed(row(chosen=" green")))


def test_margins_and_columns_that_nobody_asked_for_come_from_json_and_csv_alike(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row(margin=0.5, source="x")) + "\n\n")
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected,margin\nSky?," blue"," green",0.5\n')
    for name in ("a.jsonl", "a.csv"):
        (pair,) = load_rows(tmp_path / name, check_pairs).kept
        assert pair[1:] == (Answered("Sky?", " blue"), Answered("Sky?", " green"), 0.5)
        assert name in pair.place
    assert check_pairs(placed(row())).kept[0].margin == 0


def test_columns_that_only_some_rows_have_do_not_count_and_a_missing_margin_is_0():
    pairs = check_pairs(placed(row(), row(source="web", margin=1.0), row(score=3)))
    assert [pair.margin for pair in pairs.kept] == [0, 1, 0]
    references = placed({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "source": "web"})
    assert len(check_answers(references).kept) == 2


def test_a_malformed_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row()) + "\n{nonsense\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        load_rows(tmp_path / "a.jsonl", check_pairs)


def test_reference_rows_need_a_prompt_and_a_completion():
    found = check_answers(placed({"prompt": "Sky?", "completion": " blue"}))
    assert found.kept == [Reference("line 1", Answered("Sky?", " blue"))] and found.notes() == []
    found = check_answers(placed({"prompt": [USER], "completion": [bot("b")]}))
    assert found.kept == [Reference("line 1", Answered([USER], bot("b")))]
    with pytest.raises(ValueError, match="line 1: there is no column 'completion'"):
        check_answers(placed({"prompt": "Sky?"}))
    with pytest.raises(ValueError, match="line 1: there is no column 'prompt'"):
        check_answers(placed({"completion": "Sky?"}))


# --- ids -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that puts a token in front of every text, as Llama's does, and pads with its end of sequence."""
    from tokenizers.processors import TemplateProcessing

    fast = end_padded_tokenizer("<|bos|>")
    number = fast.convert_tokens_to_ids("<|bos|>")
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", number)]
    )
    fast.chat_template = TEMPLATE
    return fast


def test_the_ids_are_those_of_a_policy_prompt_and_completion_and_the_end(tokenizer):
    prompt = tokenizer("Sky?")["input_ids"]
    answer = tokenizer(" blue", add_special_tokens=False)["input_ids"]
    assert prompt[0] == tokenizer.convert_tokens_to_ids("<|bos|>") and answer[0] != prompt[0]
    ids = {eos: encode_answers([Answered("Sky?", " blue")], tokenizer, chat=False, eos=eos)[0] for eos in (True, False)}
    assert ids[False] == prompt + answer and ids[True] == [*prompt, *answer, tokenizer.eos_token_id]


def test_an_end_that_the_answer_holds_already_is_not_put_there_twice(tokenizer):
    for eos in (True, False):
        (ids,) = encode_answers([Answered("Sky?", f" blue{END}")], tokenizer, chat=False, eos=eos)
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1


def test_messages_go_through_the_template_and_texts_where_asked(tokenizer):
    answers = [Answered([USER], " blue"), Answered("Sky?", " blue")]
    plain = encode_answers(answers, tokenizer, chat=False, eos=True)
    templated = encode_answers(answers, tokenizer, chat=True, eos=True)
    assert tokenizer.decode(plain[0]).endswith(f"<user>Sky?<bot> blue{END}")
    assert plain[0] == templated[0] == templated[1] != plain[1]


def test_no_template_and_a_template_that_refuses_and_no_end_are_errors():
    bare = end_padded_tokenizer()
    with pytest.raises(ValueError, match="no chat template"):
        encode_answers([Answered([USER], "a")], bare, chat=False, eos=True)
    bare.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(
        ValueError, match=r"answer 0 .*: the chat template refuses the messages \(no system role\).*Sky"
    ):
        encode_answers([Answered([USER], "a")], bare, chat=False, eos=True)
    bare.chat_template = "{{ 1 + messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"line 1: the chat template refuses the messages \(unsupported operand.*Sky"):
        encode_pairs(check_pairs(placed(row(prompt=[USER]))), bare, chat=False, eos=True, max_length=64)
    endless = end_padded_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode_answers([Answered("a", "b")], endless, chat=False, eos=True)
    assert len(encode_answers([Answered("a", "b")], endless, chat=False, eos=False)[0]) == 2


def test_a_pair_of_which_one_answer_is_too_long_is_left_out_whole(tokenizer):
    pairs = check_pairs(placed(row(), row(rejected=" green and more"), row(chosen=" green")))
    found = encode_pairs(pairs, tokenizer, chat=False, eos=True, max_length=12)
    assert len(found.kept) == 1 and max(map(len, found.kept[0][:2])) == 12
    assert found.left_out == {"two equal answers": ["line 3"], "longer than 12 tokens": ["line 2"]}
    with pytest.raises(ValueError, match=r"no pair is left to learn from.*longer than 4 tokens: line 1; line 2"):
        encode_pairs(pairs, tokenizer, chat=False, eos=True, max_length=4)


def test_references_that_are_empty_or_too_long_are_left_out_with_their_places(tokenizer):
    # The bug: one of them stops the run, or is scored though no policy would ever give it, and nobody learns where.
    texts = (" blue", "", " green and much more", f" a{END} b")
    references = check_answers(placed(*({"prompt": "Sky?", "completion": text} for text in texts)))
    found = encode_references(references, tokenizer, chat=False, eos=True, max_length=12)
    assert found.kept == encode_answers([Answered("Sky?", " blue")], tokenizer, chat=False, eos=True)
    assert found.notes() == [
        "left out 1 row, an empty answer: line 2",
        "left out 1 row, longer than 12 tokens: line 3",
        "left out 1 row, an end of sequence inside the answer: line 4",
    ]
    with pytest.raises(ValueError, match="no reference is left: left out 1 row, an empty answer: line 1"):
        check_answers(placed({"prompt": "Sky?", "completion": " "}))
    with pytest.raises(ValueError, match=r"no reference is left: .*longer than 3 tokens: line 1"):
        encode_references(references, tokenizer, chat=False, eos=True, max_length=3)


def test_an_end_of_sequence_inside_an_answer_leaves_the_pair_out(tokenizer):
    pairs = check_pairs(placed(row(), row(rejected=f" a{END} b"), row(chosen=f" blue{END}")))
    found = encode_pairs(pairs, tokenizer, chat=False, eos=True, max_length=64)
    assert found.left_out == {"an end of sequence inside the answer": ["line 2"]} and found.kept[0] == found.kept[1]


def test_any_of_the_models_stop_ids_ends_an_answer():
    # The bug: an answer that ends with the model's other stop id got a second end, inside which the first one stood.
    several = end_padded_tokenizer("<|bos|>")
    other = several.convert_tokens_to_ids("<|bos|>")
    several.init_kwargs[STOP_IDS] = [several.eos_token_id, other]
    (ids,) = encode_answers([Answered("a", "b<|bos|>")], several, chat=False, eos=True)
    assert ids[-1] == other and several.eos_token_id not in ids


def test_answers_of_other_texts_and_equal_ids_are_equal(tokenizer):
    # The bug: a pair whose scores are always the same counts as wrong for ever, and its gradient is 0.
    pairs = check_pairs(placed(row(), row(chosen=" green"), row(chosen=f" green{END}")))
    found = encode_pairs(pairs, tokenizer, chat=False, eos=True, max_length=64)
    assert found.left_out == {"two equal answers": ["line 2", "line 3"]} and len(found.kept) == 1
    assert pairs.left_out == {"two equal answers": ["line 2"]}
    assert len(encode_pairs(pairs, tokenizer, chat=False, eos=False, max_length=64).kept) == 2


# --- learning --------------------------------------------------------------------------------------------------------


def test_the_end_of_sequence_is_real_though_it_is_also_the_padding():
    batch = pair_batch([EncodedPair([5, 0], [5, 6, 7, 0], 0.0)], most=64)
    assert batch.attention_mask.sum(-1).tolist() == [[2, 4]]
    assert batch.tokens[0, 1, :5].tolist() == [5, 6, 7, 0, 0]


def test_lengths_fall_into_few_buckets_and_never_beyond_the_positions():
    lengths = {pair_batch([EncodedPair([1] * n, [2], 0.0)], most=100).tokens.shape[-1] for n in range(1, 101)}
    assert sorted(lengths) == [16, 24, 32, 48, 64, 96, 100]


def first_update(pairs, microbatches, center_coef):
    """What an update reports of the loss and of the gradient."""
    optimizer = adamw(0.0, updates=1, max_grad_norm=None)
    state = init_state(jax.tree.map(jnp.copy, random_params(RM)), optimizer)
    batch = jax.device_put(pair_batch(pairs, most=64))
    _, metrics = update(state, batch, jnp.float32(center_coef), rm=RM, optimizer=optimizer, microbatches=microbatches)
    assert all(x.is_deleted() for x in jax.tree.leaves(state[:2]))  # its memory is the new state's
    return {name: float(value) for name, value in metrics.items()}


def test_the_update_follows_the_formula_in_float64_with_margin_and_centring():
    pairs = random_pairs(8)
    scores = pair_scores(RM, random_params(RM), pairs, batch_size=3).astype(np.float64)
    margin, (chosen, rejected) = np.array([pair.margin for pair in pairs]), scores.T
    for coef in (0.0, 0.3):
        loss = np.log1p(np.exp(-(chosen - rejected - margin))).mean() + coef * ((chosen + rejected) ** 2).mean()
        metrics = first_update(pairs, 1, coef)
        np.testing.assert_allclose(metrics["loss/preference"], loss, rtol=2e-6)
        np.testing.assert_allclose(metrics["train/margin"], (chosen - rejected).mean(), rtol=1e-4)
        assert metrics["train/accuracy"] == np.mean(chosen > rejected)
    assert margin.max() > 0


@pytest.mark.campaign
def test_microbatches_change_neither_loss_nor_gradient():
    pairs = random_pairs(8, seed=3)
    whole = first_update(pairs, 1, 0.1)
    for parts in (2, 8):
        found = first_update(pairs, parts, 0.1)
        for name in ("loss/preference", "train/grad_norm", "train/accuracy"):
            np.testing.assert_allclose(found[name], whole[name], rtol=1e-5)


def test_training_and_scoring_read_the_same_token_whatever_the_padding_beside():
    pairs = random_pairs(3, seed=1)
    params = random_params(RM)
    one_by_one = [[RM.apply(params, jnp.array([ids]))[0] for ids in pair[:2]] for pair in pairs]
    for size in (2, 3):
        np.testing.assert_allclose(pair_scores(RM, params, pairs, batch_size=size), one_by_one, rtol=1e-5, atol=1e-6)
    batch = pair_batch(pairs, most=64)
    again = RM.apply(params, batch.tokens.reshape(6, -1), batch.attention_mask.reshape(6, -1)).reshape(3, 2)
    np.testing.assert_allclose(again, one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.campaign
def test_features_come_back_in_the_order_of_the_rows():
    rows = [ids for pair in random_pairs(2, seed=2) for ids in pair[:2]]
    params = random_params(RM)
    found = features(RM, params, rows, batch_size=3)
    for ids, value in zip(rows, found, strict=True):
        np.testing.assert_allclose(value, RM.features(params, jnp.array([ids]))[0], rtol=1e-4, atol=1e-5)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_calibration_of_preferences_drawn_by_the_model_itself_is_right_and_of_a_boaster_wrong():
    draw = np.random.default_rng(0)
    true = draw.normal(0, 2, 40_000)
    wins = draw.random(true.size) < 1 / (1 + np.exp(-true))
    gaps = np.where(wins, true, -true)
    scores = np.stack([gaps, np.zeros_like(gaps)], axis=1)
    assert pair_metrics(scores)["calibration_error"] < 0.01
    assert pair_metrics(3 * scores)["calibration_error"] > 0.1
    assert pair_metrics(3 * scores)["accuracy"] == pair_metrics(scores)["accuracy"]
    bins = calibration(gaps)
    assert len(bins) == 10 and sum(b.pairs for b in bins) == 40_000
    for b in bins:
        error = np.sqrt(b.predicted * (1 - b.predicted) / b.pairs)
        assert abs(b.predicted - b.measured) < 4 * error
    assert all(0.5 + 0.05 * i <= b.predicted <= 0.55 + 0.05 * i for i, b in enumerate(bins))


def test_figures_against_their_definitions():
    scores = np.array([[2.0, 0.5], [1.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    found, gaps = pair_metrics(scores), np.array([1.5, 0.0, -3.0, 1.0])
    assert found["accuracy"] == 2.5 / 4
    np.testing.assert_allclose(found["margin"], gaps.mean())
    np.testing.assert_allclose(found["loss"], np.log(1 + np.exp(-gaps)).mean())
    np.testing.assert_allclose(found["accuracy_stderr"], np.std([1, 0.5, 0, 1], ddof=1) / 2)
    of_two_prompts = pair_metrics(scores, ["a", "a", "b", "b"])["accuracy_stderr"]  # means 0.75 and 0.5
    np.testing.assert_allclose(of_two_prompts, np.std([0.75, 0.5], ddof=1) / np.sqrt(2))
    assert "accuracy_stderr" not in pair_metrics(scores, ["a"] * 4)  # of one prompt no error can be estimated


def test_gaps_of_any_size_are_finite():
    found = pair_metrics(np.array([[1e4, -1e4], [-1e4, 1e4]]))
    assert found["loss"] == 1e4 and found["calibration_error"] == 0.5
