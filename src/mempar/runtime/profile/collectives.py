"""Marks around the collectives that megatron calls: torch.distributed's functions are replaced for the steps recorded.

Megatron calls them as attributes of `torch.distributed`, or under names that its modules took at import; both are
replaced, and put back. Collectives inside one of ours are ours, and are not marked twice; groups of one rank send
nothing. An asynchronous call ends where megatron waits for it. Calls that are coalesced end together, as one call.
What megatron never waits for, as some last sends of an interleaved pipeline, is recorded without a time of its own.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mempar.marks import Call, Marks

# Of each function the argument that is the message, and what its calls are called.
_CALLS = {
    "all_reduce": ("tensor", "all_reduce"),
    "all_gather": ("tensor_list", "all_gather"),
    "all_gather_into_tensor": ("output_tensor", "all_gather"),
    "_all_gather_base": ("output_tensor", "all_gather"),
    "reduce_scatter": ("input_list", "reduce_scatter"),
    "reduce_scatter_tensor": ("input", "reduce_scatter"),
    "_reduce_scatter_base": ("input", "reduce_scatter"),
    "all_to_all_single": ("input", "all_to_all"),
    "all_to_all": ("input_tensor_list", "all_to_all"),
    "broadcast": ("tensor", "broadcast"),
    "reduce": ("tensor", "reduce"),
    "isend": ("tensor", "send"),
    "irecv": ("tensor", "receive"),
    "send": ("tensor", "send"),
    "recv": ("tensor", "receive"),
}
_BETWEEN_STAGES = ("send", "receive")


class WatchedCollectives:
    """Marks the collectives of one rank while it is entered."""

    def __init__(self, marks: Marks, group_names: Mapping[int, str]) -> None:
        """Look for what is to be replaced; nothing is yet.

        Args:
            marks: of this rank.
            group_names: of process groups by their `id`; others are called `other`.
        """
        self.marks, self._names = marks, group_names
        self._coalesced: list[tuple[str, str, int]] | None = None
        # Calls that go on, in their order; no handles, which would keep tensors.
        self.open: dict[Call, None] = {}
        functions: dict[str, Any] = {name: self._marked(name) for name in _CALLS if hasattr(dist, name)}
        functions["P2POp"] = _unwrapping(dist.P2POp)
        functions["batch_isend_irecv"] = self._batch
        functions["_coalescing_manager"] = self._coalescing
        replaced = {id(getattr(dist, name)): new for name, new in functions.items()}
        holders = [module for name, module in sys.modules.items() if name.startswith("megatron.core.")]
        self._places = [
            (module, name, value, replaced[id(value)])
            for module in (dist, *holders)
            for name, value in list(vars(module).items())
            if id(value) in replaced
        ]
        self._original_batch, self._original_coalescing = dist.batch_isend_irecv, dist._coalescing_manager

    def __enter__(self) -> "WatchedCollectives":
        for module, name, _, new in self._places:
            setattr(module, name, new)
        return self

    def __exit__(self, *raised: object) -> None:
        for module, name, original, _ in self._places:
            setattr(module, name, original)
        for call in self.open:
            call.end_unseen()
        self.open.clear()

    def _marked(self, function: str) -> Callable[..., Any]:
        """The function, with marks."""
        original = getattr(dist, function)
        message, kind = _CALLS[function]
        places = {name: place for place, name in enumerate(inspect.signature(original).parameters)}

        def call(*args: Any, **kwargs: Any) -> Any:
            def given(name: str) -> Any:
                return args[places[name]] if places[name] < len(args) else kwargs.get(name)

            name = "" if self.marks.in_collective else self._name(given("group"))
            if name and kind in _BETWEEN_STAGES:
                # Megatron sends over the world's group too, so that two stages can send both ways at once.
                name = "pp"
            if not name:
                return original(*args, **kwargs)
            num_bytes = _num_bytes(given(message))
            if self._coalesced is not None:
                self._coalesced.append((f"{kind}/{name}", name, num_bytes))
                return original(*args, **kwargs)
            mark = self.marks.call(f"{kind}/{name}", name, num_bytes, num_bytes).begin()
            since = self.marks.clock.now()
            handle = original(*args, **kwargs)
            if handle is not None:
                return _Handle(handle, [mark], self)
            mark.end(since)
            return None

        call.original = original  # type: ignore[attr-defined]
        return call

    def _batch(self, operations: list[Any]) -> list[Any]:
        """`batch_isend_irecv` with marks."""
        marks, kinds = [], []
        for operation in operations:
            kind, num_bytes = _CALLS[operation.op.__name__][1], _num_bytes(operation.tensor)
            marks.append(self.marks.call(f"{kind}/pp", "pp", num_bytes, num_bytes).begin())
            kinds.append(kind)
        handles = self._original_batch(operations)
        if len(handles) == len(marks):
            return [_Handle(handle, [mark], self) for handle, mark in zip(handles, marks, strict=True)]
        # NCCL coalesces them into one, whose wait is that for what is received, if anything is.
        ordered = [marks[place] for place in sorted(range(len(marks)), key=lambda place: kinds[place] != "receive")]
        return [_Handle(handles[0], ordered, self), *handles[1:]] if handles else handles

    @contextmanager
    def _coalescing(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """`_coalescing_manager` with one mark for all calls inside it."""
        self._coalesced, clock = [], self.marks.clock
        begun = clock.now()
        manager = _Handle(None, [], self)
        try:
            with self._original_coalescing(*args, **kwargs) as handle:
                manager.handle = handle
                yield manager
                begun = clock.now()
        finally:
            calls, self._coalesced = self._coalesced, None
        if not calls:
            return
        phase, name, _ = calls[0]
        num_bytes = sum(each for *_, each in calls)
        mark = self.marks.call(phase, name, num_bytes, num_bytes).begin(begun)
        if kwargs.get("async_ops"):
            manager.add(mark)
        else:
            mark.end(begun)

    def _name(self, group: Any) -> str:
        """Name of a process group; empty for one of this rank alone."""
        if dist.get_world_size(group) == 1:
            return ""
        return self._names.get(id(group), "other" if group is not None else "world")


class _Handle:
    """Torch's handle of asynchronous calls, whose wait is marked: it counts once, as that of the first of them."""

    def __init__(self, handle: Any, marks: list[Call], owner: WatchedCollectives) -> None:
        self.handle, self.marks, self._owner = handle, [], owner
        for mark in marks:
            self.add(mark)

    def add(self, mark: Call) -> None:
        """Let a mark end with the wait."""
        self.marks.append(mark)
        self._owner.open[mark] = None

    def wait(self, *args: Any) -> Any:
        """Wait as torch does."""
        clock = self._owner.marks.clock
        since = clock.now()
        result = self.handle.wait(*args)
        over = clock.now()
        ended, self.marks = self.marks, []
        for place, mark in enumerate(ended):
            # Otherwise the recorded step was over before.
            if mark in self._owner.open:
                del self._owner.open[mark]
                mark.end(since if place == 0 else over, at=over)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)


def _unwrapping(make: Any) -> Callable[..., Any]:
    """`P2POp`, which takes torch's own functions alone."""

    def operation(op: Any, *args: Any, **kwargs: Any) -> Any:
        return make(getattr(op, "original", op), *args, **kwargs)

    return operation


def _num_bytes(message: Tensor | list[Tensor] | None) -> int:
    if message is None:
        return 0
    if isinstance(message, Tensor):
        return message.numel() * message.element_size()
    return sum(_num_bytes(each) for each in message)
