"""Samples of .bin/.idx pairs, their order and their mix; logical parameters and their initial values."""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mempar.errors import ConfigError
from mempar.runtime.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from mempar.runtime.data.samples import Batch, Samples, context_share, micro_batches
from mempar.runtime.data.tokenizer import BYTE_VOCAB, vocab_size
from mempar.runtime.initial import initial_value
from mempar.runtime.logical import LogicalParameter, logical_parameters
from mempar.runtime.mcore import IndexedDatasetBuilder, parallel_state
from mempar.runtime.preflight import check_data

LENGTH = 8
# Tokens say where they came from, in numbers up to 20100.
RUN = RunConfig(
    model=ModelConfig(vocab_size=20200), train=TrainConfig(seq_length=LENGTH, global_batch_size=24, micro_batch_size=2)
)
END = BYTE_VOCAB - 1
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def rng() -> random.Random:
    seed = torch.seed()
    # Shown by pytest when a test fails; torch.manual_seed(it) and random.Random(it) repeat the test.
    print(f"torch and random seed {seed}")
    return random.Random(seed)


def write(prefix: Path, documents: list[list[list[int]]]) -> str:
    """Write documents, each a list of sequences of tokens."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int32))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def documents_from(first: int, num_tokens: int, rng: random.Random) -> list[list[list[int]]]:
    """Documents of random lengths, of tokens that count up from `first`: each token says where it came from."""
    cuts = sorted({0, num_tokens, *(rng.randrange(num_tokens) for _ in range(num_tokens // 7))})
    return [[list(range(first + start, first + end))] for start, end in itertools.pairwise(cuts)]


def taken(samples: Samples, indices: range) -> list[tuple[int, ...]]:
    return [tuple(samples[index].tolist()) for index in indices]


@pytest.fixture
def prefix(tmp_path: Path, rng: random.Random) -> str:
    return write(tmp_path / "one", documents_from(0, 403, rng))


@pytest.fixture
def three(tmp_path: Path, rng: random.Random) -> tuple[str, ...]:
    """Sets of 50, 25 and 12 samples; their tokens lie in 0..., 10000... and 20000..."""
    sizes = {0: 403, 10000: 203, 20000: 100}
    return tuple(write(tmp_path / f"from_{first}", documents_from(first, num, rng)) for first, num in sizes.items())


def origins(samples: list[tuple[int, ...]]) -> list[int]:
    return [sample[0] // 10000 for sample in samples]


def test_samples_are_consecutive_pieces_of_the_shuffled_documents(prefix: str) -> None:
    samples = taken(Samples(RUN, (prefix,), (), seed=1), range(50))
    assert {len(sample) for sample in samples} == {LENGTH + 1}
    # The last token of a sample is the first of the next one, so the samples form a chain over the whole file.
    following = {sample[0]: sample for sample in samples}
    ends, starts = {sample[-1] for sample in samples}, set(following)
    (first,) = starts - ends
    chain = list(following[first])
    while chain[-1] in following:
        chain += following[chain[-1]][1:]
    assert len(chain) == len(set(chain)) == 50 * LENGTH + 1
    assert len(set(range(403)) - set(chain)) == 2
    # Inside a document tokens count up: most neighbours do.
    assert sum(b == a + 1 for a, b in itertools.pairwise(chain)) > 0.75 * len(chain)


def test_samples_keep_every_byte_and_the_end_of_document(tmp_path: Path) -> None:
    text = [*range(256), END, *range(255, -1, -1), END]
    samples = Samples(
        replace(RUN, train=TrainConfig(seq_length=len(text) - 1)), (write(tmp_path / "x", [[text]]),), (), 1
    )
    assert samples[0].tolist() == text
    assert samples[0].dtype == np.int64


def test_samples_hold_all_sequences_of_a_document(tmp_path: Path) -> None:
    documents = [[list(range(0, 30)), list(range(30, 60))], [list(range(60, 80)), list(range(80, 121))]]
    samples = taken(Samples(RUN, (write(tmp_path / "x", documents),), (), seed=1), range(15))
    assert len({token for sample in samples for token in sample}) == 121


def test_every_epoch_is_another_permutation_of_all_samples(prefix: str) -> None:
    samples = Samples(RUN, (prefix,), (), seed=1)
    epochs = [taken(samples, range(start, start + 50)) for start in range(0, 200, 50)]
    for epoch in epochs:
        assert len(set(epoch)) == 50
        assert set(epoch) == set(epochs[0])
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_samples_differ_when_seed_differs_and_repeat_when_it_does_not(prefix: str) -> None:
    first, again, other = (taken(Samples(RUN, (prefix,), (), seed), range(50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_sample_does_not_depend_on_run_length_or_batch_or_order_of_reading(three: tuple[str, ...]) -> None:
    weights = (0.5, 0.2, 0.3)
    long = replace(RUN, train=TrainConfig(seq_length=LENGTH, steps=10**6, global_batch_size=96, micro_batch_size=4))
    forward = taken(Samples(RUN, three, weights, seed=1), range(2100))
    backward = taken(Samples(long, three, weights, seed=1), range(2099, -1, -1))[::-1]
    assert forward == backward
    jumping = Samples(RUN, three, weights, seed=1)
    for index in (3, 1777, 2099, 5000, 3, 1777, 0):
        sample = tuple(jumping[index].tolist())
        assert index >= len(forward) or sample == forward[index]


@pytest.mark.parametrize("given", [(), (1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (5.0, 1000.0, 1.0), "random"])
def test_mix_follows_the_weights_within_one_sample_at_every_prefix(
    three: tuple[str, ...], rng: random.Random, given: tuple[float, ...] | str
) -> None:
    weights = tuple(rng.uniform(0.1, 9) for _ in three) if given == "random" else given
    # Without weights, in proportion to the samples.
    share = np.array(weights or (50, 25, 12)) / sum(weights or (50, 25, 12))
    samples = taken(Samples(RUN, three, weights, seed=1), range(1200))
    counts = np.zeros(3)
    for index, origin in enumerate(origins(samples)):
        counts[origin] += 1
        assert np.abs(counts - share * (index + 1)).max() < 1 + 1e-9
    for origin, num_samples in enumerate((50, 25, 12)):
        mine = [sample for sample in samples if origins([sample]) == [origin]]
        whole_epochs = len(mine) // num_samples
        for epoch in range(whole_epochs):
            assert len(set(mine[epoch * num_samples : (epoch + 1) * num_samples])) == num_samples


@pytest.mark.parametrize("dp", [1, 2, 3, 6])
def test_micro_batches_of_all_ranks_partition_the_global_batch(prefix: str, dp: int) -> None:
    samples = Samples(RUN, (prefix,), (), seed=1)
    for first in (0, 24, 48):
        ranks = [micro_batches(samples, RUN, first, count=24, dp_rank=rank, dp=dp, device=CPU) for rank in range(dp)]
        assert {len(batches) for batches in ranks} == {12 // dp}
        seen = [index for batches in ranks for batch in batches for index in batch.sample_ids]
        assert sorted(seen) == list(range(first, first + 24))
        # In every round the ranks take the next micro-batches in turn, so the order is the same for every dp.
        in_turn = [batch.sample_ids for batches in zip(*ranks, strict=True) for batch in batches]
        assert in_turn == [[index, index + 1] for index in range(first, first + 24, 2)]


@pytest.mark.parametrize(("count", "dp"), [(5, 1), (5, 2), (7, 3), (1, 2), (3, 4)])
def test_micro_batches_are_filled_up_with_padding(prefix: str, count: int, dp: int) -> None:
    samples = Samples(RUN, (prefix,), (), seed=1)
    ranks = [micro_batches(samples, RUN, 10, count=count, dp_rank=rank, dp=dp, device=CPU) for rank in range(dp)]
    assert {len(batches) for batches in ranks} == {-(-count // (2 * dp))}
    in_turn = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    assert [index for batch in in_turn for index in batch.sample_ids] == list(range(10, 10 + count))
    for batches in zip(*ranks, strict=True):
        counts = [len(batch.sample_ids) for batch in batches]
        for batch, held in zip(batches, counts, strict=True):
            assert batch.sample_counts == counts
            assert batch.tokens.shape == batch.labels.shape == (2, LENGTH)
            for row in range(2):
                assert batch.loss_mask[row].tolist() == [float(row < held)] * LENGTH
                if row < held:
                    assert batch.tokens[row].tolist() == samples[batch.sample_ids[row]][:-1].tolist()
                else:
                    assert not batch.tokens[row].any() and not batch.labels[row].any()


def test_labels_are_tokens_shifted_by_one(prefix: str) -> None:
    samples = Samples(RUN, (prefix,), (), seed=1)
    for batch in micro_batches(samples, RUN, 4, count=8, dp_rank=1, dp=2, device=CPU):
        assert (
            batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == batch.position_ids.shape == (2, LENGTH)
        )
        assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert torch.equal(batch.loss_mask, torch.ones(2, LENGTH))
        assert batch.position_ids.tolist() == [list(range(LENGTH))] * 2
        for row, index in enumerate(batch.sample_ids):
            assert [*batch.tokens[row].tolist(), int(batch.labels[row, -1])] == samples[index].tolist()


def test_samples_are_refused_when_data_is_shorter_than_one(tmp_path: Path) -> None:
    path = write(tmp_path / "short", [[list(range(LENGTH))]])
    with pytest.raises(ConfigError, match=rf"short holds {LENGTH} tokens.*train\.seq_length={LENGTH} "):
        Samples(RUN, (path,), (), seed=1)
    path = write(tmp_path / "just", [[list(range(LENGTH + 1))]])
    assert taken(Samples(RUN, (path,), (), seed=1), range(2)) == [tuple(range(LENGTH + 1))] * 2


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("kind", ["paths", "heldout_paths"])
def test_missing_file_is_named_with_the_command_that_makes_it(prefix: str, suffix: str, kind: str) -> None:
    other = write(Path(prefix).with_name("other"), [[list(range(LENGTH + 1))]])
    data = DataConfig(paths=(prefix,))
    run = replace(RUN, data=replace(data, **{kind: (*getattr(data, kind), other)}))
    check_data(run)
    Path(other + suffix).unlink()
    with pytest.raises(ConfigError) as caught:
        check_data(run)
    assert str(caught.value).startswith(f"{other}{suffix} does not exist")
    assert f"mempar prepare INPUT... --tokenizer byte --out {other}" in str(caught.value)


@pytest.mark.parametrize("kind", ["paths", "heldout_paths"])
def test_data_of_less_than_a_sample_are_refused_before_a_run_is_made(prefix: str, tmp_path: Path, kind: str) -> None:
    small = write(tmp_path / "small", [[list(range(LENGTH))]])
    data = DataConfig(paths=(prefix,))
    run = replace(RUN, data=replace(data, **{kind: (*getattr(data, kind), small)}))
    with pytest.raises(ConfigError, match=f"small holds {LENGTH} tokens, fewer than one sample"):
        check_data(replace(run, train=replace(run.train, heldout_samples=1 if kind == "heldout_paths" else 0)))
    if kind == "heldout_paths":
        check_data(replace(run, train=replace(run.train, heldout_samples=0)))


def test_empty_paths_and_unknown_tokenizers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.paths is empty.*mempar prepare"):
        check_data(RUN)
    assert vocab_size(RUN) == BYTE_VOCAB == 257
    with pytest.raises(ConfigError, match=r"data\.tokenizer=gpt2 .*byte"):
        vocab_size(replace(RUN, data=DataConfig(tokenizer="gpt2")))


def share_at(tp_rank: int, tp: int, shape: tuple[int, ...], dim: int | None, halves: int = 1) -> LogicalParameter:
    local = list(shape)
    if dim is not None:
        local[dim] //= tp
    param = nn.Parameter(torch.zeros(local))
    return LogicalParameter(name="x", param=param, dim=dim, halves=halves, tp=tp, tp_rank=tp_rank)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("dim", "halves"), [(0, 1), (1, 1), (0, 2), (None, 1)])
def test_shares_and_the_whole_are_inverse(tp: int, dim: int | None, halves: int) -> None:
    whole = torch.randn(16, 8)
    ranks = [share_at(rank, tp, (16, 8), dim, halves) for rank in range(tp)]
    shares = [rank.share_of(whole) for rank in ranks]
    for rank, share in zip(ranks, shares, strict=True):
        assert share.shape == rank.param.shape
        assert rank.shape == (16, 8)
        assert torch.equal(rank.join(shares), whole)
        assert torch.equal(rank.share_of(rank.join(shares)), share)
    if dim is not None and tp > 1:
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(shares, 2))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_share_of_linear_fc1_has_both_halves_of_its_columns(tp: int) -> None:
    gate, up = torch.randn(8, 5), torch.randn(8, 5)
    for rank in range(tp):
        share = share_at(rank, tp, (16, 5), 0, halves=2).share_of(torch.cat([gate, up]))
        mine = slice(rank * 8 // tp, (rank + 1) * 8 // tp)
        assert torch.equal(share, torch.cat([gate[mine], up[mine]]))


def test_logical_parameters_have_global_names_and_dims() -> None:
    class Block(nn.Module):
        def __init__(self, layer_number: int) -> None:
            super().__init__()
            self.layer_number = layer_number
            self.mlp = nn.Module()
            self.mlp.linear_fc1 = nn.Linear(3, 4, bias=False)
            self.mlp.linear_fc2 = nn.Linear(4, 3, bias=False)
            for linear, dim in ((self.mlp.linear_fc1, 0), (self.mlp.linear_fc2, 1)):
                linear.weight.tensor_model_parallel, linear.weight.partition_dim = True, dim

    model = nn.Module()
    model.decoder = nn.Module()
    # Megatron's layer numbers are global and start at one; the place in the list is local.
    model.decoder.layers = nn.ModuleList([Block(7), Block(8)])
    model.decoder.final_layernorm = nn.RMSNorm(3)
    found = {one.name: one for one in logical_parameters(model, tp=2, tp_rank=1, ep_rank=0)}
    blocks = [f"decoder.layers.{block}.mlp.linear_fc{number}.weight" for block in (6, 7) for number in (1, 2)]
    assert list(found) == [*blocks, "decoder.final_layernorm.weight"]
    assert [(one.dim, one.halves, one.shape) for one in found.values()] == [
        *[(0, 2, (8, 3)), (1, 1, (3, 8))] * 2,
        (None, 1, (3,)),
    ]
    assert found["decoder.layers.7.mlp.linear_fc2.weight"].param is model.decoder.layers[1].mlp.linear_fc2.weight


def initial(name: str, shape: tuple[int, ...] = (60, 50), seed: int = 1) -> torch.Tensor:
    return initial_value(name, shape, seed=seed, init_std=0.02, num_layers=8)


def test_initial_value_depends_on_seed_and_global_name_alone() -> None:
    name = "decoder.layers.3.self_attention.linear_qkv.weight"
    first = initial(name)
    torch.manual_seed(7)
    assert torch.equal(first, initial(name))
    assert first.dtype == torch.float64
    others = [initial(name, seed=2), initial(name.replace("3", "4")), initial(name.replace("qkv", "fc1"))]
    for one, other in itertools.combinations([first, *others], 2):
        assert not (one == other).any()
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 6 / math.sqrt(3000)


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("embedding.word_embeddings.weight", 0.02),
        ("output_layer.weight", 0.02),
        ("decoder.layers.3.self_attention.linear_qkv.weight", 0.02),
        ("decoder.layers.3.mlp.linear_fc1.weight", 0.02),
        # Projections into the residual stream of 8 blocks: 0.02 / sqrt(16).
        ("decoder.layers.3.self_attention.linear_proj.weight", 0.005),
        ("decoder.layers.3.mlp.linear_fc2.weight", 0.005),
        # The memory layer's are its own: of width 50, and out of width 60.
        ("decoder.layers.3.mlp.gate_proj.weight", 50**-0.5),
        ("decoder.layers.3.mlp.output_proj.weight", 60**-0.5),
    ],
)
def test_initial_value_has_the_spread_of_its_kind(name: str, deviation: float) -> None:
    draw = initial(name, seed=torch.initial_seed() % 2**31)
    assert draw.std().item() == pytest.approx(deviation, rel=6 / math.sqrt(2 * draw.numel()))
    assert abs(draw.mean()) < 6 * deviation / math.sqrt(draw.numel())


@pytest.mark.parametrize(
    "name",
    [
        "decoder.final_layernorm.weight",
        "decoder.layers.3.pre_mlp_layernorm.weight",
        "x.mlp.query_norm.weight",
        # TransformerEngine's linear layers hold the norms before them.
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.3.mlp.linear_fc1.layer_norm_weight",
    ],
)
def test_initial_norms_are_one(name: str) -> None:
    assert torch.equal(initial(name, (5,)), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_context_shares_make_up_the_micro_batch(monkeypatch: pytest.MonkeyPatch, cp: int) -> None:
    tokens = torch.arange(48).view(3, 16)
    batch = Batch(
        tokens=tokens,
        labels=tokens + 1,
        loss_mask=tokens.float(),
        position_ids=torch.arange(16).expand(3, -1),
        sample_ids=[5, 6],
        sample_counts=[2, 3],
    )
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: cp)
    shares = []
    for rank in range(cp):
        monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
        shares.append(context_share(batch))
    for share in shares:
        assert share.tokens.shape == (3, 16 // cp)
        assert torch.equal(share.labels, share.tokens + 1)
        assert torch.equal(share.loss_mask, share.tokens.float())
        assert torch.equal(share.position_ids[0], share.tokens[0])
        assert (share.sample_ids, share.sample_counts) == ([5, 6], [2, 3])
    together = torch.cat([share.tokens for share in shares], dim=1)
    assert torch.equal(together.sort(dim=1).values, tokens)
    # Under a causal mask late positions cost more: the first rank has the first chunk and the last.
    assert shares[0].tokens[0, 0] == 0 and shares[0].tokens[0, -1] == 15
