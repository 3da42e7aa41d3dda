"""Checks the truth itself: each piece of `oracle.py` against a reference that was not written with it."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle

VOCAB, WIDTH, VALUE_WIDTH, HALF_KEY, BATCH, LENGTH = 19, 12, 10, 3, 2, 5
CONFIG = oracle.OracleConfig(
    num_layers=3,
    hidden_size=WIDTH,
    num_attention_heads=6,
    num_query_groups=3,
    ffn_hidden_size=7,
    memory_layers=(0, 2),
    num_subkeys=5,
    heads=2,
    top_k=3,
)
DENSE = replace(CONFIG, memory_layers=())
EVERYTHING = replace(CONFIG, qk_norm=True, scalar_gate=True)


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    # Shown by pytest when a test fails; torch.manual_seed(it) repeats the test.
    print(f"torch seed {torch.seed()}")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def memory_shapes(config: oracle.OracleConfig) -> dict[str, tuple[int, ...]]:
    num_queries = config.heads * 2 * HALF_KEY
    shapes = {
        "query.weight": (num_queries, WIDTH),
        "query.bias": (num_queries,),
        "keys": (config.heads, 2, config.num_subkeys, HALF_KEY),
    }
    if config.variant == "memory_plus":
        shapes |= {"gate_proj.weight": (VALUE_WIDTH, WIDTH), "gate_proj.bias": (VALUE_WIDTH,)}
        shapes |= {"output_proj.weight": (WIDTH, VALUE_WIDTH), "output_proj.bias": (WIDTH,)}
    if config.qk_norm:
        shapes |= {"query_norm.weight": (HALF_KEY,), "key_norm.weight": (HALF_KEY,)}
    if config.scalar_gate:
        shapes |= {"scalar_gate.weight": (1, WIDTH), "scalar_gate.bias": (1,)}
    return shapes


def random_params(config: oracle.OracleConfig) -> oracle.Params:
    width = WIDTH // config.num_attention_heads
    num_qkv = (config.num_attention_heads + 2 * config.num_query_groups) * width
    value_width = VALUE_WIDTH if config.variant == "memory_plus" else WIDTH
    shapes = {"embedding.word_embeddings.weight": (VOCAB, WIDTH), "decoder.final_layernorm.weight": (WIDTH,)}
    if not config.tie_embeddings:
        shapes["output_layer.weight"] = (VOCAB, WIDTH)
    if config.memory_layers:
        shapes[oracle.VALUES] = (config.num_subkeys**2, value_width)
    for layer in range(config.num_layers):
        prefix = f"decoder.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = shapes[f"{prefix}.pre_mlp_layernorm.weight"] = (WIDTH,)
        shapes[f"{prefix}.self_attention.linear_qkv.weight"] = (num_qkv, WIDTH)
        shapes[f"{prefix}.self_attention.linear_proj.weight"] = (WIDTH, WIDTH)
        if layer in config.memory_layers:
            shapes |= {f"{prefix}.mlp.{name}": shape for name, shape in memory_shapes(config).items()}
        else:
            shapes[f"{prefix}.mlp.linear_fc1.weight"] = (2 * config.ffn_hidden_size, WIDTH)
            shapes[f"{prefix}.mlp.linear_fc2.weight"] = (WIDTH, config.ffn_hidden_size)
    return {name: 0.5 * normal(*shape) for name, shape in shapes.items()}


def random_batch() -> oracle.Batch:
    tokens, labels = torch.randint(VOCAB, (2, BATCH, LENGTH))
    loss_mask = (torch.rand(BATCH, LENGTH) < 0.7).double()
    loss_mask[0, 0] = 1.0
    return tokens, labels, loss_mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rms_norm_matches_torch(dtype: torch.dtype) -> None:
    x, weight = normal(4, 3, WIDTH).to(dtype), normal(WIDTH).to(dtype)
    torch.testing.assert_close(oracle.rms_norm(x, weight, 1e-3), F.rms_norm(x, (WIDTH,), weight, 1e-3))


def test_attention_matches_torch_when_queries_share_groups() -> None:
    query, key, value = normal(2, 7, 6, 4), normal(2, 7, 3, 4), normal(2, 7, 3, 4)
    expected = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(oracle.causal_attention(query, key, value), expected.transpose(1, 2))


def test_attention_layer_reads_the_grouped_qkv_layout() -> None:
    params, x, prefix = random_params(DENSE), normal(BATCH, LENGTH, WIDTH), "decoder.layers.1.self_attention"
    blocks = iter(params[f"{prefix}.linear_qkv.weight"].split(2))
    query, key, value = [], [], []
    for _ in range(3):
        query += [x @ next(blocks).T, x @ next(blocks).T]
        key.append(x @ next(blocks).T)
        value.append(x @ next(blocks).T)
    heads = [oracle.rotate(torch.stack(part, 2), 1e4).transpose(1, 2) for part in (query, key)]
    read = F.scaled_dot_product_attention(*heads, torch.stack(value, 1), is_causal=True, enable_gqa=True)
    expected = read.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH) @ params[f"{prefix}.linear_proj.weight"].T
    torch.testing.assert_close(oracle.attention_layer(params, prefix, x, DENSE), expected)


def test_rotation_matches_complex_numbers() -> None:
    x, base = normal(2, 9, 3, 8), 500.0
    theta = torch.tensor([base ** (-2 * j / 8) for j in range(4)], dtype=torch.float64)
    turn = torch.exp(1j * torch.arange(9).double()[:, None, None] * theta)
    turned = torch.complex(x[..., :4], x[..., 4:]) * turn
    expected = torch.cat((turned.real, turned.imag), -1)
    # The oracle's angles are float32, up to 8 radians here.
    torch.testing.assert_close(oracle.rotate(x, base), expected, rtol=0, atol=1e-5)


def test_topk_matches_torch_on_all_slots() -> None:
    query, keys = normal(6, 2, 2, HALF_KEY), normal(2, 2, 5, HALF_KEY)
    slot, score = oracle.product_key_topk(query, keys, 4)
    for h in range(2):
        first, second = query[:, h, 0] @ keys[h, 0].T, query[:, h, 1] @ keys[h, 1].T
        expected = torch.cat([first[:, i : i + 1] + second for i in range(5)], dim=-1).topk(4)
        torch.testing.assert_close(score[:, h], expected.values)
        assert torch.equal(slot[:, h], expected.indices)


def test_topk_takes_lowest_slots_when_keys_equal() -> None:
    query, keys = normal(3, 2, 2, HALF_KEY), normal(2, 2, 1, HALF_KEY).expand(2, 2, 7, HALF_KEY)
    slot, score = oracle.product_key_topk(query, keys, 9)
    assert torch.equal(slot, torch.arange(9).expand(3, 2, 9))
    assert torch.equal(score, score[..., :1].expand(3, 2, 9))


def test_topk_sorts_by_score_then_slot_when_scores_tie() -> None:
    # Small integers, so that many sums tie exactly.
    query, keys = torch.randint(-2, 3, (8, 2, 2, 2)).double(), torch.randint(-1, 2, (2, 2, 6, 2)).double()
    slot, score = oracle.product_key_topk(query, keys, 5)
    for t in range(8):
        for h in range(2):
            first, second = keys[h, 0] @ query[t, h, 0], keys[h, 1] @ query[t, h, 1]
            ranked = sorted((-(first[i // 6] + second[i % 6]).item(), i) for i in range(36))[:5]
            assert slot[t, h].tolist() == [i for _, i in ranked]
            assert score[t, h].tolist() == [-negated for negated, _ in ranked]


def test_memory_layer_weights_sum_to_heads() -> None:
    config = replace(CONFIG, variant="memory")
    params = random_params(config)
    params[oracle.VALUES] = torch.ones_like(params[oracle.VALUES])
    out, slots = oracle.memory_layer(params, "decoder.layers.0.mlp", normal(4, WIDTH), config)
    assert slots.shape == (4, config.heads, config.top_k)
    torch.testing.assert_close(out, torch.full_like(out, config.heads))


@pytest.mark.parametrize("config", [CONFIG, EVERYTHING, replace(CONFIG, variant="memory")])
def test_memory_layer_matches_loops(config: oracle.OracleConfig) -> None:
    params, x = random_params(config), normal(3, WIDTH)
    mlp = {name.removeprefix("decoder.layers.0.mlp."): param for name, param in params.items()}
    out, slots = oracle.memory_layer(params, "decoder.layers.0.mlp", x, config)
    for t in range(3):
        query = mlp["query.weight"] @ x[t] + mlp["query.bias"]
        read = torch.zeros(params[oracle.VALUES].shape[1], dtype=torch.float64)
        for h in range(config.heads):
            half = []
            for c in range(2):
                q, k = query[(2 * h + c) * HALF_KEY :][:HALF_KEY], mlp["keys"][h, c]
                if config.qk_norm:
                    q = F.rms_norm(q, (HALF_KEY,), mlp["query_norm.weight"], config.norm_epsilon)
                    k = F.rms_norm(k, (HALF_KEY,), mlp["key_norm.weight"], config.norm_epsilon)
                half.append(k @ q)
            best = (half[0].repeat_interleave(5) + half[1].repeat(5)).topk(config.top_k)
            assert torch.equal(best.indices, slots[t, h])
            read += best.values.softmax(0) @ params[oracle.VALUES][best.indices]
        if config.variant == "memory_plus":
            gate = F.silu(mlp["gate_proj.weight"] @ x[t] + mlp["gate_proj.bias"])
            read = mlp["output_proj.weight"] @ (read * gate) + mlp["output_proj.bias"]
        if config.scalar_gate:
            read = read / (1 + math.exp(-(mlp["scalar_gate.weight"] @ x[t] + mlp["scalar_gate.bias"]).item()))
        torch.testing.assert_close(out[t], read)


@pytest.mark.parametrize("config", [CONFIG, EVERYTHING, replace(CONFIG, variant="memory")])
def test_memory_layer_gradients_match_differences(config: oracle.OracleConfig) -> None:
    params, prefix = random_params(config), "decoder.layers.0.mlp"
    names = [f"{prefix}.query.weight", f"{prefix}.query.bias", f"{prefix}.keys", oracle.VALUES]

    def out_of(x: Tensor, *leaves: Tensor) -> Tensor:
        return oracle.memory_layer(params | dict(zip(names, leaves, strict=True)), prefix, x, config)[0]

    # Differences of 1e-6 do not flip a slot unless two scores are that close: draw until they are well apart.
    while True:
        x = normal(2, WIDTH)
        query = F.linear(x, params[names[0]], params[names[1]]).unflatten(-1, (config.heads, 2, -1))
        keys = params[names[2]]
        if config.qk_norm:
            query = oracle.rms_norm(query, params[f"{prefix}.query_norm.weight"], config.norm_epsilon)
            keys = oracle.rms_norm(keys, params[f"{prefix}.key_norm.weight"], config.norm_epsilon)
        score = oracle.product_key_topk(query, keys, config.top_k + 1)[1]
        if (score[..., -2] - score[..., -1]).min() > 1e-3:
            break
    inputs = [x.requires_grad_(), *(params[name].clone().requires_grad_() for name in names)]
    assert torch.autograd.gradcheck(out_of, inputs)


@pytest.mark.parametrize("config", [DENSE, CONFIG, EVERYTHING, replace(CONFIG, variant="memory", tie_embeddings=True)])
def test_logits_do_not_see_the_future(config: oracle.OracleConfig) -> None:
    params, (tokens, _, _) = random_params(config), random_batch()
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % VOCAB
    before, slots = oracle.forward(params, tokens, config)
    after, _ = oracle.forward(params, changed, config)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3:] != before[:, 3:]).any(-1).all()
    assert {layer: slot.shape for layer, slot in slots.items()} == dict.fromkeys(
        config.memory_layers, (BATCH, LENGTH, config.heads, config.top_k)
    )


def test_replay_of_own_slots_changes_nothing_and_of_others_does() -> None:
    params, (tokens, _, _) = random_params(CONFIG), random_batch()
    logits, slots = oracle.forward(params, tokens, CONFIG)
    again, same = oracle.forward(params, tokens, CONFIG, replay=slots)
    assert torch.equal(again, logits)
    others = {layer: (slot + 1) % CONFIG.num_subkeys**2 for layer, slot in slots.items()}
    moved, kept = oracle.forward(params, tokens, CONFIG, replay=others)
    assert (moved != logits).any()
    for layer in CONFIG.memory_layers:
        assert torch.equal(same[layer], slots[layer])
        assert torch.equal(kept[layer], others[layer])


def test_loss_is_mean_over_unmasked_tokens_of_all_batches() -> None:
    params, batches = random_params(CONFIG), [random_batch(), random_batch()]
    batches[1][2][1] = 0.0
    log_probability = [oracle.forward(params, tokens, CONFIG)[0].log_softmax(-1) for tokens, _, _ in batches]
    picked = [
        -log_probability[i][b, t, labels[b, t]]
        for i, (_, labels, mask) in enumerate(batches)
        for b in range(BATCH)
        for t in range(LENGTH)
        if mask[b, t] == 1
    ]
    loss, grads, _ = oracle.gradients(params, batches, CONFIG)
    torch.testing.assert_close(loss, torch.stack(picked).mean())
    joined = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    loss_joined, grads_joined, _ = oracle.gradients(params, [joined], CONFIG)
    torch.testing.assert_close(loss_joined, loss)
    torch.testing.assert_close(grads_joined, grads)
    torch.testing.assert_close(oracle.loss(params, *joined, CONFIG)[0], loss)


@pytest.mark.parametrize("clip_grad", [0.0, 0.01, 1e6])
def test_adamw_steps_match_torch(clip_grad: float) -> None:
    params = random_params(EVERYTHING)
    optim = oracle.OptimConfig(
        1e-2, weight_decay=0.3, clip_grad=clip_grad, memory_lr=5e-2, memory_clip_grad=clip_grad / 2
    )
    leaves = {name: param.clone().requires_grad_() for name, param in params.items()}
    dense, table = [leaf for name, leaf in leaves.items() if name != oracle.VALUES], [leaves[oracle.VALUES]]
    groups = [
        {"params": [leaf for leaf in dense if leaf.dim() > 1], "weight_decay": 0.3},
        {"params": [leaf for leaf in dense if leaf.dim() == 1], "weight_decay": 0.0},
        {"params": table, "lr": 5e-2, "weight_decay": 0.1},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    state = oracle.OptimState()
    for _ in range(4):
        batch = random_batch()
        result = oracle.step(params, state, [batch], EVERYTHING, optim)
        reference.zero_grad()
        # The slots are replayed, so that rounding cannot flip one.
        loss, _ = oracle.loss(leaves, *batch, EVERYTHING, replay=result["slots"][0])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(dense, clip_grad or math.inf)
        memory_norm = torch.nn.utils.clip_grad_norm_(table, clip_grad / 2 or math.inf)
        reference.step()
        found = torch.tensor([result["loss"], result["grad_norm"], result["memory_grad_norm"]], dtype=torch.float64)
        torch.testing.assert_close(found, torch.stack([loss.detach(), norm, memory_norm]), rtol=1e-9, atol=0)
    # Adam divides by the square root of tiny second moments, which lifts float64 rounding.
    torch.testing.assert_close(params, {name: leaf.detach() for name, leaf in leaves.items()}, rtol=1e-7, atol=1e-9)
    assert state.step == 4


def test_row_adam_leaves_untouched_rows_unchanged() -> None:
    params, state = random_params(CONFIG), oracle.OptimState()
    optim = oracle.OptimConfig(1e-2)
    for _ in range(3):
        zero = torch.zeros_like(params[oracle.VALUES])
        before = [params[oracle.VALUES].clone()]
        before += [moments.get(oracle.VALUES, zero).clone() for moments in (state.first, state.second)]
        # One short sequence: at most 2 layers * 2 tokens * 2 heads * 3 of the 25 rows.
        batch = tuple(part[:1, :2] for part in random_batch())
        slots = oracle.step(params, state, [batch], CONFIG, optim, "row_adam")["slots"]
        touched = torch.zeros(CONFIG.num_subkeys**2, dtype=torch.bool)
        for slot in slots[0].values():
            touched[slot] = True
        assert 0 < touched.sum() < len(touched)
        after = [params[oracle.VALUES], state.first[oracle.VALUES], state.second[oracle.VALUES]]
        for old, new in zip(before, after, strict=True):
            assert torch.equal(new[~touched], old[~touched])
        assert (after[0][touched] != before[0][touched]).any(-1).all()


def test_row_adam_equals_adamw_when_all_rows_touched() -> None:
    # 4 slots, and every head reads 4.
    config = replace(CONFIG, num_subkeys=2, top_k=4)
    params = random_params(config)
    copies, states = [params, {name: param.clone() for name, param in params.items()}], []
    batches = [random_batch() for _ in range(3)]
    for copy, optimizer in zip(copies, ("adamw", "row_adam"), strict=True):
        states.append(oracle.OptimState())
        for batch in batches:
            oracle.step(copy, states[-1], [batch], config, oracle.OptimConfig(1e-2), optimizer)
    assert all(torch.equal(copies[0][name], copies[1][name]) for name in params)
    assert torch.equal(states[0].second[oracle.VALUES], states[1].second[oracle.VALUES])


def test_row_adam_corrects_bias_by_the_global_step() -> None:
    optim = oracle.OptimConfig(1e-2, memory_clip_grad=0.0, memory_weight_decay=0.5)
    params, state = {oracle.VALUES: normal(4, 3)}, oracle.OptimState()
    start, grad = params[oracle.VALUES].clone(), normal(4, 3)
    for row in (0, 2):
        slots = [{0: torch.full((1, 1, 1, 1), row)}]
        oracle.update(params, {oracle.VALUES: grad}, slots, state, optim, "row_adam")
    direction = 0.1 / (1 - 0.9**2) * grad[2] / (math.sqrt(0.05 / (1 - 0.95**2)) * grad[2].abs() + 1e-8)
    expected = start[2] * (1 - optim.memory_lr * 0.5) - optim.memory_lr * direction
    torch.testing.assert_close(params[oracle.VALUES][2], expected)
    assert torch.equal(params[oracle.VALUES][1], start[1])


def test_row_adagrad_of_one_tile_a_column_is_adagrad_of_torch() -> None:
    start = normal(5, 3)
    param = torch.nn.Parameter(start.clone())
    truth = torch.optim.Adagrad([param], lr=0.1, eps=1e-8)
    optim = oracle.OptimConfig(0.0, memory_lr=0.1, memory_weight_decay=0.0, memory_clip_grad=0.0, column_tile=1)
    params, state = {oracle.VALUES: start.clone()}, oracle.OptimState()
    every_row = [{0: torch.arange(5)}]
    for _ in range(4):
        param.grad = normal(5, 3)
        oracle.update(params, {oracle.VALUES: param.grad}, every_row, state, optim, "row_adagrad")
        truth.step()
    torch.testing.assert_close(params[oracle.VALUES], param.detach())


def test_row_adagrad_shares_the_mean_square_of_a_tile_and_leaves_other_rows_alone() -> None:
    start, grad = normal(4, 5), normal(4, 5)
    optim = oracle.OptimConfig(0.0, memory_lr=0.1, memory_weight_decay=0.5, memory_clip_grad=0.0, column_tile=3)
    params, state = {oracle.VALUES: start.clone()}, oracle.OptimState()
    oracle.update(params, {oracle.VALUES: grad}, [{0: torch.tensor([2, 0])}], state, optim, "row_adagrad")
    squares = torch.stack([grad[:, :3].square().sum(1) / 3, grad[:, 3:].square().sum(1) / 2], 1)
    torch.testing.assert_close(state.accumulator[oracle.VALUES][[0, 2]], squares[[0, 2]])
    expected = start[2, 4] * (1 - 0.1 * 0.5) - 0.1 * grad[2, 4] / squares[2, 1].sqrt()
    torch.testing.assert_close(params[oracle.VALUES][2, 4], expected)
    assert torch.equal(params[oracle.VALUES][[1, 3]], start[[1, 3]])
    assert not state.accumulator[oracle.VALUES][[1, 3]].any()


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e9])
def test_joint_clip_limits_the_norm_of_all_gradients_together(limit: float) -> None:
    dense, table = {"a": normal(3, 4)}, {oracle.VALUES: normal(6, 2)}
    optim = oracle.OptimConfig(1e-2, clip_grad=limit, memory_clip_grad=1e-3, joint_clip=True)
    clipped, dense_norm, table_norm = oracle.clip_all(dense, table, {oracle.VALUES: oracle.MemoryShape()}, optim)
    before = math.hypot(dense_norm.item(), table_norm.item())
    after = oracle.global_norm(clipped).item()
    assert after == pytest.approx(min(before, limit or math.inf), rel=1e-5)
    torch.testing.assert_close(
        clipped[oracle.VALUES] / table[oracle.VALUES],
        torch.full((6, 2), after / before).to(clipped[oracle.VALUES].dtype),
        rtol=1e-5,
        atol=0,
    )


def test_update_refuses_unknown_optimizer() -> None:
    with pytest.raises(ValueError, match="row_adam"):
        oracle.update({}, {}, [], oracle.OptimState(), oracle.OptimConfig(1e-2), "row_sgd")
