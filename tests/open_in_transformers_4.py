"""Hold saved folders against transformers 4: the same ids, text, chat, stops and rope as pgjax has.

    python3 -m venv four && four/bin/pip install 'transformers==4.57.*' jinja2
    JAX_PLATFORMS=cpu python -m tests.open_in_transformers_4 four/bin/python

Every kind of tokenizer with one of the tiny models each. It ends with 1 where something differs.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from pgjax.models.causal_lm import causal_lm
from pgjax.models.io.load import save_pretrained
from pgjax.models.io.stops import stop_ids
from tests.tiny import ARCHITECTURES
from tests.tokenizer_kinds import CHATML, KINDS, TEXTS, TOOLS

MESSAGES = [{"role": "user", "content": "no"}, {"role": "assistant", "content": "yes"}]
ASKED = [*TEXTS, "<|im_start|>user\nno yes<|im_end|>\n", "<think>no</think>yes<|tool|>é"]
READ = """
import json, sys
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, __version__
asked, messages = json.loads(sys.argv[1])
found = {}
for folder in sys.argv[2:]:
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in asked]
    found[folder] = {
        "ids": ids, "texts": [tokenizer.decode(x, clean_up_tokenization_spaces=False) for x in ids],
        "special": sorted(tokenizer.all_special_tokens), "chat": tokenizer.apply_chat_template(messages, tokenize=False),
        "stops": [config.eos_token_id, GenerationConfig.from_pretrained(folder).eos_token_id],
        "rope": [getattr(config, "rope_theta", None), getattr(config, "rope_scaling", None)],
    }
print(json.dumps([__version__, found]))
"""


def expected(tokenizer, arch):
    """What transformers 4 is to read."""
    ids = [tokenizer(text)["input_ids"] for text in ASKED]
    rope, scaling = arch.rope, None
    if rope is not None and rope.factor is not None:
        scaling = {
            "rope_type": "llama3", "factor": rope.factor, "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor, "original_max_position_embeddings": rope.original_max_positions,
        }  # fmt: skip
    return {
        "ids": ids, "texts": [tokenizer.decode(x, clean_up_tokenization_spaces=False) for x in ids],
        "special": sorted(tokenizer.all_special_tokens), "chat": tokenizer.apply_chat_template(MESSAGES, tokenize=False),
        "stops": [list(stop_ids(tokenizer))] * 2, "rope": [None if rope is None else rope.theta, scaling],
    }  # fmt: skip


def main(python: str) -> int:
    """Save, let the other interpreter read, and compare; the number of differences."""
    with tempfile.TemporaryDirectory() as root:
        wanted = {}
        for number, (kind, make) in enumerate(KINDS.items()):
            name, arch = list(ARCHITECTURES.items())[number % len(ARCHITECTURES)]
            tokenizer = make()
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
            tokenizer.add_tokens(["<plain>"])
            tokenizer.chat_template = {"default": CHATML, "tool_use": TOOLS} if number % 2 else CHATML
            lm = causal_lm(dataclasses.replace(arch, vocab_size=len(tokenizer)))
            folder = Path(root) / f"{name}, {kind}"
            save_pretrained(folder, lm, lm.init(jax.random.key(0)), tokenizer)
            wanted[str(folder)] = expected(tokenizer, arch)
        asked = json.dumps([ASKED, MESSAGES])
        told = subprocess.run(
            [python, "-c", READ, asked, *wanted], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    version, found = json.loads(told.splitlines()[-1])
    wrong = 0
    for folder, fields in wanted.items():
        differing = [name for name in fields if fields[name] != found[folder][name]]
        wrong += len(differing)
        print(f"transformers {version}: {Path(folder).name}: {', '.join(differing) or 'the same'}")
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1])))
