"""A table of what holds with every kind of tokenizer, for experiments/README.md.

python -m tests.tokenizer_table           # print it
python -m tests.tokenizer_table --write   # and put it into the page
"""

import dataclasses
import tempfile

import jax
import numpy as np

import pgjax as pg
from pgjax.data.examples import check_examples, encode_examples
from pgjax.data.preferences import check_pairs, encode_pairs
from pgjax.data.prompts import completion_texts, encode_prompts
from pgjax.models.io.chat_template import set_template
from pgjax.models.io.stops import stop_ids
from tests import page_table
from tests.tiny import ARCHITECTURES
from tests.tokenizer_kinds import KINDS, TEMPLATES, with_template

PAGE = "experiments/README.md", "tests.tokenizer_table"
PROMPT, ANSWER = "The film was", " great"
USER, BOT = {"role": "user", "content": PROMPT}, {"role": "assistant", "content": "I am"}
CHAT = [USER, BOT, {"role": "user", "content": "no"}, {"role": "assistant", "content": "yes"}]
CLOCK = [{"type": "function", "function": {"name": "film", "parameters": {}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "film", "arguments": {}}}]}


def whole_ids(tokenizer, text):
    """Tokenise a text as transformers does, without what comes behind it."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def completion_text(kind):
    tokenizer = KINDS[kind]()
    ids = np.array([whole_ids(tokenizer, PROMPT + ANSWER)])
    sampled = np.arange(ids.shape[1])[None] >= len(whole_ids(tokenizer, PROMPT))
    return completion_texts(ids, sampled, tokenizer) == [ANSWER]


def prompt_and_completion(kind):
    tokenizer = KINDS[kind]()
    rows = check_examples([("row 0", {"prompt": PROMPT, "completion": ANSWER})])
    (example,) = encode_examples(rows, tokenizer, chat=False, max_length=99).examples
    known = len(whole_ids(tokenizer, PROMPT))
    is_whole = example.ids == [*whole_ids(tokenizer, PROMPT + ANSWER), tokenizer.eos_token_id]
    return is_whole and example.learned == [i >= known for i in range(len(example.ids))]


def conversation(kind):
    return all(is_transformers(with_template(kind, template)) for template in TEMPLATES if template != "dates")


def is_transformers(tokenizer):
    """Say whether a conversation has the ids that transformers gives it, up to the last end of a turn."""
    (example,) = encode_examples(
        check_examples([("row 0", {"messages": CHAT})]), tokenizer, chat=True, max_length=99
    ).examples
    theirs = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    return example.ids == theirs[: len(example.ids)] and example.ids[-1] in stop_ids(tokenizer)


def pair(kind):
    tokenizer = KINDS[kind]()
    pairs = check_pairs([("row 0", {"prompt": PROMPT, "chosen": ANSWER, "rejected": " not"})])
    (found,) = encode_pairs(pairs, tokenizer, chat=False, eos=True, max_length=99).kept
    return found.chosen == [*whole_ids(tokenizer, PROMPT + ANSWER), tokenizer.eos_token_id]


def open_end(kind):
    tokenizer = KINDS[kind]()
    (ids,) = encode_prompts([PROMPT], tokenizer, chat=False)
    return ids == whole_ids(tokenizer, PROMPT)


def one_beginning(kind):
    tokenizer = KINDS[kind]()
    (ids,) = encode_prompts(["<s>" + PROMPT], tokenizer, chat=False)
    return ids.count(tokenizer.bos_token_id) == 1


def going_on(kind):
    tokenizer = with_template(kind, "ChatML")
    opened = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True) + BOT["content"]
    return encode_prompts([[USER, BOT]], tokenizer, chat=True) == [
        tokenizer(opened, add_special_tokens=False)["input_ids"]
    ]


def tools(kind):
    tokenizer = with_template(kind, "tools")
    rows = check_examples([("row 0", {"messages": [USER, CALL], "tools": CLOCK})])
    (example,) = encode_examples(rows, tokenizer, chat=True, max_length=999).examples
    theirs = tokenizer.apply_chat_template([USER, CALL], tools=CLOCK, tokenize=True, return_dict=False)
    return example.ids == theirs[: len(example.ids)] and any(example.learned)


def stops(kind):
    tokenizer = with_template(kind, "ChatML")
    return set(stop_ids(tokenizer)) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}


def saved(kind):
    tokenizer = set_template(with_template(kind, "thoughts"), args={"enable_thinking": False})
    lm = pg.causal_lm(dataclasses.replace(ARCHITECTURES["llama"], vocab_size=len(tokenizer)))
    with tempfile.TemporaryDirectory() as folder:
        pg.save_pretrained(folder, lm, lm.init(jax.random.key(0)), tokenizer)
        _, _, read = pg.load(folder)
    same = encode_prompts([CHAT[:1]], read, chat=True) == encode_prompts([CHAT[:1]], tokenizer, chat=True)
    return same and stop_ids(read) == stop_ids(tokenizer)


CHECKS = {
    "completion text": completion_text,
    "fine-tuning": prompt_and_completion,
    "chat": conversation,
    "pairs": pair,
    "prompt's end": open_end,
    "one BOS": one_beginning,
    "prefill": going_on,
    "tools": tools,
    "stops": stops,
    "saved": saved,
}


def row(kind):
    """Try everything with one kind: a row of the table in Markdown."""
    return f"| {kind} | {' | '.join('yes' if check(kind) else '**no**' for check in CHECKS.values())} |\n"


def table():
    """Try everything with every kind."""
    head = f"| tokenizer | {' | '.join(CHECKS)} |\n|{' --- |' * (len(CHECKS) + 1)}\n"
    return head + "".join(map(row, KINDS))


def of_page():
    """Read the table that the page shows."""
    return page_table.of_page(*PAGE)


if __name__ == "__main__":
    page_table.show(*PAGE, table())
