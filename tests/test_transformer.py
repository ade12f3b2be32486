"""The model: what a token may see, padding that leaves no trace, options that do what they say, the cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.models.architecture import Rope
from pgjax.models.attention import attention
from pgjax.models.causal_lm import causal_lm, decode_params, logits_of
from pgjax.models.forward import positions_of
from pgjax.models.rope import rope_frequencies, rotary_table, rotate
from tests.compare import assert_close
from tests.sizes import SOME_FAMILIES
from tests.tiny import ARCHITECTURES, FAMILIES, LLAMA3_ROPE, left_padded, tiny_apply, tiny_lm, tiny_params

RNG = np.random.default_rng(0)


LENGTHS = (7, 4, 1)
TOKENS, MASK = left_padded(LENGTHS, 7)
OTHER = np.where(MASK, TOKENS, 22 - TOKENS).astype(np.int32)  # other garbage under the padding


@pytest.mark.parametrize("name", FAMILIES)
def test_left_padding_and_the_garbage_in_it_change_nothing(name):
    # The bug: positions from arange, or a forgotten mask. Absolute positions show the first, any model the second.
    params, apply = tiny_params(name), tiny_apply(name)
    logits = np.asarray(apply(params, TOKENS, MASK))
    tolerance = 1e-5 * np.abs(logits).max()
    assert np.isfinite(logits).all()
    assert np.array_equal(np.asarray(apply(params, OTHER, MASK))[MASK], logits[MASK])
    shifted = np.zeros_like(TOKENS)
    for row, length in enumerate(LENGTHS):  # what follows a row can't reach back: its own tokens, unpadded
        shifted[row, :length] = TOKENS[row, 7 - length :]
    unpadded = np.asarray(apply(params, shifted, np.ones_like(MASK)))
    for row, length in enumerate(LENGTHS):
        assert_close(logits[row, 7 - length :], unpadded[row, :length], tolerance)
    without_mask = np.asarray(apply(params, TOKENS, np.ones_like(MASK)))
    assert np.abs(without_mask - logits)[1, -1].max() > 100 * tolerance  # so the above can fail


@pytest.mark.parametrize("name", FAMILIES)
def test_later_tokens_change_nothing_before_them(name):
    params, apply = tiny_params(name), tiny_apply(name)
    everything = np.ones_like(MASK)
    logits = np.asarray(apply(params, TOKENS, everything))
    for t in range(1, 7):
        changed = TOKENS.copy()
        changed[:, t] = (changed[:, t] + 5) % 23
        moved = (np.asarray(apply(params, changed, everything)) != logits).any(-1)
        assert not moved[:, :t].any() and moved[:, t:].all()


def test_a_state_has_a_gradient_from_every_earlier_token_and_none_from_a_later_one():
    lm, params = tiny_lm("gpt2"), tiny_params("gpt2")
    tokens = np.arange(3, 9)[None, :]  # all different, so a row of the embedding is a position
    weights = RNG.standard_normal(lm.arch.width).astype(np.float32)

    def states(table):  # not logits: a tied unembedding must not reach the table
        return lm.hidden({**params, "embed": {**params["embed"], "tokens": table}}, tokens)[0] @ weights

    influence = np.abs(jax.jit(jax.jacrev(states))(params["embed"]["tokens"])[:, 3:9]).sum(-1)
    assert (influence[np.tril_indices(6)] > 1e-6).all()
    assert (influence[np.triu_indices(6, 1)] == 0).all()


def test_positions_count_real_tokens():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool)
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [0, 0, 0, 1, 2]]
    assert positions_of(mask).tolist() == expected


@functools.cache
def gradient_of(remat="none"):
    """A mean square of the logits that are counted, with its gradient; the last row is padding alone."""
    lm, mask = tiny_lm("qwen3", remat=remat == "remat"), MASK & np.array([[True], [True], [False]])

    def loss(params, tokens, counted):
        return jnp.square(jnp.where(counted[..., None], lm.apply(params, tokens, mask), 0)).mean()

    return jax.jit(jax.value_and_grad(loss)), loss


def test_gradients_are_finite_even_at_padding_and_ignore_what_is_under_it():
    (run, _), params = gradient_of(), tiny_params("qwen3")
    everywhere = jax.tree.leaves(run(params, TOKENS, np.ones_like(MASK)))
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in everywhere)
    real = MASK & np.array([[True], [True], [False]])
    assert_close(run(params, TOKENS, real), run(params, OTHER, real), 1e-5)


@pytest.mark.parametrize("name", SOME_FAMILIES)
def test_bfloat16_runs_under_strict_promotion_and_is_near_float32(name):
    params = tiny_params(name)
    logits, expected = (tiny_apply(name, dtype)(params, TOKENS, MASK) for dtype in ("bfloat16", "float32"))
    assert logits.dtype == jnp.float32
    assert_close(logits, expected, of_max=0.05)
    shape = jax.eval_shape(tiny_lm(name, "bfloat16").hidden, params, TOKENS, MASK)
    assert shape.dtype == jnp.bfloat16
    gradient = jax.eval_shape(jax.grad(lambda p: tiny_lm(name, "bfloat16").apply(p, TOKENS, MASK).std()), params)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert jax.eval_shape(tiny_lm(name, "bfloat16").apply, half, TOKENS, MASK).dtype == jnp.float32


def test_remat_keeps_loss_and_gradient_and_saves_less_for_the_backward_pass():
    params = tiny_params("qwen3")
    (plain, loss), (remat, remat_loss) = gradient_of(), gradient_of("remat")
    assert_close(plain(params, TOKENS, MASK), remat(params, TOKENS, MASK), 1e-5)

    def saved(f):  # beside the parameters, which every backward pass reads
        kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(f, p, TOKENS, MASK)[1], params))
        return sum(x.size for x in kept) - sum(x.size for x in jax.tree.leaves(params))

    assert 0 < saved(remat_loss) < 0.5 * saved(loss)


def numpy_attention(query, key, value, mask):
    out = np.zeros(query.shape)
    for b, h, t in np.ndindex(query.shape[:3]):
        group = h * key.shape[1] // query.shape[1]
        scores = key[b, group, mask[b, t]] @ query[b, h, t] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, h, t] = weights @ value[b, group, mask[b, t]] / weights.sum()
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_queries_equal_repeated_heads_and_plain_numpy(kv_heads):
    query = RNG.standard_normal((2, 4, 3, 8)).astype(np.float32)
    key, value = RNG.standard_normal((2, 2, kv_heads, 5, 8)).astype(np.float32)
    mask = np.array([[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], [[0, 0, 1, 0, 0]] * 3], bool)
    out = attention(query, key, value, mask)
    assert_close(out, numpy_attention(query, key, value, mask), 1e-5)
    assert_close(out, attention(query, *(x.repeat(4 // kv_heads, axis=1) for x in (key, value)), mask), 1e-6)


def llama3_frequency(rope, frequency):
    """One pair of a head, as the Llama 3.1 release says it: by wavelength."""
    wavelength = 2 * np.pi / frequency
    if wavelength < rope.original_max_positions / rope.high_freq_factor:
        return frequency
    if wavelength > rope.original_max_positions / rope.low_freq_factor:
        return frequency / rope.factor
    smooth = rope.original_max_positions / wavelength - rope.low_freq_factor
    smooth /= rope.high_freq_factor - rope.low_freq_factor
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, *(Rope(500000.0, factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))])
def test_llama3_rope_scaling_equals_the_formula_of_its_release(rope):
    plain = [rope.theta ** (-i / 64) for i in range(0, 64, 2)]
    expected = np.array([llama3_frequency(rope, f) for f in plain])
    np.testing.assert_allclose(rope_frequencies(rope, 64), expected, rtol=1e-5)
    kinds = expected / plain  # the three cases all occur
    assert (kinds == 1).any() and np.isclose(kinds, 1 / rope.factor).any() and len(set(kinds.round(4))) > 2
    np.testing.assert_allclose(rope_frequencies(Rope(rope.theta), 64), plain, rtol=1e-5)


def test_rotary_products_depend_on_distance_alone():
    rope = Rope(theta=100.0)
    query, key = RNG.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

    @jax.jit
    def product(m, n):
        turned = (rotate(jnp.asarray(x), rotary_table(rope, 8, jnp.full((1, 1), p))) for x, p in ((query, m), (key, n)))
        return jnp.vdot(*turned)

    assert_close(product(40, 38), product(3, 1), 1e-4)
    assert_close(product(2, 0), product(3, 1), 1e-4)
    assert abs(product(3, 1) - product(1, 3)) > 0.01
    pair = jnp.zeros((1, 1, 1, 8)).at[..., 1].set(1.0)  # its partner stands half a head away: rotate-half
    turned = rotate(pair, rotary_table(rope, 8, jnp.array([[5]])))[0, 0, 0]
    assert np.flatnonzero(np.abs(turned) > 1e-6).tolist() == [1, 5]


def expected_shapes(arch):
    """The parameter tree, written down once more from its description."""
    depth, d, f = arch.depth, arch.width, arch.mlp_width
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim

    def linear(n, m, bias):
        return {"kernel": (depth, n, m)} | ({"bias": (depth, m)} if bias else {})

    def norm(*shape):
        return {"scale": shape} | ({"bias": shape} if arch.norm == "layer" else {})

    layers = {"attn_norm": norm(depth, d), "mlp_norm": norm(depth, d)}
    layers |= {"q": linear(d, q, arch.qkv_bias), "k": linear(d, kv, arch.qkv_bias), "v": linear(d, kv, arch.qkv_bias)}
    layers |= {"o": linear(q, d, arch.out_bias)}
    layers |= {"up": linear(d, f, arch.mlp_bias), "down": linear(f, d, arch.mlp_bias)}
    if arch.gated_mlp:
        layers["gate"] = linear(d, f, arch.mlp_bias)
    if arch.qk_norm:
        layers |= {name: {"scale": (depth, arch.head_dim)} for name in ("q_norm", "k_norm")}
    embed = {"tokens": (arch.vocab_size, d)} | ({"positions": (arch.max_positions, d)} if arch.rope is None else {})
    head = {} if arch.tied else {"head": {"kernel": (arch.vocab_size, d)}}
    return {"embed": embed, "layers": layers, "norm": norm(d), **head}


BIASES_EVERYWHERE = dataclasses.replace(ARCHITECTURES["llama"], qkv_bias=True, out_bias=True, mlp_bias=True)


@pytest.mark.parametrize("arch", [*ARCHITECTURES.values(), BIASES_EVERYWHERE])
def test_the_parameter_tree_has_the_promised_names_and_shapes(arch):
    lm = causal_lm(arch, param_dtype=jnp.bfloat16)
    tree = jax.eval_shape(lm.init, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, tree) == expected_shapes(arch)
    assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}


def test_init_is_small_noise_that_differs_everywhere_and_norms_start_as_identity():
    arch = dataclasses.replace(ARCHITECTURES["gpt2"], tied=False)  # every kind of leaf
    init = jax.jit(causal_lm(arch).init)
    params, other = init(jax.random.key(3)), init(jax.random.key(4))
    drawn = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf, last = np.asarray(leaf), path[-1].key
        if last in ("scale", "bias"):
            assert (leaf == (1 if last == "scale" else 0)).all()
        else:
            assert 0.9 * 0.02 < leaf.std() < 1.1 * 0.02 and abs(leaf.mean()) < 0.003
            drawn += list(leaf) if leaf.ndim == 3 else [leaf]
    firsts = [float(x.reshape(-1)[0]) for x in drawn]
    assert len(firsts) == 3 + 6 * arch.depth and len(set(firsts)) == len(firsts)  # no key was used twice
    assert not np.array_equal(params["embed"]["tokens"], other["embed"]["tokens"])


def test_equal_options_give_the_same_functions_so_that_programs_are_shared():
    arch = ARCHITECTURES["llama"]
    assert causal_lm(arch) is causal_lm(arch, dtype="float32", remat=False)
    assert causal_lm(arch) is not causal_lm(arch, dtype=jnp.bfloat16)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])  # every family: in test_rollout
def test_cached_decode_equals_teacher_forcing(name):
    # The bugs: a cache off by one, positions that count padding, a prompt's padding seen by later tokens.
    lm, params = tiny_lm(name), tiny_params(name)
    start = 4
    tokens, mask = left_padded((4, 3, 1), start)
    tokens = np.concatenate([tokens, TOKENS[:, start:]], axis=1)
    mask = np.concatenate([mask, np.ones((3, 3), bool)], axis=1)
    states, cache = jax.jit(lm.prefill)(params, tokens[:, :start], mask[:, :start], lm.init_cache(3, 7))
    stepwise, weights, decode = [states], decode_params(params, lm.dtype), jax.jit(lm.decode)
    for t in range(start, 7):
        slots = mask & (np.arange(7) <= t)
        position = mask[:, :t].sum(1).astype(np.int32)
        states, cache = decode(weights, tokens[:, t], position, jnp.int32(t), slots, cache)
        stepwise.append(states)
    cached = logits_of(jnp.stack(stepwise, 1), lm.unembedding(params))
    forced = np.asarray(tiny_apply(name)(params, tokens, mask))[:, start - 1 :]
    assert_close(cached, forced, of_max=1e-5)


def test_longrope_goes_by_the_length_of_the_array_and_dynamic_ends_where_it_would_change():
    rope = Rope(100.0, original_max_positions=8, scaling="longrope", short_factors=(1.0, 2.0), long_factors=(4.0, 8.0))
    short, long = (np.asarray(rope_frequencies(rope, 4, length)) for length in (8, 9))
    assert_close(short, [1.0, 0.05], 1e-7)
    assert_close(long, [0.25, 0.0125], 1e-7)
    dynamic = dataclasses.replace(rope, factor=2.0, scaling="dynamic")
    table = rotary_table(dynamic, 4, jnp.array([[7, 8]]))
    assert [bool(np.isnan(x[0, 0, i]).all()) for x in table for i in (0, 1)] == [False, True] * 2
