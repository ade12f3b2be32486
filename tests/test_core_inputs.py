"""What the pure core does with inputs that are not what it computes with: refused by name, or right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pgjax as pg
from tests.compare import assert_close
from tests.core_cases import BATCH, CASES, WHOLE, function, inputs
from tests.sizes import campaign_but_for

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.standard_normal((2, 4, 7)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, 7, (2, 4)), jnp.int32)


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_tokens_that_are_no_ids_are_refused_by_function_and_argument(dtype):
    # The bug: True became the id 1, and 2.7 the id 2.
    tokens, hidden = TOKENS.astype(dtype), jnp.ones((2, 4, 3))
    with pytest.raises(ValueError, match=r"^token_logprobs: tokens must be whole numbers.*got"):
        pg.token_logprobs(LOGITS, tokens)
    with pytest.raises(ValueError, match=r"^aligned_token_logprobs: tokens must be whole numbers.*got"):
        pg.aligned_token_logprobs(LOGITS, tokens)
    with pytest.raises(ValueError, match=r"^linear_token_logprobs: tokens must be whole numbers.*got"):
        jax.jit(pg.linear_token_logprobs)(hidden, jnp.ones((7, 3)), tokens)


def test_numbers_that_cannot_be_meant_are_refused():
    hidden = jnp.ones((2, 4, 3), jnp.int32)
    with pytest.raises(ValueError, match="linear_token_logprobs: hidden must be of a floating type, got int32"):
        pg.linear_token_logprobs(hidden, jnp.ones((7, 3)), TOKENS)
    with pytest.raises(ValueError, match=r"discount must be at most 1, got 1\.5"):
        pg.monte_carlo_returns(jnp.ones((1, 3)), None, discount=1.5)
    with pytest.raises(ValueError, match="group_size must be known when the function is traced"):
        jax.jit(lambda size: pg.group_advantages(jnp.ones(4), group_size=size))(2)


MASKED = [name for name, case in CASES.items() if "mask" in case.inputs.split()]
IN_GROUPS = [name for name, case in CASES.items() if "group_size" in case.options]


def with_mask(name, mask):
    return [mask if field == "mask" else x for field, x in zip(CASES[name].inputs.split(), inputs(name), strict=True)]


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_fractions_is_refused_under_jit_too(name):
    # The bug: 0.9 counted as 1, and a mask that is added to logits, 0 and -inf, as its opposite.
    floats = BATCH["mask"].astype(jnp.float32)
    with pytest.raises(ValueError, match=r"mask must be boolean or whole numbers .*got float32: pass mask > 0"):
        jax.eval_shape(function(name), *with_mask(name, floats))
    for mask in (0.9 * floats, jnp.log(floats)):
        with pytest.raises(ValueError, match="mask must hold only 0 and 1, got"):
            function(name)(*with_mask(name, mask))
    jax.eval_shape(function(name), *with_mask(name, BATCH["mask"].astype(jnp.int32)))


def test_numbers_that_are_not_real_are_refused():
    # The bug: the imaginary part was dropped.
    with pytest.raises(ValueError, match="numbers must be real, got complex64"):
        jax.jit(pg.masked_mean)(jnp.ones(3, jnp.complex64))


def test_parameters_that_have_no_gradient_are_named():
    params = {"scale": jnp.ones(3), "count": jnp.arange(3)}
    logits_fn = lambda params: jnp.zeros((1, 2, 3)) + params["scale"][None, None]
    with pytest.raises(ValueError, match=r"params\['count'\] must be of a floating type, got int32"):
        pg.fisher_vector_product(logits_fn, params, params)
    with pytest.raises(ValueError, match=r"params\['count'\] must be of a floating type, got int32"):
        pg.trust_region_step(lambda params: params["scale"][0], logits_fn, params)


def test_a_mask_of_samples_has_their_shape():
    with pytest.raises(AssertionError):
        pg.group_advantages(jnp.arange(4.0), group_size=2, mask=jnp.ones((2, 2), bool))


def test_tokens_chosen_by_fractions_are_refused():
    fields = inputs("kl_cov_loss")
    with pytest.raises(ValueError, match="mask must hold only 0 and 1"):
        pg.kl_cov_loss(*fields, chosen=0.5 * BATCH["mask"].astype(jnp.float32))


@pytest.mark.parametrize("name", campaign_but_for(MASKED, "kl_shaped_rewards", "finished_mask", "value_loss"))
def test_no_mask_counts_every_entry(name):
    if name == "place_scores":
        with pytest.raises(ValueError, match="place_scores: mask must be given"):
            pg.place_scores(BATCH["scores"], None)
        return
    every = jax.jit(function(name))(*with_mask(name, jnp.ones_like(BATCH["mask"])))
    assert_close(function(name)(*with_mask(name, None)), every, 2e-6, rtol=2e-5)


@pytest.mark.parametrize("name", campaign_but_for(CASES, "m2po_mask", "high_covariance_mask"))
def test_an_empty_batch_gives_no_nan(name):
    none = [x if field in WHOLE else x[:0] for field, x in zip(CASES[name].inputs.split(), inputs(name), strict=True)]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(function(name)(*none)))


@pytest.mark.parametrize("name", IN_GROUPS)
def test_sizes_that_are_no_group_are_refused(name):
    def of_size(size):
        return function(name).func(*inputs(name), **{**CASES[name].options, "group_size": size})

    with pytest.raises(ValueError, match="group_size must be known when the function is traced"):
        jax.jit(of_size)(2)
    for size in (0, 3, 16, 2.0, True):
        with pytest.raises(ValueError, match="group_size"):
            of_size(size)


def test_a_parameter_of_nnx_is_an_array_under_jit():
    hidden = jnp.ones((2, 4, 3))
    weight = nnx.Param(jnp.asarray(RNG.standard_normal((7, 3)), jnp.float32))
    expected = jax.jit(pg.linear_token_logprobs)(hidden, weight[...], TOKENS)
    assert_close(jax.jit(pg.linear_token_logprobs)(hidden, weight, TOKENS), expected, 1e-6)
    loss = lambda scores: pg.preference_loss(scores, BATCH["others"])
    scores = nnx.Param(BATCH["scores"])
    assert_close(nnx.jit(loss)(scores), loss(BATCH["scores"]), 1e-6)
    assert_close(jax.jit(jax.grad(loss))(scores)[...], jax.grad(loss)(BATCH["scores"]), 1e-6)


def test_logits_of_completions_are_taken_as_they_stand():
    found = pg.aligned_token_logprobs(LOGITS, TOKENS, temperature=0.7)
    log_p = jax.nn.log_softmax(LOGITS / 0.7)
    assert_close(found, jnp.take_along_axis(log_p, TOKENS[..., None], axis=2)[..., 0], 1e-6)
    shifted = pg.token_logprobs(LOGITS, jnp.pad(TOKENS, ((0, 0), (1, 0)))[:, :-1], temperature=0.7)
    assert_close(found[:, :-1], shifted[:, 1:], 1e-6)


def test_preferences_are_masked_and_weighed():
    chosen, rejected = jnp.array([1.0, 0.2, jnp.nan, -1.0]), jnp.array([0.0, 0.5, 1.0, 0.3])
    mask, weights = jnp.array([True, True, False, True]), jnp.array([1.0, 2.0, jnp.nan, 0.5])
    options = {"margin": jnp.array([0.1, 0.0, 0.3, 0.2]), "center_coef": 0.1}
    kept = np.array([0, 1, 3])
    of = lambda i, **more: pg.preference_loss(
        chosen[i], rejected[i], margin=options["margin"][i], center_coef=0.1, **more
    )
    assert_close(pg.preference_loss(chosen, rejected, mask, **options), of(kept), 1e-6)
    each = np.array([float(of(np.array([i]))) for i in kept])
    weighed = pg.preference_loss(chosen, rejected, mask, weights=weights, **options)
    assert_close(weighed, np.float32((each * [1.0, 2.0, 0.5]).sum() / 3.5), 1e-6)
    gradient = jax.grad(lambda x: pg.preference_loss(x, rejected, mask, weights=weights, **options))(chosen)
    assert np.isfinite(gradient).all() and gradient[2] == 0
    parts = jax.tree.map(lambda x: x.reshape(2, 2), (chosen, rejected, mask, weights, options["margin"]))
    mapped = lambda c, r, m, w, x: pg.preference_loss(c, r, m, weights=w, margin=x, center_coef=0.1, axis_name="i")
    assert_close(jax.vmap(mapped, axis_name="i")(*parts), jnp.full(2, weighed), 1e-6)
