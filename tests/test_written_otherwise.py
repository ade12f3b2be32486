"""Templates that write a conversation otherwise than they open a turn, leave words out, or take content in parts alone."""

import itertools
import types

import pytest
from tokenizers import normalizers

from pgjax.core.errors import UserError
from pgjax.data.drafts import OPENED_OTHERWISE, OPENED_TWICE, REWRITTEN, THOUGHT_DROPPED, UNUSED_TOOLS, UNWRITTEN
from pgjax.data.examples import check_examples, encode_examples
from pgjax.data.preferences import (
    STOPPED,
    Answered,
    check_answers,
    check_pairs,
    encode_answers,
    encode_pairs,
    encode_references,
)
from pgjax.data.prompts import check_rows, completion_texts, encode_prompts
from pgjax.data.tokens import added_text
from pgjax.models.io.chat_template import set_template
from pgjax.models.io.tokenizer import folder_tokenizer, missing_tokenizer
from pgjax.run.session import templated
from tests.tokenizer_kinds import CHATML, KINDS, LLAMA3, byte_level, sentencepiece_like

USER = {"role": "user", "content": "q"}
STRIPPED = (  # as R1's distils: thoughts are left out of what has been said, and a turn is opened with one
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}"
    "<|assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
SPACED = (  # as Mistral's: the space before an answer belongs to it
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
    " {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
FILLED = (  # as Qwen3's: an answer without a thought gets an empty one
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] | capitalize }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


def bot(text):
    return {"role": "assistant", "content": text}


def made(template, make=byte_level):
    tokenizer = make()
    tokenizer.chat_template = template
    return tokenizer


def fine_tuned(tokenizer, *rows):
    placed = [(f"line {number}", row) for number, row in enumerate(rows, start=1)]
    return encode_examples(check_examples(placed), tokenizer, chat=True, max_length=500)


def learned(example, tokenizer):
    """Give the text of each run of learned tokens."""
    texts, begin = [], 0
    for is_learned, run in itertools.groupby(example.learned):
        end = begin + len(list(run))
        texts += [added_text(example.ids[:begin], example.ids[begin:end], tokenizer)] if is_learned else []
        begin = end
    return texts


def theirs(messages, tokenizer):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def test_an_answer_behind_bytes_is_the_text_that_it_adds():
    # The bug: the ids that decide begin inside a character, and all bytes behind it come out as �.
    tokenizer = sentencepiece_like()
    texts = [("中文中文", "文"), ("The film: 日本語", "中文 great"), ("日本語日本語日本語", "の😀"), ("ab日本", " a")]
    for prompt, answer in texts:
        ids, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer))
        sampled = [[i >= len(ids) for i in range(len(whole))]]
        assert completion_texts([whole], sampled, tokenizer) == [answer]
        text = prompt + answer
        begun = [tokenizer(text[:known], add_special_tokens=False)["input_ids"] for known in range(len(text) + 1)]
        for cut in range(2, len(whole)):  # inside characters too, which then are part of what is added
            known = max(known for known, ids in enumerate(begun) if ids == whole[: len(ids)] and len(ids) <= cut)
            assert added_text(whole[:cut], whole[cut:], tokenizer) == text[known:]
    half = tokenizer("文", add_special_tokens=False)["input_ids"][-3:-1]
    assert added_text(whole[:-2], half, tokenizer) == "��"  # spoils no character in front


def test_a_turn_that_is_opened_with_a_thought_is_learned_as_the_conversation_has_it_and_counted():
    # The bug: every row of messages is left out, and a completion's <think> is written twice.
    tokenizer = made(STRIPPED)
    thinks = "<think>\nhm\n</think>\n\nyes"
    found = fine_tuned(tokenizer, {"messages": [USER, bot("yes")]}, {"messages": [USER, bot(thinks)]})
    assert found.remarks == {OPENED_OTHERWISE: ["line 1", "line 2"], THOUGHT_DROPPED: ["line 2"]}
    for example, answer in zip(found.examples, ("yes", "\n\nyes"), strict=True):
        assert learned(example, tokenizer) == [answer + "</s>"]
    assert found.examples[1].ids == theirs([USER, bot(thinks)], tokenizer)
    found = fine_tuned(tokenizer, {"prompt": "q", "completion": thinks}, {"prompt": "q", "completion": "so</think>"})
    assert found.remarks == {OPENED_TWICE: ["line 1"]}
    assert tokenizer.decode(found.examples[0].ids) == "<s><|user|>q<|assistant|>" + thinks + "</s>"
    pairs = check_pairs([("line 1", {"prompt": "q", "chosen": thinks, "rejected": "no"})])
    coded = encode_pairs(pairs, tokenizer, chat=True, eos=True, max_length=99)
    assert coded.kept[0].chosen == found.examples[0].ids and coded.remarks == {OPENED_TWICE: ["line 1"]}
    (sampled,) = encode_answers([Answered("q", "<think>\nno")], tokenizer, chat=True, eos=False)
    assert tokenizer.decode(sampled).endswith("<think>\n<think>\nno")  # the policy's own is kept


def test_a_turn_whose_conversation_has_another_beginning_is_left_out():
    tokenizer = made("{% if add_generation_prompt %}A{% else %}{% endif %}" + CHATML)
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        fine_tuned(tokenizer, {"messages": [USER, bot("yes")]})
    tokenizer = made("{{ messages | length }}" + CHATML)
    with pytest.raises(ValueError, match="rewrites earlier turns") as told:
        fine_tuned(tokenizer, {"messages": [USER, bot("yes")]})
    assert REWRITTEN in str(told.value)


def test_an_answer_of_which_the_template_leaves_words_out_is_not_learned_in_silence():
    tokenizer = made(STRIPPED.replace("<think>\n{%", "{%"))
    rows = [{"messages": [USER, bot(text)]} for text in ("<think>hm</think>yes", "<think>a</think>")]
    found = fine_tuned(tokenizer, *rows)
    assert found.remarks == {THOUGHT_DROPPED: ["line 1"]} and found.left_out == {UNWRITTEN: ["line 2"]}
    tokenizer = made(CHATML.replace("{{ m['content'] }}", "{{ m['content'][:3] }}"))
    found = fine_tuned(tokenizer, *({"messages": [USER, bot(text)]} for text in ("yes, I am", "yes")))
    assert found.left_out == {UNWRITTEN: ["line 1"]} and learned(found.examples[0], tokenizer) == ["yes<|im_end|>"]


@pytest.mark.parametrize("kind", ["byte-level", "prepending normalizer", "Metaspace"])
def test_a_template_that_takes_parts_alone_gets_parts(kind):
    tokenizer = made(PARTS, KINDS[kind])
    messages = [{**x, "content": [{"type": "text", "text": x["content"]}]} for x in (USER, bot("yes"))]
    found = fine_tuned(tokenizer, {"messages": messages}, {"messages": [USER, bot("yes")]})
    for example in found.examples:
        assert example.ids == theirs(messages, tokenizer)[: len(example.ids)]
        assert learned(example, tokenizer) == ["yes<|im_end|>"]
    prompts = [row["prompt"] for row in check_rows([("line 1", {"prompt": messages[:1]})])]
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert encode_prompts(prompts, tokenizer, chat=True) == [opened]
    (going_on,) = encode_prompts([[USER, bot("yes")]], tokenizer, chat=True)
    assert added_text(opened, going_on[len(opened) :], tokenizer) == "yes"


@pytest.mark.parametrize("template", [SPACED, FILLED, LLAMA3, STRIPPED, PARTS])
@pytest.mark.parametrize("kind", ["byte-level", "prepending normalizer", "Metaspace"])
def test_pairs_of_messages_are_what_the_template_writes_of_the_conversation(kind, template):
    # The bug: the words alone stand behind the opened turn: [/INST]yes for [/INST] yes.
    tokenizer = made(template, KINDS[kind])
    whole = [USER, bot("yes\n" if template == LLAMA3 else "yes")]
    rows = (
        {"chosen": whole, "rejected": [USER, bot("no")]},
        {"prompt": "q", "chosen": whole[1:], "rejected": [bot("no")]},
    )
    pairs = [check_pairs([("line 1", row)]) for row in rows]
    first, second = (encode_pairs(pair, tokenizer, chat=True, eos=True, max_length=99).kept[0] for pair in pairs)
    (example,) = fine_tuned(tokenizer, {"messages": whole}).examples
    in_parts = [{**x, "content": [{"type": "text", "text": x["content"]}]} for x in whole]
    expected = theirs(in_parts if template == PARTS else whole, tokenizer)
    assert first.chosen == second.chosen == example.ids == expected[: len(example.ids)]
    completion = check_answers([("line 1", {"prompt": [USER], "completion": whole[1:]})])
    assert encode_references(completion, tokenizer, chat=True, eos=True, max_length=99).kept == [example.ids]


def test_pairs_that_cannot_be_scored_are_left_out_with_the_reason():
    tokenizer = made(STRIPPED)
    texts = ["a", "<think>b</think>", "b</s>b"]
    placed = [(f"line {n}", {"chosen": [USER, bot(x)], "rejected": [USER, bot("no")]}) for n, x in enumerate(texts, 1)]
    found = encode_pairs(check_pairs(placed), tokenizer, chat=True, eos=True, max_length=99)
    assert found.left_out == {UNWRITTEN: ["line 2"], STOPPED: ["line 3"]} and len(found.kept) == 1
    with pytest.raises(ValueError, match="line 1: 'chosen' is a text and 'rejected' is a list of messages: make both"):
        check_pairs([("line 1", {"prompt": "q", "chosen": "a", "rejected": [bot("b")]})])


def test_tools_that_nothing_writes_are_told_of_pairs_and_references_too():
    tokenizer = made(CHATML)
    tools = [{"name": "clock"}]
    for chat in (True, False):
        pairs = check_pairs([("line 1", {"prompt": "q", "chosen": "a", "rejected": "b", "tools": tools})])
        answers = check_answers([("line 1", {"prompt": "q", "completion": "a", "tools": tools})])
        for found in (
            encode_pairs(pairs, tokenizer, chat=chat, eos=True, max_length=99),
            encode_references(answers, tokenizer, chat=chat, eos=True, max_length=99),
        ):
            assert found.remarks == {UNUSED_TOOLS: ["line 1"]}


def composed():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "answer"),
    [(composed, "e\u0301" * 6 + "a"), (sentencepiece_like, "<think>a</think>b"), (byte_level, "a 中")],
)
def test_a_turn_without_an_end_is_learned_up_to_its_end_though_its_tokens_spell_it_otherwise(make, answer):
    # The bug: counted in characters of the decoded text, the next turn's header is learned, or the answer's end is not.
    tokenizer = made(NO_END, make)
    (example,) = fine_tuned(tokenizer, {"messages": [USER, bot(answer), USER, bot("no")]}).examples
    first, last = learned(example, tokenizer)
    assert last == "no\n</s>"
    assert first.replace(" ", "") == tokenizer.decode(
        tokenizer(answer + "\n", add_special_tokens=False)["input_ids"]
    ).replace(" ", "")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{% set f = '%d %b %Y' %}{{ strftime_now(f) }}", "03 Feb 2020"),
        ("{{ strftime_now(format='%A, %-d %B') }}", "Monday, 3 February"),
        ("{{ strftime_now('%d' ~ ' %b') }}", "03 Feb"),
        ("{{ strftime_now('100%% %d\\'', ) }}", "100% 03'"),
        ("{% macro day() %}{{ strftime_now('%j') }}{% endmacro %}{{ day() }}", "034"),
        ("  {% if strftime_now is defined %}\n{{ strftime_now('%x %X %%d %') }}{% endif %}", "02/03/20 00:00:00 %d %"),
    ],
)
def test_the_date_is_fixed_however_a_template_asks_for_it(written, expected):
    tokenizer = set_template(made(written + "|" + CHATML), date="2020-02-03")
    (ids,) = encode_prompts(["a"], tokenizer, chat=True)
    assert tokenizer.decode(ids).split("|<")[0] == expected
    assert tokenizer.chat_template == written + "|" + CHATML  # the saved one stays as it was


def test_a_folder_with_a_tokenizer_in_another_form_is_told_which_and_what_to_do(tmp_path):
    (tmp_path / "tekken.json").write_text("{}")
    assert folder_tokenizer(tmp_path) is None
    assert "holds no tokenizer that is read: tekken.json is another form; add the" in missing_tokenizer(tmp_path)
    assert missing_tokenizer(tmp_path / "none").endswith("holds no tokenizer: add its files")
    with pytest.raises(UserError, match=r"tekken\.json is another form"):  # as every script says it
        templated(None, types.SimpleNamespace(model=tmp_path))
