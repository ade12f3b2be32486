"""Pairs in token ids with every kind of tokenizer: the answer's ids are those behind the prompt's in the whole text."""

import pytest

from pgjax.data.preferences import Answered, check_answers, check_pairs, encode_answers, encode_pairs, encode_references
from pgjax.data.templates import render
from pgjax.data.tokens import INSIDE, added_text, encode_texts
from tests.tokenizer_kinds import KINDS, with_template

USER = {"role": "user", "content": "The film was"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "film", "arguments": {"no": 1}}}]}
TOOLS = [{"name": "great"}]
HUMAN = "\n\nHuman: no\n\nAssistant: yes\n\nHuman: The film?\n\nAssistant:"


def bot(text):
    return {"role": "assistant", "content": text}


def placed(*rows):
    return [(f"line {number}", row) for number, row in enumerate(rows, start=1)]


def encoded(tokenizer, *rows):
    return encode_pairs(check_pairs(placed(*rows)), tokenizer, chat=False, eos=True, max_length=500)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_stands_behind_its_prompt_as_in_the_whole_text_and_ends_once(kind):
    # The bug: ▁ and ▁great behind a prompt that ends in </s>.
    tokenizer = KINDS[kind]()
    found = encoded(
        tokenizer, *({"prompt": "The film was", "chosen": x, "rejected": " not"} for x in (" great", " great</s>"))
    )
    assert found.kept[0] == found.kept[1] and found.notes() == []
    eos = tokenizer.eos_token_id
    for ids, text in zip(found.kept[0][:2], ("The film was great", "The film was not"), strict=True):
        assert ids == [*encode_texts([text], tokenizer)[0], eos] and ids.count(eos) == 1
    (answer,) = encode_answers([Answered("<s>The film was", " great")], tokenizer, chat=False, eos=False)
    assert answer.count(tokenizer.bos_token_id) <= 1 and eos not in answer


@pytest.mark.parametrize(
    ("template", "end"), [("plain headers", "</s>"), ("ChatML", "<|im_end|>"), ("Llama 3", "<|eot_id|>")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_answer_is_what_a_policy_samples_behind_the_opened_turn(kind, template, end):
    tokenizer = with_template(kind, template)
    pair = encoded(tokenizer, {"prompt": [USER], "chosen": "I am", "rejected": "yes"}).kept[0]
    theirs = tokenizer.apply_chat_template([USER, bot("I am")], tokenize=True, return_dict=False)
    assert pair.chosen == theirs[: len(pair.chosen)]
    prompt = encode_texts([render([USER], tokenizer, place="")], tokenizer, special=False)[0]
    assert all(ids[: len(prompt)] == prompt for ids in pair[:2])
    assert added_text(prompt, pair.chosen[len(prompt) :], tokenizer) == "I am" + end


@pytest.mark.parametrize("kind", KINDS)
def test_a_boundary_inside_a_token_keeps_the_prompts_ids_for_both_answers_and_is_counted(kind):
    tokenizer = KINDS[kind]()
    rows = [{"prompt": "The film was ", "chosen": "great", "rejected": x} for x in ("not", "\nno")]
    found = encoded(tokenizer, *rows, {"prompt": "a\n", "chosen": "great", "rejected": "no"})
    prompt = encode_texts(["The film was "], tokenizer)[0]
    assert all(ids[: len(prompt)] == prompt for pair in found.kept[:2] for ids in pair[:2])
    assert [pair.prompt for pair in found.kept] == [0, 0, 1]
    assert found.notes() == [f"in 2 rows {INSIDE}: line 1; line 2"]
    references = check_answers(placed(*({"prompt": x, "completion": "great"} for x in ("The film was ", "a\n"))))
    found = encode_references(references, tokenizer, chat=False, eos=True, max_length=500)
    assert found.notes() == [f"in 1 row {INSIDE}: line 1"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_goes_on_with_the_words_that_its_prompt_ends_in(kind):
    tokenizer = with_template(kind, "plain headers")
    prompt = [USER, bot("The answer is")]
    pair = encoded(tokenizer, {"prompt": prompt, "chosen": [bot(" great")], "rejected": " not"}).kept[0]
    theirs = tokenizer.apply_chat_template([USER, bot("The answer is great")], tokenize=True, return_dict=False)
    assert pair.chosen == theirs[: len(pair.chosen)] and pair.chosen[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_that_a_judge_encodes_again_may_be_empty(kind):
    tokenizer = KINDS[kind]()
    prompt = encode_texts(["The film was"], tokenizer)[0]
    for eos in (False, True):
        (ids,) = encode_answers([Answered("The film was", "")], tokenizer, chat=False, eos=eos)
        assert ids == [*prompt, *([tokenizer.eos_token_id] if eos else [])]


@pytest.mark.parametrize("kind", KINDS)
def test_tools_reach_the_template_and_an_answer_may_be_a_call(kind):
    tokenizer = with_template(kind, "tools")
    row = {"prompt": [USER], "chosen": [CALL], "rejected": [bot("no")], "tools": TOOLS}
    pair = encoded(tokenizer, row).kept[0]
    call = {name: x for name, x in CALL.items() if x is not None}
    theirs = tokenizer.apply_chat_template([USER, call], tools=TOOLS, tokenize=True, return_dict=False)
    assert pair.chosen == theirs[: len(pair.chosen)] and tokenizer.decode(pair.chosen[-1:]) == "<|im_end|>"
    bare = with_template(kind, "ChatML")
    with pytest.raises(ValueError, match="line 1: the chat template does not write the answer's tool calls"):
        encoded(bare, row)


def test_dialogues_without_a_prompt_are_split_behind_the_last_opened_answer():
    row = {"chosen": HUMAN + " Great.", "rejected": HUMAN + " Dull."}
    other = {**row, "rejected": HUMAN.replace("film", "play") + " Dull."}
    longer = {**row, "rejected": row["rejected"] + "\n\nHuman: Why?\n\nAssistant: So."}
    pairs = check_pairs(placed(row, other, longer))
    assert [pair.chosen for pair in pairs.kept] == [Answered(HUMAN, " Great.")]
    assert pairs.kept[0].rejected == Answered(HUMAN, " Dull.")
    assert pairs.notes() == [
        r"left out 2 rows, two dialogues that differ before their last '\n\nAssistant:': line 2; line 3"
    ]
    with pytest.raises(
        ValueError, match=r"line 1: there is no column 'prompt'.*'rejected'.* begins behind '.n.nAssistant:'"
    ):
        check_pairs(placed({**row, "rejected": "Dull."}))
