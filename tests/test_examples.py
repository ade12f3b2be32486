"""Rows turned into examples: which tokens are learned, what is left out, what is refused."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from pgjax.data import examples
from pgjax.data.drafts import REWRITTEN
from pgjax.data.examples import Example, check_examples, encode_examples
from pgjax.data.prompts import encode_prompts
from pgjax.models.io.scratch import train_tokenizer

TOKENIZER = train_tokenizer(["a film that is a fine film, and a dull one"] * 3, 280)  # chat turns end with eos
END = TOKENIZER.eos_token_id
USER, BOT = ({"role": role, "content": text} for role, text in (("user", "is it fine?"), ("assistant", "a fine film")))


def placed(*rows: Any) -> list[tuple[str, Any]]:
    return [(f"line {i}", row) for i, row in enumerate(rows, start=1)]


def encode(*rows: Mapping[str, Any], chat: bool = False, max_length: int = 200, **options: Any) -> examples.Examples:
    return encode_examples(check_examples(placed(*rows)), TOKENIZER, chat=chat, max_length=max_length, **options)


def learned_text(example: Example) -> str:
    return TOKENIZER.decode([i for i, learned in zip(example.ids, example.learned, strict=True) if learned])


@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_is_tokenised_as_ppo_does_it_and_the_completion_apart(chat):
    # The bug: "a fi" + "lm" tokenised as one text merges over the border into tokens that sampling never meets.
    row = {"prompt": "that is a fi", "completion": "lm"}
    (example,) = encode(row, chat=chat).examples
    prompt = encode_prompts([row["prompt"]], TOKENIZER, chat=chat, max_length=None)[0]
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
    assert len(found.examples) == 1 and found.left_out == {REWRITTEN: ["line 2"]}


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
        ValueError, match=r"no row is left to learn from: left out 1 row, the chat template rewrites earlier turns"
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
    with pytest.raises(ValueError, match="plain texts cannot be rendered with a chat template"):
        encode({"text": "a"}, chat=True)
