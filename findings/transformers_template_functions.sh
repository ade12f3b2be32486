#!/usr/bin/env bash
# A function given to a chat template as a variable arrives as a text.
#
# Versions: transformers 5.24.0, jinja2 3.1.6, Python 3.11.
# Behaviour: `apply_chat_template(..., strftime_now=function)` replaces what is not plain data by a text that names its type, and
#   a template that calls it fails: 'str' object is not callable. In 5.0.0 the function reached the template.
# One would guess: as documented, all further arguments can be used by the template; so a run can fix the date that templates
#   with `strftime_now` write.
# What to do: give dates as texts, or write them into a copy of the template and pass that as `chat_template`.
# Seen on 2026-12-01:
#   5.0.0: Today is 29 Feb 2024
#   5.24.0: TypeError: 'str' object is not callable
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
for version in 5.0.0 5.24.0; do
  "$folder/venv/bin/pip" install -q --no-compile "transformers==$version" jinja2==3.1.6
  "$folder/venv/bin/python" - <<'PYTHON' 2> /dev/null
import datetime

import transformers
from tokenizers import Tokenizer, models

tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}"
day = datetime.datetime(2024, 2, 29)
messages = [{"role": "user", "content": "Hello"}]
try:
    seen = tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=day.strftime)
except TypeError as error:
    seen = f"TypeError: {error}"
print(f"{transformers.__version__}: {seen}")
expected = {"5.0.0": "Today is 29 Feb 2024", "5.24.0": "TypeError: 'str' object is not callable"}
raise SystemExit(seen != expected[transformers.__version__])
PYTHON
done
