"""megatron-core 0.16 on machines without CUDA: its CUDA entry points, pointed at the CPU.

megatron-core names CUDA in a handful of places where it means "the device" (allocating buffers,
reading the random state, comparing type names). With these replaced, its schedules, parallel layers,
optimizers and checkpoints run over gloo unchanged. Where CUDA is present nothing is touched.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = ("empty", "zeros", "ones", "tensor", "full", "arange", "empty_like", "zeros_like")


class _Stream:
    """A stream on a device that runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or torch.cpu.Event()


def install(megatron_random: Any) -> bool:
    """Apply the cure, once a process.

    Args:
        megatron_random: megatron's module of random states. It is imported before this is called:
            megatron pulls in torch._dynamo, which indexes torch.cuda's functions at import and refuses
            to see one object under two names.

    Returns:
        Whether this process runs on the CPU.
    """
    if torch.cuda.is_available():
        return False
    _point_cuda_at_cpu()
    # `with torch.device(...)` knows factories by identity, from the first time it is used on: it must know these.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)  # pyright: ignore[reportAttributeAccessIssue]
    # Its own setter defers through torch.cuda._lazy_call, which never runs without CUDA.
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # Forking the random state warns when the CPU generator advances; here that one is meant.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    return True


def _point_cuda_at_cpu() -> None:
    cuda: Any = torch.cuda
    # megatron passes the result as `device=`.
    cuda.current_device = lambda: _CPU
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.Stream, cuda.Event = _Stream, torch.cpu.Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = lambda device=None: _Stream()
    cuda.default_stream = lambda device=None: _Stream()
    # The "CUDA" generator is the CPU's.
    cuda.manual_seed = torch.default_generator.manual_seed
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        # Optimizers compare type names with 'torch.cuda.FloatTensor' and the like.
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_name


def mend_router(moe_utils: Any) -> None:
    """Let the router of experts run without TransformerEngine: in 0.16.1 it names a function that only that defines.

    Args:
        moe_utils: megatron's module of this name.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def mend_experts(token_dispatcher: Any, mappings: Any) -> None:
    """Let mixture-of-experts blocks run without CUDA.

    In 0.16.1 numbers of tokens that go to the host as lists do so only from a CUDA tensor; and under tensor
    parallelism ranks gather and reduce uneven numbers of tokens, which gloo refuses.

    Args:
        token_dispatcher: megatron's module of this name.
        mappings: megatron's module of the collectives of tensor parallelism.
    """

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(
        part: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(part, group, output_split_sizes, use_global_buffer)
        whole = part.new_empty((sum(output_split_sizes), *part.shape[1:]))
        to_all = torch.cat([part] * group.size())
        dist.all_to_all_single(whole, to_all, output_split_sizes, [len(part)] * group.size(), group=group)
        return whole

    def reduce_scatter_uneven(
        whole: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(whole, group, input_split_sizes, use_global_buffer)
        size, mine = group.size(), input_split_sizes[group.rank()]
        parts = whole.new_empty((size * mine, *whole.shape[1:]))
        dist.all_to_all_single(parts, whole.contiguous(), [mine] * size, input_split_sizes, group=group)
        # In rank order, on every rank.
        return functools.reduce(torch.add, parts.split(mine)) if mine else parts

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven


def make_moments(optimizer: Any) -> None:
    """Give parameters that were never stepped the state of step 0, which torch's Adam makes in its first step.

    Without it a checkpoint written before any step was applied would lack tensors that loading asks for.

    Args:
        optimizer: of torch; any but Adam is left alone.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        return
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        if not optimizer.state[param]:
            optimizer.state[param] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }


def mend_distributed_adam(optimizer_class: Any) -> None:
    """Let the distributed optimizer save and load torch's AdamW, which megatron uses without TE or apex.

    In 0.16.1 its moments do not exist before the first step although a checkpoint is laid out from
    them, its `step` is not among the tensors being set, and after loading one `step` tensor is shared
    by all parameters, so that each of them would advance it. Where it has no parameters (the experts'
    on a stage without experts) it cannot be described at all.

    Args:
        optimizer_class: megatron's DistributedOptimizer.
    """
    set_states = optimizer_class._set_main_param_and_optimizer_states
    sharded_state_dict, state_dict = optimizer_class.sharded_state_dict, optimizer_class.state_dict

    @torch.no_grad()
    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        if not isinstance(self.optimizer, torch.optim.Adam):
            set_states(self, model_param, tensors)
            return
        group, position = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][position]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"], **tensors}
        set_states(self, model_param, tensors)

    def sharded_state_dict_with_moments(self: Any, *args: Any, **kwargs: Any) -> Any:
        make_moments(self.optimizer)
        return sharded_state_dict(self, *args, **kwargs)

    def state_dict_without_params(self: Any) -> dict[str, Any]:
        if any(group["params"] for group in self.optimizer.param_groups):
            return state_dict(self)
        groups = [{**group, "step": 0.0} for group in self.optimizer.state_dict()["param_groups"]]
        for group in groups:
            del group["params"]
        return {"optimizer": {"param_groups": groups}}

    optimizer_class.state_dict = state_dict_without_params
    optimizer_class._set_main_param_and_optimizer_states = set_states_with_step
    optimizer_class.sharded_state_dict = sharded_state_dict_with_moments
