"""Examples to fine-tune on: which tokens are learned, what is left out, and that packing changes no number."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from experiments.scratch import train_tokenizer
from pgjax import data, supervised, train
from pgjax.supervised import Example, Packed, check_examples, encode_examples, pack
from tests.tiny import close, tiny_lm, tiny_params

TOKENIZER = train_tokenizer(["a film that is a fine film, and a dull one"] * 3, 280)  # chat turns end with eos
END = TOKENIZER.eos_token_id
USER, BOT = ({"role": role, "content": text} for role, text in (("user", "is it fine?"), ("assistant", "a fine film")))


def placed(*rows: Any) -> list[tuple[str, Any]]:
    return [(f"line {i}", row) for i, row in enumerate(rows, start=1)]


def encode(*rows: Mapping[str, Any], chat: bool = False, max_length: int = 200, **options: Any) -> supervised.Examples:
    return encode_examples(check_examples(placed(*rows)), TOKENIZER, chat=chat, max_length=max_length, **options)


def learned_text(example: Example) -> str:
    return TOKENIZER.decode([i for i, learned in zip(example.ids, example.learned, strict=True) if learned])


@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_is_tokenised_as_ppo_does_it_and_the_completion_apart(chat):
    # The bug: "a fi" + "lm" tokenised as one text merges over the border into tokens that sampling never meets.
    row = {"prompt": "that is a fi", "completion": "lm"}
    (example,) = encode(row, chat=chat).examples
    prompt = data.encode_prompts([row["prompt"]], TOKENIZER, chat=chat, max_length=None)[0]
    completion = TOKENIZER(row["completion"], add_special_tokens=False)["input_ids"]
    assert example.ids == [*prompt, *completion, END]
    assert example.learned == [False] * len(prompt) + [True] * (len(completion) + 1)
    if not chat:
        assert TOKENIZER("that is a film")["input_ids"] != prompt + completion  # so the above can fail


def test_a_completion_that_ends_already_does_not_end_twice():
    (example,) = encode({"prompt": "a", "completion": "film<|endoftext|>"}).examples
    assert example.ids.count(END) == 1 and example.learned[-1]


def test_the_prompt_is_learned_where_asked():
    (example,) = encode({"prompt": "that is", "completion": "fine"}, learn_prompt=True).examples
    assert example.learned == [False] + [True] * (len(example.ids) - 1)


def test_every_turn_of_the_assistant_is_learned_with_its_end_and_nothing_else():
    # The bug: the marker that opens the turn is learned, or the end of turn is not and the model never stops.
    (example,) = encode({"messages": [USER, BOT, USER, {**BOT, "content": "dull"}]}).examples
    assert learned_text(example) == "a fine film<|endoftext|>dull<|endoftext|>"
    assert example.ids[-1] == END
    rendered = TOKENIZER.apply_chat_template([USER, BOT, USER, {**BOT, "content": "dull"}], tokenize=False)
    assert TOKENIZER.decode(example.ids) == rendered.removesuffix("\n")


def test_messages_and_prompt_with_completion_give_the_same_example():
    (by_messages,) = encode({"messages": [USER, BOT]}).examples
    others = [
        {"prompt": [USER], "completion": [BOT]},
        {"prompt": [USER], "completion": BOT["content"]},
    ]
    for row in others:
        assert encode(row).examples == [by_messages]
        in_json = {name: json.dumps(x) if isinstance(x, list) else x for name, x in row.items()}  # as CSV has it
        assert encode(in_json).examples == [by_messages]
    assert encode({"prompt": USER["content"], "completion": BOT["content"]}, chat=True).examples == [by_messages]
    assert encode({"messages": json.dumps([USER, BOT])}).examples == [by_messages]  # as CSV has it


def test_only_turns_of_the_completion_are_learned():
    (example,) = encode({"prompt": [USER, BOT, USER], "completion": [{**BOT, "content": "dull"}]}).examples
    assert learned_text(example) == "dull<|endoftext|>"


def test_a_turn_that_answers_nothing_is_not_learned():
    (example,) = encode({"messages": [{**BOT, "content": "hello"}, USER, BOT, USER, {**BOT, "content": " "}]}).examples
    assert learned_text(example) == "a fine film<|endoftext|>"


def test_rows_that_a_template_does_not_write_turn_by_turn_are_left_out_and_the_rest_is_learned():
    # The bug: a template that drops earlier reasoning stops the whole file at the first such row.
    tokenizer = train_tokenizer(["a"], 280)
    tokenizer.chat_template = TOKENIZER.chat_template.replace("{%", "{% if messages|length < 4 %}{%", 1) + "{% endif %}"
    rows = check_examples(placed({"messages": [USER, BOT]}, {"messages": [USER, BOT, USER, BOT]}))
    found = encode_examples(rows, tokenizer, chat=False, max_length=200)
    assert len(found.examples) == 1 and found.left_out == {supervised.REWRITTEN: ["line 2"]}


def test_an_end_of_sequence_inside_an_answer_leaves_the_row_out_rather_than_cut_it():
    # The bug: what comes after the token is lost in silence, and the answer is learned as if it ended there.
    odd = "a film<|endoftext|> a dull one"
    rows = [{"prompt": "a", "completion": text} for text in ("fine", odd, "fine<|endoftext|>")]
    found = encode(*rows)
    assert len(found.examples) == 2
    assert found.notes() == ["left out 1 row, an end of sequence inside the answer: line 2"]
    found = encode({"messages": [USER, BOT, USER, BOT]}, {"messages": [USER, {**BOT, "content": odd}, USER, BOT]})
    assert found.left_out == {"an end of sequence inside the answer": ["line 2"]} and len(found.examples) == 1
    assert len(encode({"text": odd}).examples) == 1  # a text may hold documents


def test_a_template_that_rewrites_what_it_wrote_is_refused():
    tokenizer = train_tokenizer(["a"], 280)
    last_only = (
        "{{ messages[-1]['role'] }}: {{ messages[-1]['content'] }}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.chat_template = last_only  # forgets the earlier turns
    rows = check_examples(placed({"messages": [USER, BOT]}))
    with pytest.raises(
        ValueError, match=r"no row is left to learn from: left out 1 row, the chat template writes a turn"
    ):
        encode_examples(rows, tokenizer, chat=False, max_length=200)
    tokenizer.chat_template = "{{ 1 + messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"line 1: the chat template refuses the messages \(unsupported operand"):
        encode_examples(rows, tokenizer, chat=False, max_length=200)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"line 1: the chat template refuses the messages.*roles must alternate"):
        encode_examples(rows, tokenizer, chat=False, max_length=200)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_examples(rows, tokenizer, chat=False, max_length=200)


def test_a_long_text_is_cut_and_every_token_but_the_first_is_learned_once():
    text = "a film that is a fine film, and a dull one. " * 5
    found = encode({"text": "fine"}, {"text": text}, max_length=16)
    whole = [*TOKENIZER(text)["input_ids"], END]
    pieces = found.examples[1:]
    assert [i for piece in pieces for i, learned in zip(piece.ids, piece.learned, strict=True) if learned] == whole[1:]
    assert all(len(piece.ids) <= 16 and not piece.learned[0] and any(piece.learned) for piece in pieces)
    assert found.notes() == ["cut 1 long text into pieces: line 2"]


def test_what_cannot_be_learned_is_left_out_counted_and_named():
    rows = [{"prompt": "a", "completion": c} for c in ("fine", "", " \n", "dull " * 100, "ok", "")]
    found = encode(*rows, max_length=30)
    assert len(found.examples) == 2
    assert found.notes() == [
        "left out 3 rows, empty: line 2; line 3; line 6",
        "left out 1 row, longer than 30 tokens: line 4",
    ]
    assert encode(*[{"prompt": "a", "completion": ""}] * 7, rows[0]).notes() == [
        "left out 7 rows, empty: line 1; line 2; line 3; line 4; line 5 and 2 more"
    ]
    assert encode({"messages": [USER]}, {"messages": [USER, BOT]}).notes() == [
        "left out 1 row, without an answer to learn: line 1"
    ]
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        encode({"text": "ab"}, max_length=1)
    with pytest.raises(ValueError, match="no row is left to learn from: left out 1 row, empty: line 1"):
        encode({"prompt": "a", "completion": ""})


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "answer": "b"}], "line 1: the columns are 'prompt', 'answer'; an example has"),
        ([{}], "line 1: the columns are none"),
        ([{"prompt": "a", "completion": "b", "text": "c"}], "line 1: .*only one of these"),
        ([{"prompt": "a", "completion": "b", "messages": [USER, BOT]}], "line 1: .*only one of these"),
        ([{"text": "a"}, "b"], "line 2: 'b' is not a row"),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], "line 2: its columns differ"),
        ([{"text": "a"}, {"text": None}], "line 2: the text is None, not a text"),
        ([{"prompt": "a", "completion": 3}], "line 1: the completion is 3, not a text"),
        ([{"prompt": "", "completion": "b"}], "line 1: the prompt is empty"),
        ([{"prompt": "a", "completion": [BOT]}], "line 1: the completion is a list of messages, the prompt a text"),
        ([{"prompt": [USER], "completion": [USER]}], "line 1: the completion begins with the role 'user'"),
        ([{"messages": "hi"}], "line 1: the messages are neither a list nor one in JSON"),
        ([{"messages": [{"role": "user"}]}], "line 1: a message is"),
    ],
)
def test_a_bad_row_is_named_with_its_columns(rows, said):
    with pytest.raises(ValueError, match=said):
        check_examples(placed(*rows))


def test_further_columns_are_ignored():
    assert check_examples(placed({"text": "a", "source": "web"})) == [("line 1", {"text": "a"})]
    more = check_examples(placed({"text": "a"}, {"text": "b", "source": "web"}))  # in one row and not in the other
    assert [row for _, row in more] == [{"text": "a"}, {"text": "b"}]
    both = {"prompt": "is it fine?", "messages": [USER, BOT]}  # as UltraChat has it
    assert check_examples(placed(both)) == [("line 1", {"messages": [USER, BOT]})]


def test_plain_texts_and_chat_do_not_go_together():
    with pytest.raises(ValueError, match="plain texts do not go through a chat template"):
        encode({"text": "a"}, chat=True)


def examples_of(*lengths: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [Example(rng.integers(0, 23, n).tolist(), (rng.random(n) < 0.6).tolist()) for n in lengths]


def unpacked(packed: Packed) -> list[tuple[list[int], list[bool]]]:
    found = []
    for tokens, segments, mask in zip(*packed, strict=True):
        found += [(tokens[segments == s].tolist(), mask[segments == s].tolist()) for s in range(1, segments.max() + 1)]
    return found


def test_packing_loses_no_example_and_learns_no_first_token():
    examples = examples_of(*np.random.default_rng(1).integers(1, 17, 200).tolist())
    packed = pack(examples, 16)
    wanted = [(e.ids, [False, *e.learned[1:]]) for e in examples]
    assert sorted(unpacked(packed)) == sorted(wanted)
    assert (packed.segment_ids > 0).mean() > 0.95  # a row an example would be half empty
    assert not packed.mask[packed.segment_ids == 0].any()
    again = pack(examples, 16)
    assert all(np.array_equal(a, b) for a, b in zip(packed, again, strict=True))


@pytest.mark.parametrize("lengths", [(), (3, 0), (3, 17)])
def test_what_does_not_fit_is_refused(lengths):
    with pytest.raises(ValueError, match="examples"):
        pack(examples_of(*lengths), 16)


LENGTHS = (9, 2, 5, 1, 7, 3, 4, 6, 2)
EXAMPLES = examples_of(*LENGTHS)


@functools.cache
def loss_apart(name: str) -> tuple[float, Any]:
    """The mean over all learned tokens and its gradient, each example in a row of its own."""
    width, lm = max(LENGTHS), tiny_lm(name)
    tokens = np.array([e.ids + [0] * (width - len(e.ids)) for e in EXAMPLES], np.int32)
    real = np.arange(width)[None, :] < np.array(LENGTHS)[:, None]
    mask = np.array([[False, *e.learned[1:]] + [False] * (width - len(e.ids)) for e in EXAMPLES])

    def loss(params):
        found = pg.token_logprobs(lm.apply(params, tokens, real), tokens)
        return -jnp.where(mask, found, 0.0).sum() / int(mask.sum())

    value, gradient = jax.jit(jax.value_and_grad(loss))(tiny_params(name))
    return float(value), gradient


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_the_packed_gradient_is_that_of_the_examples_apart(name, microbatches):
    # The bugs: a mean of means over rows or microbatches, a token predicted from the example before it.
    lm, params = tiny_lm(name), tiny_params(name)
    packed = pack(EXAMPLES, 12, pad_id=5)
    rows = 4 * -(-len(packed.tokens) // 4)
    packed = Packed(*(np.pad(x, ((0, rows - len(x)), (0, 0))) for x in packed))  # rows without a token, too
    assert len({int(n) for n in packed.mask.sum(1)}) > 2  # uneven rows
    optimizer = train.Optimizer(  # a step is minus the gradient
        lambda params: (),
        lambda grad, state, params: (jax.tree.map(jnp.negative, grad), state),
        lambda i: jnp.float32(1),
    )
    state = train.init_state(jax.tree.map(jnp.copy, params), optimizer)
    state, metrics = supervised.update(
        state, jax.device_put(packed), lm=lm, optimizer=optimizer, microbatches=microbatches
    )
    expected, gradient = loss_apart(name)
    assert bool(state.healthy) and int(metrics["train/tokens"]) == int(packed.mask.sum())
    close(metrics["loss/cross_entropy"], expected, 1e-5 * expected)
    for after, before, wanted in zip(*map(jax.tree.leaves, (state.params, params, gradient)), strict=True):
        close(before - after, wanted, 1e-4 * max(1.0, float(np.abs(wanted).max())))


def test_mean_surprise_counts_tokens_not_rows():
    lm, params = tiny_lm("gpt2"), tiny_params("gpt2")
    expected, _ = loss_apart("gpt2")
    packed = pack(EXAMPLES, 12)
    for batch_size in (2, 8):
        assert abs(supervised.mean_surprise(lm, params, packed, batch_size) - expected) < 1e-5 * expected
    with pytest.raises(ValueError, match=f"none of the {packed.mask.size} tokens is learned"):
        supervised.mean_surprise(lm, params, packed._replace(mask=packed.mask & False), 2)
