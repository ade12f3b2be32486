"""PPO, RLOO, GRPO, Dr. GRPO and REINFORCE by flags of the one script: what each learns from, and the exactness of its loss."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from experiments import ppo as script
from pgjax.learning import flags, iteration, programs
from pgjax.learning.algorithm import Batch
from pgjax.learning.optimizer import Optimizer, init_state
from pgjax.learning.policy_loss import policy_loss, token_weights
from pgjax.run import logs
from tests import core_in_numpy
from tests.sizes import campaign_but_for
from tests.tiny_task import EARLY_LETTERS, save_tiny_model

pytestmark = pytest.mark.usefixtures("no_pictures")


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def config(model, tmp_path) -> script.Config:
    prompts = tmp_path / "prompts.jsonl"
    words = ("a", "bcd", "ef", "ghij", "k", "lmn", "op", "qrs")
    prompts.write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in words))
    return script.Config(
        model=str(model), prompts=str(prompts), held_out=str(prompts), rewards=(EARLY_LETTERS,),
        output=tmp_path / "run", steps=2, batch_size=8, max_new_tokens=6, minibatches=1, microbatches=2,
        learning_rate=1e-2, warmup_updates=0, kl_coef=0.5, eval_samples=1, samples_every=1, save_every=100,
    )  # fmt: skip


def change(config: script.Config, **fields) -> script.Config:
    return dataclasses.replace(config, **fields)


@pytest.fixture
def seen(monkeypatch):
    """The arguments and the batch of every call of `programs.experience`."""
    calls = []
    original = programs.experience

    def recorded(rollout, policy, ref_logprobs, scores, kl_coef, kept, **options):
        assert kept is None, "no row is left out"
        found = original(rollout, policy, ref_logprobs, scores, kl_coef, kept, **options)
        calls.append(jax.device_get((rollout, policy, ref_logprobs, scores, kl_coef, found[0])))
        return found

    monkeypatch.setattr(iteration.programs, "experience", recorded)
    return calls


CRITIC, RLOO, GRPO, DR_GRPO, REINFORCE = ({"algorithm": x} for x in ("ppo", "rloo", "grpo", "dr_grpo", "reinforce"))
VARIANTS = {
    "PPO": {**CRITIC, "epochs": 2, "minibatches": 2},
    "PPO, asymmetric and dual clip": {**CRITIC, "clip_eps_high": 0.28, "dual_clip": 3.0, "epochs": 2},
    "RLOO": RLOO,
    "RLOO, pairs": {**RLOO, "group_size": 2},
    "GRPO": {**GRPO, "kl_coef": None},
    "GRPO, penalised in the reward": GRPO,
    "Dr. GRPO": {**DR_GRPO, "kl_coef": None},
    "Dr. GRPO, penalised in the reward, pairs": {**DR_GRPO, "group_size": 2},
    "REINFORCE": REINFORCE,
    "REINFORCE off its sampler": {**REINFORCE, "top_p": 0.6, "importance_cap": 0.602},
}


def others_mean(of_row, row, group_size):
    """Average a function of a row over the other rows of its group."""
    first = row - row % group_size
    return np.mean([of_row(i) for i in range(first, first + group_size) if i != row])


def expected_advantages(config, group_size, rollout, policy, ref_logprobs, scores, kl_coef):
    """The advantages, in float64 NumPy."""
    window = config.max_new_tokens + 1
    mask = rollout.mask[:, -window:]
    kl = policy.logprobs.astype(np.float64) - ref_logprobs
    rewards = core_in_numpy.shaped_rewards(scores, kl, mask, float(kl_coef))
    returns = core_in_numpy.returns(rewards, mask)
    if config.algorithm == "ppo":
        return core_in_numpy.whiten(returns - policy.values, mask)
    if config.algorithm == "reinforce":
        weight = 1.0
        if config.importance_cap is not None:
            log_ratio = policy.logprobs.astype(np.float64) - rollout.logprobs[:, -window:]
            weight = np.minimum(np.exp(np.where(mask, log_ratio, 0)), config.importance_cap)
        return returns * weight
    known = np.zeros(mask.shape)
    if config.algorithm == "rloo":
        for row, t in np.argwhere(mask):
            to_come = lambda i, t=t: returns[i, t] if mask[i, t] else scores[i]
            known[row, t] = to_come(row) - others_mean(to_come, row, group_size)
        return known
    groups = scores.astype(np.float64).reshape(-1, group_size)
    compared = groups - groups.mean(1, keepdims=True)
    if config.algorithm == "grpo":
        compared /= groups.std(1, ddof=1, keepdims=True) + 1e-4
    penalties = core_in_numpy.returns(-float(kl_coef) * kl, mask)  # 0 after a row's end
    for row, t in np.argwhere(mask):
        to_come = lambda i, t=t: penalties[i, t]
        known[row, t] = compared.ravel()[row] + to_come(row) - others_mean(to_come, row, group_size)
    return known


PLAIN = [name for name in VARIANTS if ", p" not in name]


@pytest.mark.parametrize("name", campaign_but_for(VARIANTS, *PLAIN))  # without "penalised" and "pairs"
def test_each_variant_learns_from_its_own_advantages(config, seen, name):
    config = change(config, **VARIANTS[name])
    group_size = flags.algorithm_of(config).group_size
    figures = script.main(config)
    assert len(seen) == 2 and figures["objective/kl"] != 0
    for rollout, policy, ref_logprobs, scores, kl_coef, batch in seen:
        known = expected_advantages(config, group_size, rollout, policy, ref_logprobs, scores, kl_coef)
        np.testing.assert_allclose(batch.advantages, known, rtol=2e-4, atol=2e-5)
        assert np.abs(known).max() > 1e-3
        prompts = rollout.tokens[:, : -config.max_new_tokens]
        if group_size > 1:
            groups = prompts.reshape(-1, group_size, prompts.shape[1])
            assert (groups == groups[:, :1]).all(), "completions of one prompt are adjacent"
            assert len(np.unique(groups[:, 0], axis=0)) == len(groups), "and each group has its own"
    with_critic = config.algorithm == "ppo"
    names = logs.read_metrics(config.output)[-1].keys()
    assert ("loss/value_avg" in names, "val/explained_variance" in names) == (with_critic, with_critic)
    assert ("loss/kl_avg" in names) == (config.algorithm == "grpo")
    if config.importance_cap is not None:
        rollout, policy, *_, batch = seen[-1]
        log_ratio = (policy.logprobs - rollout.logprobs[:, -batch.mask.shape[1] :])[batch.mask]
        assert figures["val/importance_capped"] == pytest.approx((log_ratio > np.log(0.602)).mean(), abs=1e-6)


@pytest.mark.campaign
def test_only_the_kind_with_a_critic_moves_the_value_head(config, monkeypatch):
    states = []
    original = programs.update

    def recorded(*args, **options):
        state, metrics = original(*args, **options)
        states.append(jax.device_get(state.params["value"]))
        return state, metrics

    monkeypatch.setattr(iteration.programs, "update", recorded)
    for name, moves in (("PPO", True), ("RLOO", False)):
        states.clear()
        script.main(change(config, **VARIANTS[name], steps=1, weight_decay=0.1, output=config.output.with_name(name)))
        assert any(np.any(x) for x in jax.tree.leaves(states[-1])) == moves


@pytest.mark.campaign
def test_a_group_of_equal_scores_teaches_grpo_nothing(config, seen, model):
    script.main(change(config, **GRPO, kl_coef=0.0, kl_loss_coef=0.0, rewards=("tests.test_ppo_variants:constant",)))
    assert not any(np.any(batch.advantages) for *_, batch in seen)
    jax.tree.map(np.testing.assert_array_equal, pg.load(config.output / "policy")[1], pg.load(model)[1])


def constant(prompts, completions, **columns):
    return [3.7] * len(completions)


SGD = Optimizer.at(optax.sgd(1.0), lambda update: 1.0)
LENGTHS = (5, 1, 3, 4, 2, 5, 1, 2)


def uneven_batch(lm, prompt=3, new=5):
    rows = len(LENGTHS)
    tokens = jax.random.randint(jax.random.key(1), (rows, prompt + new), 0, lm.arch.vocab_size)
    mask = jnp.concatenate([jnp.zeros((rows, 1), bool), jnp.arange(new)[None, :] < jnp.array(LENGTHS)[:, None]], axis=1)
    attention_mask = jnp.concatenate([jnp.ones((rows, prompt - 1), bool), mask.at[:, 0].set(True)], axis=1)
    noise = [jax.random.normal(key, mask.shape) for key in jax.random.split(jax.random.key(2), 5)]
    return Batch(tokens, attention_mask, mask, -5.5 + 0.3 * noise[0], *noise[1:4], ref_logprobs=-5.5 + 0.3 * noise[4])


TEMPERATURE = 0.8
COEFS = {"kl_loss_coef": 0.2, "entropy_coef": 0.05}
CLIP = {"clip_eps": 0.1, "clip_eps_high": 0.3, "dual_clip": 1.2}
ALGORITHMS = {"ppo": pg.ppo(**COEFS, **CLIP), "reinforce": pg.reinforce(**COEFS)._replace(value_coef=0.5)}


def reduced(x, mask, reduce):
    """`reduce` of the losses x [B, W], row by row."""
    if reduce == "token_mean":
        return jnp.where(mask, x, 0.0).sum() / mask.sum().astype(jnp.float32)
    sums = jnp.where(mask, x, 0.0).sum(1)
    return (sums / mask.sum(1).astype(jnp.float32) if reduce == "sequence_mean" else sums).mean()


def direct_loss(params, batch, lm, kind, reduce):
    """The whole loss from pgjax's public losses and whole logits, without the library's programs."""
    window, temperature = batch.mask.shape[1], TEMPERATURE
    logits = lm.apply(params["lm"], batch.tokens, batch.attention_mask)[:, -window:]
    tokens = batch.tokens[:, -window:]
    logprobs = pg.token_logprobs(logits, tokens, temperature=temperature)
    if kind == "ppo":
        policy = pg.clipped_surrogate_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.mask, **CLIP, reduce=reduce
        )
    else:
        policy = pg.policy_gradient_loss(logprobs, batch.advantages, batch.mask, reduce=reduce)
    hidden = lm.hidden(params["lm"], batch.tokens, batch.attention_mask)[:, -window:]
    value = pg.value_loss(pg.token_values(params["value"], hidden), batch.returns, batch.mask)
    entropy = reduced(pg.token_entropy(logits, temperature=temperature), batch.mask, reduce)
    penalty = reduced(pg.kl_k3(logprobs, batch.ref_logprobs), batch.mask, reduce)
    loss = policy + 0.5 * value - COEFS["entropy_coef"] * entropy + COEFS["kl_loss_coef"] * penalty
    return loss, {
        "loss/policy_avg": policy,
        "loss/value_avg": value,
        "loss/entropy_avg": entropy,
        "loss/kl_avg": penalty,
    }


@functools.cache
def loaded(model):
    lm, params, _ = pg.load(model)
    head = {"kernel": jax.random.normal(jax.random.key(5), (lm.arch.width,)), "bias": jnp.float32(0.1)}
    return lm, {"lm": params, "value": head}


@pytest.mark.parametrize("reduce", campaign_but_for(["token_mean", "sequence_mean", "sequence_sum"], "sequence_mean"))
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_an_update_is_the_gradient_of_the_whole_minibatchs_loss_in_however_many_parts(model, kind, reduce):
    """Uneven lengths; a mean of the microbatches' own sequence means would be another gradient."""
    lm, params = loaded(model)
    batch, algorithm = uneven_batch(lm), ALGORITHMS[kind]._replace(reduce=reduce)
    direct = jax.jit(jax.grad(functools.partial(direct_loss, lm=lm, kind=kind, reduce=reduce), has_aux=True))
    known, terms = direct(params, batch)
    order = jnp.array([[3, 1, 6, 0, 4, 2, 7, 5]])  # uneven between the parts too
    for parts in (1, 4) if kind == "ppo" else (4,):
        state = init_state(jax.tree.map(jnp.copy, params), SGD)
        state, metrics = programs.update(
            state,
            batch,
            order,
            jnp.int32(0),
            lm=lm,
            algorithm=algorithm,
            optimizer=SGD,
            microbatches=parts,
            temperature=TEMPERATURE,
        )
        found = jax.tree.map(jnp.subtract, params, state.params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), found, known)
        for name, term in terms.items():
            assert metrics[name] == pytest.approx(float(term), rel=1e-4), name


@pytest.mark.campaign
def test_the_reductions_are_three_different_losses(model):
    lm, params = loaded(model)
    batch = uneven_batch(lm)
    losses = [
        direct_loss(params, batch, lm, "reinforce", reduce)[1]
        for reduce in ("token_mean", "sequence_mean", "sequence_sum")
    ]
    for name in ("loss/policy_avg", "loss/kl_avg"):
        found = [float(loss[name]) for loss in losses]
        assert all(abs(x - y) > 0.05 * abs(x) for x, y in itertools.combinations(found, 2)), (name, found)


@pytest.mark.campaign
def test_a_kl_in_the_loss_needs_the_references_logprobs(model):
    lm, params = loaded(model)
    batch = uneven_batch(lm)._replace(ref_logprobs=None)
    with pytest.raises(ValueError, match=r"kl_loss_coef=0.2 needs the reference's log-probabilities"):
        policy_loss(params, batch, lm=lm, algorithm=ALGORITHMS["ppo"], temperature=TEMPERATURE)


@pytest.mark.campaign
@pytest.mark.parametrize("reduce", ["sequence_mean", "sequence_sum"])
def test_weights_of_tokens_turn_a_token_mean_into_the_other_reductions(reduce):
    mask = jnp.arange(6)[None, :] < jnp.array([[6], [1], [0], [3]])
    x = jax.random.normal(jax.random.key(0), mask.shape)
    found = pg.masked_mean(x * token_weights(mask, reduce), mask)
    assert float(found) == pytest.approx(core_in_numpy.reduce(np.asarray(x), np.asarray(mask), reduce), rel=1e-5)


def test_the_kl_of_a_sequence_is_summed_over_its_own_tokens():
    draw = np.random.default_rng(0)
    new, old = draw.normal(size=(3, 4)).astype(np.float32), draw.normal(size=(3, 4)).astype(np.float32)
    mask = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    found = programs.sequence_kl(*(jnp.where(mask[:, 2:], x, jnp.nan) for x in (new, old)), jnp.asarray(mask))
    np.testing.assert_allclose(found, np.where(mask[:, 2:], new - old, 0).sum(1), rtol=1e-5)


def test_evaluations_now_and_then_report_kl_and_every_reward_and_are_not_repeated(config, monkeypatch):
    config = change(
        config, steps=4, eval_every=2, eval_samples=3, save_every=2, rewards=(EARLY_LETTERS, f"{__name__}:length"),
        reward_weights=(1.0, 0.0),
    )  # fmt: skip
    figures = script.main(config)
    evaluated = [row for row in logs.read_metrics(config.output) if "eval/scores" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 4]
    assert evaluated[0]["eval/kl"] == 0 and abs(evaluated[1]["eval/kl"]) > 1e-4
    for row in evaluated:
        assert row["eval/rewards/early_letters"] == pytest.approx(row["eval/scores"], abs=1e-6)
        assert row["eval/rewards/length"] > 1, "weight 0: measured, and not paid"
        assert row["eval/scores_stderr"] > 0 and row["eval/kl_stderr"] >= 0
    last = {name: value for name, value in evaluated[-1].items() if name.startswith("eval/")}
    assert last.items() <= figures.items()
    script.main(change(config, resume=True, steps=6))
    steps = [row["step"] for row in logs.read_metrics(config.output) if "eval/scores" in row]
    assert steps == [0, 2, 4, 6]
    trained = [row["step"] for row in logs.read_metrics(config.output) if "objective/scores" in row]
    assert trained == [1, 2, 3, 4, 5, 6]


@pytest.mark.campaign
def test_evaluating_does_not_change_what_is_learnt(config):
    for name, every in (("without", None), ("with", 1)):
        script.main(change(config, eval_every=every, output=config.output.with_name(name)))
    with_them, without = (pg.load(config.output.with_name(name) / "policy")[1] for name in ("with", "without"))
    jax.tree.map(np.testing.assert_array_equal, with_them, without)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"algorithm": "trpo"},
            "no algorithm 'trpo': it is one of ppo, rloo, grpo, dr_grpo, reinforce, gspo, .*, or module:name",
        ),
        ({**REINFORCE, "clip_eps": 0.1}, "the algorithm reinforce has no option clip_eps"),
        ({"reduce": "mean"}, "reduce must be one of token_mean, sequence_mean, sequence_sum, got 'mean'"),
        ({**RLOO, "epochs": 2}, "epochs=2 would learn from samples of an older policy"),
        ({**RLOO, "group_size": 1}, "group_size must be at least 2, got 1"),
        ({**GRPO, "group_size": 3}, "batch_size=8 does not divide into groups of group_size=3"),
        ({**GRPO, "discount": 0.9}, "leave discount at 1, got 0.9"),
        ({"clip_eps_high": -0.1}, "clip_eps_high must be at least 0, got -0.1"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, got 1.0"),
        ({"dual_clip": float("inf")}, "dual_clip must be above 1, got inf .None sets no bound"),
        ({"importance_cap": 0.0}, "importance_cap must be above 0, got 0.0"),
        ({"kl_loss_coef": -1.0}, "kl_loss_coef must be finite and at least 0, got -1.0"),
        ({"eval_every": 0}, "eval_every must be at least 1, got 0"),
        ({"rewards": ()}, "rewards is empty: name at least one module:function, or a reward model"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_written(config, fields, message):
    with pytest.raises(ValueError, match=message):
        script.main(change(config, **fields))
    assert not config.output.exists()
