"""What is learned of rows, with every kind of tokenizer and of chat template: the ids are those of transformers for the whole."""

import pytest

from pgjax.data.drafts import EMPTY_TURN, LAST_ONLY, OPENED_OTHERWISE, UNANSWERED, UNUSED_TOOLS, UNWRITTEN
from pgjax.data.examples import check_examples, encode_examples, texts_of
from pgjax.data.tokens import INSIDE, added_text, encode_texts
from pgjax.models.io.chat_template import set_template
from pgjax.models.io.stops import STOP_IDS
from tests.tokenizer_kinds import KINDS, TEMPLATES, THOUGHTS, with_template

USER, BOT = {"role": "user", "content": "The film was"}, {"role": "assistant", "content": "I am great"}
MORE = [{"role": "user", "content": "no"}, {"role": "assistant", "content": "yes"}]
ENDS = ["</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"]
CLOCK = [{"type": "function", "function": {"name": "film", "parameters": {}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "film", "arguments": {"no": 1}}}]}
RESULT = {"role": "tool", "content": "The answer is 3."}


def prepared(kind, template=None):
    """Make a tokenizer whose completions end at any end of a turn."""
    tokenizer = KINDS[kind]() if template is None else with_template(kind, template)
    tokenizer.init_kwargs[STOP_IDS] = tokenizer.convert_tokens_to_ids(ENDS)
    return set_template(tokenizer, date="2026-11-30")


def encode(tokenizer, *rows, chat=False, max_length=500):
    placed = [(f"line {number}", row) for number, row in enumerate(rows, start=1)]
    return encode_examples(placed, tokenizer, chat=chat, max_length=max_length)


def learned(example, tokenizer):
    """Give the text of each run of learned tokens, as it stands behind what is before it."""
    texts, begin = [], None
    for i, is_learned in enumerate([*example.learned, False]):
        if is_learned and begin is None:
            begin = i
        elif not is_learned and begin is not None:
            texts.append(added_text(example.ids[:begin], example.ids[begin:i], tokenizer))
            begin = None
    return texts


def spelled(text, tokenizer):
    """Write a text as the tokenizer gives it back but for spaces, which many put behind a special token."""
    return tokenizer.decode(encode_texts([text], tokenizer, special=False)[0]).replace(" ", "")


def learned_spelled(example, tokenizer):
    return [text.replace(" ", "") for text in learned(example, tokenizer)]


def transformers_ids(messages, tokenizer, **how):
    """Tokenise a conversation as transformers does, up to the last end of a turn."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **how)
    stops = tokenizer.init_kwargs[STOP_IDS]
    return ids[: max(i for i, token in enumerate(ids) if token in stops) + 1]


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "dates"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_conversation_the_answers_with_their_ends_are_learned_and_all_ids_are_those_of_transformers(
    kind, template
):
    tokenizer = prepared(kind, template)
    found = encode(
        tokenizer, {"messages": [USER, BOT, *MORE]}, {"prompt": [USER, BOT, MORE[0]], "completion": MORE[1:]}
    )
    whole, last = found.examples
    assert whole.ids == last.ids == transformers_ids([USER, BOT, *MORE], tokenizer)
    end = next(end for end in ENDS if end in tokenizer.apply_chat_template([BOT], tokenize=False))
    assert learned(whole, tokenizer) == ["I am great" + end, "yes" + end] and learned(last, tokenizer) == ["yes" + end]
    assert found.notes() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_is_learned_as_it_stands_behind_its_prompt_and_begins_and_ends_once(kind):
    # The bug: tokenised on its own " great" is ▁ and ▁great, and a prompt may end in </s>.
    tokenizer = prepared(kind)
    rows = [{"prompt": "The film was", "completion": text} for text in (" great", " great</s>")]
    rows.append({"prompt": "<s>The film was", "completion": " great"})
    found = encode(tokenizer, *rows)
    prompt, whole = encode_texts(["The film was", "The film was great"], tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert found.examples[0].ids == found.examples[1].ids == [*whole, eos]
    assert found.examples[0].learned == [i >= len(prompt) for i in range(len(whole) + 1)]
    for example in found.examples:
        assert learned(example, tokenizer) == [" great</s>"]
        assert example.ids.count(eos) == 1 and example.ids.count(bos) <= 1
    assert found.notes() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_text_begins_once_and_ends_once(kind):
    tokenizer = prepared(kind)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for example in encode(tokenizer, *({"text": x} for x in ("The film", "The film</s>", "<s>The film"))).examples:
        assert example.ids[-1] == eos and example.ids.count(eos) == 1 and example.ids.count(bos) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_begins_inside_a_token_goes_on_from_the_prompt_and_is_counted(kind):
    tokenizer = prepared(kind)
    rows = [{"prompt": text, "completion": "great"} for text in ("The film was\n", "The film was ", "was ")]
    found = encode(tokenizer, *rows)
    assert found.notes() == [f"in 2 rows {INSIDE}: line 2; line 3"]
    prompt = encode_texts(["The film was "], tokenizer)[0]
    assert found.examples[1].ids[: len(prompt)] == prompt and learned(found.examples[1], tokenizer) == ["great</s>"]


@pytest.mark.parametrize("template", ["ChatML", "Llama 3", "plain headers"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_goes_on_with_the_words_that_its_prompt_ends_in(kind, template):
    # The bug: a second header of the assistant between "The answer is" and "great".
    tokenizer = prepared(kind, template)
    prompt = [USER, {"role": "assistant", "content": "The answer is"}]
    by_messages, by_text = encode(
        tokenizer, {"prompt": prompt, "completion": [{"role": "assistant", "content": " great"}]},
        {"prompt": prompt, "completion": " great"},
    ).examples  # fmt: skip
    whole = [USER, {"role": "assistant", "content": "The answer is great"}]
    assert by_messages.ids == transformers_ids(whole, tokenizer)
    assert by_text == by_messages  # ended as the template ends a turn
    assert learned(by_text, tokenizer)[0].startswith(" great<") and len(learned(by_text, tokenizer)) == 1


def test_space_that_a_template_cuts_off_behind_a_prompts_last_words_begins_the_completion():
    tokenizer = prepared("byte-level", "Llama 3")
    prompt = [USER, {"role": "assistant", "content": "The answer is "}]
    (example,) = encode(tokenizer, {"prompt": prompt, "completion": "great"}).examples
    assert learned(example, tokenizer) == [" great<|eot_id|>"]


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_template_rewrites_earlier_turns_the_last_one_is_learned_and_counted(kind):
    tokenizer = prepared(kind, "thoughts")
    thinks = {"role": "assistant", "content": "<think>no</think>yes"}
    found = encode(
        tokenizer,
        {"messages": [USER, thinks, USER, thinks]},
        {"messages": [USER, BOT, *MORE]},
        {"messages": [USER, thinks]},
    )
    assert found.notes() == [f"in 1 row {LAST_ONLY}: line 1"] and len(found.examples) == 3
    assert found.examples[0].ids == transformers_ids([USER, thinks, USER, thinks], tokenizer)
    assert learned_spelled(found.examples[0], tokenizer) == ["<think>no</think>yes<|im_end|>"]
    assert len(learned(found.examples[1], tokenizer)) == 2


def test_a_last_turn_that_is_opened_otherwise_is_learned_as_the_conversation_has_it():
    tokenizer = prepared("byte-level")
    opens = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"  # as the distils of R1
    tokenizer.chat_template = THOUGHTS.split("{% if add_generation_prompt %}")[0] + opens
    found = encode(
        tokenizer, {"messages": [USER, BOT]}, {"messages": [USER, {**BOT, "content": "<think>no</think>yes"}]}
    )
    assert found.left_out == {} and found.remarks == {OPENED_OTHERWISE: ["line 1"]}
    assert [learned(x, tokenizer) for x in found.examples] == [["I am great<|im_end|>"], ["no</think>yes<|im_end|>"]]


@pytest.mark.parametrize("kind", KINDS)
def test_with_tags_the_template_says_what_is_learned_even_of_turns_that_it_rewrites(kind):
    tokenizer = prepared(kind)
    tags = "{% generation %}", "{% endgeneration %}"
    answer = "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}"
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        + tags[0] + answer + tags[1] + "<|im_end|>{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip
    thinks = {"role": "assistant", "content": "<think>no</think>yes"}
    found = encode(
        tokenizer, {"messages": [USER, thinks, USER, thinks]},
        {"prompt": [USER, BOT, USER], "completion": [thinks]}, {"messages": [BOT, USER, BOT]},
    )  # fmt: skip
    assert [learned_spelled(example, tokenizer) for example in found.examples] == [
        ["yes<|im_end|>", "<think>no</think>yes<|im_end|>"],  # the end is learned though it is not tagged
        ["<think>no</think>yes<|im_end|>"],
        ["Iamgreat<|im_end|>"],
    ]
    assert found.examples[0].ids == transformers_ids([USER, thinks, USER, thinks], tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_tools_reach_the_template_and_calls_are_learned_and_results_are_not(kind):
    tokenizer = prepared(kind, "tools")
    messages = [USER, CALL, RESULT, MORE[1]]
    found = encode(tokenizer, {"messages": messages, "tools": CLOCK}, {"messages": messages})
    plain = [{name: x for name, x in message.items() if x is not None} for message in messages]
    assert found.examples[0].ids == transformers_ids(plain, tokenizer, tools=CLOCK) != found.examples[1].ids
    call = spelled('{"name": "film", "arguments": {"no": 1}}<|im_end|>', tokenizer)
    assert learned_spelled(found.examples[0], tokenizer) == [call, "yes<|im_end|>"] and found.notes() == []
    (by_completion,) = encode(tokenizer, {"prompt": [USER], "completion": [CALL], "tools": CLOCK}).examples
    assert learned_spelled(by_completion, tokenizer) == [call]


def test_tool_calls_and_tools_that_a_template_leaves_out_are_not_lost_in_silence():
    # The bug: a turn that calls a tool is learned as one that says nothing.
    tokenizer = prepared("byte-level", "ChatML")
    found = encode(
        tokenizer, {"messages": [USER, CALL]}, {"messages": [USER, BOT], "tools": CLOCK}, {"messages": [USER, BOT]}
    )
    assert found.left_out == {UNWRITTEN: ["line 1"]} and found.remarks == {UNUSED_TOOLS: ["line 2"]}
    found = encode(tokenizer, {"prompt": "a", "completion": "b", "tools": CLOCK})
    assert found.remarks == {UNUSED_TOOLS: ["line 1"]}


def test_the_column_of_tools_is_read_from_lists_and_json_and_messages_without_words_are_no_texts():
    rows = [{"messages": [USER, BOT], "tools": tools} for tools in (CLOCK, '[{"name": "film"}]', None)]
    checked = check_examples([(f"line {i}", row) for i, row in enumerate(rows, start=1)])
    assert [row.get("tools") for _, row in checked] == [CLOCK, [{"name": "film"}], None]
    with pytest.raises(ValueError, match="line 1: the column 'tools' is 'clock', not a list of JSON schemas"):
        check_examples([("line 1", {"messages": [USER, BOT], "tools": "clock"})])
    parts = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    assert list(texts_of([("line 1", {"messages": [parts, CALL, BOT], "tools": CLOCK})])) == ["Hi", "I am great"]


def test_turns_that_are_not_learned_are_counted():
    tokenizer = prepared("byte-level", "ChatML")
    empty = {"role": "assistant", "content": " "}
    found = encode(tokenizer, {"messages": [BOT, USER, BOT]}, {"messages": [USER, empty, USER, BOT]})
    assert found.remarks == {UNANSWERED: ["line 1"], EMPTY_TURN: ["line 2"]}
    assert [learned(example, tokenizer) for example in found.examples] == [["I am great<|im_end|>"]] * 2


@pytest.mark.parametrize("kind", ["byte-level", "Metaspace"])
def test_a_second_turn_of_the_assistant_does_not_learn_its_header(kind):
    tokenizer = prepared(kind, "ChatML")
    (example,) = encode(tokenizer, {"messages": [USER, BOT, MORE[1]]}).examples
    assert learned(example, tokenizer) == ["I am great<|im_end|>", "yes<|im_end|>"]


@pytest.mark.parametrize("kind", KINDS)
def test_turns_that_no_stop_id_ends_end_where_the_template_ends_them(kind):
    # The bug: the first stop id behind an answer stands in the next message, which is learned up to it.
    tokenizer = prepared(kind)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}{{ '<|im_end|>' if m['role'] == 'user' else '' }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    (example,) = encode(tokenizer, {"messages": [USER, BOT, *MORE]}).examples
    assert learned(example, tokenizer) == ["I am great\n", "yes\n</s>"]
