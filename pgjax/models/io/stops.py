"""Where completions end: one set of ids, of the model's configuration, the tokenizer and its chat template; and strings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.io.tensors import read_json

STOP_IDS, STOP_STRINGS = (
    "stop_token_ids",
    "stop_strings",
)  # settings of the tokenizer, so that tokenizer_config.json saves them
_WORDS = "Quite so"  # an answer that no template holds


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """List the ids that end a completion.

    Args:
        tokenizer: as `load` returns it, or any other Hugging Face tokenizer.

    Returns:
        Ids without repeats, in this order: those of generation_config.json or else config.json, the tokenizer's end of
        sequence, the end of a turn in its chat template; or what `set_stops` has put in their place. May be empty.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "<end>": 1, "a": 2}, unk_token="a"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
        >>> stop_ids(tokenizer)
        (0,)
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
        >>> _ = tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
        >>> stop_ids(tokenizer)
        (0, 1)
    """
    if STOP_IDS in tokenizer.init_kwargs:
        return tuple(int(i) for i in tokenizer.init_kwargs[STOP_IDS])
    return gathered_stops((), tokenizer)


def stop_strings(tokenizer: Any) -> tuple[str, ...]:
    """List the texts at which a completion ends, as `set_stops` or the model's generation_config.json gives them.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
        >>> stop_strings(set_stops(PreTrainedTokenizerFast(tokenizer_object=words), [], ["aa"]))
        ('aa',)
    """
    return tuple(tokenizer.init_kwargs.get(STOP_STRINGS, ()))


def end_id(tokenizer: Any, *, chat: bool) -> int | None:
    """Choose the stop id that ends an answer to learn.

    Args:
        tokenizer: as for `stop_ids`.
        chat: whether the answer stands in a chat template, which ends turns in its own way.

    Returns:
        The end of a turn in the chat template where that is asked for, else the tokenizer's end of sequence, else the first of
        the stop ids, of which it is one; None where there is none.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "<end>": 1, "a": 2}, unk_token="a"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
        >>> _ = tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
        >>> end_id(tokenizer, chat=True), end_id(tokenizer, chat=False)
        (1, 0)
    """
    stops = stop_ids(tokenizer)
    liked = [turn_end(tokenizer) if chat else None, tokenizer.eos_token_id, *stops]
    return next((i for i in liked if i in stops), None)


def gathered_stops(configured: Iterable[int], tokenizer: Any) -> tuple[int, ...]:
    """Put the ids that a model's configuration ends at, the tokenizer's and the chat template's into one set, in this order.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
        >>> gathered_stops([5, 0], PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>"))
        (5, 0)
    """
    found = [*configured, tokenizer.eos_token_id, turn_end(tokenizer)]
    return tuple(int(i) for i in dict.fromkeys(found) if i is not None)


def read_stops(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Settle where a model in a folder ends: what `set_stops` chose before it was saved, else what `gathered_stops` finds.

    What was chosen stands in the tokenizer's settings, and in the configurations too. Where these have been changed since,
    they count.

    Args:
        folder: holds generation_config.json, config.json, both or neither.
        tokenizer: the folder's.

    Returns:
        The ids.

    Raises:
        UserError: a configuration whose eos_token_id is neither an id nor a list of ids.
    """
    configured = _configured(folder)
    saved = tokenizer.init_kwargs.get(STOP_IDS)
    if saved is not None and (configured is None or set(saved) == set(configured)):
        return tuple(saved)
    return gathered_stops(configured or (), tokenizer)


def read_stop_strings(folder: Path, tokenizer: Any) -> tuple[str, ...]:
    """Settle at which texts a model in a folder ends: what `set_stops` chose, else what its generation_config.json says.

    Args:
        folder: may hold generation_config.json.
        tokenizer: the folder's.

    Returns:
        The texts.

    Raises:
        UserError: a configuration whose stop_strings are neither a text nor a list of texts.
    """
    file = folder / "generation_config.json"
    found = stop_strings(tokenizer) or (read_json(file).get(STOP_STRINGS) if file.is_file() else None) or ()
    strings = [found] if isinstance(found, str) else found
    if not isinstance(strings, list | tuple) or not all(isinstance(string, str) and string for string in strings):
        raise UserError(f"{file}: stop_strings = {found!r} must be a text or a list of texts, none of them empty")
    return tuple(strings)


def _configured(folder: Path) -> list[int] | None:
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise UserError(f"{folder / name}: eos_token_id = {found!r} must be an id or a list of ids")
        return ids
    return None


def turn_end(tokenizer: Any) -> int | None:
    """Find the token that ends an assistant's turn in a chat template: the first added token behind the words of one.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Returns:
        Its id; None without a template, and for one that writes no such token or refuses a plain exchange.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<end>": 0, "<turn>": 1, "a": 2}, unk_token="a"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> _ = tokenizer.add_special_tokens({"additional_special_tokens": ["<end>", "<turn>"]})
        >>> tokenizer.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}<end>{% endfor %}"
        >>> turn_end(tokenizer)
        0
    """
    if tokenizer.chat_template is None:
        return None
    behind = next(filter(None, (_behind(content, tokenizer) for content in _CONTENTS)), "")
    tokens = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    tokens |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind.strip() else []
    # Some tokenizers have line ends and rows of spaces as added tokens.
    return next((i for i in ids if tokens.get(i, "").replace("▁", " ").strip()), None)


_CONTENTS: tuple[Any, ...] = (_WORDS, [{"type": "text", "text": _WORDS}])  # some templates take parts alone


def _behind(content: Any, tokenizer: Any) -> str:
    """Render an exchange, and give what stands behind the answer's words; nothing where the template leaves them out."""
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except ImportError:
        raise
    except Exception:  # a template is a program of its own: it may fail with anything
        return ""
    before, _, behind = text.rpartition(_WORDS)
    return behind if _WORDS in before else ""


def set_stops(tokenizer: Any, tokens: Sequence[str], strings: Sequence[str] = ()) -> Any:
    """Let completions end at these tokens and no others, and at these strings: in the tokenizer, which saves it.

    Args:
        tokenizer: a Hugging Face tokenizer, changed in place; None is passed on.
        tokens: each the text of one token, or an id in digits; none of them changes nothing.
        strings: texts, of any number of tokens; none of them changes nothing.

    Returns:
        The same tokenizer.

    Raises:
        UserError: a text that is no single token, with the nearest one; an id that the tokenizer does not have.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "<|im_end|>": 1, "a": 2}, unk_token="a"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
        >>> stop_ids(set_stops(tokenizer, ["<|im_end|>", "0"]))
        (1, 0)
    """
    if tokens and tokenizer is not None:
        tokenizer.init_kwargs[STOP_IDS] = list(dict.fromkeys(_id_of(token, tokenizer) for token in tokens))
    if strings and tokenizer is not None:
        tokenizer.init_kwargs[STOP_STRINGS] = list(dict.fromkeys(strings))
    return tokenizer


def _id_of(token: str, tokenizer: Any) -> int:
    vocab = tokenizer.get_vocab()
    if token.isdecimal():
        if int(token) not in vocab.values():
            raise UserError(f"no token has the stop id {token}: the tokenizer's largest is {max(vocab.values())}")
        return int(token)
    if token in vocab:
        return int(vocab[token])
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and tokenizer.decode(ids) == token:  # as a line end, which byte-level vocabularies write otherwise
        return int(ids[0])
    added = [added.content for added in tokenizer.added_tokens_decoder.values()]
    near = difflib.get_close_matches(token, added, n=1, cutoff=0.0)
    hint = f": the nearest token is {near[0]!r}" if near else ""
    raise UserError(f"the stop token {token!r} is no single token of the tokenizer{hint}")


def told_stops(tokenizer: Any) -> str:
    """Say in one line where completions end.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
        >>> told_stops(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>"))
        "completions end at '<eos>' (0)"
    """
    named = [f"{(tokenizer.decode([i]) or tokenizer.convert_ids_to_tokens(i))!r} ({i})" for i in stop_ids(tokenizer)]
    named += [f"the text {string!r}" for string in stop_strings(tokenizer)]
    if not named:
        return "completions have no end: no end of sequence is known, so each is as long as it may be"
    return f"completions end at {', '.join(named)}"
