"""Where completions end, for every kind of tokenizer and template; and that a saved folder says so to pgjax and transformers."""

import dataclasses
import json
import os
import stat

import jax
import pytest
from tokenizers import AddedToken

from pgjax.core.errors import UserError
from pgjax.models.causal_lm import causal_lm
from pgjax.models.io.classifier import load_reward_model, save_reward_model
from pgjax.models.io.load import load, save_pretrained
from pgjax.models.io.stops import set_stops, stop_ids, told_stops, turn_end
from pgjax.models.reward_model import reward_model
from tests.tiny import ARCHITECTURES
from tests.tokenizer_kinds import CHATML, KINDS, TEMPLATES, TOOLS, byte_level, with_template

ENDS = dict.fromkeys(TEMPLATES, "<|im_end|>") | {
    "plain headers": "</s>", "Llama 3": "<|eot_id|>", "Gemma": "<end_of_turn>",
}  # fmt: skip
UNUSUAL = {
    "no turn ends": ("{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}", None),
    "refuses": ("{{ raise_exception('no system') }}", None),
    "the question alone": ("{{ messages[0]['content'] }}<|im_end|>", None),
    "parts alone": ("{% for m in messages %}{{ m['content'][0]['text'] }}<|eot_id|>{% endfor %}", "<|eot_id|>"),
    "text in between": ("{% for m in messages %}{{ m['content'] }} OVER\n</s>{% endfor %}", "</s>"),
}


def lm_for(tokenizer):
    """A model whose embedding has a row for every id."""
    lm = causal_lm(dataclasses.replace(ARCHITECTURES["llama"], vocab_size=len(tokenizer)))
    return lm, lm.init(jax.random.key(0))


def ids_of(tokenizer, *tokens):
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_turn_ends_a_completion_beside_the_tokenizers_own(kind, template):
    tokenizer = with_template(kind, template)
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids(ENDS[template])
    assert stop_ids(tokenizer) == tuple(dict.fromkeys(ids_of(tokenizer, "</s>", ENDS[template])))


@pytest.mark.parametrize("name", UNUSUAL)
def test_templates_that_end_no_turn_refuse_or_take_parts_alone(name):
    tokenizer = byte_level()
    tokenizer.chat_template, end = UNUSUAL[name]
    assert turn_end(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_a_line_end_that_is_an_added_token_does_not_end_a_turn():
    tokenizer = with_template("byte-level", "plain headers")
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n<|im_end|>{% endfor %}"
    assert turn_end(tokenizer) == ids_of(tokenizer, "<|im_end|>")[0]


def test_stops_are_told_in_one_line():
    tokenizer = with_template("byte-level", "ChatML")
    assert told_stops(tokenizer) == "completions end at '</s>' (2), '<|im_end|>' (4)"
    tokenizer.eos_token, tokenizer.chat_template = None, None
    assert told_stops(tokenizer).startswith("completions have no end")


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_stops_take_the_place_of_those_found(kind):
    tokenizer = set_stops(with_template(kind, "ChatML"), ["<|im_end|>", "0", "<|im_end|>"])
    assert stop_ids(tokenizer) == (4, 0)
    assert stop_ids(set_stops(tokenizer, [])) == (4, 0), "none given changes nothing"
    for token, message in (
        ("<|imend|>", "'<|imend|>' is no single token of the tokenizer: the nearest token is '<|im_end|>'"),
        ("99999", f"no token has the stop id 99999: the tokenizer's largest is {len(tokenizer) - 1}"),
    ):
        with pytest.raises(UserError) as raised:
            set_stops(tokenizer, [token])
        assert message in str(raised.value)


def test_a_line_end_may_be_chosen_where_it_is_one_token():
    tokenizer = set_stops(byte_level(), ["\n"])
    assert tokenizer.decode(stop_ids(tokenizer)) == "\n"


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("kind", KINDS)
def test_stops_survive_saving_and_transformers_ends_at_the_same(tmp_path, kind):
    from transformers import AutoConfig, GenerationConfig

    plain, chat, chosen = KINDS[kind](), with_template(kind, "ChatML"), set_stops(KINDS[kind](), ["<|eot_id|>"])
    none = KINDS[kind]()
    none.eos_token = None
    lm, params = lm_for(plain)
    for name, tokenizer, ids in (("a", plain, (2,)), ("b", chat, (2, 4)), ("c", chosen, (9,)), ("d", none, ())):
        folder = tmp_path / name
        save_pretrained(folder, lm, params, tokenizer)
        again = load(folder)[2]
        assert stop_ids(tokenizer) == stop_ids(again) == ids
        written = {0: None, 1: ids[0] if ids else None}.get(len(ids), list(ids))
        assert GenerationConfig.from_pretrained(folder).eos_token_id == written
        assert AutoConfig.from_pretrained(folder).eos_token_id == written
        save_pretrained(folder, lm, params, again)
        assert stop_ids(load(folder)[2]) == ids


def test_configurations_changed_after_saving_count_and_must_hold_ids(tmp_path):
    tokenizer = set_stops(with_template("byte-level", "ChatML"), ["<|eot_id|>"])
    lm, params = lm_for(tokenizer)
    save_pretrained(tmp_path / "m", lm, params, tokenizer)
    edit(tmp_path / "m" / "generation_config.json", eos_token_id=7)
    assert stop_ids(load(tmp_path / "m")[2]) == (7, 2, 4)
    edit(tmp_path / "m" / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(
        UserError, match=r"generation_config\.json: eos_token_id = '</s>' must be an id or a list of ids"
    ):
        load(tmp_path / "m")


def test_reward_models_keep_every_stop(tmp_path):
    tokenizer = with_template("byte-level", "ChatML")
    rm = reward_model(lm_for(tokenizer)[0].arch)
    save_reward_model(tmp_path / "rm", rm, rm.init(jax.random.key(0)), tokenizer)
    assert stop_ids(load_reward_model(tmp_path / "rm")[2]) == (2, 4)
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["eos_token_id"] == [2, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_files_are_those_that_transformers_4_reads_too(tmp_path, kind):
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    lm, params = lm_for(tokenizer)
    save_pretrained(tmp_path / "m", lm, params, tokenizer)
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|tool|>"] and "extra_special_tokens" not in config
    assert config.get("add_prefix_space", False) == (kind == "byte-level, prefix space")
    again = load(tmp_path / "m")[2]
    assert again("The film<|tool|> was")["input_ids"] == tokenizer("The film<|tool|> was")["input_ids"]
    assert "<|tool|>" in again.all_special_tokens


def test_named_chat_templates_are_saved_again_and_again(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOLS}
    lm, params = lm_for(tokenizer)
    for _ in range(2):
        save_pretrained(tmp_path / "m", lm, params, tokenizer)
        tokenizer = load(tmp_path / "m")[2]
        assert tokenizer.chat_template == {"default": CHATML, "tool_use": TOOLS}
        assert stop_ids(tokenizer) == (2, 4)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask, mode):
    tokenizer = byte_level()
    lm, params = lm_for(tokenizer)
    before = os.umask(umask)
    try:
        save_pretrained(tmp_path / "m", lm, params, tokenizer)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "m").iterdir()} == {mode}
