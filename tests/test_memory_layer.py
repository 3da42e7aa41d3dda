"""Memory layers and their records on one process, against the oracle."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import oracle
import oracle_runs
from mempar.memory.config import MemoryConfig
from mempar.memory.layer import MemoryLayer, initial_value
from mempar.memory.lookup import LocalReader, Readers, SilentReader
from mempar.memory.values import ValueShard
from mempar.runtime.config import ModelConfig, RunConfig
from shards import assert_same, whole_shard

pytestmark = pytest.mark.usefixtures("fresh_seed")
WIDTH, VALUE_WIDTH, EPSILON = 12, 10, 1e-5
SMALL = {"num_subkeys": 5, "heads": 2, "top_k": 3, "key_dim": 6}
LAYERS = pytest.mark.parametrize(
    "extras",
    [
        {"variant": "memory"},
        {"variant": "memory", "qk_norm": True, "scalar_gate": True},
        {"variant": "memory_plus", "value_dim": VALUE_WIDTH},
        {"variant": "memory_plus", "value_dim": VALUE_WIDTH, "qk_norm": True},
        {"variant": "memory_plus", "value_dim": VALUE_WIDTH, "scalar_gate": True},
        {"variant": "memory_plus", "qk_norm": True, "scalar_gate": True},
        {"variant": "peer"},
        {"variant": "peer", "qk_norm": True, "scalar_gate": True},
    ],
    ids=lambda extras: "-".join(name if value is True else str(value) for name, value in extras.items()),
)


def random_layer(config: MemoryConfig) -> MemoryLayer:
    layer = MemoryLayer(config, WIDTH, EPSILON).double()
    for param in layer.parameters():
        torch.nn.init.normal_(param)
    return layer


def dense_gradient(shard: ValueShard) -> Tensor:
    rows, grad = shard.take_gradient()
    assert rows.dtype == torch.int32
    assert rows.tolist() == sorted(set(rows.tolist()))
    return torch.zeros_like(shard.values, dtype=grad.dtype).index_copy(0, rows.long(), grad)


def oracle_config(config: MemoryConfig) -> oracle.OracleConfig:
    model = ModelConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=1, ffn_hidden_size=1, norm_epsilon=EPSILON)
    return oracle_runs.oracle_config(RunConfig(model=model, memory=replace(config, layers=(0,))))


def oracle_params(layer: MemoryLayer, values: Tensor) -> oracle.Params:
    return {f"mlp.{name}": param for name, param in layer.named_parameters()} | {oracle.VALUES: values}


@LAYERS
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_memory_layer_matches_oracle(extras: dict, num_tokens: int) -> None:
    config = MemoryConfig(**SMALL, **extras)
    layer = random_layer(config)
    shards = {name: whole_shard(config.num_slots, config.value_dim or WIDTH) for name in config.table_names}
    x = torch.randn(num_tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    tables = {f"memory.{name}": shard.values.clone().requires_grad_() for name, shard in shards.items()}
    params = oracle_params(layer, tables[oracle.VALUES]) | tables
    expected, slots = oracle.memory_layer(params, "mlp", x, oracle_config(config))
    cotangent = torch.randn_like(expected)
    names = list(params)
    *truth, truth_x = torch.autograd.grad(expected, [*params.values(), x], cotangent)

    chosen: list[Tensor] = []
    readers = Readers(**{name: LocalReader(shard) for name, shard in shards.items()})
    out = layer(x, readers, lambda slot: None if slot is None else chosen.append(slot))
    assert torch.equal(chosen[0], slots)
    assert_same(out, expected)
    out.backward(cotangent)
    assert_same(x.grad, truth_x)
    for name, grad in zip(names, truth, strict=True):
        if name in tables:
            assert_same(dense_gradient(shards[name.removeprefix("memory.")]), grad)
        else:
            assert_same(layer.get_parameter(name.removeprefix("mlp.")).grad, grad)


def test_memory_layer_reads_replayed_slots() -> None:
    config = MemoryConfig(**SMALL, variant="memory")
    layer, shard = random_layer(config), whole_shard(config.num_slots, WIDTH)
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    replay = torch.randint(config.num_slots, (6, config.heads, config.top_k))
    seen: list[Tensor | None] = []

    def hook(slot: Tensor | None) -> Tensor:
        seen.append(slot)
        return replay

    out = layer(x, Readers(values=LocalReader(shard)), hook)
    params = oracle_params(layer, shard.values)
    assert_same(out, oracle.memory_layer(params, "mlp", x, oracle_config(config), replay)[0])
    assert seen[0] is None and torch.equal(seen[1], replay)


def test_weights_of_a_token_sum_to_one_for_each_head() -> None:
    config = MemoryConfig(**SMALL, variant="memory")
    layer = random_layer(config).to(torch.bfloat16)
    slot, weight = layer.choose(torch.randn(9, WIDTH, dtype=torch.bfloat16))
    assert slot.shape == weight.shape == (9, config.heads, config.top_k)
    # The softmax stays in float32 under bf16.
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.sum(-1), torch.ones(9, config.heads), rtol=0, atol=1e-6)


def test_shared_table_collects_every_deposit_once() -> None:
    config = MemoryConfig(**SMALL, value_dim=VALUE_WIDTH)
    first, second = random_layer(config), random_layer(config)
    shard = whole_shard(config.num_slots, VALUE_WIDTH)
    values = shard.values.clone().requires_grad_()
    reader, truth = Readers(values=LocalReader(shard)), torch.zeros_like(values)
    for num_tokens in (4, 1, 9):
        x = torch.randn(num_tokens, WIDTH, dtype=torch.float64)
        weight = torch.rand(num_tokens, 1, dtype=torch.float64)
        (second(first(x, reader), reader) * weight).sum().backward()
        hidden, _ = oracle.memory_layer(oracle_params(first, values), "mlp", x, oracle_config(config))
        out, _ = oracle.memory_layer(oracle_params(second, values), "mlp", hidden, oracle_config(config))
        truth += torch.autograd.grad((out * weight).sum(), values)[0]
    assert shard.record_bytes > 0
    assert_same(dense_gradient(shard), truth)
    assert shard.record_bytes == 0
    rows, grad = shard.take_gradient()
    assert rows.shape == (0,) and grad.shape == (0, VALUE_WIDTH)
    assert torch.equal(shard.values, values)


def test_nothing_is_deposited_before_backward_or_without_gradients() -> None:
    config = MemoryConfig(**SMALL, variant="memory")
    layer, shard = random_layer(config), whole_shard(config.num_slots, WIDTH)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    out = layer(x, Readers(values=LocalReader(shard)))
    assert shard.record_bytes == 0
    with torch.no_grad():
        assert torch.equal(layer(x, Readers(values=LocalReader(shard))), out)
    assert shard.record_bytes == 0
    out.sum().backward()
    # Per read a row, a weight and a bag; per token an output gradient.
    reads = 3 * config.heads * config.top_k
    assert shard.record_bytes == reads * (4 + 8 + 4) + 3 * WIDTH * 8


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_deposits_once(use_reentrant: bool) -> None:
    config = MemoryConfig(**SMALL, variant="memory")
    layer, shard = random_layer(config), whole_shard(config.num_slots, WIDTH)
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    layer(x, Readers(values=LocalReader(shard))).square().sum().backward()
    plain = dense_gradient(shard)
    checkpoint(layer, x, Readers(values=LocalReader(shard)), use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(dense_gradient(shard), plain)


def test_local_reader_takes_no_tokens() -> None:
    shard = whole_shard(25, 7)
    weight = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(0, 6, dtype=torch.int64)
    reader = LocalReader(shard)
    found = reader.find(none)
    out = reader.read(found, weight)
    assert out.shape == (0, 7)
    assert reader.dot(found, out.detach()).shape == (0, 6)
    out.sum().backward()
    assert weight.grad.shape == (0, 6)
    rows, grad = shard.take_gradient()
    assert rows.shape == (0,) and grad.shape == (0, 7)


def test_local_reader_answers_in_the_dtype_of_the_table() -> None:
    shard = whole_shard(25, 8, torch.bfloat16)
    slot, weight = torch.randint(25, (4, 6)), torch.rand(4, 6, requires_grad=True)
    reader = LocalReader(shard)
    out = reader.read(reader.find(slot), weight)
    assert out.dtype == torch.bfloat16
    expected = (shard.values.double()[slot] * weight.detach().bfloat16().double()[..., None]).sum(1)
    # Six terms, each at most 2^-8 off.
    torch.testing.assert_close(out.double(), expected, rtol=6 * 2**-8, atol=6 * 2**-8)
    out.sum().backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad.abs().min() > 0


def test_row_gradients_of_a_bf16_table_are_summed_in_float32() -> None:
    shard = whole_shard(25, 4, torch.bfloat16)
    assert shard.take_gradient()[1].dtype == torch.float32
    # In bf16 a sum of ones stops at 256.
    weight = torch.ones(1000, 1, requires_grad=True)
    reader = LocalReader(shard)
    reader.read(reader.find(torch.full((1000, 1), 7)), weight).sum().backward()
    rows, grad = shard.take_gradient()
    assert rows.tolist() == [7]
    assert torch.equal(grad, torch.full((1, 4), 1000.0))


def test_silent_reader_answers_zeros() -> None:
    config = MemoryConfig(**SMALL, value_dim=VALUE_WIDTH)
    layer = random_layer(config)
    reader = SilentReader(VALUE_WIDTH)
    out = reader.read(reader.find(torch.zeros(4, 6, dtype=torch.int64)), torch.full((4, 6), torch.nan))
    assert torch.equal(out, torch.zeros(4, VALUE_WIDTH))
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    assert torch.equal(layer(x, Readers(values=reader)), layer.output_proj.bias.expand(4, WIDTH))


@LAYERS
def test_every_parameter_has_an_initial_value_of_its_shape(extras: dict) -> None:
    layer = MemoryLayer(MemoryConfig(**SMALL, **extras), WIDTH, EPSILON)
    for name, param in layer.named_parameters():
        draw = [initial_value(name, tuple(param.shape), torch.Generator().manual_seed(5)) for _ in range(2)]
        assert draw[0] is not None, name
        assert (draw[0].shape, draw[0].dtype) == (param.shape, torch.float64)
        assert torch.equal(draw[0], draw[1])


@pytest.mark.parametrize("name", ["linear_fc1.weight", "query", "keys.weight", "values", "gate_proj"])
def test_initial_value_leaves_other_names_alone(name: str) -> None:
    assert initial_value(name, (2, 3), torch.Generator()) is None


@pytest.mark.parametrize(
    ("name", "shape", "bound", "deviation"),
    [
        # Xavier: sqrt(6 / (fan_in + fan_out)).
        ("query.weight", (300, 100), math.sqrt(6 / 400), math.sqrt(2 / 400)),
        # Q is 32 and a whole key twice as wide.
        ("keys", (4, 2, 100, 32), 1 / 8, 1 / 8 / math.sqrt(3)),
        ("gate_proj.weight", (300, 100), math.inf, 0.1),
        ("output_proj.weight", (100, 300), math.inf, 0.1),
        ("scalar_gate.weight", (1, 10000), math.inf, 0.01),
    ],
)
def test_initial_value_has_its_spread(name: str, shape: tuple[int, ...], bound: float, deviation: float) -> None:
    draw = initial_value(name, shape, torch.Generator().manual_seed(torch.initial_seed() % 2**31))
    count = draw.numel()
    assert abs(draw.mean()) < 6 * deviation / math.sqrt(count)
    assert abs(draw.std() / deviation - 1) < 6 / math.sqrt(2 * count)
    assert draw.abs().max() <= bound
    if bound < math.inf:
        assert draw.abs().max() > 0.99 * bound
    else:
        assert draw.abs().max() > 2.5 * deviation


@pytest.mark.parametrize(
    ("names", "constant"),
    [
        (("query.bias", "gate_proj.bias", "output_proj.bias", "scalar_gate.bias"), torch.zeros),
        (("query_norm.weight", "key_norm.weight"), torch.ones),
    ],
)
def test_initial_biases_are_zero_and_norms_one(names: tuple[str, ...], constant: Callable[[int], Tensor]) -> None:
    for name in names:
        assert torch.equal(initial_value(name, (6,), torch.Generator()), constant(6).double())


def test_scores_are_as_narrow_as_the_layer_is_told() -> None:
    x = torch.randn(40, WIDTH)
    wide = MemoryLayer(MemoryConfig(**SMALL), WIDTH, EPSILON)
    narrow = MemoryLayer(MemoryConfig(**SMALL, score_dtype="bf16"), WIDTH, EPSILON)
    for one, other in zip(wide.parameters(), narrow.parameters(), strict=True):
        torch.nn.init.normal_(one)
        other.data.copy_(one.data)
    (slots, weight), (rounded_slots, rounded_weight) = wide.choose(x), narrow.choose(x)
    assert weight.dtype == rounded_weight.dtype == torch.float32
    assert not torch.equal(weight, rounded_weight)
    # The best slots are far enough apart for most tokens.
    assert (slots[..., 0] == rounded_slots[..., 0]).float().mean() > 0.5
