"""What DeepSpeed's own loaders find in a universal checkpoint, compared with the checkpoint that it was made of.

    python deepspeed_load.py CASE SOURCE UNIVERSAL      prints what differs as a JSON list, and what was compared

A process of its own: deepspeed changes torch as it is imported, and its engine wants a process group.
"""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mempar.runtime.checkpoint.manifest import WEIGHTS
from mempar.runtime.checkpoint.names import stored_name
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.convert.deepspeed import DeepSpeedSource
from universal_cases import whole

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1


class Truth:
    """What the source says of a parameter's states."""

    def __init__(self, root: Path) -> None:
        self.source = CheckpointSource(root)
        self.parameters = {name: record for name, record in self.source.tensors.items() if record.kind == WEIGHTS}

    def tensor(self, name: str) -> Tensor | None:
        return whole(self.source, name) if name in self.source.tensors else None

    def state(self, parameter: str, state: str) -> Tensor | None:
        """In float32: `fp32`, which is the copy that is stepped, `exp_avg` or `exp_avg_sq`."""
        table = f"{parameter}.{'master' if state == 'fp32' else state}"
        dense = f"optimizer.state.{'param' if state == 'fp32' else state}.{parameter}"
        if state == "fp32" and table not in self.source.tensors:
            dense = stored_name(dense, self.source.tensors)
        found = self.tensor(table if table in self.source.tensors else dense)
        return None if found is None else found.float()


class Model(nn.Module):
    """Parameters of the names and shapes that a checkpoint holds; their gradients are what they are told to be."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__()
        for name, record in parameters.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(torch.full(record.shape, 0.5)))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return torch.stack(
            [(param * wanted[name].to(param.dtype)).sum() for name, param in self.named_parameters()]
        ).sum()


def same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def engine(truth: Truth, root: Path, *, stage: int, bf16: bool) -> list[str]:
    """Load into an engine and compare everything; in float32 also step once, as torch's AdamW would, and come back."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    # Its collectives over shared memory would be compiled, with the compiler that is or is not there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = Model(truth.parameters)
    named = dict(model.named_parameters())
    # Parameters of one group must have the same states.
    groups: dict[bool, list[nn.Parameter]] = {}
    for name, param in named.items():
        groups.setdefault(truth.state(name, "exp_avg") is not None, []).append(param)
    optimizer = torch.optim.AdamW(
        [{"params": params} for params in groups.values()], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY
    )
    settings = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        # Off: DeepSpeed clips at a norm of 1 unless it is told otherwise.
        "gradient_clipping": 0.0,
        "checkpoint": {"load_universal": True},
        "bf16": {"enabled": bf16},
    }
    loaded, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    loaded.load_checkpoint(str(root))
    differing = []
    for name, param in named.items():
        if not same(safe_get_full_fp32_param(param), truth.state(name, "fp32")):
            differing.append(f"{name} fp32")
        if stage < 3 and not same(param.detach(), truth.tensor(name)):
            differing.append(f"{name} weights")
        for state in ("exp_avg", "exp_avg_sq"):
            expected = truth.state(name, state)
            if expected is not None and not same(safe_get_full_optimizer_state(param, state), expected):
                differing.append(f"{name} {state}")
    if loaded.global_steps != truth.source.progress["step"]:
        differing.append("step")
    return differing if bf16 else [*differing, *step_once(truth, loaded, named), *come_back(root, loaded, named)]


def step_once(truth: Truth, loaded: Any, named: dict[str, nn.Parameter]) -> list[str]:
    """Let the engine and torch's AdamW take the same step from the same state."""
    from deepspeed.utils import safe_get_full_fp32_param

    wanted = {name: torch.randn(param.shape) for name, param in named.items()}
    loss = loaded(wanted)
    loaded.backward(loss)
    loaded.step()
    differing = []
    for name, param in named.items():
        alone = nn.Parameter(truth.state(name, "fp32"))
        alone.grad = wanted[name]
        optimizer = torch.optim.AdamW([alone], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
        optimizer.state[alone] = {
            "step": torch.tensor(float(truth.source.progress["applied_steps"])),
            **{state: truth.state(name, state) for state in ("exp_avg", "exp_avg_sq")},
        }
        optimizer.step()
        # Both compute alike in float32, in another order.
        if not torch.allclose(safe_get_full_fp32_param(param), alone.detach(), rtol=1e-6, atol=1e-7):
            differing.append(f"{name} after a step")
    return differing


def come_back(root: Path, loaded: Any, named: dict[str, nn.Parameter]) -> list[str]:
    """Save as DeepSpeed does, make that universal with its converter, and read it with the folder of ours."""
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    first, after = root / (root / "latest_universal").read_text(), Path("after").absolute()
    info = torch.load(first / "mp_rank_00_model_states.pt", weights_only=True)["universal_checkpoint_info"]
    loaded.module.universal_checkpoint_info = info
    loaded.save_checkpoint(str(after), tag="saved")
    folders = ["--input_folder", str(after / "saved"), "--output_folder", str(after / "universal")]
    sys.argv = ["ds_to_universal", *folders, "--num_extract_workers", "1", "--num_merge_workers", "1"]
    with contextlib.redirect_stdout(sys.stderr):
        ds_to_universal.main(ds_to_universal.parse_arguments())
    shutil.copytree(first / "mempar", after / "universal" / "mempar")
    source = DeepSpeedSource(after)
    differing = [] if source.progress["applied_steps"] == 3 else [f"after {source.progress}"]
    for name, param in named.items():
        found = {"fp32": name} | {
            state: f"{name}.{state}" if f"{name}.{state}" in source.tensors else f"optimizer.state.{state}.{name}"
            for state in ("exp_avg", "exp_avg_sq")
        }
        for state, tensor in found.items():
            expected = (
                safe_get_full_optimizer_state(param, state) if state != "fp32" else safe_get_full_fp32_param(param)
            )
            if not same(whole(source, tensor), expected):
                differing.append(f"{tensor} after coming back")
    return differing


def shares(truth: Truth, root: Path, *, tp: int, ep: int) -> list[str]:
    """Load each tensor-parallel rank's share of every state with DeepSpeed's function, and compare it with ours."""
    from deepspeed.checkpoint.universal_checkpoint import load_hp_checkpoint_state
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    folder = root / (root / "latest_universal").read_text()
    differing = []
    for name in truth.parameters:
        for tp_rank, ep_rank in ((tp_rank, ep_rank) for tp_rank in range(tp) for ep_rank in range(ep)):
            expected = {
                state: share_of(name, all_of_it, tp, tp_rank, ep, ep_rank)
                for state in ("fp32", "exp_avg", "exp_avg_sq")
                if (all_of_it := truth.state(name, state)) is not None
            }
            param = nn.Parameter(torch.zeros_like(expected["fp32"]))
            flat = torch.full((param.numel(),), float("nan"))
            all_numbers = fragment_address(numel=param.numel(), start=0)
            param._hp_mapping = tensor_fragment(param, all_numbers, flat, all_numbers, {}, {}, False, 0)
            step = load_hp_checkpoint_state(
                param, str(folder / "zero" / name), tp_rank, tp, ep_rank=ep_rank, ep_size=ep
            )
            found = {"fp32": flat, **param._hp_mapping.optim_fragment}
            if found.keys() != expected.keys() or step != truth.source.progress["applied_steps"]:
                differing.append(f"{name} has {sorted(found)} at step {step}")
            differing += [f"{name} {key}" for key in expected if not same(found[key].view(param.shape), expected[key])]
    return differing


def share_of(name: str, tensor: Tensor, tp: int, tp_rank: int, ep: int, ep_rank: int) -> Tensor:
    """A rank's share, as megatron cuts parameters."""
    dim, halves = 0, 1
    if ".experts." in name:
        tensor = tensor.chunk(ep, 0)[ep_rank]
        dim = 1
    if name.endswith((".linear_proj.weight", ".linear_fc2.weight")):
        dim += 1
    elif name.endswith(".linear_fc1.weight"):
        halves = 2
    elif not name.endswith(("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight")):
        return tensor
    return torch.cat([half.chunk(tp, dim)[tp_rank] for half in tensor.chunk(halves, dim)], dim)


CASES = {
    "stage1": lambda truth, root: engine(truth, root, stage=1, bf16=False),
    "stage2-bf16": lambda truth, root: engine(truth, root, stage=2, bf16=True),
    "stage3-bf16": lambda truth, root: engine(truth, root, stage=3, bf16=True),
    "whole": lambda truth, root: shares(truth, root, tp=1, ep=1),
    "tp2": lambda truth, root: shares(truth, root, tp=2, ep=1),
    "tp2-ep2": lambda truth, root: shares(truth, root, tp=2, ep=2),
}


if __name__ == "__main__":
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    outcomes = {}
    for case, source, universal in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=True):
        truth = Truth(Path(source))
        outcomes[f"{case} of {Path(source).name}"] = [len(truth.parameters), CASES[case](truth, Path(universal))]
    print(json.dumps(outcomes))
