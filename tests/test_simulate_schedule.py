"""The simulator's order of passes and messages, against megatron's own in runs of the pool, and by closed forms."""

from typing import Any
from unittest.mock import patch

import pytest

from mempar.tools.simulate.schedule import Instruction, Pass, Post, Wait, instructions_of
from rank_pool import RankPool
from toy import Session, toy_run

# (pp, vpp, micro-batches): few and many micro-batches, interleaved and not.
CASES = [(2, 1, 1), (2, 1, 4), (4, 1, 3), (2, 2, 2), (2, 2, 4), (4, 1, 6)]
KINDS = {"tensor_send_next": "send_next", "tensor_send_prev": "send_prev"}


class _Told:
    """A request that notes when it is waited for."""

    def __init__(self, request: Any, wait: Wait, seen: list[Instruction]) -> None:
        self.request, self.noted, self.seen = request, wait, seen

    def wait(self) -> None:
        self.seen.append(self.noted)
        self.request.wait()


class Recorder:
    """Stands in for megatron's passes and messages, and notes them."""

    def __init__(self) -> None:
        self.seen: list[Instruction] = []
        self.outputs: list[tuple[Any, int, int]] = []
        self.posted: dict[str, int] = {}

    def forward_step(self, real: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            chunk, micro_batch = kwargs.get("vp_stage") or 0, kwargs["current_microbatch"]
            self.seen.append(Pass(True, chunk, micro_batch))
            result = real(*args, **kwargs)
            self.outputs.append((result[0], chunk, micro_batch))
            return result

        return step

    def backward_step(self, real: Any) -> Any:
        def step(input_tensor: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
            ((chunk, micro_batch),) = [found[1:] for found in self.outputs if found[0] is output]
            self.seen.append(Pass(False, chunk, micro_batch))
            return real(input_tensor, output, *args, **kwargs)

        return step

    def communicate(self, real: Any) -> Any:
        def call(communicator: Any, **kwargs: Any) -> Any:
            kinds: list[Any] = [name for name in ("recv_prev", "recv_next") if kwargs[name]]
            kinds += [kind for name, kind in KINDS.items() if kwargs[name] is not None]
            waits = {}
            for kind in kinds:
                number = self.posted.get(kind, 0)
                self.posted[kind] = number + 1
                self.seen.append(Post(kind, number))
                waits[kind] = Wait(kind, number)
            *received, requests = real(communicator, **kwargs)
            if kwargs.get("wait_on_reqs", True):
                self.seen += waits.values()
            else:
                requests = {kind: _Told(request, waits[kind], self.seen) for kind, request in requests.items()}
            return *received, requests

        return call


def recorded_step(pp: int, vpp: int, micro_batches: int) -> list[Instruction]:
    """One training step of a toy on this rank: what its stage did, in order."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    session = Session(toy_run(pp=pp, vpp=vpp, kind="dense", micro_batches=micro_batches))
    recorder = Recorder()
    with (
        patch.object(schedules, "forward_step", recorder.forward_step(schedules.forward_step)),
        patch.object(schedules, "backward_step", recorder.backward_step(schedules.backward_step)),
        patch.object(P2PCommunicator, "_communicate", recorder.communicate(P2PCommunicator._communicate)),
    ):
        session.step(0)
    return recorder.seen


def canonical(instructions: list[Instruction]) -> list[Any]:
    """The same with messages that are posted, or waited for, one after the other in alphabetical order."""
    found: list[tuple[type, list[Any]]] = []
    for instruction in instructions:
        if isinstance(instruction, Pass) or not found or found[-1][0] is not type(instruction):
            found.append((type(instruction), []))
        found[-1][1].append(instruction)
    return [sorted(group, key=repr) for _, group in found]


@pytest.mark.parametrize(("pp", "vpp", "micro_batches"), CASES)
def test_order_is_that_of_the_engine(pool: RankPool, pp: int, vpp: int, micro_batches: int):
    seen = pool.run(pp, recorded_step, pp, vpp, micro_batches)
    for stage in range(pp):
        expected = instructions_of(stage, pp=pp, vpp=vpp, num_micro_batches=micro_batches)
        assert canonical(seen[stage]) == canonical(expected)


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (3, 1), (8, 1), (2, 2), (2, 5), (4, 2), (4, 3), (8, 4)])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_every_pass_runs_once_and_messages_meet(pp: int, vpp: int, rounds: int):
    count = rounds * pp
    stages = [instructions_of(stage, pp=pp, vpp=vpp, num_micro_batches=count) for stage in range(pp)]
    for instructions in stages:
        passes = [step for step in instructions if isinstance(step, Pass)]
        assert len(set(passes)) == len(passes) == 2 * vpp * count
        # A message that is received is waited for; one that is sent may be left to itself at the end.
        posts = {(step.kind, step.number) for step in instructions if isinstance(step, Post)}
        waits = {(step.kind, step.number) for step in instructions if isinstance(step, Wait)}
        assert waits <= posts
        assert all(kind.startswith("send") for kind, _ in posts - waits)

    def posted(stage: int, kind: str) -> int:
        return sum(isinstance(step, Post) and step.kind == kind for step in stages[stage])

    for stage in range(pp):
        after = (stage + 1) % pp
        if pp > 1:
            assert posted(stage, "send_next") == posted(after, "recv_prev")
            assert posted(after, "send_prev") == posted(stage, "recv_next")
