#!/usr/bin/env bash
# Neighbouring seeds of grain's shuffle deal the same orders, one epoch apart.
#
# Versions: grain 0.2.18, Python 3.11.
# Behaviour: in `MapDataset.source(rows).shuffle(seed=s).repeat()` epoch e + 1 has the order of epoch e of seed s + 1.
#   Runs with the seeds 0, 1 and 2, meant as independent repetitions, read the same batches one epoch apart.
# One would guess: the orders of two seeds have nothing in common.
# What to do: take the seed from `MapDataset.seed(s)`, which mixes it, and give `shuffle` none.
# Seen on 2026-11-30:
#   orders of 5 epochs of 1,000 rows that two seeds share: 4 by shuffle(seed=0) and (seed=1), 0 by seed(0) and seed(1)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile grain==0.2.18
"$folder/venv/bin/python" - <<'PYTHON'
import grain

ROWS, EPOCHS = 1000, 5


def orders(dataset):
    repeated = dataset.repeat()
    return [tuple(repeated[epoch * ROWS + row] for row in range(ROWS)) for epoch in range(EPOCHS)]


source = grain.MapDataset.range(ROWS)
by_shuffle = [orders(source.shuffle(seed=seed)) for seed in (0, 1)]
by_seed = [orders(source.seed(seed).shuffle()) for seed in (0, 1)]
in_common = [len(set(one) & set(other)) for one, other in (by_shuffle, by_seed)]
print(
    f"orders of {EPOCHS} epochs of 1,000 rows that two seeds share: {in_common[0]} by shuffle(seed=0) and (seed=1), "
    f"{in_common[1]} by seed(0) and seed(1)"
)
assert by_shuffle[0][1:] == by_shuffle[1][:-1], "changed: epoch e + 1 of seed 0 is no longer epoch e of seed 1"
assert in_common == [EPOCHS - 1, 0], "changed: another number of orders in common"
PYTHON
