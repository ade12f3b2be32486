"""Stop strings: found where the text that a completion adds first holds one, for every kind of tokenizer, by the sampler too."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import pgjax as pg
from pgjax.core.errors import UserError
from pgjax.data.prompts import encode_prompts
from pgjax.data.stop_strings import ends_at_string, stop_table
from pgjax.data.tokens import added_text
from pgjax.models.causal_lm import causal_lm
from pgjax.models.io.load import load, save_pretrained
from pgjax.models.io.stops import set_stops, stop_strings, told_stops
from pgjax.parallel.mesh import make_mesh
from pgjax.parallel.sharding import place, replicated
from pgjax.rollout.sample import sample, sample_scored
from pgjax.rollout.task import make_task
from tests.sizes import campaign_but_for
from tests.tiny import ARCHITECTURES
from tests.tokenizer_kinds import KINDS, TEXTS, byte_level

STRINGS = ("as gre", "\n\n", "</think>", "1 +", "é", "o y", " no")


def lm_for(tokenizer):
    """A model whose embedding has more rows than there are ids."""
    lm = causal_lm(dataclasses.replace(ARCHITECTURES["llama"], vocab_size=len(tokenizer) + 3))
    return lm, lm.init(jax.random.key(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_string_is_found_with_the_token_that_completes_it(kind):
    tokenizer = KINDS[kind]()
    strings = [x for x in STRINGS if x != "é" or "Metaspace" not in kind]  # those have no bytes to write it
    table = stop_table(strings, tokenizer, len(tokenizer) + 3)
    prompt = encode_prompts(["The film was"], tokenizer, chat=False)[0]
    random = np.random.default_rng(0)
    texts = [a + between + b for a, b in itertools.pairwise(TEXTS) for between in (" ", "é", "</think>")]
    written = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    mixed = [random.integers(0, len(tokenizer), 12).tolist() for _ in range(20)]
    stopped = 0
    for ids in written + mixed:
        state = 0
        for count in range(1, len(ids) + 1):
            text = added_text(prompt, ids[:count], tokenizer)
            state = table[state, ids[count - 1]]
            assert (state < 0) == any(string in text for string in strings), (text, ids[:count])
            if state < 0:
                stopped += 1
                break
        assert ends_at_string(table, [ids]) == [state < 0]
    assert stopped > 20


@pytest.mark.parametrize("mesh", campaign_but_for([None, {"data": 2, "tensor": 2}], None))
def test_the_sampler_ends_a_row_where_the_table_does_and_draws_the_same_tokens(mesh):
    tokenizer = byte_level()
    lm, params = lm_for(tokenizer)
    devices = None if mesh is None else make_mesh(**mesh)
    if devices is not None:
        params = place(params, replicated(devices))
    table = stop_table(["a", "<|user|>", "é", "0", " t"], tokenizer, lm.arch.vocab_size)
    prompts = np.arange(8).reshape(8, 1), np.ones((8, 1), bool)
    options = {"max_new_tokens": 12, "pad_id": 1}
    plain = jax.device_get(sample(lm, params, *prompts, jax.random.key(1), **options))
    ended = jax.device_get(sample(lm, params, *prompts, jax.random.key(1), stop_table=table, **options))
    lengths = []
    for row in range(8):
        ids = plain.tokens[row, 1:].tolist()
        length = next((n for n in range(1, 13) if ends_at_string(table, [ids[:n]])[0]), 12)
        lengths.append(length)
        assert ended.mask[row].tolist() == [False] + [True] * length + [False] * (12 - length)
        assert ended.tokens[row, 1:].tolist() == ids[:length] + [1] * (12 - length)
        np.testing.assert_allclose(ended.logprobs[row, 1 : 1 + length], plain.logprobs[row, 1 : 1 + length], atol=1e-5)
    assert min(lengths) < 12, "no row ended"
    if devices is None:
        both = {"lm": params, "value": pg.init_value_head(lm.arch.width)}
        rollout, _ = sample_scored(lm, both, *prompts, jax.random.key(1), stop_table=table, **options)
        assert np.array_equal(rollout.tokens, ended.tokens)


def test_a_task_says_that_a_completion_ended_at_a_string_and_keeps_its_text():
    tokenizer = set_stops(byte_level(), ["</s>"], ["e"])
    lm, params = lm_for(tokenizer)
    rows = [{"prompt": f"{word} film"} for word in ("a", "the", "no", "yes", "my", "his", "her", "one")]
    seen = []
    reward = lambda prompts, completions, raw_completions, **columns: [seen.append(x) or 0.0 for x in raw_completions]
    task = make_task(lm, tokenizer, [reward], None, [rows], chat=False, max_new_tokens=60, temperature=1.0)
    rollout = task.generate(params, task.prompt_sets[0], jax.random.key(0))
    judged = task.judge(task.prompt_sets[0], rollout)
    at_token = (np.asarray(rollout.tokens) == 2).any(1)
    assert judged.ended.tolist() == [at or "e" in raw for at, raw in zip(at_token, seen, strict=True)]
    assert any("e" in raw for raw in seen)


def test_strings_are_saved_loaded_and_told(tmp_path):
    tokenizer = set_stops(byte_level(), [], ["\nUser:", "END", "END"])
    assert told_stops(tokenizer) == "completions end at '</s>' (2), the text '\\nUser:', the text 'END'"
    lm, params = lm_for(tokenizer)
    save_pretrained(tmp_path / "a", lm, params, tokenizer)
    assert stop_strings(load(tmp_path / "a")[2]) == ("\nUser:", "END")
    save_pretrained(tmp_path / "b", lm, params, byte_level())
    file = tmp_path / "b" / "generation_config.json"
    for given, expected in (("END", ("END",)), (["a", "b"], ("a", "b")), (None, ())):
        file.write_text(json.dumps({**json.loads(file.read_text()), "stop_strings": given}))
        assert stop_strings(load(tmp_path / "b")[2]) == expected
    file.write_text(json.dumps({"stop_strings": [3]}))
    with pytest.raises(UserError, match=r"stop_strings = \[3\] must be a text or a list of texts"):
        load(tmp_path / "b")


def test_strings_that_no_completion_can_hold_are_refused():
    tokenizer = KINDS["byte-level"]()
    with pytest.raises(UserError, match="a stop string is empty"):
        stop_table(["a", ""], tokenizer, len(tokenizer))
    few = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate("abe")}, merges=[]))
    few.decoder = decoders.Fuse()
    with pytest.raises(UserError, match="no completion can hold the stop string 'zebra'"):
        stop_table(["ab", "zebra"], PreTrainedTokenizerFast(tokenizer_object=few), 3)
