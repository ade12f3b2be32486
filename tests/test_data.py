"""Prompts on their way to the model: nothing cut, nothing lost, nothing told from the pad id."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax.data.batches import batches, split_rows
from pgjax.data.padding import bucket_length, left_pad
from pgjax.data.prompts import completion_texts, encode_prompts
from tests.sizes import campaign_but_for

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def make_tokenizer(chat_template: str | None = TEMPLATE) -> Any:
    """A real Hugging Face tokenizer over bytes, in memory; its pad token is its end token, as SmolLM2's is."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<s>", "<e>", *letters])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="<e>", pad_token="<e>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_plain_prompts_go_in_as_they_are(tokenizer: Any) -> None:
    prompts = ["The film was", " x\n"]
    encoded = encode_prompts(prompts, tokenizer, chat=False, max_length=None)
    assert [decoded(tokenizer, ids) for ids in encoded] == prompts
    assert all(type(i) is int for ids in encoded for i in ids)


def test_chat_opens_the_turn_of_the_assistant(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    encoded = encode_prompts(["hi", messages], tokenizer, chat=True, max_length=None)
    assert decoded(tokenizer, encoded[0]) == "<s>user hi<e><s>assistant "
    assert decoded(tokenizer, encoded[1]) == "<s>system be brief<e><s>user hi<e><s>assistant "
    assert encoded[0][0] == tokenizer.bos_token_id  # one token, not its letters


def test_a_long_prompt_is_refused_not_cut(tokenizer: Any) -> None:
    assert len(encode_prompts(["abcd"], tokenizer, chat=False, max_length=4)[0]) == 4
    with pytest.raises(ValueError, match=r"prompt 1 .*has 5 tokens, the limit is 4: shorten.*'abcde'"):
        encode_prompts(["abcd", "abcde"], tokenizer, chat=False, max_length=4)
    with pytest.raises(ValueError, match=r"line 7 has 5 tokens, the limit is 4.*begins 'abcde'"):
        encode_prompts(["abcd", "abcde"], tokenizer, chat=False, max_length=4, places=["line 3", "line 7"])


def test_prompts_that_cannot_be_encoded_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompts(["hi"], make_tokenizer(None), chat=True, max_length=None)
    refusing = make_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(
        ValueError,
        match=r"prompt 0 .*: the chat template refuses the messages \(no system role\); the last begins 'hi'",
    ):
        encode_prompts(["hi"], refusing, chat=True, max_length=None)
    with pytest.raises(ValueError, match=r"prompt 1 .*list of messages"):
        encode_prompts(["hi", [{"role": "user", "content": "hi"}]], tokenizer, chat=False, max_length=None)
    with pytest.raises(ValueError, match=r"prompt 0 .*no tokens"):
        encode_prompts([""], tokenizer, chat=False, max_length=None)


def test_left_pad_puts_the_last_token_last() -> None:
    tokens, mask = left_pad([[7], [1, 2, 3]], 1, length=4)
    assert tokens.dtype == np.int32 and mask.dtype == np.bool_
    np.testing.assert_array_equal(tokens, [[1, 1, 1, 7], [1, 1, 2, 3]])
    np.testing.assert_array_equal(mask, [[0, 0, 0, 1], [0, 1, 1, 1]])


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_left_pad_loses_nothing_even_where_pad_is_a_token(ids: list[list[int]], extra: int) -> None:
    tokens, mask = left_pad(ids, 0, length=max(map(len, ids)) + extra)
    assert [row[real].tolist() for row, real in zip(tokens, mask, strict=True)] == ids
    assert (np.diff(mask.astype(int), axis=1) >= 0).all() and (tokens[~mask] == 0).all()


@pytest.mark.parametrize(
    ("ids", "length", "said"),
    [
        ([], None, "no rows"),
        ([[1], []], None, "row 1"),
        ([[1], [1, 2, 3]], 2, "row 1 has 3 tokens, more than the length 2"),
    ],
)
def test_left_pad_refuses_what_does_not_fit(ids: list[list[int]], length: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        left_pad(ids, 0, length=length)


def test_buckets_are_few_and_hold_every_length() -> None:
    lengths = {n: bucket_length(n) for n in range(1, 1025)}
    assert all(bucket >= n and (bucket <= 16 or 2 * bucket < 3 * n) for n, bucket in lengths.items())
    assert sorted(set(lengths.values())) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(bucket_length(bucket) == bucket for bucket in lengths.values())
    for n in (0, -3):
        with pytest.raises(ValueError, match=str(n)):
            bucket_length(n)


def test_completions_come_from_the_mask_not_from_the_pad_id(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    prompt, answer = tokenizer("ask")["input_ids"], tokenizer("é, yes")["input_ids"]
    row = [end, *prompt, *answer, end, end]
    mask = [False] * 4 + [True] * (len(answer) + 1) + [False]
    nothing = [False] * 4 + [True] + [False] * (len(row) - 5)
    tokens = np.asarray([row, [end] * len(row)])
    assert completion_texts(tokens, np.asarray([mask, nothing]), tokenizer) == ["é, yes", ""]
    with pytest.raises(ValueError, match=r"\(2, 13\) and mask \(1, 13\)"):
        completion_texts(tokens, np.asarray([mask]), tokenizer)


def test_every_epoch_holds_every_row_once_in_a_new_order() -> None:
    ds = batches([f"row {i}" for i in range(12)], 4, seed=0)
    epochs = [[row for step in range(3 * e, 3 * e + 3) for row in ds[step]] for e in range(5)]
    assert all(sorted(epoch) == sorted(f"row {i}" for i in range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize("batch_size", [1, 5, 7, 20])
def test_no_row_is_dropped_where_the_batch_does_not_divide(batch_size: int) -> None:
    ds = batches(list(range(7)), batch_size, seed=3)
    stream = [row for step in range(7) for row in ds[step]]
    assert all(len(ds[step]) == batch_size for step in range(7))
    assert all(sorted(stream[start : start + 7]) == list(range(7)) for start in range(0, len(stream), 7))


def test_the_step_number_is_the_whole_state() -> None:
    rows = [{"prompt": str(i)} for i in range(10)]
    first, again, other = (batches(rows, 3, seed=seed) for seed in (1, 1, 2))
    straight = [first[step] for step in range(20)]
    assert [again[step] for step in reversed(range(20))] == straight[::-1]
    assert [other[step] for step in range(20)] != straight
    assert isinstance(straight[0], list) and straight[0][0] in rows
    assert first[10**9] == again[10**9]


@pytest.mark.parametrize(
    "parts", [[range(4), range(4, 8)], [(0, 1, 4, 5), (2, 3, 6, 7)], [(0, 3, 7), (3, 4), (1, 2, 5, 6)]]
)
@pytest.mark.parametrize("group_size", campaign_but_for([1, 2, 4], 2))
def test_the_parts_of_the_processes_make_up_the_batch_of_one(parts: list[Any], group_size: int) -> None:
    whole = batches(list("abcdefg"), 8, seed=3, group_size=group_size)
    dealt = [batches(list("abcdefg"), 8, seed=3, group_size=group_size, places=places) for places in parts]
    for step in range(4):
        for places, ds in zip(parts, dealt, strict=True):
            assert ds[step] == [whole[step][place] for place in places]


def test_a_process_reads_no_rows_but_its_own() -> None:
    class Rows(list):
        read: ClassVar[list[int]] = []

        def __getitem__(self, index: Any) -> Any:
            self.read.append(int(index))
            return super().__getitem__(index)

    whole = [row for step in range(3) for row in batches(list(range(100)), 10, seed=0)[step][2:5]]
    ds = batches(Rows(range(100)), 10, seed=0, places=[2, 3, 4])
    del Rows.read[:]
    assert [row for step in range(3) for row in ds[step]] == whole == Rows.read


def test_a_group_shares_a_row_and_the_rows_keep_their_order() -> None:
    single, grouped = (batches(list(range(12)), size, seed=1, group_size=g) for size, g in ((4, 1), (12, 3)))
    for step in range(5):
        assert grouped[step] == [row for row in single[step] for _ in range(3)]


def test_batches_refuse_groups_that_do_not_divide_and_places_outside() -> None:
    with pytest.raises(ValueError, match="a batch of 6 does not divide into groups of 4"):
        batches([1], 6, seed=0, group_size=4)
    for place in (-1, 6):
        with pytest.raises(ValueError, match=f"row {place} is not in a batch of 6, whose rows are 0 to 5"):
            batches([1], 6, seed=0, places=[0, place])


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, "4"])
def test_a_bad_batch_size_is_refused(batch_size: Any) -> None:
    with pytest.raises(ValueError, match=r"batch_size must be (a whole number|at least 1), got "):
        batches([1, 2], batch_size, seed=0)


def test_batches_refuse_no_rows_and_a_bad_seed() -> None:
    with pytest.raises(ValueError, match="no rows"):
        batches([], 1, seed=0)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed is {seed}"):
            batches([1], 1, seed=seed)


def test_held_out_rows_are_never_trained_on() -> None:
    rows = [f"row {i:02d}" for i in range(20)]
    train, held_out = split_rows(rows, 6, seed=0)
    assert len(held_out) == 6 and sorted(train + held_out) == rows
    assert (train, held_out) == split_rows(rows, 6, seed=0)
    assert held_out != split_rows(rows, 6, seed=1)[1]
    assert held_out != rows[:6] and held_out != rows[-6:]
    assert split_rows(rows, 0, seed=0) == (rows, [])


@pytest.mark.parametrize("held_out", [-1, 3, 4])
def test_a_split_leaves_rows_to_train_on(held_out: int) -> None:
    with pytest.raises(ValueError, match=f"hold out {held_out} of 3 rows"):
        split_rows([1, 2, 3], held_out, seed=0)
