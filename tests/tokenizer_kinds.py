"""The kinds of tokenizers and of chat templates that users bring, made here: nothing is downloaded."""

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The film was great", "the film was not great at all", "I am not here, you are there.", "What is 1 + 2? It is 3.",
    "a\nb\n\nc  d", "no yes", "The answer is", "user assistant system tool model think",
]  # fmt: skip
SPECIAL = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<think>", "</think>",
]  # fmt: skip
_MERGED = ("▁The", "▁film", "▁was", "▁great", "great", "▁I", "▁not", "▁yes", "▁answer", "▁is")


def byte_level(*, prefix_space: bool = False, around: str | None = None) -> PreTrainedTokenizerFast:
    """Make one as GPT-2's, Llama 3's and Qwen's are; `around` is what its post-processor puts around a text, as ``<s> $A``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return _wrapped(tokenizer, around)


def sentencepiece_like(*, metaspace: str | None = None, around: str | None = None) -> PreTrainedTokenizerFast:
    """Make one as Llama 2's, Mistral's and Gemma's are: ▁ for a space, and bytes for what is not in the vocabulary.

    Args:
        metaspace: None: a normalizer prepends the ▁; else the scheme of the Metaspace pre-tokenizer that does ("always" or
            "first").
        around: what its post-processor puts around a text.
    """
    letters = sorted({letter for text in TEXTS for letter in text} - {" "} | {"▁", "m"})
    vocab = {token: i for i, token in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters])}
    merges: list[tuple[str, str]] = []
    for word in _MERGED:
        for end in range(1, len(word)):
            if (pair := (word[:end], word[end])) not in merges:
                merges.append(pair)
            vocab.setdefault(word[: end + 1], len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if metaspace is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        options = {"replacement": "▁", "prepend_scheme": metaspace}
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**options, split=False)
        tokenizer.decoder = decoders.Metaspace(**options)
    return _wrapped(tokenizer, around)


def _wrapped(tokenizer: Tokenizer, around: str | None) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    if around is not None:
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "byte-level, prefix space": lambda: byte_level(prefix_space=True),
    "byte-level, BOS and EOS": lambda: byte_level(around="<s> $A </s>"),
    "prepending normalizer": sentencepiece_like,
    "prepending normalizer, BOS": lambda: sentencepiece_like(around="<s> $A"),
    "prepending normalizer, BOS and EOS": lambda: sentencepiece_like(around="<s> $A </s>"),
    "Metaspace": lambda: sentencepiece_like(metaspace="always"),
    "Metaspace, first": lambda: sentencepiece_like(metaspace="first", around="<s> $A"),
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_HEADERS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THOUGHTS = (  # as Qwen3's: thoughts of earlier turns are left out, and may be switched off
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '</think>' in m['content'] and loop.index0 < ns.last %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML

TEMPLATES = {
    "ChatML": CHATML,
    "plain headers": PLAIN_HEADERS,
    "Llama 3": LLAMA3,
    "Gemma": GEMMA,
    "thoughts": THOUGHTS,
    "generation tags": GENERATION,
    "tools": TOOLS,
    "dates": DATED,
}


def with_template(kind: str, template: str) -> Any:
    """Make a tokenizer of a kind with a chat template."""
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer
