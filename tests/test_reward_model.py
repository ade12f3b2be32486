"""The reward model: one reading of the score, Hugging Face layout in and out, one normalisation."""

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax.models.io.classifier import PAD_TOKEN, with_padding_token
from pgjax.models.reward_model import from_causal_lm, init_score_head, last_index, normalized
from tests.compare import assert_close, assert_same_bits
from tests.goldens.reward_cases import END, FAMILIES, TEXTS, end_padded_tokenizer, random_params, saved_case
from tests.sizes import campaign_but_for
from tests.tiny import ARCHITECTURES, tiny_lm, tiny_params

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = np.load(GOLDENS / "reward_models.npz")
ROWS = [GOLDEN[f"row{i}"] for i in range(3)]


@functools.cache
def programs(rm):
    return jax.jit(rm.apply), jax.jit(rm.features)


def score(rm, *arguments):
    return programs(rm)[0](*arguments)


def padded(rows, side, pad_id):
    """Pad rows with an id that occurs in them; only the mask says which is which."""
    width = max(map(len, rows)) + 2
    tokens, mask = np.full((len(rows), width), pad_id, np.int32), np.zeros((len(rows), width), bool)
    for row, ids in enumerate(rows):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        tokens[row, place], mask[row, place] = ids, True
    return jnp.asarray(tokens), jnp.asarray(mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", campaign_but_for([*FAMILIES, "llama_bf16"], "llama", "gpt2"))
def test_a_classifier_that_torch_saved_scores_as_torch_does_on_either_side_of_padding(family, side):
    rm, params, tokenizer = pg.load_reward_model(GOLDENS / f"reward_{family}", dtype=jnp.float32)
    tokens, mask = padded(ROWS, side, pad_id=2)  # the end of sequence, with which the second row ends
    scores = score(rm, params, tokens, mask)
    assert tokenizer is None and scores.dtype == jnp.float32
    assert_close(scores, GOLDEN[f"torch_{family}"], of_max=1e-5)
    assert "head" not in params["lm"] and params["score"]["kernel"].shape == (16,)


@pytest.mark.parametrize("family", campaign_but_for(FAMILIES, "llama", "gpt2"))
def test_torch_scores_a_saved_model_as_it_was_though_padding_was_the_end_of_sequence(family, tmp_path):
    rm, params, tokenizer = saved_case(family, tmp_path / "rm")
    ids = tokenizer(TEXTS)["input_ids"]
    assert [row[-1] == tokenizer.eos_token_id for row in ids] == [True, False, True, True, True]
    for side in ("left", "right"):
        assert_close(
            score(rm, params, *padded(ids, side, tokenizer.eos_token_id)), GOLDEN[f"ours_{family}"], of_max=1e-5
        )
    again, loaded, saved = pg.load_reward_model(tmp_path / "rm")
    assert saved.padding_side == "right" and saved.pad_token_id != saved.eos_token_id
    assert saved(TEXTS)["input_ids"] == ids
    batch = saved(TEXTS, padding=True, return_tensors="np")
    assert_close(
        score(again, loaded, batch["input_ids"], batch["attention_mask"]), GOLDEN[f"ours_{family}"], of_max=1e-5
    )
    assert tokenizer.pad_token == END  # the caller's own is left alone


@pytest.mark.parametrize("family", campaign_but_for(FAMILIES, "llama", "gpt2"))
def test_torch_where_installed_gives_the_scores_of_the_goldens(family, tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed; its scores are held by the committed goldens")
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rm, params, tokenizer = saved_case(family, tmp_path / "rm")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "rm")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**batch).logits[:, 0].numpy()
    assert model.config.num_labels == 1
    assert_close(score(rm, params, *padded(tokenizer(TEXTS)["input_ids"], "right", 0)), theirs, of_max=1e-5)
    assert_close(GOLDEN[f"ours_{family}"], theirs, of_max=1e-5)


@pytest.mark.parametrize("family", campaign_but_for(FAMILIES, "llama", "gpt2"))
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_save_and_load_give_the_same_bits(family, param_dtype, tmp_path):
    rm, params, _ = pg.load_reward_model(GOLDENS / f"reward_{family}", param_dtype=param_dtype)
    pg.save_reward_model(tmp_path / "out", rm, params, None)
    again, back, tokenizer = pg.load_reward_model(tmp_path / "out", param_dtype=param_dtype)
    assert again.arch == rm.arch and tokenizer is None
    assert_same_bits(back, params)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification") and len(config["id2label"]) == 1
    assert config["dtype"] == jnp.dtype(param_dtype).name


@pytest.mark.campaign
def test_a_mesh_spreads_the_body_and_the_scores_stay(tmp_path):
    from pgjax.parallel.sharding import make_mesh

    rm, params, _ = pg.load_reward_model(GOLDENS / "reward_llama")
    _, spread, _ = pg.load_reward_model(GOLDENS / "reward_llama", mesh=make_mesh(data=2, fsdp=2))
    assert_same_bits(params, spread)
    table, kernel = spread["lm"]["embed"]["tokens"], spread["score"]["kernel"]
    assert table.addressable_shards[0].data.shape == (32, 8) and kernel.sharding.is_fully_replicated
    assert_close(score(rm, spread, *padded(ROWS, "left", 2)), GOLDEN["torch_llama"], of_max=1e-5)
    pg.save_reward_model(tmp_path / "rm", rm, spread, None)
    assert_same_bits(pg.load_reward_model(tmp_path / "rm")[1], params)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_the_score_is_read_at_the_last_real_token_and_nothing_else_moves_it(name):
    rm = pg.reward_model(ARCHITECTURES[name])
    params = random_params(rm)
    mask = jnp.array([[False, False, True, True, True], [True, True, True, True, False]])
    tokens = jnp.array([[2, 2, 5, 6, 2], [7, 8, 9, 2, 2]])
    hidden = np.asarray(tiny_lm(name).hidden(params["lm"], tokens, mask))
    kernel = np.asarray(params["score"]["kernel"])
    np.testing.assert_allclose(
        score(rm, params, tokens, mask), [hidden[0, 4] @ kernel, hidden[1, 3] @ kernel], rtol=1e-5
    )
    other = tokens.at[0, :2].set(3).at[1, 4].set(11)
    assert np.array_equal(score(rm, params, other, mask), score(rm, params, tokens, mask))
    assert last_index(mask).tolist() == [4, 3]


def test_integer_masks_and_no_mask_read_the_same_token():
    rm = pg.reward_model(ARCHITECTURES["gpt2"])
    params, tokens = random_params(rm), jnp.array([[5, 6, 7]])
    whole = score(rm, params, tokens)
    assert np.array_equal(whole, score(rm, params, tokens, jnp.ones((1, 3), jnp.int32)))
    assert not np.array_equal(whole, score(rm, params, tokens, jnp.array([[1, 1, 0]])))


def test_the_gradient_reaches_the_whole_body_and_the_head():
    rm = pg.reward_model(ARCHITECTURES["llama"])
    tokens = jnp.array([[5, 6, 7, 2]])
    gradient = jax.grad(lambda p: rm.apply(p, tokens)[0])(random_params(rm))
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        assert np.abs(np.asarray(leaf)).max() > 0, jax.tree_util.keystr(path)


def test_the_head_starts_with_standard_deviation_one_over_root_of_width_plus_one():
    kernel = np.asarray(init_score_head(jax.random.key(0), 65_535)["kernel"])
    assert abs(kernel.std() * 256 - 1) < 0.02 and abs(kernel.mean() * 256) < 0.02
    other = init_score_head(jax.random.key(1), 65_535)["kernel"]
    assert not np.array_equal(kernel, other)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_language_model_gives_its_body_and_loses_its_unembedding(name):
    lm, params = tiny_lm(name), tiny_params(name)
    rm, made = from_causal_lm(lm, params, jax.random.key(0))
    assert ("head" in params) == (name == "qwen3") and "head" not in made["lm"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, rm.init(jax.random.key(0)))
    tokens = jnp.array([[3, 4, 5]])
    assert np.array_equal(rm.features(made, tokens), lm.hidden(params, tokens)[:, -1])


# --- what is refused -------------------------------------------------------------------------------------------------


def edited(tmp_path, source, **fields):
    """Copy a golden folder and change its config.json; None takes a field away."""
    shutil.copytree(GOLDENS / source, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "model" / "config.json").write_text(json.dumps(kept))
    return tmp_path / "model"


def test_several_labels_are_refused_by_number_and_name(tmp_path):
    folder = edited(tmp_path, "reward_llama", id2label={"0": "negative", "1": "neutral", "2": "positive"})
    with pytest.raises(ValueError, match=r"3 labels \(negative, neutral, positive\); a reward model has one"):
        pg.load_reward_model(folder)


def test_weights_of_several_labels_are_refused_where_the_configuration_is_silent(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = edited(tmp_path, "reward_gpt2", id2label=None, label2id=None, num_labels=None)
    assert pg.load_reward_model(folder)[1]["score"]["kernel"].shape == (16,)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"score.weight": np.zeros((2, 16), np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"2 labels \(LABEL_0, LABEL_1\)"):
        pg.load_reward_model(folder)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_language_model_is_refused_with_what_it_is_and_what_to_do(model):
    with pytest.raises(
        ValueError, match=r"(LlamaForCausalLM|GPT2LMHeadModel), which is not a reward model.*score\.weight"
    ):
        pg.load_reward_model(GOLDENS / model)
    with pytest.raises(ValueError, match=r"holds a language model, not a reward model: train a reward model from it"):
        pg.load_reward_model("SmolLM2-135M-Instruct")


def test_a_reward_model_is_not_opened_as_a_language_model():
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification, not a language model: pgjax\.load_reward"):
        pg.load(GOLDENS / "reward_llama")


def test_a_stray_unembedding_is_left_out_and_a_bias_of_the_score_is_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = edited(tmp_path, "reward_qwen2")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": np.zeros((32, 16), np.float32)}, folder / "model.safetensors")
    assert_same_bits(pg.load_reward_model(folder)[1], pg.load_reward_model(GOLDENS / "reward_qwen2")[1])
    save_file(tensors | {"score.bias": np.ones(1, np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected tensors: score\.bias"):
        pg.load_reward_model(folder)


def test_parameters_of_another_model_are_not_saved(tmp_path):
    rm, params, _ = pg.load_reward_model(GOLDENS / "reward_llama")
    with pytest.raises(ValueError, match="score"):
        pg.save_reward_model(tmp_path / "out", rm, {"lm": params["lm"]}, None)
    assert not (tmp_path / "out").exists()


# --- padding tokens --------------------------------------------------------------------------------------------------


def small_rm(vocab_size):
    rm = pg.reward_model(ARCHITECTURES["llama"].__class__(**{**vars(ARCHITECTURES["llama"]), "vocab_size": vocab_size}))
    return rm, random_params(rm)


@pytest.mark.parametrize(
    "specials, chosen",
    [
        ((), PAD_TOKEN),
        (("<|user|>", "<|reserved_7|>"), "<|reserved_7|>"),
        (("<|reserved_7|>", "<|finetune_right_pad_id|>"), "<|finetune_right_pad_id|>"),
        (("<|user|>", "<|file|>"), "<|file|>"),  # the template writes <|user|>: a text may end with it
        (("<|user|>",), PAD_TOKEN),
    ],
)
def test_a_padding_token_that_ends_no_text_is_chosen(specials, chosen):
    tokenizer = end_padded_tokenizer(*specials)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    rm, params = small_rm(len(tokenizer))
    new, grown, saved = with_padding_token(rm, params, tokenizer)
    assert saved.pad_token == chosen and saved.pad_token_id not in (None, saved.eos_token_id)
    assert saved.padding_side == "right"
    assert new.arch.vocab_size == grown["lm"]["embed"]["tokens"].shape[0] == max(len(tokenizer), saved.pad_token_id + 1)
    table = params["lm"]["embed"]["tokens"]
    assert np.array_equal(grown["lm"]["embed"]["tokens"][: len(tokenizer)], table)
    assert with_padding_token(new, grown, saved)[0] is new  # once is enough


def test_a_spare_row_of_the_embedding_is_used_before_a_new_one():
    tokenizer = end_padded_tokenizer()
    rm, params = small_rm(len(tokenizer) + 3)
    new, same, saved = with_padding_token(rm, params, tokenizer)
    assert new is rm and same is params and saved.pad_token_id == len(tokenizer)


def test_padding_of_its_own_is_kept():
    tokenizer = end_padded_tokenizer("<|p|>")
    tokenizer.pad_token = "<|p|>"
    rm, params = small_rm(len(tokenizer))
    assert with_padding_token(rm, params, tokenizer)[2].pad_token == "<|p|>"


def test_smollm2_gets_a_special_token_without_growing(smollm2):
    lm, _, tokenizer = smollm2
    rm = pg.reward_model(lm.arch)
    same, _, saved = with_padding_token(rm, {}, tokenizer)
    assert same is rm and tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert saved.pad_token_id not in (0, 1, 2) and saved.pad_token in tokenizer.get_vocab()


def test_a_model_by_others_that_pads_with_its_end_of_sequence_is_told_of(tmp_path):
    saved_case("llama", tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    (tmp_path / "rm" / "config.json").write_text(json.dumps({**config, "pad_token_id": config["eos_token_id"]}))
    with pytest.warns(UserWarning, match="the padding id 0 is also an end of sequence"):
        pg.load_reward_model(tmp_path / "rm")


# --- normalised once -------------------------------------------------------------------------------------------------


def reference_scores(rm, params, seed, rows=48):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(3, 20, rows)
    ids = [draw.integers(3, rm.arch.vocab_size, length) for length in lengths]
    tokens, mask = padded(ids, "right", 0)
    return np.asarray(score(rm, params, tokens, mask), np.float64), np.asarray(rm.features(params, tokens, mask))


@pytest.mark.parametrize("family", campaign_but_for(FAMILIES, "llama", "gpt2"))
def test_scores_of_the_reference_samples_have_mean_0_and_deviation_1_in_torch_layout_too(family, tmp_path):
    rm, params, _ = pg.load_reward_model(GOLDENS / f"reward_{family}")
    before, features = reference_scores(rm, params, seed=0)
    new, report = normalized(params, features)
    assert abs(report["mean"] - before.mean()) < 1e-5 and report["std"] > 0.1
    after, _ = reference_scores(rm, new, seed=0)
    assert abs(before.mean()) > 0.05 and abs(after.mean()) < 1e-5 and abs(after.std() - 1) < 1e-5
    pg.save_reward_model(tmp_path / "rm", rm, new, None)
    again, loaded, _ = pg.load_reward_model(tmp_path / "rm")
    assert np.array_equal(reference_scores(again, loaded, seed=0)[0], after)


@pytest.mark.campaign
def test_with_a_bias_in_the_last_norm_every_score_is_shifted_by_one_constant():
    rm, params, _ = pg.load_reward_model(GOLDENS / "reward_gpt2")
    _, features = reference_scores(rm, params, seed=0)
    new, report = normalized(params, features)
    assert report["shift_spread"] == 0
    before, after = (reference_scores(rm, p, seed=1, rows=8)[0] for p in (params, new))
    np.testing.assert_allclose(after, (before - report["mean"]) / report["std"], atol=1e-5)


def test_without_one_the_reported_spread_is_how_far_the_shift_is_from_a_constant():
    rm, params, _ = pg.load_reward_model(GOLDENS / "reward_llama")
    before, features = reference_scores(rm, params, seed=0)
    new, report = normalized(params, features)
    shift = (before / report["std"]) - reference_scores(rm, new, seed=0)[0]
    np.testing.assert_allclose(shift.std(), report["shift_spread"], rtol=1e-3)
    np.testing.assert_allclose(shift.mean(), report["mean"] / report["std"], rtol=1e-4)
    assert report["shift_spread"] > 0


def test_a_constant_feature_makes_the_shift_a_constant():
    draw = np.random.default_rng(0)
    features = np.concatenate([draw.standard_normal((200, 7)), np.full((200, 1), 3.0)], axis=1)
    kernel = jnp.asarray(draw.standard_normal(8), jnp.float32)
    params = {"lm": {"norm": {"scale": jnp.ones(8)}}, "score": {"kernel": kernel}}
    new, report = normalized(params, features, ridge=1e-9)
    wanted = (features @ np.asarray(kernel, np.float64) - report["mean"]) / report["std"]
    np.testing.assert_allclose(features @ np.asarray(new["score"]["kernel"], np.float64), wanted, atol=1e-4)
    assert report["shift_spread"] < 1e-6


def test_too_few_or_equal_or_infinite_reference_samples_are_named():
    params = {"lm": {"norm": {"scale": jnp.ones(2)}}, "score": {"kernel": jnp.ones(2)}}
    with pytest.raises(ValueError, match="at least 2 samples"):
        normalized(params, np.ones((1, 2)))
    with pytest.raises(ValueError, match="all 3 reference samples score 2"):
        normalized(params, np.ones((3, 2)))
    with pytest.raises(ValueError, match="not finite"):
        normalized(params, np.array([[1.0, np.nan], [0.0, 1.0]]))
