"""The truth: the whole model and its training step as a page of plain torch, on one process.

The engine in `src/mempar` must reproduce what this file computes (the oracle law). It is written for reading and
imports nothing from mempar; autograd makes every gradient, dense `[S, D]` table gradients included. It follows
"Memory Layers at Scale" (arXiv 2412.09764), section 3, on the transformer of megatron-core 0.16.1. Variants `memory`,
`memory_plus` and `peer` (arXiv 2407.04153); mixtures of experts with token
choice; no dropout.

Parameters are one flat `dict[str, Tensor]` under the names megatron-core uses on a single process. The arithmetic has
the parameters' dtype; norms, softmaxes and the loss have at least float32.

    B sequences   L positions   T = B*L tokens (token b*L + l)   V padded vocabulary   C model width   F FFN width
    A attention heads   G query groups   d = C/A head width
    H memory heads   N sub-keys per half   S = N*N slots   Q half-key width   K top-k   D value width
    E experts   J experts that a token is sent to   F_e width of an expert

    embedding.word_embeddings.weight  [V, C]      output_layer.weight  [V, C] (absent when tied)
    decoder.final_layernorm.weight    [C]         memory.values        [S, D] (shared by all layers of a memory)
                                                  memory.down          [S, C] peer only; memory1... are more memories
    decoder.layers.{l}.  (l is global, 0-based)
      input_layernorm.weight              [C]     pre_mlp_layernorm.weight           [C]
      self_attention.linear_qkv.weight    [G*(A/G+2)*d, C]: for each group A/G query heads, a key head, a value head
      self_attention.linear_proj.weight   [C, A*d]
      mlp.linear_fc1.weight               [2F, C]: gate half, then up half        mlp.linear_fc2.weight  [C, F]
    and in a memory layer, instead of the two linear_fc (or beside them, under mlp.memory.):
      mlp.query.weight, .bias             [H*2Q, C], [H*2Q]                       mlp.keys               [H, 2, N, Q]
      mlp.gate_proj.weight, .bias         [D, C], [D]      memory_plus only
      mlp.output_proj.weight, .bias       [C, D], [C]      memory_plus only
      mlp.query_norm.weight, mlp.key_norm.weight   [Q]     with qk_norm
      mlp.scalar_gate.weight, .bias       [1, C], [1]      with scalar_gate
    and in a block of experts
      mlp.router.weight                   [E, C]
      mlp.experts.{e}.linear_fc1.weight   [2F_e, C]        mlp.experts.{e}.linear_fc2.weight   [C, F_e]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

VALUES = "memory.values"
Params = dict[str, Tensor]
# The slots each token chose, or must choose: {memory layer: [B, L, H, K] int64}.
Slots = dict[int, Tensor]
# tokens, labels and loss mask, each [B, L].
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class MemoryShape:
    """One memory: layers that share tables `{name}.values`, and with `peer` also `{name}.down`."""

    name: str = "memory"
    memory_layers: tuple[int, ...] = ()
    variant: str = "memory_plus"
    beside: bool = False
    num_subkeys: int = 0
    heads: int = 0
    top_k: int = 0
    qk_norm: bool = False
    scalar_gate: bool = False


@dataclass(frozen=True, kw_only=True)
class OracleConfig(MemoryShape):
    """The model; its own memory settings are those of the first memory."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    more_memories: tuple[MemoryShape, ...] = ()
    moe_layers: tuple[int, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    balance_loss: float = 0.0

    def memory_of(self, layer: int) -> MemoryShape | None:
        """The memory that a block reads."""
        return next((memory for memory in (self, *self.more_memories) if layer in memory.memory_layers), None)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = at_least_float32(x)
    return (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight).to(x.dtype)


def rotate(x: Tensor, base: float) -> Tensor:
    """Turns x [B, L, heads, d] by its position; dim j pairs with dim j + d/2, angles are float32 as in megatron."""
    length, width = x.shape[1], x.shape[3]
    inv_freq = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32, device=x.device) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=x.device), inv_freq)
    # [L, 1, d/2]: the same for all heads
    cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query [B, L, A, d], key and value [B, L, G, d] -> [B, L, A, d]; query head a reads group a // (A/G)."""
    length, heads_per_group = query.shape[1], query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(heads_per_group, dim=2), value.repeat_interleave(heads_per_group, dim=2)
    score = torch.einsum("bqad,bkad->baqk", query, key) / math.sqrt(query.shape[3])
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    weight = at_least_float32(score).masked_fill(future, -math.inf).softmax(-1).to(value.dtype)
    return torch.einsum("baqk,bkad->bqad", weight, value)


def attention_layer(params: Params, prefix: str, x: Tensor, config: OracleConfig) -> Tensor:
    """x [B, L, C] -> [B, L, C]."""
    groups = config.num_query_groups
    width = config.hidden_size // config.num_attention_heads
    heads_per_group = config.num_attention_heads // groups
    qkv = F.linear(x, params[f"{prefix}.linear_qkv.weight"]).unflatten(-1, (groups, heads_per_group + 2, width))
    # [B, L, A, d], [B, L, G, d], [B, L, G, d]
    query, key, value = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
    out = causal_attention(rotate(query, config.rotary_base), rotate(key, config.rotary_base), value)
    return F.linear(out.flatten(2), params[f"{prefix}.linear_proj.weight"])


def feed_forward(params: Params, prefix: str, x: Tensor) -> Tensor:
    gate, up = F.linear(x, params[f"{prefix}.linear_fc1.weight"]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, params[f"{prefix}.linear_fc2.weight"])


def slot_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Scores every slot i1*N + i2 as s1[i1] + s2[i2]: query [T, H, 2, Q], keys [H, 2, N, Q] -> [T, H, N*N]."""
    half = torch.einsum("thcq,hcnq->thcn", query, keys)
    return (half[:, :, 0, :, None] + half[:, :, 1, None, :]).flatten(2)


def product_key_topk(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of all N*N slots, score descending then slot ascending: slot [T, H, K] int64, score [T, H, K]."""
    # The sort is stable and the slots enter it in ascending order, so equal scores stay in that order.
    score, slot = slot_scores(query, keys).sort(dim=-1, descending=True, stable=True)
    return slot[..., :k], score[..., :k]


def memory_layer(
    params: Params,
    prefix: str,
    x: Tensor,
    config: MemoryShape,
    replay: Tensor | None = None,
    norm_epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """x [T, C] -> out [T, C], slots [T, H, K]; with `replay` [T, H, K] these slots are read instead of the best."""
    keys, values = params[f"{prefix}.keys"], params[f"{config.name}.values"]
    query = F.linear(x, params[f"{prefix}.query.weight"], params[f"{prefix}.query.bias"])
    query = query.unflatten(-1, (config.heads, 2, -1))
    if config.qk_norm:
        query = rms_norm(query, params[f"{prefix}.query_norm.weight"], norm_epsilon)
        keys = rms_norm(keys, params[f"{prefix}.key_norm.weight"], norm_epsilon)
    if replay is None:
        slot, score = product_key_topk(query, keys, config.top_k)
    else:
        slot, score = replay, slot_scores(query, keys).gather(-1, replay)
    # A softmax for each head, so that the weights of a token sum to H; the heads are summed, not concatenated.
    weight = at_least_float32(score).softmax(-1)
    if config.variant == "peer":
        # Slot s is an expert of one neuron, gelu(u_s . x) v_s.
        down = params[f"{config.name}.down"]
        weight = weight * F.gelu(torch.einsum("thkc,tc->thk", down[slot].to(weight.dtype), x.to(weight.dtype)))
    out = torch.einsum("thk,thkd->td", weight, values[slot].to(weight.dtype)).to(x.dtype)
    if config.variant == "memory_plus":
        gate = F.silu(F.linear(x, params[f"{prefix}.gate_proj.weight"], params[f"{prefix}.gate_proj.bias"]))
        out = F.linear(out * gate, params[f"{prefix}.output_proj.weight"], params[f"{prefix}.output_proj.bias"])
    if config.scalar_gate:
        scalar = F.linear(x, params[f"{prefix}.scalar_gate.weight"], params[f"{prefix}.scalar_gate.bias"])
        out = out * scalar.sigmoid()
    return out, slot


def mixture_of_experts(params: Params, prefix: str, x: Tensor, config: OracleConfig) -> tuple[Tensor, Tensor]:
    """x [T, C] -> out [T, C] and the balance loss [], as megatron's router has it by default.

    Every token goes to the J experts of the largest logits. They are weighed by the softmax over these J logits; with
    J = 1, where that would be 1, by the softmax over all.
    """
    logits = F.linear(at_least_float32(x), at_least_float32(params[f"{prefix}.router.weight"]))
    probability = logits.softmax(-1)
    # [T, J]
    best, expert = logits.topk(config.experts_per_token, dim=-1)
    weight = best.softmax(-1) if config.experts_per_token > 1 else probability.gather(-1, expert)
    out = torch.zeros_like(x)
    for number in range(config.num_experts):
        token, place = (expert == number).nonzero(as_tuple=True)
        done = feed_forward(params, f"{prefix}.experts.{number}", x[token])
        out = out.index_add(0, token, (weight[token, place, None] * done).to(x.dtype))
    # E times the sum over experts of the share of choices and the mean probability (arXiv 2101.03961): 1 when equal.
    share = F.one_hot(expert, config.num_experts).to(probability.dtype).sum(1).mean(0) / config.experts_per_token
    return out, config.num_experts * (share * probability.mean(0)).sum()


def forward(
    params: Params,
    tokens: Tensor,
    config: OracleConfig,
    replay: Slots | None = None,
    balance: list[Tensor] | None = None,
) -> tuple[Tensor, Slots]:
    """tokens [B, L] -> logits [B, L, V] and the slots of each memory layer [B, L, H, K].

    The balance loss of each block of experts is appended to `balance`.
    """
    x = params["embedding.word_embeddings.weight"][tokens]
    slots: Slots = {}
    for layer in range(config.num_layers):
        prefix = f"decoder.layers.{layer}"
        normed = rms_norm(x, params[f"{prefix}.input_layernorm.weight"], config.norm_epsilon)
        x = x + attention_layer(params, f"{prefix}.self_attention", normed, config)
        normed = rms_norm(x, params[f"{prefix}.pre_mlp_layernorm.weight"], config.norm_epsilon)
        memory = config.memory_of(layer)
        if layer in config.moe_layers:
            out, unequal = mixture_of_experts(params, f"{prefix}.mlp", normed.flatten(0, 1), config)
            x = x + out.unflatten(0, tokens.shape)
            if balance is not None:
                balance.append(unequal)
        elif memory is None or memory.beside:
            x = x + feed_forward(params, f"{prefix}.mlp", normed)
        if memory is not None:
            chosen = None if replay is None else replay[layer].flatten(0, 1)
            place = f"{prefix}.mlp.memory" if memory.beside else f"{prefix}.mlp"
            out, slot = memory_layer(params, place, normed.flatten(0, 1), memory, chosen, config.norm_epsilon)
            x = x + out.unflatten(0, tokens.shape)
            slots[layer] = slot.unflatten(0, tokens.shape)
    x = rms_norm(x, params["decoder.final_layernorm.weight"], config.norm_epsilon)
    output = "embedding.word_embeddings.weight" if config.tie_embeddings else "output_layer.weight"
    return F.linear(x, params[output]), slots


def loss(
    params: Params,
    tokens: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    config: OracleConfig,
    replay: Slots | None = None,
    num_tokens: Tensor | None = None,
    balance: list[Tensor] | None = None,
) -> tuple[Tensor, Slots]:
    """The masked token losses' sum over `num_tokens`: the unmasked tokens of the global batch, by default of this one.

    labels are the tokens to predict, already shifted. The padded columns of the vocabulary take part in the softmax.
    """
    logits, slots = forward(params, tokens, config, replay, balance)
    token_loss = F.cross_entropy(at_least_float32(logits).flatten(0, 1), labels.flatten(), reduction="none")
    num_tokens = loss_mask.sum() if num_tokens is None else num_tokens
    return (token_loss * loss_mask.flatten()).sum() / num_tokens.clamp(min=1), slots


def gradients(
    params: Params, batches: Sequence[Batch], config: OracleConfig, replay: Sequence[Slots] | None = None
) -> tuple[Tensor, Params, list[Slots]]:
    """Loss, gradient of every parameter, and the slots of each micro-batch, for the global batch `batches`.

    The balance loss is in the gradients but not in the loss. As in megatron, each micro-batch weighs in it by all its
    tokens, masked ones too.
    """
    leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
    num_tokens = torch.stack([loss_mask.sum() for _, _, loss_mask in batches]).sum()
    parts, slots, unequal = [], [], torch.zeros(())
    for index, batch in enumerate(batches):
        balance: list[Tensor] = []
        part, chosen = loss(leaves, *batch, config, None if replay is None else replay[index], num_tokens, balance)
        unequal = unequal + sum(balance) * batch[0].numel() / num_tokens
        parts.append(part)
        slots.append(chosen)
    total = torch.stack(parts).sum()
    grads = torch.autograd.grad(total + config.balance_loss * unequal, list(leaves.values()))
    return total.detach(), dict(zip(leaves, grads, strict=True)), slots


@dataclass(frozen=True)
class OptimConfig:
    """AdamW's settings; a clip of 0 is off. A schedule passes another `lr` and `memory_lr` to each step."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    memory_lr: float = 1e-3
    memory_weight_decay: float = 0.1
    memory_clip_grad: float = 1.0
    # One norm and the limit `clip_grad` for dense and table gradients together.
    joint_clip: bool = False
    # Columns of the table that share one statistic of row_adagrad.
    column_tile: int = 128


@dataclass
class OptimState:
    """The number of steps done, and what optimizers keep for each parameter, zero until its first step.

    Adam keeps two moments of the parameter's shape, row_adagrad one number `[S, ceil(D / column_tile)]`.
    """

    step: int = 0
    first: Params = field(default_factory=dict)
    second: Params = field(default_factory=dict)
    accumulator: Params = field(default_factory=dict)


def global_norm(grads: Params) -> Tensor:
    return sum((at_least_float32(grad).square().sum() for grad in grads.values()), torch.zeros(())).sqrt()


def clip(grads: Params, norm: Tensor, max_norm: float) -> Params:
    coefficient = max_norm / (norm + 1e-6)
    if max_norm > 0 and coefficient < 1:
        return {name: grad * coefficient for name, grad in grads.items()}
    return grads


def adamw(
    param: Tensor, grad: Tensor, first: Tensor, second: Tensor, lr: float, decay: float, optim: OptimConfig, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The next param, first and second moment. The decay is decoupled; `step` counts from 1 and corrects the bias."""
    beta1, beta2 = optim.betas
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad.square()
    direction = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + optim.eps)
    return param - lr * decay * param - lr * direction, first, second


def row_adagrad(
    param: Tensor, grad: Tensor, accumulator: Tensor, lr: float, decay: float, optim: OptimConfig
) -> tuple[Tensor, Tensor]:
    """The next param [S, D] and accumulator [S, tiles]: each tile of columns adds the mean square of its gradients."""
    tiles = list(zip(param.split(optim.column_tile, 1), grad.split(optim.column_tile, 1), strict=True))
    accumulator = accumulator + torch.stack([part.square().mean(1) for _, part in tiles], 1)
    moved = [
        values - lr * decay * values - lr * part / (accumulator[:, [tile]].sqrt() + optim.eps)
        for tile, (values, part) in enumerate(tiles)
    ]
    return torch.cat(moved, 1), accumulator


def clip_all(
    dense: Params, tables: Params, memory_of: dict[str, MemoryShape], optim: OptimConfig
) -> tuple[Params, Tensor, Tensor]:
    """All gradients, clipped, and the unclipped norms of the dense ones and of the tables'."""
    dense_norm, table_norm = global_norm(dense), global_norm(tables)
    if optim.joint_clip:
        joint = torch.sqrt(dense_norm.square() + table_norm.square())
        return clip(dense | tables, joint, optim.clip_grad), dense_norm, table_norm
    clipped = dict(clip(dense, dense_norm, optim.clip_grad))
    for memory in dict.fromkeys(memory_of.values()):
        own = {name: grad for name, grad in tables.items() if memory_of[name] is memory}
        clipped |= clip(own, global_norm(own), optim.memory_clip_grad)
    return clipped, dense_norm, table_norm


@torch.no_grad()
def update(
    params: Params,
    grads: Params,
    slots: Sequence[Slots],
    state: OptimState,
    optim: OptimConfig,
    memory_optimizer: str,
    memories: Sequence[MemoryShape] = (MemoryShape(memory_layers=(0,)),),
) -> tuple[Tensor, Tensor]:
    """Clips and applies the gradients, in place; returns the norms of the dense ones and of the tables', unclipped.

    Each memory is clipped by the norm of its own tables, or all with the dense gradients by one joint norm. `adamw`
    updates whole tables. `row_adam` and `row_adagrad` update the rows that any token chose in this step, masked tokens
    too, and change neither the values nor the state of the others; Adam's bias correction counts all steps.
    """
    if memory_optimizer not in ("adamw", "row_adam", "row_adagrad"):
        raise ValueError(f"memory_optimizer={memory_optimizer!r} is not known; use 'adamw', 'row_adam', 'row_adagrad'.")
    state.step += 1
    memory_of = {
        f"{memory.name}.{table}": memory for memory in memories for table in ("values", "down") if memory.memory_layers
    }
    dense = {name: grad for name, grad in grads.items() if name not in memory_of}
    tables = {name: grad for name, grad in grads.items() if name in memory_of}
    clipped, dense_norm, table_norm = clip_all(dense, tables, memory_of, optim)

    for name, grad in clipped.items():
        param, rows, lr, decay = params[name], slice(None), optim.lr, optim.weight_decay
        if param.dim() == 1:
            # As in megatron, norms and biases do not decay.
            decay = 0.0
        if name in memory_of:
            lr, decay = optim.memory_lr, optim.memory_weight_decay
            if memory_optimizer != "adamw":
                layers = memory_of[name].memory_layers
                rows = torch.cat([batch[layer].flatten() for batch in slots for layer in layers]).unique()
        if name in memory_of and memory_optimizer == "row_adagrad":
            num_tiles = math.ceil(grad.shape[1] / optim.column_tile)
            old = [param, state.accumulator.setdefault(name, grad.new_zeros(len(grad), num_tiles))]
            new = row_adagrad(param, grad, old[1], lr, decay, optim)
        else:
            old = [param, *(moment.setdefault(name, torch.zeros_like(grad)) for moment in (state.first, state.second))]
            new = adamw(param, grad, old[1], old[2], lr, decay, optim, state.step)
        for before, after in zip(old, new, strict=True):
            before[rows] = after[rows]
    return dense_norm, table_norm


def step(
    params: Params,
    state: OptimState,
    batches: Sequence[Batch],
    config: OracleConfig,
    optim: OptimConfig,
    memory_optimizer: str = "adamw",
    replay: Sequence[Slots] | None = None,
) -> dict:
    """One training step on the global batch `batches`; changes params and state in place.

    Returns:
        loss, grad_norm, memory_grad_norm: floats, the norms before clipping; slots: for each micro-batch the slots of
        each memory layer, which another run can take as `replay`.
    """
    total, grads, slots = gradients(params, batches, config, replay)
    memories = (config, *config.more_memories)
    grad_norm, memory_grad_norm = update(params, grads, slots, state, optim, memory_optimizer, memories)
    norms = {"grad_norm": grad_norm.item(), "memory_grad_norm": memory_grad_norm.item()}
    return {"loss": total.item(), **norms, "slots": slots}
