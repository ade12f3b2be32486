"""Make `gguf_sentencepiece.json`, with the package sentencepiece: the pieces of two small models, and its ids of texts.

python tests/goldens/make_gguf_sentencepiece.py
"""

import io
import json
import random
from pathlib import Path

WORDS = [
    "the", "rain", "on", "the", "sea", "owls", "bread", "haiku", "write", "about", "moon", "river", "café", "naïve", "12", "345",
    "hello", "world", "in", "a", "of", "and", "to",
]  # fmt: skip
TEXTS = [
    "the rain on the sea",
    "  two  spaces",
    "Hello, café naïve 12345!",
    "日本 🎉 owls",
    "a\nb\n\nc",
    "",
    "tab\there   ",
]
KINDS = {"is_unknown": 2, "is_control": 3, "is_byte": 6, "is_unused": 5}  # as GGUF numbers them


def main() -> None:
    import sentencepiece  # the gate imports this file, and does without the package

    rng, held = random.Random(0), {}
    lines = [" ".join(rng.choices(WORDS, k=8)) for _ in range(400)]
    for name, in_front in (("space in front", True), ("none in front", False)):
        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=380, model_type="bpe", byte_fallback=True,
            character_coverage=0.99, add_dummy_prefix=in_front, normalization_rule_name="identity",
            remove_extra_whitespaces=False, user_defined_symbols=["<t>"], minloglevel=2,
        )  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
        ids = range(model.get_piece_size())
        kinds = [next((kind for test, kind in KINDS.items() if getattr(model, test)(i)), 1) for i in ids]
        kinds[model.piece_to_id("<t>")] = 4
        held[name] = {
            "tokens": [model.id_to_piece(i) for i in ids],
            "scores": [model.get_score(i) for i in ids],
            "token_type": kinds,
            "texts": TEXTS,
            "ids": [model.encode(text) for text in TEXTS],
        }
    text = json.dumps({"version": sentencepiece.__version__, "models": held}, ensure_ascii=False, separators=(",", ":"))
    (Path(__file__).parent / "gguf_sentencepiece.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
