#!/usr/bin/env bash
# A tokenizer that transformers 5 has saved does not open in transformers 4.
#
# Versions: transformers 5.24.0 and 4.57.6, Python 3.11.
# Behaviour: 5.24 writes `"tokenizer_class": "TokenizersBackend"` for a plain fast tokenizer. 4.57 has no class of
#   that name, and AutoTokenizer raises, though tokenizer.json beside it is one that 4.57 reads. With the name
#   PreTrainedTokenizerFast in its place both open it and give the same ids.
# One would guess: a folder that one release saved opens in the release before, which reads the same tokenizer.json.
# What to do: write `PreTrainedTokenizerFast` into tokenizer_config.json of what others shall open.
# Seen on 2026-11-30:
#   saved by 5.24.0 as TokenizersBackend
#   4.57.6: ValueError: Tokenizer class TokenizersBackend does not exist or is not currently imported.
#   4.57.6, named PreTrainedTokenizerFast: opens, same ids
#   5.24.0, named PreTrainedTokenizerFast: opens, same ids
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1 TRANSFORMERS_VERBOSITY=error
for version in 5.24.0 4.57.6; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q --no-compile "transformers==$version"
done
cd "$folder"
5.24.0/bin/python - <<'PYTHON'
import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "film": 2}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained("saved")
config = json.load(open("saved/tokenizer_config.json"))
print("saved by 5.24.0 as", config["tokenizer_class"])
assert config["tokenizer_class"] == "TokenizersBackend", "changed: another class is written"
assert AutoTokenizer.from_pretrained("saved")("a film")["input_ids"] == [1, 2]
PYTHON
4.57.6/bin/python - <<'PYTHON'
import json

from transformers import AutoTokenizer

try:
    AutoTokenizer.from_pretrained("saved")
except ValueError as error:
    print(f"4.57.6: {type(error).__name__}: {error}")
else:
    raise AssertionError("changed: 4.57.6 opens it")
config = json.load(open("saved/tokenizer_config.json"))
json.dump(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, open("saved/tokenizer_config.json", "w"))
assert AutoTokenizer.from_pretrained("saved")("a film")["input_ids"] == [1, 2], "changed: the other name opens otherwise"
print("4.57.6, named PreTrainedTokenizerFast: opens, same ids")
PYTHON
5.24.0/bin/python - <<'PYTHON'
from transformers import AutoTokenizer

assert AutoTokenizer.from_pretrained("saved")("a film")["input_ids"] == [1, 2], "changed: 5.24.0 needs its own name"
print("5.24.0, named PreTrainedTokenizerFast: opens, same ids")
PYTHON
