"""Algorithms as values: what each of the five is made of, which numbers are refused, and how one is found by its name."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from pgjax.core.errors import UserError
from pgjax.core.reductions import REDUCTIONS
from pgjax.learning import programs
from pgjax.learning.algorithm import Algorithm, Batch, check_algorithm
from pgjax.learning.by_name import load_algorithm
from pgjax.learning.policy_loss import policy_loss
from tests import core_in_numpy
from tests.compare import assert_close
from tests.tiny import tiny_lm, tiny_params

ROWS, P, N, GROUP = 8, 3, 5, 4
LENGTHS = (5, 1, 3, 4, 2, 5, 1, 2)
BETA = 0.3
RNG = np.random.default_rng(0)
MASK = np.arange(N + 1)[None, :] - 1 < np.array(LENGTHS)[:, None]
MASK[:, 0] = False
LOGPROBS, REF, VALUES, NOISE = RNG.normal(size=(4, ROWS, N + 1)).astype(np.float32)
LOGPROBS, REF = LOGPROBS - 3, REF - 3
SCORES = RNG.normal(size=ROWS).astype(np.float32)

# Advantages and loss of one token, as the papers give them, in float64.
KL = LOGPROBS.astype(np.float64) - REF
RETURNS = core_in_numpy.returns(core_in_numpy.shaped_rewards(SCORES, KL, MASK, BETA), MASK)
PENALTIES = core_in_numpy.returns(-BETA * KL, MASK)


def against_others(to_come, size):
    """Compare [B, W] with the mean of the group's other rows, token by token."""
    groups = to_come.reshape(-1, size, to_come.shape[1])
    others = (groups.sum(1, keepdims=True) - groups) / (size - 1)
    return np.where(MASK, (groups - others).reshape(to_come.shape), 0)


def of_group(size, normalize):
    """Compare scores with their group's mean."""
    groups = SCORES.astype(np.float64).reshape(-1, size)
    compared = groups - groups.mean(1, keepdims=True)
    compared = compared / (groups.std(1, ddof=1, keepdims=True) + 1e-4) if normalize else compared
    return np.where(MASK, compared.reshape(-1, 1), 0) + against_others(PENALTIES, size)


def clipped(low=0.2, high=0.2, dual=None):
    return lambda new, a: core_in_numpy.surrogate(new, LOGPROBS, a, low, high, dual)


def plain(new, a):
    return -a * new


TO_COME = np.where(MASK, RETURNS, SCORES[:, None])
WHITE = core_in_numpy.whiten(RETURNS - VALUES, MASK)
CASES = {  # algorithm, advantages, loss of a token, reduction, {coefficient that is not 0}
    "ppo": (pg.ppo(), WHITE, clipped(), "token_mean", {"value_coef": 0.5, "kl_coef": 0.005}),
    "ppo, clipped otherwise": (
        pg.ppo(clip_eps=0.1, clip_eps_high=0.28, dual_clip=1.5, value_clip_eps=0.2, whiten=False, reduce="sequence_mean"),
        np.where(MASK, RETURNS - VALUES, 0), clipped(0.1, 0.28, 1.5), "sequence_mean", {"value_coef": 0.5, "kl_coef": 0.005},
    ),
    "rloo": (pg.rloo(), against_others(TO_COME, 4), plain, "sequence_sum", {"kl_coef": 0.005}),
    "rloo, several updates": (
        pg.rloo(group_size=2, clip_eps=0.2), against_others(TO_COME, 2), clipped(), "sequence_sum", {"kl_coef": 0.005},
    ),
    "grpo": (pg.grpo(), of_group(4, True), clipped(), "sequence_mean", {"kl_loss_coef": 0.04}),
    "dr_grpo": (pg.dr_grpo(group_size=2), of_group(2, False), clipped(), "sequence_sum", {}),
    "reinforce": (pg.reinforce(), RETURNS, plain, "sequence_sum", {"kl_coef": 0.005}),
}  # fmt: skip
COEFS = ("value_coef", "kl_coef", "kl_loss_coef", "entropy_coef")


def rollout_of(tokens):
    """Give the rollout whose completions have `LENGTHS` tokens."""
    seen = np.concatenate([np.ones((ROWS, P), bool), MASK[:, 1:]], axis=1)
    mask = np.concatenate([np.zeros((ROWS, P), bool), MASK[:, 1:]], axis=1)
    return pg.Rollout(
        tokens, jnp.asarray(seen), jnp.asarray(mask), jnp.pad(jnp.asarray(LOGPROBS), ((0, 0), (P - 1, 0)))
    )


TOKENS = jax.random.randint(jax.random.key(1), (ROWS, P + N), 0, 23)


@pytest.mark.parametrize("name", CASES)
def test_advantages_and_loss_are_those_of_the_papers(name):
    algorithm, advantages, token_loss, reduce, coefs = CASES[name]
    policy = pg.Scored(*(jnp.asarray(x) for x in (LOGPROBS, VALUES, NOISE)))
    batch, kl_coef, metrics = programs.experience(
        rollout_of(TOKENS), policy, jnp.asarray(REF), jnp.asarray(SCORES), jnp.float32(BETA), algorithm=algorithm
    )
    assert float(kl_coef) == np.float32(BETA)
    assert_close(np.where(MASK, batch.returns, 0), RETURNS, 1e-5)
    assert_close(batch.advantages, advantages, 2e-5)
    assert np.abs(advantages).max() > 0.1
    assert ("val/explained_variance" in metrics) == ("value_coef" in coefs)
    new = LOGPROBS + 0.3 * NOISE
    found = algorithm.token_loss(jnp.asarray(new), batch)
    assert_close(np.where(MASK, found, 0), np.where(MASK, token_loss(new, advantages), 0), 2e-5, rtol=1e-5)
    assert {x: getattr(algorithm, x) for x in COEFS if getattr(algorithm, x) != 0} == coefs
    assert algorithm.reduce == reduce and algorithm.on_policy == (token_loss is plain)


def test_the_reductions_weigh_the_tokens_of_the_loss():
    lm, params = tiny_lm("llama"), {"lm": tiny_params("llama"), "value": pg.init_value_head(16)}
    rollout, x = rollout_of(TOKENS), jnp.asarray(NOISE)
    logits = lm.apply(params["lm"], TOKENS, rollout.attention_mask)
    logprobs = core_in_numpy.token_logprobs(np.asarray(logits), np.asarray(TOKENS))[:, -(N + 1) :]
    for reduce in REDUCTIONS:
        algorithm = pg.reinforce(reduce=reduce)
        weights = programs.token_weights(jnp.asarray(MASK), reduce)
        batch = Batch(TOKENS, rollout.attention_mask, jnp.asarray(MASK), x, x, x, x, weights=weights)
        loss, _ = policy_loss(params, batch, lm=lm, algorithm=algorithm, temperature=1.0)
        assert float(loss) == pytest.approx(core_in_numpy.reduce(-NOISE * logprobs, MASK, reduce), rel=1e-4)


def test_equal_arguments_give_the_same_value_and_others_another():
    for make in (pg.ppo, pg.rloo, pg.grpo, pg.dr_grpo, pg.reinforce):
        assert make(kl_coef=0.1) == make(kl_coef=0.1) and hash(make()) == hash(make())
        assert make(kl_coef=0.1) != make() and make(entropy_coef=0.0) == make(), "a default spelled out is the default"
    assert pg.rloo(group_size=4) == pg.rloo() != pg.rloo(group_size=2)
    assert pg.dr_grpo() == pg.grpo(normalize=False, kl_loss_coef=0.0, reduce="sequence_sum")
    assert load_algorithm("rloo", group_size=2) == pg.rloo(group_size=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pg.ppo(reduce="mean"), "reduce must be one of token_mean, sequence_mean, sequence_sum, got 'mean'"),
        (lambda: pg.ppo(kl_coef=-1.0), "kl_coef must be finite and at least 0, got -1.0"),
        (lambda: pg.ppo(entropy_coef=math.inf), "entropy_coef must be finite and at least 0, got inf"),
        (lambda: pg.ppo(value_coef=math.nan), "value_coef must be finite and at least 0, got nan"),
        (lambda: pg.grpo(kl_loss_coef=-0.1), "kl_loss_coef must be finite and at least 0, got -0.1"),
        (lambda: pg.ppo(discount=0.0), "discount must be above 0 and at most 1, got 0.0"),
        (lambda: pg.reinforce(discount=1.1), "discount must be above 0 and at most 1, got 1.1"),
        (lambda: pg.ppo(value_clip_eps=0.0), "value_clip_eps must be above 0, got 0.0"),
        (lambda: pg.ppo()._replace(group_size=0), "group_size must be at least 1, got 0"),
        (lambda: pg.rloo()._replace(discount=0.9), "groups of 4 compare whole sequences: leave discount at 1, got 0.9"),
        (lambda: pg.rloo(group_size=1), "group_size must be at least 2, got 1"),
        (lambda: pg.grpo(clip_eps=-0.1), "clip_eps must be at least 0, got -0.1"),
        (lambda: pg.ppo(clip_eps=math.nan), "clip_eps must be at least 0, got nan"),
        (lambda: pg.ppo(clip_eps_high=-1.0), "clip_eps_high must be at least 0, got -1.0"),
        (lambda: pg.ppo(dual_clip=1.0), "dual_clip must be above 1, got 1.0"),
        (lambda: pg.rloo(clip_eps_high=0.3), "clip_eps_high=0.3 belongs to a clipped ratio, which needs clip_eps"),
    ],
)
def test_numbers_that_cannot_work_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        check_algorithm(make())


def test_experience_refuses_a_discount_with_groups():
    """The bug: only the script did."""
    x = jnp.asarray(NOISE)
    algorithm = pg.grpo()._replace(discount=0.9)
    with pytest.raises(UserError, match=r"leave discount at 1, got 0.9"):
        programs.experience(
            rollout_of(TOKENS), pg.Scored(x, x, x), x, jnp.asarray(SCORES), jnp.float32(0), algorithm=algorithm
        )


MINE = pg.reinforce(kl_coef=0.25)
GROUPED = pg.grpo(group_size=4)
NUMBER = 3


def make_mine(*, scale: float = 1.0, group_size: int = 1) -> Algorithm:
    return MINE._replace(advantages=lambda experience: scale * experience.returns, group_size=group_size)


def make_none() -> str:
    return "no algorithm"


HERE = "tests.test_algorithms"


def test_an_algorithm_is_found_by_name_and_its_options_overridden():
    from tests import test_algorithms as here  # the module that names are looked up in

    for name in ("ppo", "rloo", "grpo", "dr_grpo", "reinforce"):
        assert load_algorithm(name) == getattr(pg, name)()
    assert load_algorithm("grpo", group_size=8, clip_eps=0.1, entropy_coef=None) == pg.grpo(group_size=8, clip_eps=0.1)
    assert load_algorithm("rloo", value_coef=0.5) == pg.rloo()._replace(
        value_coef=0.5
    )  # a field that it has no argument for
    assert load_algorithm("reinforce", group_size=4) == pg.reinforce()._replace(group_size=4)
    assert load_algorithm(f"{HERE}:MINE") == here.MINE
    assert load_algorithm(f"{HERE}:MINE", kl_coef=0.5).kl_coef == 0.5
    made = load_algorithm(f"{HERE}:make_mine", scale=3.0, discount=0.5)
    assert made.kl_coef == 0.25 and made.discount == 0.5
    assert made.advantages(pg.Experience(*[2.0] * 7)) == 6.0


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (
            "trpo",
            {},
            "no algorithm 'trpo': it is one of ppo, rloo, grpo, dr_grpo, reinforce, gspo, .*, or module:name for your own",
        ),
        ("_group", {}, "no algorithm '_group'"),
        ("check_algorithm", {}, "no algorithm 'check_algorithm'"),
        ("reinforce", {"clip_eps": 0.1}, "the algorithm reinforce has no option clip_eps"),
        ("ppo", {"gamma": 1, "lam": 1}, "the algorithm ppo has no option gamma, lam"),
        (f"{HERE}:MINE", {"scale": 2.0}, "MINE has no option scale"),
        (f"{HERE}:GROUPED", {"group_size": 8}, "compares groups of 4 in its advantages, not of group_size=8"),
        ("no_such_module:f", {}, "'no_such_module:f': there is no module 'no_such_module'"),
        (f"{HERE}:nothing", {}, f"module '{HERE}' has no 'nothing'"),
        (f"{HERE}:NUMBER", {}, "must be a pgjax.Algorithm or a function that gives one, and is 3"),
        (f"{HERE}:make_none", {}, "must be a pgjax.Algorithm or a function that gives one, and gives 'no algorithm'"),
    ],
)
def test_what_is_no_algorithm_is_refused_by_name(spec, options, message):
    with pytest.raises(UserError, match=message):
        load_algorithm(spec, **options)


def odd_tokens(tokens):
    """A black box: the share of odd ids among the four sampled tokens."""
    return (np.asarray(tokens)[:, -4:] % 2).mean(1)


def above_the_mean(experience):
    return jnp.where(experience.mask, (experience.scores - experience.scores.mean())[:, None], 0.0)


def likelihood_ratio(logprobs, batch):
    return -batch.advantages * jnp.exp(logprobs - batch.old_logprobs)


@pytest.mark.campaign
def test_an_algorithm_of_ones_own_learns():
    lm = tiny_lm("llama")
    mine = Algorithm(above_the_mean, likelihood_ratio, "token_mean")
    it = pg.iteration(lm, mine, optax.adam(3e-2), max_new_tokens=4)
    state = it.init(lm.init(jax.random.key(0)), jax.random.key(1))
    prompts = np.ones((64, 2), np.int32)
    means = []
    for _ in range(8):
        rollout = it.sample(state, prompts, prompts > 0)
        scores = odd_tokens(rollout.tokens)
        state, metrics = it.learn(state, rollout, scores)
        means.append(scores.mean())
    assert means[0] < 0.6 and means[-1] > 0.8, means
    assert metrics["train/healthy"] and not any(name.startswith("objective/kl") for name in metrics)
