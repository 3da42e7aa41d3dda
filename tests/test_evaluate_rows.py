"""Requests as rows of tokens: what is read, what is scored, and in which batches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mempar.errors import ConfigError
from mempar.runtime.data.encoders import ByteEncoder, load_encoder
from mempar.runtime.data.tokenizer import parse_spec
from mempar.runtime.inference.sampling import Sampling
from mempar.tools.evaluate.rows import Row, batches, encode_pairs, make_rows, window_rows
from mempar.tools.evaluate.sizes import BatchSizes
from mempar.tools.evaluate.work import Prompts, continue_prompts
from toy_tokenizers import sentencepiece_model

BYTES = ByteEncoder(parse_spec("byte"))
EOD = 256


def test_pairs_are_divided_where_the_context_ends() -> None:
    assert encode_pairs(BYTES, [("ab", " c"), ("ab ", "c"), ("", "c"), (" ", "c")]) == [
        ([97, 98], [32, 99]),
        # Tokens begin with spaces, not end.
        ([97, 98], [32, 99]),
        ([EOD], [99]),
        ([EOD], [32, 99]),
    ]


def test_pairs_are_encoded_as_one_text(tmp_path: Path) -> None:
    encoder = load_encoder(parse_spec(f"sentencepiece:{sentencepiece_model(tmp_path / 'toy.model')}"))
    ((context, continuation),) = encode_pairs(encoder, [("the memory", " layer reads")])
    assert [*context, *continuation] == encoder.encode(["the memory layer reads"])[0]
    assert encoder.decode(context) == "the memory"
    # Alone, it would begin with a space of its own.
    assert continuation != encoder.encode([" layer reads"])[0] or encoder.decode(continuation) == "layer reads"


def test_what_has_no_token_cannot_be_scored() -> None:
    with pytest.raises(ConfigError, match="nothing to score in '' after 'question'"):
        encode_pairs(BYTES, [("question", "")])


def test_requests_that_read_the_same_share_a_row() -> None:
    pairs = [([1, 2], [3]), ([1, 2], [4]), ([1], [2, 3]), ([1, 2], [3]), ([1, 2], [3, 4])]
    rows, places = make_rows(pairs, 8)
    assert rows == [Row((1, 2), ((3,), (4,), (2, 3))), Row((1, 2, 3), ((3, 4),))]
    assert places == [(0, 0), (0, 1), (0, 2), (0, 0), (1, 0)]


def test_long_requests_lose_their_beginning() -> None:
    (row,), _ = make_rows([(list(range(10)), [10, 11])], 4)
    assert row == Row((7, 8, 9, 10), ((10, 11),))
    (row,), _ = make_rows([([0], [1, 2, 3, 4])], 4)
    assert row == Row((0, 1, 2, 3), ((1, 2, 3, 4),))
    with pytest.raises(ConfigError, match="5 tokens is to be scored, and the model reads 4"):
        make_rows([([0], [1, 2, 3, 4, 5])], 4)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11, 12, 40])
def test_windows_score_every_token_once_with_the_longest_context_there_is(length: int) -> None:
    tokens = list(range(length))
    rows = window_rows(tokens, EOD, 4)
    assert [token for row in rows for token in row.endings[0]] == tokens
    for row in rows:
        ending = row.endings[0]
        # What is read ends one token before what is scored.
        whole = [EOD, *tokens]
        end = whole.index(ending[-1])
        assert list(row.tokens) == whole[max(0, end - 4) : end]
    assert window_rows([], EOD, 4) == []


def test_harness_has_the_same_windows() -> None:
    from lm_eval.utils import get_rolling_token_windows

    tokens = list(range(23))
    theirs = get_rolling_token_windows(tokens, prefix_token=EOD, max_seq_len=5, context_len=1)
    ours = [(list(row.tokens), list(row.endings[0])) for row in window_rows(tokens, EOD, 5)]
    assert ours == list(theirs)


def test_batches_are_of_similar_lengths_and_the_longest_come_first() -> None:
    found = list(batches([3, 9, 1, 9, 4], lambda length: 10 // length))
    assert found == [[1], [3], [4, 0], [2]]
    assert list(batches([], lambda length: 3)) == []


class Dictated:
    """A forward pass that is sure of the bytes of a text, one after the other, whatever it is given."""

    max_length = 64

    def __init__(self, *texts: str) -> None:
        self.texts, self.calls = [text.encode() for text in texts], 0

    def new_cache(self, batch_size: int, max_length: int) -> None:
        self.calls = 0

    def logits(self, tokens: torch.Tensor, cache: None, *, last_only: bool) -> torch.Tensor:
        self.calls += 1
        says = torch.tensor([text[self.calls - 1] if self.calls <= len(text) else EOD for text in self.texts])
        return torch.nn.functional.one_hot(says, EOD + 1).float()[:, None]


@pytest.mark.parametrize(
    ("until", "found", "calls"),
    [
        (("\n",), ["one", "a longer"], 9),
        ((" ", "\n"), ["one", "a"], 4),
        # Of characters that are several tokens.
        (("ß",), ["one\ntwo", "a longer\nGrü"], 15),
        ((), ["one\ntwo", "a longer\nGrüße"], 17),
        (("never",), ["one\ntwo", "a longer\nGrüße"], 17),
    ],
)
def test_continuations_end_at_the_first_of_the_texts(until: tuple[str, ...], found: list[str], calls: int) -> None:
    forward: Any = Dictated("one\ntwo", "a longer\nGrüße")
    opened: Any = SimpleNamespace(encoder=BYTES, forward=forward)
    prompts = Prompts(tokens=[[1], [2]], max_new_tokens=20, until=until, sampling=Sampling())
    assert continue_prompts(opened, prompts) == found
    # All stop when the last one is over.
    assert forward.calls == calls


def test_batches_keep_logits_small() -> None:
    small, large = BatchSizes(given=None, embeddings=257), BatchSizes(given=None, embeddings=128256)
    assert small.rows(128) == 64 and large.rows(4096) == 1 and 1 < large.rows(64) < 64
    assert BatchSizes(given=5, embeddings=128256).rows(4096) == 5 == BatchSizes(given=5, embeddings=2).prompts(9)
