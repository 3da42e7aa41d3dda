"""Memory layers, their table and its optimizers on one process, against the oracle and against torch."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import oracle
import oracle_runs
from mempar.dims import TableSlice
from mempar.errors import ConfigError
from mempar.memory import initial, optimizer
from mempar.memory.config import MemoryConfig
from mempar.memory.initial import hashed_normal, table_values
from mempar.memory.layer import MemoryLayer, initial_value
from mempar.memory.lookup import LocalReader, Readers, SilentReader
from mempar.memory.optimizer import AdamSettings, TableAdam
from mempar.memory.values import ValueShard
from mempar.runtime.config import ModelConfig, RunConfig

WIDTH, VALUE_WIDTH, EPSILON = 12, 10, 1e-5
SMALL = {"num_subkeys": 5, "heads": 2, "top_k": 3, "key_dim": 6}
SETTINGS = AdamSettings(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
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


@pytest.fixture(autouse=True)
def fresh_seed() -> int:
    seed = torch.seed()
    # Shown by pytest when a test fails; torch.manual_seed(it) repeats the test.
    print(f"torch seed {seed}")
    return seed % 2**31


def slice_of(num_slots: int, value_dim: int, rows: tuple[int, int], columns: tuple[int, int]) -> TableSlice:
    return TableSlice(
        num_slots=num_slots,
        value_dim=value_dim,
        row_start=rows[0],
        row_end=rows[1],
        column_start=columns[0],
        column_end=columns[1],
    )


def values_of(part: TableSlice, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return table_values(part, seed=seed, dtype=dtype, device=torch.device("cpu"))


def whole_shard(num_slots: int, value_dim: int, dtype: torch.dtype = torch.float64) -> ValueShard:
    part = slice_of(num_slots, value_dim, (0, num_slots), (0, value_dim))
    return ValueShard(part, seed=3, dtype=dtype, device=torch.device("cpu"))


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


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_elements", [1, 100, 1 << 21])
def test_table_slice_equals_slice_of_whole_table(
    monkeypatch: pytest.MonkeyPatch, fresh_seed: int, dtype: torch.dtype, chunk_elements: int
) -> None:
    whole = values_of(slice_of(37, 23, (0, 37), (0, 23)), fresh_seed, dtype)
    monkeypatch.setattr(initial, "_CHUNK_ELEMENTS", chunk_elements)
    for rows in ((0, 37), (0, 13), (13, 26), (36, 37), (5, 5)):
        for columns in ((0, 23), (0, 8), (8, 23), (22, 23), (7, 7)):
            part = values_of(slice_of(37, 23, rows, columns), fresh_seed, dtype)
            assert part.dtype == dtype
            assert torch.equal(part, whole[slice(*rows), slice(*columns)])


def test_table_row_is_the_same_when_table_has_more_slots(fresh_seed: int) -> None:
    small = values_of(slice_of(9, 16, (0, 9), (0, 16)), fresh_seed)
    large = values_of(slice_of(64 * 10**6, 16, (4, 9), (0, 16)), fresh_seed)
    assert torch.equal(small[4:], large)


def test_table_values_have_the_moments_of_their_distribution(fresh_seed: int) -> None:
    num_slots, value_dim = 500, 400
    values = values_of(slice_of(num_slots, value_dim, (0, num_slots), (0, value_dim)), fresh_seed)
    scaled, deviations = values * math.sqrt(value_dim), 6 / math.sqrt(values.numel())
    # Each bound is six standard deviations of its estimate from this many numbers.
    assert abs(scaled.mean()) < deviations
    assert abs(scaled.square().mean() - 1) < math.sqrt(2) * deviations
    assert abs(scaled.pow(3).mean()) < math.sqrt(15) * deviations
    assert abs(scaled.pow(4).mean() - 3) < math.sqrt(96) * deviations
    for one, other in ((scaled[1:], scaled[:-1]), (scaled[:, 1:], scaled[:, :-1])):
        assert abs((one * other).mean()) < 1.01 * deviations
        assert abs((one.square() * other.square()).mean() - 1) < 3 * deviations
    for row_bound, mean in ((num_slots, scaled.mean(0)), (value_dim, scaled.mean(1))):
        assert mean.abs().max() < 7 / math.sqrt(row_bound)
    assert values.unique().numel() == values.numel()


def test_table_values_follow_the_normal_distribution_function(fresh_seed: int) -> None:
    values = hashed_normal(fresh_seed, torch.arange(200), torch.arange(200)).flatten()
    expected = 0.5 * (1 + torch.erf(values.sort()[0] / math.sqrt(2)))
    observed = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values)
    # Kolmogorov and Smirnov: a larger distance has a probability of about 1e-7.
    assert (expected - observed).abs().max() < 2.9 / math.sqrt(len(values))


def test_table_values_differ_when_seed_differs(fresh_seed: int) -> None:
    part = slice_of(50, 40, (0, 50), (0, 40))
    first = values_of(part, fresh_seed)
    for seed in (fresh_seed + 1, -fresh_seed - 1, fresh_seed + 2**40):
        other = values_of(part, seed)
        assert not (first == other).any()
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 6 / math.sqrt(2000)
    assert torch.equal(first, values_of(part, fresh_seed))


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
    out = LocalReader(shard).read(none, weight)
    assert out.shape == (0, 7)
    assert LocalReader(shard).dot(none, out.detach()).shape == (0, 6)
    out.sum().backward()
    assert weight.grad.shape == (0, 6)
    rows, grad = shard.take_gradient()
    assert rows.shape == (0,) and grad.shape == (0, 7)


def test_local_reader_answers_in_the_dtype_of_the_table() -> None:
    shard = whole_shard(25, 8, torch.bfloat16)
    slot, weight = torch.randint(25, (4, 6)), torch.rand(4, 6, requires_grad=True)
    out = LocalReader(shard).read(slot, weight)
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
    LocalReader(shard).read(torch.full((1000, 1), 7), weight).sum().backward()
    rows, grad = shard.take_gradient()
    assert rows.tolist() == [7]
    assert torch.equal(grad, torch.full((1, 4), 1000.0))


def test_silent_reader_answers_zeros() -> None:
    config = MemoryConfig(**SMALL, value_dim=VALUE_WIDTH)
    layer = random_layer(config)
    reader = SilentReader(VALUE_WIDTH)
    out = reader.read(torch.zeros(4, 6, dtype=torch.int64), torch.full((4, 6), torch.nan))
    assert torch.equal(out, torch.zeros(4, VALUE_WIDTH))
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    assert torch.equal(layer(x, Readers(values=reader)), layer.output_proj.bias.expand(4, WIDTH))


def touched_rows(num_rows: int, num_touched: int) -> Tensor:
    return torch.randperm(num_rows)[:num_touched].sort()[0].int()


@pytest.mark.parametrize("rows_at_once", [1, 3, 4, 100])
def test_table_adamw_matches_torch_on_the_dense_gradient(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    num_rows, width = 10, 7
    monkeypatch.setattr(optimizer, "_CHUNK_ELEMENTS", rows_at_once * width + width // 2)
    values = torch.randn(num_rows, width, dtype=torch.float64)
    param = torch.nn.Parameter(values.clone())
    truth = torch.optim.AdamW([param], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    table = TableAdam(values, SETTINGS, touched_only=False)
    for step, num_touched in enumerate((4, 0, 10, 1, 7, 3)):
        rows, lr = touched_rows(num_rows, num_touched), 0.05 / (1 + step)
        grad = torch.randn(num_touched, width, dtype=torch.float64)
        param.grad = torch.zeros_like(param).index_copy(0, rows.long(), grad)
        truth.param_groups[0]["lr"] = lr
        truth.step()
        table.update(rows, grad, lr)
        assert_same(values, param.detach(), 1e-13)
    assert table.step == 6
    state = truth.state[param]
    assert_same(table.state["exp_avg"], state["exp_avg"], 1e-13)
    assert_same(table.state["exp_avg_sq"], state["exp_avg_sq"], 1e-13)
    assert "master" not in table.state


@pytest.mark.parametrize("memory_optimizer", ["adamw", "row_adam"])
@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_table_optimizer_matches_oracle(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int, memory_optimizer: str
) -> None:
    num_rows, width = 11, 5
    monkeypatch.setattr(optimizer, "_CHUNK_ELEMENTS", rows_at_once * width)
    values = torch.randn(num_rows, width, dtype=torch.float64)
    params, state = {oracle.VALUES: values.clone()}, oracle.AdamState()
    table = TableAdam(values, SETTINGS, touched_only=memory_optimizer == "row_adam")
    for step, num_touched in enumerate((4, 0, 11, 1, 7, 4)):
        rows, lr = touched_rows(num_rows, num_touched), 0.05 / (1 + step)
        grad = torch.randn(num_touched, width, dtype=torch.float64)
        # A row that was chosen is touched, whatever its gradient.
        grad[::3] = 0.0
        dense = torch.zeros_like(values).index_copy(0, rows.long(), grad)
        optim = oracle.OptimConfig(lr=0.0, memory_lr=lr, memory_clip_grad=0.0)
        before = {"values": values, **table.state}
        before = {name: tensor.clone() for name, tensor in before.items()}
        slots = [{0: rows.long().repeat(2)}] if num_touched else [{0: torch.zeros(0, dtype=torch.int64)}]
        config = oracle_config(MemoryConfig(**SMALL))
        oracle.update(params, {oracle.VALUES: dense}, slots, state, config, optim, memory_optimizer)
        table.update(rows, grad, lr)
        assert_same(values, params[oracle.VALUES], 1e-13)
        assert_same(table.state["exp_avg"], state.first[oracle.VALUES], 1e-13)
        assert_same(table.state["exp_avg_sq"], state.second[oracle.VALUES], 1e-13)
        if memory_optimizer == "row_adam":
            others = torch.ones(num_rows, dtype=torch.bool)
            others[rows.long()] = False
            for name, tensor in {"values": values, **table.state}.items():
                assert torch.equal(tensor[others], before[name][others])


@pytest.mark.parametrize("touched_only", [False, True])
def test_bf16_values_do_not_stall_when_updates_are_below_their_resolution(touched_only: bool) -> None:
    lr, num_steps = 2e-5, 40
    values = torch.full((6, 4), 0.03, dtype=torch.bfloat16)
    start = values.clone()
    # Plain bf16 stalls: a step of lr is less than half of the distance to the next number.
    assert torch.equal(start - lr, start)
    settings = AdamSettings(beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0)
    table = TableAdam(values, settings, touched_only=touched_only)
    rows = torch.tensor([1, 4], dtype=torch.int32)
    for _ in range(num_steps):
        table.update(rows, torch.ones(2, 4), lr)
    assert table.state["master"].dtype == table.state["exp_avg"].dtype == torch.float32
    # Adam's step is lr where the gradient never changes.
    expected = start[[1, 4]].double() - lr * num_steps
    torch.testing.assert_close(table.state["master"][[1, 4]].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(values, table.state["master"].bfloat16())
    assert (values[[1, 4]] < start[[1, 4]]).all()
    assert torch.equal(values[[0, 2, 3, 5]], start[[0, 2, 3, 5]])


@pytest.mark.parametrize("touched_only", [False, True])
def test_bf16_table_follows_its_float32_master(touched_only: bool) -> None:
    values = torch.randn(9, 5).bfloat16()
    wide = values.float()
    tables = [TableAdam(table, SETTINGS, touched_only=touched_only) for table in (values, wide)]
    for num_touched in (3, 0, 9, 5):
        rows, grad = touched_rows(9, num_touched), torch.randn(num_touched, 5)
        for table in tables:
            table.update(rows, grad.clone(), 0.01)
    assert torch.equal(tables[0].state["master"], wide)
    assert torch.equal(values, wide.bfloat16())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "peers"}, r"memory\.variant=peers.*memory, memory_plus"),
        ({"optimizer": "sgd"}, r"memory\.optimizer=sgd.*adamw, row_adam"),
        ({"num_subkeys": 0}, r"memory\.num_subkeys=0 "),
        ({"heads": -1}, r"memory\.heads=-1 "),
        ({"top_k": 0}, r"memory\.top_k=0 "),
        ({"key_dim": 0}, r"memory\.key_dim=0 "),
        ({"column_tile": 0}, r"memory\.column_tile=0 "),
        ({"key_dim": 7}, r"memory\.key_dim=7 "),
        ({"top_k": 9, "num_subkeys": 8}, r"memory\.top_k=9 .*memory\.num_subkeys=8"),
        ({"layers": (4, 2)}, r"memory\.layers=\[4, 2\]"),
        ({"layers": (2, 2)}, r"memory\.layers=\[2, 2\]"),
        ({"value_dim": -8}, r"memory\.value_dim=-8 "),
        ({"lr": -0.5}, r"memory\.lr=-0\.5 "),
        ({"clip_grad": -1.0}, r"memory\.clip_grad=-1\.0 "),
    ],
)
def test_memory_config_refuses_with_the_numbers(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryConfig(**settings)


@pytest.mark.parametrize("name", ["lr", "clip_grad", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_memory_config_refuses_numbers_that_are_not_finite(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"memory\.{name}={value}"):
        MemoryConfig(**{name: value})


def test_memory_config_takes_the_bounds_of_its_rules() -> None:
    config = MemoryConfig(num_subkeys=8, top_k=8, heads=1, key_dim=2, layers=(0, 1, 7), column_tile=1)
    assert (config.num_slots, config.half_key_dim) == (64, 1)


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
