"""What scripts train on: the tiny Llama, saved with a byte-level tokenizer in Hugging Face layout, rows of text, and a reward."""

import copy
import dataclasses
import json
from pathlib import Path

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pgjax as pg
from tests.tiny import ARCHITECTURES

EARLY_LETTERS = "tests.tiny_task:early_letters"  # as a flag names it
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def save_tiny_model(folder: Path, *, max_positions: int = 64, unused_ids: int = 0) -> Path:
    """Write the model; pad equals eos, as in many real ones. Its vocabulary has 257 ids, and some that mean nothing."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(["<|end|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    arch = dataclasses.replace(
        ARCHITECTURES["llama"], vocab_size=len(vocab) + unused_ids, max_positions=max_positions,
        heads=2, kv_heads=1, head_dim=8,
    )  # fmt: skip
    lm = pg.causal_lm(arch)
    pg.save_pretrained(folder, lm, lm.init(jax.random.key(0)), fast)
    return folder


def save_tiny_task(folder: Path) -> Path:
    """Write the model, and beside it what each script learns from: pairs, texts and prompts, .jsonl each."""
    save_tiny_model(folder / "model")
    words = ("sun", "rain", "fog", "wind", "snow", "ice", "dew", "hail")
    pairs = [{"prompt": "sky:", "chosen": f" {word}+", "rejected": f" {word}-"} for word in words * 2]
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    for name, rows in {"pairs": pairs, "texts": texts, "prompts": [{"prompt": "sky:"}]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def task_config(script, folder: Path, output: Path, **fields):
    """A script's config on the files of `save_tiny_task`, the same ones held out."""
    names = {"prompts": "prompts", "data": "texts", "pairs": "pairs"}
    field = next(name for name in names if name in script.Config.__dataclass_fields__)
    source = str(folder / f"{names[field]}.jsonl")
    return script.Config(model=str(folder / "model"), output=output, held_out=source, **{field: source}, **fields)


def other_letters(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer but for the ids of its letters, which come in the opposite order."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    letters = [letter for letter in spec["model"]["vocab"] if letter != "<|end|>"]
    spec["model"]["vocab"] = {letter: i for i, letter in enumerate(["<|end|>", *letters[::-1]])}
    other = copy.deepcopy(tokenizer)
    other._tokenizer = Tokenizer.from_str(json.dumps(spec))
    return other


def early_letters(prompts, completions, **columns) -> list[float]:
    """A black box that random letters score differently in: the share of characters before m."""
    return [sum(letter < "m" for letter in text) / max(len(text), 1) for text in completions]
