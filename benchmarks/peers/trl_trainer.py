"""Shared by both TRL peers: a tokenizer whose words are token ids, and a callback that times each iteration for the parent."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from benchmarks.peers.protocol import Parent


class Metronome(TrainerCallback):
    """Time from one iteration's end to the next one's; the trainer waits between them until the parent requests a run."""

    def __init__(self, parent: Parent) -> None:
        """Keep the parent."""
        self.parent = parent
        self.loss = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answer that all is loaded, and wait for the first run."""
        self.parent.ready("trl", "torch", "transformers", "accelerate")
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answer with the iteration's seconds, and wait for the next one."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.parent.stop({"iterations": state.global_step})
        self._wait()

    def _wait(self) -> None:
        self.parent.next()
        self.parent.start()


def settle(parent: Parent) -> None:
    """Set the threads as the parent wants them; None is torch's own choice."""
    if parent.setup["threads"] is not None:
        torch.set_num_threads(parent.setup["threads"])


def id_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose words are the ids themselves, so that prompts of random ids can be written as text."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", eos_token=f"t{vocab_size - 1}", padding_side="left"
    )


def text(ids: list[int]) -> str:
    """Write ids as the text that `id_tokenizer` reads."""
    return " ".join(f"t{i}" for i in ids)
