"""Text and ids of every kind of tokenizer and template: the ids of parts are those of the whole, and so is the text of ids."""

import itertools

import pytest

from pgjax.core.errors import UserError
from pgjax.data.templates import render
from pgjax.data.tokens import added_text, encode_parts, encode_texts
from pgjax.models.io.chat_template import set_template
from tests import tokenizer_table
from tests.sizes import campaign_but_for
from tests.tokenizer_kinds import DATED, KINDS, TEMPLATES, with_template

MESSAGES = [
    {"role": "user", "content": "The film was", "name": None},
    {"role": "assistant", "content": "great"},
    {"role": "user", "content": "no"},
    {"role": "assistant", "content": "yes I am"},
]


def joined(parts):
    return list(itertools.chain.from_iterable(parts))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_conversation_are_the_ids_of_transformers(kind, template):
    tokenizer = set_template(with_template(kind, template), date="2026-11-30")
    whole = render(MESSAGES, tokenizer, place="row 0", open_turn=False)
    ends = [render(MESSAGES[:end], tokenizer, place="row 0", open_turn=end % 2 == 1) for end in (1, 2, 3)]
    assert all(whole.startswith(end) for end in ends)
    cuts = [0, *map(len, ends), len(whole)]
    parts = [whole[begin:end] for begin, end in itertools.pairwise(cuts)]
    [ids], [inside] = encode_parts([parts], tokenizer, special=False)
    assert not inside
    text = whole if template == "dates" else tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == whole
    assert joined(ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    for end in (1, 2, 3):
        assert joined(ids[:end]) == tokenizer(ends[end - 1], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_assistants_last_words_go_on(kind):
    tokenizer = with_template(kind, "ChatML")
    opened = render([MESSAGES[0], {"role": "assistant", "content": "The answer is"}], tokenizer, place="row 0")
    assert opened == render(MESSAGES[:1], tokenizer, place="row 0") + "The answer is"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [("The film was", " great"), ("The film was", " not", " great"), ("a\n", "\nb")])
def test_what_follows_a_text_is_what_stands_behind_it_in_the_whole(kind, parts):
    tokenizer = KINDS[kind]()
    [ids], [inside] = encode_parts([parts], tokenizer, special=True)
    assert not inside
    assert joined(ids) == encode_texts(["".join(parts)], tokenizer)[0]
    assert ids[0] == encode_texts([parts[0]], tokenizer)[0]
    before = ids[0]
    for part, piece in zip(parts[1:], ids[1:], strict=True):
        assert added_text(before, piece, tokenizer) == part
        before = before + piece


@pytest.mark.parametrize("kind", KINDS)
def test_behind_a_boundary_inside_a_token_the_text_goes_on_as_a_policy_would_write_it(kind):
    tokenizer = KINDS[kind]()
    [ids], [inside] = encode_parts([("The film was ", "great", " I am")], tokenizer, special=True)
    assert inside
    assert ids[0] == encode_texts(["The film was "], tokenizer)[0]
    assert (
        added_text(ids[0], ids[1], tokenizer) == "great" and added_text(ids[0] + ids[1], ids[2], tokenizer) == " I am"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_begins_once_and_does_not_end(kind):
    tokenizer = KINDS[kind]()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain, begun = encode_texts(["The film was", "<s>The film was"], tokenizer)
    assert eos not in (plain[-1], begun[-1]) and begun.count(bos) == 1
    assert plain.count(bos) == (0 if tokenizer("")["input_ids"] == [] else 1)
    assert encode_texts(["no</s>"], tokenizer)[0][-1] == eos, "the text's own end stays"


def test_bytes_of_a_character_that_the_ids_before_begin_are_part_of_what_is_added():
    tokenizer = KINDS["byte-level"]()
    ids = encode_texts(["né"], tokenizer)[0]
    assert added_text(ids[:-1], ids[-1:], tokenizer) == "é"


def test_a_day_later_a_template_with_a_date_writes_the_same():
    tokenizer = with_template("byte-level", "dates")
    text = render(MESSAGES[:1], set_template(tokenizer, date="2024-02-29"), place="row 0")
    assert text.startswith("Today is 29 Feb 2024\n") and tokenizer.chat_template == DATED


def test_arguments_reach_the_template_and_are_refused_where_it_names_none():
    tokenizer = with_template("byte-level", "thoughts")
    set_template(tokenizer, args={"enable_thinking": False})
    assert render(MESSAGES[:1], tokenizer, place="row 0").endswith("<think>\n\n</think>\n\n")
    with pytest.raises(UserError, match="names no 'enable_thoughts'"):
        set_template(tokenizer, args={"enable_thoughts": False})
    for name in ("messages", "tools", "add_generation_prompt"):
        with pytest.raises(UserError, match=f"'{name}' is no argument to set for the chat template"):
            set_template(tokenizer, args={name: []})
    with pytest.raises(UserError, match="not one like 2026-11-30"):
        set_template(tokenizer, date="30 Nov")


@pytest.mark.parametrize("kind", campaign_but_for(KINDS, "prepending normalizer, BOS and EOS"))
def test_the_page_shows_what_holds_with_every_kind(kind):
    assert tokenizer_table.row(kind) in tokenizer_table.of_page()
    assert "**no**" not in tokenizer_table.of_page()
