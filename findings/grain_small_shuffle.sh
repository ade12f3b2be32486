#!/usr/bin/env bash
# An index of grain's shuffle takes the longer the fewer rows there are.
#
# Versions: grain 0.2.18, Python 3.11.
# Behaviour: `MapDataset.shuffle` walks a permutation of some 2^16 numbers until it meets one below the number of rows: of 4 rows
#   an index takes milliseconds, of 60,000 microseconds. A batch of 128 from 4 prompts takes about a second to put together.
# One would guess: an index takes about the same for any number of rows, or less where there are few.
# What to do: look an index up once a group of equal rows; repeat a small list of rows before it is shuffled where the order
#   within an epoch does not matter; or permute the numbers of an epoch oneself.
# Seen on 2026-12-01:
#   an index of 4 rows takes over 100 times as long as one of 60,000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile grain==0.2.18
"$folder/venv/bin/python" - <<'PYTHON'
import statistics
import time

import grain


def seconds(rows):
    order = grain.MapDataset.range(rows).seed(0).shuffle().repeat()
    order[0]
    found = []
    for index in range(1, 33):
        begin = time.perf_counter()
        order[index]
        found.append(time.perf_counter() - begin)
    return statistics.mean(found)


ratio = statistics.median(seconds(4) / seconds(60_000) for _ in range(5))
assert ratio > 30, f"changed: an index of 4 rows takes {ratio:.0f} times as long as one of 60,000"
print(f"an index of 4 rows takes over {100 if ratio > 100 else 30} times as long as one of 60,000")
PYTHON
