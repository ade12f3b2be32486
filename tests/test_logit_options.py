"""A soft cap on the logits, and an embedding that is padded beyond the tokenizer: sampler, learner and reference agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax.core.logprobs import token_entropy, token_logprobs
from pgjax.learning import programs
from pgjax.learning.policy_loss import policy_loss
from pgjax.models.heads import head_logprobs, logit_options
from pgjax.parallel.sharding import make_mesh
from pgjax.rollout.sample import sample_scored
from tests.compare import assert_close
from tests.sizes import campaign_but_for
from tests.tiny import ARCHITECTURES, left_padded, tiny_params
from tests.tokenizer_kinds import KINDS

PROMPTS, PROMPT_MASK = left_padded((7, 4, 1, 5), 7)
PARAMS = {"lm": tiny_params("llama"), "value": pg.init_value_head(16)}


def changed(**options):
    return pg.causal_lm(dataclasses.replace(ARCHITECTURES["llama"], **options))


@pytest.mark.parametrize(
    ("options", "filters"),
    campaign_but_for(
        [
            ({"logit_cap": 1.5, "known_ids": 9}, {"temperature": 0.7}),
            ({"known_ids": 4}, {"top_k": 5, "top_p": 0.9, "temperature": 1.3}),
            ({"logit_cap": 0.5}, {"temperature": 1.0}),
        ],
        ({"logit_cap": 1.5, "known_ids": 9}, {"temperature": 0.7}),
    ),
)
def test_sampler_learner_reference_and_apply_agree(options, filters):
    lm = changed(**options)
    known = options.get("known_ids", 23)
    sampled = pg.sample(lm, PARAMS["lm"], PROMPTS, PROMPT_MASK, jax.random.key(0), max_new_tokens=20, **filters)
    drawn = np.asarray(sampled.tokens)[np.asarray(sampled.mask)]
    assert drawn.max() < known and len(set(drawn.tolist())) > 2
    temperature = jnp.float32(filters["temperature"])
    rollout, scored = sample_scored(
        lm, PARAMS, PROMPTS, PROMPT_MASK, jax.random.key(0), max_new_tokens=20, temperature=temperature
    )
    given = rollout.tokens, rollout.attention_mask, temperature
    forced = programs.teacher_force(lm, PARAMS, *given, window=21, parts=1)
    reference = programs.reference_logprobs(lm, PARAMS["lm"], *given, window=21, parts=1)
    logits = lm.apply(PARAMS["lm"], rollout.tokens, rollout.attention_mask)
    plain = changed().apply(PARAMS["lm"], rollout.tokens, rollout.attention_mask)
    if "logit_cap" in options:
        plain = options["logit_cap"] * jnp.tanh(plain / options["logit_cap"])
    assert_close(logits[..., :known], plain[..., :known], 1e-5)
    assert np.isneginf(logits[..., known:]).all()
    naive = token_logprobs(logits, rollout.tokens, temperature=temperature)[:, -20:]
    assert_close(scored.logprobs[:, 1:], naive, 1e-5)
    assert_close(forced.logprobs[:, 1:], naive, 1e-5)
    assert_close(reference[:, 1:], naive, 1e-5)
    entropy = token_entropy(logits, temperature=temperature)[:, -20:]
    assert_close((scored.entropy[:, 1:], forced.entropy[:, 1:]), (entropy, entropy), 2e-5)


def test_the_update_leaves_rows_of_padding_as_they_are():
    lm = changed(known_ids=9, tied=False)
    params = {**PARAMS, "lm": {**PARAMS["lm"], "head": {"kernel": PARAMS["lm"]["embed"]["tokens"] + 0.1}}}
    zeros = jnp.zeros((4, 3))
    tokens = jnp.asarray(PROMPTS % 9)
    batch = programs.Batch(tokens, jnp.asarray(PROMPT_MASK), zeros == 0, None, zeros, zeros + 1.0, zeros + 1.0)
    loss = lambda params: policy_loss(params, batch, lm=lm, algorithm=pg.reinforce(), temperature=1.0)[0]
    gradient = jax.jit(jax.grad(loss))(params)["lm"]["head"]["kernel"]
    assert np.abs(gradient[:9]).max() > 0 and not np.any(gradient[9:])
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        hidden = jax.random.normal(jax.random.key(0), (4, 3, 16))
        rows = jnp.concatenate([PARAMS["lm"]["embed"]["tokens"]] * 2)[:24]  # 12 on each device, 9 of them ids
        split = jax.jit(lambda h, w: head_logprobs(h, w, tokens[:, :3], **logit_options(lm.arch)))(hidden, rows)
    assert_close(split, pg.linear_token_logprobs(hidden, rows[:9], tokens[:, :3]), 1e-5)


@pytest.mark.campaign
def test_a_tokenizer_smaller_than_the_embedding_bounds_what_is_drawn(tmp_path):
    tokenizer = KINDS[next(iter(KINDS))]()
    known = max(tokenizer.get_vocab().values()) + 1
    lm = pg.causal_lm(dataclasses.replace(ARCHITECTURES["llama"], vocab_size=known + 29))
    params = lm.init(jax.random.key(0))
    rows = params["embed"]["tokens"]
    params["embed"]["tokens"] = rows.at[known:].set(20 * rows[:29])  # the likeliest ids, were they any
    pg.save_pretrained(tmp_path / "padded", lm, params, tokenizer)
    loaded, held, _ = pg.load(tmp_path / "padded")
    assert (loaded.arch.vocab_size, loaded.arch.known_ids) == (known + 29, known)
    options = {"max_new_tokens": 12, "temperature": 2.0}
    beyond = np.asarray(pg.sample(lm, params, PROMPTS, PROMPT_MASK, jax.random.key(0), **options).tokens)
    within = np.asarray(pg.sample(loaded, held, PROMPTS, PROMPT_MASK, jax.random.key(0), **options).tokens)
    assert beyond.max() >= known > within.max()
    pg.save_pretrained(tmp_path / "again", loaded, held, tokenizer)
    again, rows, _ = pg.load(tmp_path / "again")
    assert again.arch == loaded.arch
    np.testing.assert_array_equal(rows["embed"]["tokens"], params["embed"]["tokens"])
    exact = pg.causal_lm(dataclasses.replace(ARCHITECTURES["llama"], vocab_size=known))
    pg.save_pretrained(tmp_path / "exact", exact, exact.init(jax.random.key(0)), tokenizer)
    assert pg.load(tmp_path / "exact")[0].arch.known_ids is None
