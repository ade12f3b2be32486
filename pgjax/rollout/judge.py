"""A reward model as one more judge: a frozen program on the device, beside the black boxes on the host.

Token ids go from the policy straight into it. Where its tokenizer is another one, completions are decoded and encoded again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pgjax.core.errors import UserError
from pgjax.data.padding import bucket_length, left_pad
from pgjax.data.preferences import TEMPLATED, Answered, encode_answers
from pgjax.data.prompts import TOOLS, Prompt, as_tools, encode_prompts
from pgjax.data.tables import Row
from pgjax.models.causal_lm import CausalLM
from pgjax.models.io import chat_template
from pgjax.models.io.classifier import load_reward_model
from pgjax.models.io.stops import stop_ids
from pgjax.models.io.tokenizer import missing_tokenizer
from pgjax.models.reward_model import RewardModel
from pgjax.parallel import batch_rows, processes
from pgjax.rollout.sample import Rollout
from pgjax.rollout.scoring import RewardError

REWARD_MODEL = "reward_model"  # its name among the rewards, in metrics and samples
Read = Callable[[], tuple[list[str], np.ndarray]]  # -> completions of the rows fed here; did each end by itself?


class ModelJudge(NamedTuple):
    """A reward model and how its score counts. Nothing here ever changes its parameters."""

    rm: RewardModel
    params: Any
    weight: float  # of its score in the sum
    tokenizer: Any | None  # its own, where the policy's ids are not its ids
    chat: bool  # put prompts through its own tokenizer's chat template
    mesh: Mesh | None = None  # over which its parameters and the rows of a batch are spread

    def prompt_lengths(self, rows: Sequence[Row], ids: Sequence[Sequence[int]]) -> list[int]:
        """Count the tokens of rows' prompts as the reward model reads them; `ids` are the policy's."""
        if self.tokenizer is None:
            return list(map(len, ids))
        if self.chat and self.tokenizer.chat_template is None:
            raise UserError(
                "the reward model's tokenizer has no chat template, and prompts go through one: set chat=False, or use a "
                "reward model for conversations"
            )
        prompts, tools = [row["prompt"] for row in rows], [row.get(TOOLS) for row in rows]
        return list(map(len, encode_prompts(prompts, self.tokenizer, chat=self.chat, tools=tools)))

    def queue(self, rows: Sequence[Row], rollout: Rollout, read: Read) -> jax.Array:
        """Put the scoring of a rollout on the device: [B], in reward units; without a translation nothing is waited for.

        The rows are those that this process feeds.
        """
        tokens, mask = rollout.tokens, rollout.attention_mask
        if self.tokenizer is not None:
            tokens, mask = batch_rows.feed(self.mesh, self.translated(rows, *read()))
        return _scores(self.rm, self.params, tokens, mask)

    def translated(
        self, rows: Sequence[Row], completions: Sequence[str], ended: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts for the reward model as it was trained: prompt with its tools, answer, and its end where it ended.

        An answer that comes out longer than its positions is judged as if it had been stopped there.
        """
        limit = self.rm.arch.max_positions
        ids: list[list[int]] = []

        def encode() -> int:
            answers = [
                Answered(row["prompt"], completion, as_tools("a row", row.get(TOOLS)))
                for row, completion in zip(rows, completions, strict=True)
            ]
            encoded = functools.partial(encode_answers, answers, self.tokenizer, chat=self.chat)
            cut, whole = encoded(eos=False), encoded(eos=bool(stop_ids(self.tokenizer)))
            ids.extend((x if end else y)[:limit] for x, y, end in zip(whole, cut, ended, strict=True))
            return max(map(len, ids))

        longest = max(processes.gather_results(encode))  # of the whole batch: all processes take one program
        length = min(bucket_length(longest), limit)  # buckets: few lengths, few programs
        return left_pad(ids, 0, length=length)

    def fetch(
        self, queued: jax.Array, texts: Callable[[int], tuple[Prompt, str]], judged_here: Sequence[int]
    ) -> np.ndarray:
        """Bring its scores to the host, refusing any that is not finite: [B] float32.

        Of a refused row the process that judges it tells prompt and completion, as `texts` gives them.
        """
        scores = np.asarray(processes.fetch(queued), np.float32)
        bad = np.flatnonzero(~np.isfinite(scores))

        def refuse() -> None:
            row = int(bad[0])
            if row in judged_here:
                prompt, completion = texts(row)
                raise RewardError(
                    f"returned {scores[row]} in row {row}", reward=REWARD_MODEL, row=row,
                    prompt=prompt, completion=completion, value=float(scores[row]),
                )  # fmt: skip

        if bad.size:
            processes.all_or_none(refuse)
        return scores


@functools.partial(jax.jit, static_argnames="rm")
def _scores(rm: RewardModel, params: Any, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
    return rm.apply(params, tokens, attention_mask)


def load_judge(
    source: str | None, weight: float, lm: CausalLM, tokenizer: Any, *, chat: bool, mesh: Mesh | None = None
) -> ModelJudge | None:
    """Load a reward model for a policy; say so once where texts have to be encoded again for it. No source, no judge."""
    if source is None:
        return None
    rm, params, rm_tokenizer = load_reward_model(source, mesh=mesh)
    if rm_tokenizer is None:
        raise UserError(f"nobody can tell what the reward model's ids mean: {missing_tokenizer(source)}")
    if tokenizer is None:
        raise UserError("the policy's source holds no tokenizer, and prompts are text: add its tokenizer files")
    if rm_tokenizer.init_kwargs.get(TEMPLATED, chat) != chat:
        raise UserError(
            f"the reward model {source} was trained with chat={not chat}, but the policy's prompts have chat={chat}: it would "
            f"score what it has never seen; set chat={not chat}, or train it likewise"
        )
    # of one day, where templates write the date
    chat_template.set_template(rm_tokenizer, date=tokenizer.init_kwargs.get(chat_template.DATE))
    differing = tokenizer_differences(tokenizer, rm_tokenizer, chat=chat)
    if lm.arch.vocab_size > rm.arch.vocab_size:
        differing.append(f"vocabulary size ({lm.arch.vocab_size} and {rm.arch.vocab_size})")
    if differing:
        processes.print_once(
            f"the tokenizers of the policy and of the reward model {source} differ in {', '.join(differing)}: "
            "completions are decoded, and encoded again for it"
        )
    return ModelJudge(rm, params, weight, rm_tokenizer if differing else None, chat, mesh)


def tokenizer_differences(tokenizer: Any, other: Any, *, chat: bool) -> list[str]:
    """Name what makes another tokenizer give a text of this one other ids.

    How they pad does not count, and neither does a padding token that only the other one has.

    Args:
      tokenizer: a fast Hugging Face tokenizer, the policy's.
      other: the reward model's.
      chat: whether prompts go through the chat template.

    Returns:
      Names of parts; empty where the ids are the same.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> make = lambda *letters: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(
      ...     models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])))
      >>> tokenizer_differences(make("a", "b"), make("a", "b"), chat=False)
      []
      >>> tokenizer_differences(make("a", "b"), make("b", "a"), chat=False)
      ['vocabulary']
    """
    mine, its = (json.loads(x.backend_tokenizer.to_str()) for x in (tokenizer, other))
    model, its_model = dict(mine["model"]), dict(its["model"])
    added, its_added = ({token["content"]: token for token in x["added_tokens"]} for x in (mine, its))
    if other.pad_token not in added:
        its_added.pop(other.pad_token, None)
    parts = {
        "vocabulary": (model.pop("vocab"), its_model.pop("vocab")),
        "merges": (model.pop("merges", None), its_model.pop("merges", None)),
        "kind": (model, its_model),
        "added tokens": (added, its_added),
        "normaliser": (mine["normalizer"], its["normalizer"]),
        "pre-tokeniser": (mine["pre_tokenizer"], its["pre_tokenizer"]),
        "first token": (tokenizer("")["input_ids"], other("")["input_ids"]),
    }
    if chat:
        parts["chat template"] = tokenizer.chat_template, other.chat_template
        parts["chat template's arguments"] = (*(x.init_kwargs.get(chat_template.ARGS, {}) for x in (tokenizer, other)),)
    return [name for name, (x, y) in parts.items() if x != y]
