"""Chapters 3 to 5 and their small language model: they run, their worked numbers hold, and each new line does what is said."""

import contextlib
import dataclasses
import functools
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import pgjax as pg
from experiments.chapters import ch3_llm_reinforce as ch3
from experiments.chapters import ch4_actor_critic as ch4
from experiments.chapters import ch5_ppo as ch5
from experiments.chapters import small_lm
from experiments.study.pictures import picture_path
from experiments.tasks import haiku
from pgjax.learning import programs
from pgjax.learning.optimizer import adamw, init_state
from tests.sizes import campaign_but_for
from tests.tiny_task import save_tiny_model

SIZES = {"pretrain_steps": 60, "steps": 3, "topics": 2, "repeat": 4, "max_new_tokens": 24}
MORE_SIZES = {
    ch3: {"noise_repeat": 16, "pairs": 2, "runs": 1},
    ch4: {"noise_repeat": 16, "runs": 1},
    ch5: {"fit_repeat": 4, "runs": 1, "epochs": 3},
}


@pytest.fixture(scope="module", autouse=True)
def pretrained_once():
    """Let the scripts share one pretraining: it is the same for the same number of steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_lm, "load", functools.cache(small_lm.load))
        yield


@pytest.fixture(scope="module")
def ran(pretrained_once, tmp_path_factory):
    """Run a chapter, once for all tests: chapter -> (its picture, what it returns, what it prints)."""

    @functools.cache
    def run(chapter):
        picture = tmp_path_factory.mktemp("chapter") / "new" / "picture.png"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            result = chapter.main(chapter.Config(picture=picture, **SIZES, **MORE_SIZES[chapter]))
        return picture, result, printed.getvalue()

    return run


@pytest.fixture(scope="module")
def small(pretrained_once):
    """The small model after a short pretraining, and a rollout of it: lm, params, tokenizer, rollout, scores."""
    lm, weights, tokenizer = small_lm.load("small", seed=0, pretrain_steps=SIZES["pretrain_steps"])
    params = {"lm": weights, "value": pg.init_value_head(lm.arch.width)}
    asked = small_lm.prompts(tokenizer, SIZES["topics"], repeat=SIZES["repeat"])
    rollout, _, scores = small_lm.play(
        lm, weights, tokenizer, asked, jax.random.key(7), max_new_tokens=SIZES["max_new_tokens"]
    )
    return lm, params, tokenizer, rollout, scores


def test_tokenizer_gives_back_every_poem():
    tokenizer, rng = small_lm.make_tokenizer(), np.random.default_rng(0)
    for topic in small_lm.TOPICS * 4:
        poem = small_lm.write_poem(topic, rng)
        ids = tokenizer(poem + small_lm.END)["input_ids"]
        assert ids.count(tokenizer.eos_token_id) == 1, "a word fell outside the vocabulary"
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == poem


def test_prompts_know_every_word_and_keep_a_topic_together():
    tokenizer = small_lm.make_tokenizer()
    asked = small_lm.prompts(tokenizer, 4, repeat=2)
    assert asked.texts[:3] == ["Write a haiku about robots"] * 2 + ["Write a haiku about rain"]
    assert not (asked.tokens[asked.mask] == tokenizer.eos_token_id).any()
    assert asked.mask[:, -1].all()  # padded on the left: "the moon" is a word longer than "robots"
    assert asked.mask.sum(1).tolist() == [5, 5, 5, 5, 5, 5, 6, 6]
    assert set(small_lm.TOPICS) <= set(haiku.TOPICS)


def test_the_words_can_make_an_exact_haiku():
    # Were the lexicon short of one-syllable or three-syllable words, no policy could reach the score of 1.
    poem = "beside the machines\nforgotten robots humming\nnear the old circuits"
    tokenizer = small_lm.make_tokenizer()
    assert tokenizer.unk_token_id not in tokenizer(poem)["input_ids"]
    assert haiku.exact_575(poem)
    assert haiku.haiku_score(poem) == 1.0


def test_pretraining_lowers_the_loss_on_poems_it_has_not_seen(small):
    lm, params, tokenizer, _, _ = small
    tokens, attention_mask, mask = (x[:64, -30:] for x in small_lm.poems(tokenizer, 64, seed=99))

    @jax.jit
    def loss(weights):
        return pg.cross_entropy_loss(pg.token_logprobs(lm.apply(weights, tokens, attention_mask), tokens), mask)

    before, after = float(loss(lm.init(jax.random.key(0)))), float(loss(params["lm"]))
    assert before == pytest.approx(np.log(len(tokenizer)), abs=0.3)  # it knew nothing
    assert after < before - 1.5


def test_the_masks_of_the_poems_cover_poem_and_end_only():
    tokenizer = small_lm.make_tokenizer()
    tokens, attention_mask, mask = small_lm.poems(tokenizer, 16, seed=3)
    assert (attention_mask | ~mask).all()
    for row, inside, real in zip(tokens, mask, attention_mask, strict=True):
        assert tokenizer.decode(row[real & ~inside]).startswith("Write a haiku about")
        assert row[inside][-1] == tokenizer.eos_token_id


def test_gradient_variance_is_that_of_the_stacked_gradients():
    weights = {"a": jnp.array([0.3, -0.2]), "b": jnp.array(0.7)}
    rows = np.random.default_rng(0).standard_normal((9, 2)).astype(np.float32)

    def loss(weights, x):
        assert x.shape == (1, 2)
        return jnp.sum(jnp.tanh(x @ weights["a"] + weights["b"]))

    grads = [jax.grad(loss)(weights, row[None]) for row in rows]
    stacked = np.stack([np.append(np.asarray(grad["a"]), grad["b"]) for grad in grads])
    expected = np.var(stacked.astype(np.float64), axis=0, ddof=1).sum()
    assert float(small_lm.gradient_variance(loss, weights, (rows,))) == pytest.approx(expected, rel=1e-4)


def test_noise_compares_disjoint_batches_of_every_size(small, monkeypatch):
    lm, params, _, rollout, scores = small
    seen = []

    def direction(lm, params, rollout, scores):
        seen.append({tuple(row) for row in np.asarray(rollout.tokens).tolist()})
        return jnp.array([1.0, 0.0]) if len(seen) % 2 else jnp.array([0.6, 0.8])

    monkeypatch.setattr(ch3, "direction", direction)
    cosines = ch3.noise(lm, params, rollout, scores, pairs=2)
    assert list(cosines) == [1, 2, 4]
    assert all(np.round(found, 6).tolist() == [0.6, 0.6] for found in cosines.values())
    assert all(first.isdisjoint(second) for first, second in zip(seen[::2], seen[1::2], strict=True))


def test_every_token_gets_the_whole_score(small):
    _, _, _, rollout, scores = small
    returns = ch3.returns_of(scores, rollout.mask)
    np.testing.assert_allclose(returns, np.where(rollout.mask, np.asarray(scores)[:, None], 0.0), rtol=1e-6)


def test_a_critic_that_is_fitted_predicts_better_than_the_mean(small):
    lm, params, _, rollout, scores = small
    fitted = ch4.fit_critic(lm, params, rollout, scores)
    _, values = jax.jit(ch4.forward, static_argnums=1)(fitted, lm, rollout)
    returns, mask = np.asarray(ch4.returns_of(scores, rollout.mask)), np.asarray(rollout.mask)
    error = np.mean((np.asarray(values) - returns)[mask] ** 2)
    assert error < np.var(returns[mask])
    assert fitted["lm"] is not params["lm"] and all(
        (a == b).all() for a, b in zip(jax.tree.leaves(fitted["lm"]), jax.tree.leaves(params["lm"]), strict=True)
    )


def test_the_baselines_are_none_the_others_and_the_value():
    scores, values = jnp.array([1.0, 3.0, 5.0, 5.0]), jnp.full((4, 2), 0.5)
    found = [ch4.baseline_of(shares, scores, values, 2)[:, 0].tolist() for shares in ch4.BASELINES.values()]
    assert list(ch4.BASELINES) == ["R", "R - b", "R - V(s_t)"]
    assert found == [[0.0] * 4, [3.0, 1.0, 5.0, 5.0], [0.5] * 4]


def test_worked_advantages_of_chapter_4(capsys):
    assert ch4.worked_example() == [0.2, 0.05, -0.65]
    assert "A = -0.65" in capsys.readouterr().out


def test_the_clip_pictures_of_chapter_5():
    for sign, (ratios, objective, slope) in ch5.clip_curves(0.2).items():
        best = np.minimum(ratios * sign, np.clip(ratios, 0.8, 1.2) * sign)
        np.testing.assert_allclose(objective, best, atol=1e-6)
        dead = ratios > 1.2 + 1e-4 if sign > 0 else ratios < 0.8 - 1e-4
        live = ratios < 1.2 - 1e-4 if sign > 0 else ratios > 0.8 + 1e-4
        np.testing.assert_allclose(slope[dead], 0.0, atol=1e-6)
        np.testing.assert_allclose(slope[live], sign, atol=1e-5)


def ppo_step(small, params, scores, *, epochs=1, kl_coef=0.0):
    """An update of chapter 5 on the fixture's rollout."""
    lm, reference, _, rollout, _ = small
    algorithm = ch5.ppo(clip_eps=0.2, kl_coef=kl_coef, value_coef=0.5)
    optimizer = adamw(ch5.Config().learning_rate, updates=SIZES["steps"])
    sizes = {"max_new_tokens": SIZES["max_new_tokens"], "epochs": epochs}
    it = pg.iteration(lm, algorithm, optimizer, reference=reference["lm"], **sizes)
    state = it.init(params["lm"], jax.random.key(0), critic=params["value"])
    ids, window = (
        (rollout.tokens, rollout.attention_mask, jnp.float32(1)),
        {"window": sizes["max_new_tokens"] + 1, "parts": 1},
    )
    policy = programs.teacher_force(lm, params, *ids, **window)
    ref_logprobs = programs.reference_logprobs(lm, reference["lm"], *ids, **window)
    state, metrics = it.learn(state, pg.Sampled(*rollout, policy, ref_logprobs), scores)
    return state.learner, metrics


@pytest.mark.campaign
def test_ppo_with_one_epoch_and_no_kl_is_actor_critic(small):
    # At ratio 1 the clipped surrogate has the policy gradient's gradient: chapter 5 adds nothing until the second epoch.
    lm, params, _, rollout, scores = small
    optimizer = adamw(ch5.Config().learning_rate, updates=SIZES["steps"])
    actor, _ = ch4.update(
        lm, optimizer, init_state(params, optimizer), rollout, scores,
        shares=ch4.BASELINES["R - V(s_t)"], repeat=4, value_coef=0.5,
    )  # fmt: skip
    ppo, metrics = ppo_step(small, params, scores)
    for a, b, start in zip(*(jax.tree.leaves(x) for x in (ppo.params, actor.params, params)), strict=True):
        moved = np.abs(np.asarray(b - start)).mean()
        assert np.abs(np.asarray(a - b)).mean() < 0.01 * moved  # Adam's first step is a sign: a tiny gradient may flip
    assert float(metrics["objective/kl"]) == pytest.approx(0.0, abs=1e-4)
    assert int(ppo_step(small, params, scores, epochs=3)[0].updates) == 3


@pytest.mark.campaign
def test_the_kl_penalty_makes_what_the_reference_would_not_say_less_likely(small):
    # All scores are 0: whatever moves the policy is the penalty. Were its sign wrong, sum A dlogp would be below 0.
    lm, params, _, rollout, scores = small
    moved = {**params, "lm": jax.tree.map(lambda x: 1.15 * x, params["lm"])}
    nothing = jnp.zeros_like(scores)
    forward = jax.jit(ch4.forward, static_argnums=1)
    stepped, _ = ppo_step(small, moved, nothing, kl_coef=1.0)
    old, ref, new = (np.asarray(forward(x, lm, rollout)[0], np.float64) for x in (moved, params, stepped.params))
    advantages = np.zeros_like(old)
    for row, column in np.argwhere(np.asarray(rollout.mask)):
        later = np.asarray(rollout.mask)[row, column:]
        advantages[row, column] = -(old - ref)[row, column:][later].sum()
    assert (advantages * (new - old)).sum() > 1.0
    still, _ = ppo_step(small, moved, nothing, kl_coef=0.0)
    assert all((a == b).all() for a, b in zip(*(jax.tree.leaves(x["lm"]) for x in (still.params, moved)), strict=True))


@pytest.mark.parametrize("chapter", campaign_but_for([ch3, ch4, ch5], ch5), ids=["ch3", "ch4", "ch5"])
def test_chapter_runs_and_draws(chapter, ran):
    picture, result, printed = ran(chapter)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 150_000
    assert "mean score" in printed
    numbers = np.concatenate([np.ravel(x) for x in jax.tree.leaves(result)])
    assert np.isfinite(numbers).all()
    scores = {
        ch3: lambda: result["curves"],
        ch4: lambda: [curve for curves in result["curves"].values() for curve in curves],
        ch5: lambda: [[x["score"] for x in run] for runs in result["histories"].values() for run in runs],
    }[chapter]()
    assert all(len(curve) == SIZES["steps"] and 0 < min(curve) <= max(curve) <= 1 for curve in scores)


@pytest.mark.campaign
def test_chapter_4_without_a_baseline_is_chapter_3(ran):
    (_, first, told), (_, second, _) = ran(ch3), ran(ch4)
    assert ch3.TABLE in told
    assert "log pi" in told and "credit" in told
    np.testing.assert_allclose(second["curves"]["R"][0], first["curves"][0], atol=1e-6)
    assert second["advantages"] == [0.2, 0.05, -0.65]
    for name in ("R - b", "R - V(s_t)"):
        assert second["variances"][name] < 0.5 * second["variances"]["R"]


def on_another_model(tmp_path, model):
    """Run chapter 3 on a model that it does not make itself."""
    sizes = {"steps": 1, "runs": 1, "topics": 1, "repeat": 2, "noise_repeat": 2, "pairs": 1, "max_new_tokens": 4}
    result = ch3.main(ch3.Config(model=model, picture=tmp_path / "3.png", **sizes))
    assert list(result["cosines"]) == [1]
    assert np.isfinite(result["curves"][0]).all()


@pytest.mark.campaign
def test_chapter_3_on_a_saved_model(tmp_path):
    on_another_model(tmp_path, str(save_tiny_model(tmp_path / "tiny", max_positions=256)))


@pytest.mark.campaign
def test_chapter_3_on_the_first_layers_of_the_real_model(smollm2, tmp_path, monkeypatch):
    lm, params, tokenizer = smollm2
    shallow = pg.causal_lm(dataclasses.replace(lm.arch, depth=2))
    first = params | {"layers": jax.tree.map(lambda x: x[:2], params["layers"])}
    monkeypatch.setattr(pg, "load", {"smollm2": (shallow, first, tokenizer)}.__getitem__)
    on_another_model(tmp_path, "smollm2")


@pytest.mark.campaign
def test_the_small_model_shows_its_poems(capsys):
    found = small_lm.main(small_lm.Config(pretrain_steps=2, max_new_tokens=8))
    assert 0 <= found["score"] <= 1
    assert 1 <= found["length"] <= 8
    assert "Write a haiku about robots (score" in capsys.readouterr().out


def test_pictures_go_to_a_folder_of_runs_and_over_the_committed_ones_only_by_a_flag():
    # The bug: a chapter that is tried out, on a model of one's own too, overwrites a picture that git tracks.
    for chapter, name in ((ch3, "ch3_llm_reinforce"), (ch4, "ch4_actor_critic"), (ch5, "ch5_ppo")):
        config = chapter.Config()
        assert not config.refresh_pictures and config.picture == Path("runs", "chapters", f"{name}.png")
        assert picture_path(config.picture, False) == config.picture
        assert picture_path(config.picture, True).exists()  # the committed one


def test_a_large_model_brings_its_own_defaults_and_flags_still_win(monkeypatch):
    def parse(*flags):
        monkeypatch.setattr("sys.argv", ["chapter", *flags])
        return small_lm.parse(ch5.Config, **ch5.LARGE)

    assert parse() == ch5.Config()
    assert parse("--model", "smollm2") == dataclasses.replace(ch5.Config(), model="smollm2", **ch5.LARGE)
    assert parse("--model", "smollm2", "--steps", "9").steps == 9
    assert tyro.cli(ch5.Config, args=[]) == ch5.Config()
