# Copyright 2026 The mempar authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A Llama with memory layers or experts in some blocks; needs torch and transformers and nothing else.

    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

A memory layer reads a few hundred weighted rows of a table, chosen by product keys ("Memory Layers at Scale",
arXiv 2412.09764; with `peer` a slot is an expert of one neuron, arXiv 2407.04153). Tables may be larger than the memory
of the machine: they are no parameters of the model. They stay in their safetensors files, whose tensors
tables.safetensors.index.json lists, mapped into memory for reading alone, and the rows that are asked for are copied to
the device of whoever asks. So `.to(...)` and `.half()` move and cast everything but tables, and training this model
trains everything but tables. This file is copied into models that mempar exports.
"""

import bisect
import json
import math
import mmap
import os
import shutil
import struct
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import cached_file

TABLES_INDEX = "tables.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Keyword arguments of `from_pretrained` that say where files come from.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# Bytes of scores and of rows that a layer holds at a time: long prompts are looked up in parts.
_PART_BYTES = 1 << 27


class MemparConfig(LlamaConfig):
    """A Llama's settings, and what its blocks have in the place of feed-forward networks.

    Attributes:
        memories: each with `name`, `layers` (blocks that read it), `variant` (`memory`, `memory_plus` or `peer`),
            `beside` (the feed-forward network stays, and the outputs are added), `num_subkeys`, `heads`, `top_k`,
            `key_dim`, `value_dim`, `score_dtype`, `qk_norm`, `scalar_gate`.
        experts: `layers` whose feed-forward network is replaced by `num_experts` of width `intermediate_size`, of which
            each token is sent to `top_k`; None for none.
        mempar: what mempar needs to turn the model into a checkpoint of its own again.
    """

    model_type = "mempar"
    # Not annotated as fields, or newer versions of transformers would take them for typed fields.
    memories: ClassVar[Any] = ()
    experts: ClassVar[Any] = None
    mempar: ClassVar[Any] = None


@dataclass(frozen=True)
class _Rows:
    """Rows of a table in one file: from which on, how many, and where in the file."""

    path: str
    first: int
    shape: tuple
    dtype: torch.dtype
    start: int


class MappedTable:
    """A table `[slots, width]` in files that are mapped into memory for reading.

    A mapping that cannot be written to counts neither as memory of the process nor towards `ulimit -d`, and what was
    read is the first that the kernel drops when memory is short. Copies of a model share its tables.
    """

    def __init__(self, blocks: list[_Rows]) -> None:
        self.blocks = sorted(blocks, key=lambda rows: rows.first)
        self.width, self.dtype = self.blocks[0].shape[1], self.blocks[0].dtype
        self.num_slots = sum(rows.shape[0] for rows in blocks)
        whole = [rows.first for rows in self.blocks] == [0, *(rows.first + rows.shape[0] for rows in self.blocks[:-1])]
        if not whole or any((rows.shape[1], rows.dtype) != (self.width, self.dtype) for rows in blocks):
            raise ValueError(f"{self.blocks[0].path} and its like do not make up a table: rows are missing or unlike.")
        self._mapped: list[Tensor] = []

    def __deepcopy__(self, memo: dict) -> "MappedTable":
        return self

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_mapped": []}

    def gather(self, slots: Tensor) -> Tensor:
        """Rows `[U, width]` on the CPU of slots `[U] int64`, ascending."""
        out = torch.empty(len(slots), self.width, dtype=self.dtype)
        known = slots.tolist()
        for rows, values in zip(self.blocks, self.mapped(), strict=True):
            part = slice(bisect.bisect_left(known, rows.first), bisect.bisect_left(known, rows.first + rows.shape[0]))
            if part.start < part.stop:
                torch.index_select(values, 0, slots[part] - rows.first, out=out[part])
        return out

    def mapped(self) -> list[Tensor]:
        """The blocks as tensors that nobody may write to."""
        if not self._mapped:
            files = {path: _map_file(path) for path in {rows.path for rows in self.blocks}}
            self._mapped = [
                files[rows.path][rows.start : rows.start + math.prod(rows.shape) * rows.dtype.itemsize]
                .view(rows.dtype)
                .view(rows.shape)
                for rows in self.blocks
            ]
        return self._mapped


def _map_file(path: str) -> Tensor:
    with open(path, "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        # Rows are far apart: what the kernel would read ahead is not asked for.
        buffer.madvise(mmap.MADV_RANDOM)
    with warnings.catch_warnings():
        # That writing would be undefined; nobody does.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=torch.uint8)


def _blocks_of_file(path: str, firsts: dict[str, int]) -> dict[str, _Rows]:
    """Where a safetensors file holds tensors, given the first row of each by its name."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
        size = file.seek(0, os.SEEK_END)
    found = {}
    for name, first in firsts.items():
        shape, dtype = tuple(entries[name]["shape"]), _DTYPES[entries[name]["dtype"]]
        start, end = (8 + length + offset for offset in entries[name]["data_offsets"])
        if end > size or end - start != math.prod(shape) * dtype.itemsize or len(shape) != 2:
            raise ValueError(f"{path} is damaged: {name} does not fit into its {size} bytes; fetch it again.")
        found[name] = _Rows(path, first, shape, dtype, start)
    return found


def _partial(path: str) -> str:
    if os.path.lexists(partial := path + ".partial"):
        os.remove(partial)
    return partial


class MemoryLayer(nn.Module):
    """Product-key memory: takes `[..., C]` and returns the same shape."""

    def __init__(self, config: MemparConfig, memory: dict) -> None:
        super().__init__()
        self.memory = memory
        self.norm_epsilon = config.rms_norm_eps
        width, value_dim, half = config.hidden_size, memory["value_dim"], memory["key_dim"] // 2
        self.query = nn.Linear(width, memory["heads"] * memory["key_dim"])
        self.keys = nn.Parameter(torch.empty(memory["heads"], 2, memory["num_subkeys"], half))
        if memory["qk_norm"]:
            self.query_norm = nn.Parameter(torch.ones(half))
            self.key_norm = nn.Parameter(torch.ones(half))
        if memory["variant"] == "memory_plus":
            self.gate_proj = nn.Linear(width, value_dim)
            self.output_proj = nn.Linear(value_dim, width)
        if memory["scalar_gate"]:
            self.scalar_gate = nn.Linear(width, 1)
        # Set by `open_tables`: `values`, and `down` where slots are experts.
        self.tables: dict[str, MappedTable] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Read the memory."""
        if not self.tables:
            raise RuntimeError(
                f"the tables of {self.memory['name']} are not open: they are files, which from_pretrained opens; load "
                "the model with from_pretrained, or call open_tables with the directory that holds them."
            )
        flat = x.reshape(-1, x.shape[-1])
        return torch.cat([self._look_up(part) for part in flat.split(self._tokens_at_once())]).view(x.shape)

    def _tokens_at_once(self) -> int:
        memory, table = self.memory, self.tables["values"]
        scores = 2 * memory["heads"] * memory["num_subkeys"] * 8
        rows = memory["heads"] * memory["top_k"] * table.width * table.dtype.itemsize * (1 + len(self.tables))
        return max(1, _PART_BYTES // (scores + rows))

    def _look_up(self, x: Tensor) -> Tensor:
        slot, weight = self.choose(x)
        # Reads of a row by several tokens or heads are one.
        needed, place = torch.unique(slot.flatten(1), return_inverse=True)
        weight, needed = weight.flatten(1), needed.cpu()
        values = self.tables["values"].gather(needed).to(x.device)
        if "down" in self.tables:
            down = self.tables["down"].gather(needed).to(x.device)
            hidden = down[place] @ x.to(down.dtype)[..., None]
            weight = weight * F.gelu(hidden.squeeze(-1).to(weight.dtype))
        out = F.embedding_bag(place, values, per_sample_weights=weight.to(values.dtype), mode="sum").to(x.dtype)
        if self.memory["variant"] == "memory_plus":
            out = self.output_proj(out * F.silu(self.gate_proj(x)))
        if self.memory["scalar_gate"]:
            out = out * torch.sigmoid(self.scalar_gate(x))
        return out

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slots `[T, H, K] int64` of tokens `[T, C]`, best first, and their softmax weights, in float32 at least."""
        top_k, num_subkeys = self.memory["top_k"], self.memory["num_subkeys"]
        scores = self._half_scores(x)
        best, index = (part[..., :top_k] for part in scores.sort(dim=-1, descending=True, stable=True))
        # The pairs of ranks that K others do not precede in both halves.
        pairs = [(a, b) for a in range(top_k) for b in range(top_k) if (a + 1) * (b + 1) <= top_k]
        first, second = torch.tensor(pairs, device=x.device).T
        slot = index[:, :, 0][..., first] * num_subkeys + index[:, :, 1][..., second]
        score = best[:, :, 0][..., first] + best[:, :, 1][..., second]
        # Ties go to the lowest slot: the sort by score leaves equal ones in the order of slots.
        slot, order = slot.sort(dim=-1)
        score, order = score.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        return slot.gather(-1, order)[..., :top_k], score[..., :top_k].softmax(-1)

    def _half_scores(self, x: Tensor) -> Tensor:
        """Scores of all sub-keys of both halves, `[T, H, 2, N]`."""
        memory = self.memory
        query = self.query(x).view(len(x), memory["heads"], 2, self.keys.shape[-1])
        wide = torch.promote_types(query.dtype, torch.float32)
        keys, scale = self.keys, None
        if memory["qk_norm"]:
            # A query's norm is one factor, applied to its scores; the weights of both norms go to the keys.
            keys = F.rms_norm(keys.to(wide), keys.shape[-1:], self.key_norm.to(wide), self.norm_epsilon)
            keys = keys * self.query_norm.to(wide)
        narrow = memory["score_dtype"] == "bf16"
        if narrow:
            query, keys = query.bfloat16(), keys.bfloat16()
        if memory["qk_norm"]:
            scale = query.to(wide).square().mean(-1, keepdim=True).add(self.norm_epsilon).rsqrt()
        scores = torch.einsum("thcq,hcnq->thcn", query.to(wide), keys.to(wide))
        scores = scores if scale is None else scores * scale
        return scores.bfloat16().to(wide) if narrow else scores


class FeedForward(nn.Module):
    """SwiGLU of any width."""

    def __init__(self, config: MemparConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FeedForwardBesideMemory(FeedForward):
    """A feed-forward network with a memory layer beside it: the outputs are added."""

    def __init__(self, config: MemparConfig, memory: dict) -> None:
        super().__init__(config, config.intermediate_size)
        self.memory = MemoryLayer(config, memory)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to the same shape."""
        return super().forward(x) + self.memory(x)


class MemoryInPlace(nn.Module):
    """A memory layer where a feed-forward network would be."""

    def __init__(self, config: MemparConfig, memory: dict) -> None:
        super().__init__()
        self.memory = MemoryLayer(config, memory)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to the same shape."""
        return self.memory(x)


class Experts(nn.Module):
    """Token choice: each token goes to the experts whose logits are largest."""

    def __init__(self, config: MemparConfig) -> None:
        super().__init__()
        experts = config.experts
        self.top_k = experts["top_k"]
        self.router = nn.Linear(config.hidden_size, experts["num_experts"], bias=False)
        self.experts = nn.ModuleList(
            [FeedForward(config, experts["intermediate_size"]) for _ in range(experts["num_experts"])]
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to the same shape."""
        flat = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(flat.to(wide), self.router.weight.to(wide))
        best, chosen = logits.topk(self.top_k, dim=-1)
        # Of one expert the softmax over the chosen would be 1.
        weight = best.softmax(-1) if self.top_k > 1 else logits.softmax(-1).gather(-1, chosen)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, (weight[token, place, None] * expert(flat[token])).to(flat.dtype))
        return out.view(x.shape)


class MemparForCausalLM(LlamaForCausalLM):
    """See the module."""

    config_class = MemparConfig

    def __init__(self, config: MemparConfig) -> None:
        super().__init__(config)
        for memory in config.memories:
            for block in memory["layers"]:
                kind = FeedForwardBesideMemory if memory["beside"] else MemoryInPlace
                self.model.layers[block].mlp = kind(config, memory)
        for block in (config.experts or {"layers": ()})["layers"]:
            self.model.layers[block].mlp = Experts(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MemoryLayer) and not getattr(module.keys, "_is_hf_initialized", False):
            with torch.no_grad():
                module.keys.uniform_(-1, 1).mul_((2 * module.keys.shape[-1]) ** -0.5)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, and open the tables."""
        where = {name: kwargs[name] for name in _WHERE if kwargs.get(name) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None and model.config.memories:
            if getattr(model.config, "_commit_hash", None):
                where["revision"] = model.config._commit_hash
            model.open_tables(pretrained_model_name_or_path, **where)
        return loaded

    def open_tables(self, source: Any, **where: Any) -> None:
        """Find the tables and map them.

        Args:
            source: a directory, or a name on the hub.
            where: what `from_pretrained` takes to say where files come from.
        """
        index: Any = cached_file(source, TABLES_INDEX, **where)
        with open(index, encoding="utf-8") as file:
            places = json.load(file)["weight_map"]
        names: dict[str, dict[str, int]] = {}
        for name, file_name in places.items():
            if os.path.basename(file_name) != file_name:
                raise ValueError(f"{index} names the file {file_name!r}; tables lie beside their index.")
            names.setdefault(file_name, {})[name] = int(name.rpartition(".rows-")[2])
        blocks: dict[str, list[_Rows]] = {}
        for file_name, firsts in names.items():
            path: Any = cached_file(source, file_name, **where)
            for name, rows in _blocks_of_file(path, firsts).items():
                blocks.setdefault(name.rpartition(".rows-")[0], []).append(rows)
        tables = {name: MappedTable(rows) for name, rows in blocks.items()}
        for layer in self.memory_layers():
            layer.tables = self._tables_of(layer.memory, tables)

    def memory_layers(self) -> list[MemoryLayer]:
        """The memory layers of all blocks."""
        return [module for module in self.modules() if isinstance(module, MemoryLayer)]

    def _tables_of(self, memory: dict, tables: dict[str, MappedTable]) -> dict[str, MappedTable]:
        wanted = ("values", "down") if memory["variant"] == "peer" else ("values",)
        shape = (memory["num_subkeys"] ** 2, memory["value_dim"])
        for kind in wanted:
            table = tables.get(f"{memory['name']}.{kind}")
            held = None if table is None else (table.num_slots, table.width)
            if held != shape:
                raise ValueError(f"{memory['name']}.{kind} is {held} in {TABLES_INDEX}, but {shape} in config.json.")
        return {kind: tables[f"{memory['name']}.{kind}"] for kind in wanted}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, and copy the tables."""
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub=True would leave the tables out; save the model, then upload its directory.")
        super().save_pretrained(save_directory, *args, **kwargs)
        if not (args[0] if args else kwargs.get("is_main_process", True)):
            return
        layers = self.memory_layers()
        tables = {f"{layer.memory['name']}.{kind}": t for layer in layers for kind, t in layer.tables.items()}
        blocks = {f"{name}.rows-{rows.first:012d}": rows.path for name, t in tables.items() for rows in t.blocks}
        for path in sorted(set(blocks.values())):
            copy = os.path.join(save_directory, os.path.basename(path))
            if not (os.path.exists(copy) and os.path.samefile(path, copy)):
                # Whoever has mapped a file of this name keeps the old one.
                shutil.copyfile(path, partial := _partial(copy))
                os.replace(partial, copy)
        if blocks:
            index = os.path.join(save_directory, TABLES_INDEX)
            weight_map = {name: os.path.basename(path) for name, path in blocks.items()}
            with open(partial := _partial(index), "w", encoding="utf-8") as file:
                json.dump({"metadata": {}, "weight_map": weight_map}, file, indent=2)
            os.replace(partial, index)
