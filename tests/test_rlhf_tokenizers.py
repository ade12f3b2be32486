"""All four scripts on each kind of tokenizer, with a reward that misses a lost space or a lost tag."""

import dataclasses
import json

import jax
import pytest
from transformers import AutoTokenizer

from experiments import rlhf
from experiments.study.pairs import Pairs
from pgjax.models.causal_lm import causal_lm
from pgjax.models.io.load import load, save_pretrained
from pgjax.models.io.stops import stop_ids, stop_strings
from tests.sizes import campaign_but_for
from tests.tiny import ARCHITECTURES
from tests.tokenizer_kinds import KINDS, TEMPLATES, TEXTS, with_template

pytestmark = pytest.mark.usefixtures("no_pictures")

SEEN: dict = {}  # the tokenizer as transformers reads it, and what the reward has judged


def reward(prompts, completions, completion_ids, raw_completions, **columns):
    """Score the length; check each text against transformers' own reading of prompt and completion as one."""
    tokenizer = SEEN["tokenizer"]
    specials = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for prompt, text, ids, raw in zip(prompts, completions, completion_ids, raw_completions, strict=True):
        before = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        written = ids[:-1] if ids[-1] in SEEN["stops"] else ids
        for expected, skip in ((raw, False), (text, True)):
            # special tokens are left out of the completion alone, as those of the prompt may hold its end
            kept = [i for i in written if not (skip and i in specials)]
            whole = tokenizer.decode(before + kept, clean_up_tokenization_spaces=False)
            start = tokenizer.decode(before, clean_up_tokenization_spaces=False)
            assert start + expected == whole or "\N{REPLACEMENT CHARACTER}" in whole, (start, expected, whole)
        SEEN["judged"].append((text, raw))
    return [float(len(text)) for text in completions]


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


CASES = [(kind, list(TEMPLATES)[i % len(TEMPLATES)]) for i, kind in enumerate(KINDS)]


@pytest.mark.parametrize(("kind", "template"), campaign_but_for(CASES))
def test_scripts_judge_learn_and_save_what_the_policy_wrote(tmp_path, monkeypatch, kind, template):
    tokenizer = with_template(kind, template)
    lm = causal_lm(dataclasses.replace(ARCHITECTURES["llama"], vocab_size=len(tokenizer), max_positions=256))
    save_pretrained(tmp_path / "base", lm, lm.init(jax.random.key(0)), tokenizer)
    SEEN.update(tokenizer=AutoTokenizer.from_pretrained(tmp_path / "base"), stops=stop_ids(tokenizer), judged=[])
    chats = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": f"<think>no</think>{b}"}]}
        for a in TEXTS[:4]
        for b in TEXTS[:2]
    ]
    base = rlhf.Config()
    config = rlhf.Config(
        output=tmp_path / "run", model=str(tmp_path / "base"), chat=True, data=lines(tmp_path / "chats.jsonl", chats),
        held_out_data=None, prompts=lines(tmp_path / "prompts.jsonl", [{"prompt": text} for text in TEXTS]),
        held_out_prompts=None, gold=f"{__name__}:reward", max_new_tokens=12, stop_strings=("no film",),
        template_date="2026-11-30",
        sft=dataclasses.replace(base.sft, epochs=1, batch_size=4, microbatches=1, held_out_rows=4, max_length=128),
        pair=Pairs(train=8, held_out=4, batch_size=8),
        reward_model=dataclasses.replace(base.reward_model, epochs=1, batch_size=4),
        ppo=dataclasses.replace(base.ppo, steps=1, batch_size=4, held_out_rows=2, learning_rate=1e-3),
    )  # fmt: skip
    rlhf.main(config)
    assert len(SEEN["judged"]) >= 24 + 4 and any(raw != text for text, raw in SEEN["judged"])
    assert any(text.startswith(" ") for text, _ in SEEN["judged"]), "no completion begins with a space: nothing to lose"
    _, _, saved = load(tmp_path / "run" / "ppo" / "policy")
    assert (stop_ids(saved), stop_strings(saved)) == (stop_ids(tokenizer), ("no film",))
    assert saved.get_vocab() == tokenizer.get_vocab()
