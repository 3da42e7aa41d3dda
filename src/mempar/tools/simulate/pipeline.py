"""Walks the stages of a pipeline through megatron's schedule on a timeline: passes, and messages between stages."""

from collections.abc import Callable

from mempar.tools.simulate.schedule import Instruction, Pass, Post, Wait, instructions_of
from mempar.tools.simulate.timeline import Timeline

PHASE = "send/pp"


def walk(
    timeline: Timeline,
    *,
    vpp: int,
    num_micro_batches: int,
    compute: Callable[[int, Pass], None],
    message_ps: Callable[[int, int], int],
) -> None:
    """Add the passes of a step to a timeline.

    Args:
        timeline: of as many stages as the pipeline has.
        vpp: chunks of each stage.
        num_micro_batches: of a step.
        compute: called with a stage and a pass, in the stage's order, to add what the pass does.
        message_ps: picoseconds of a message from one stage to another.
    """
    pp = timeline.num_stages
    left = [
        instructions_of(stage, pp=pp, vpp=vpp, num_micro_batches=num_micro_batches)[::-1] for stage in range(pp)
    ]  # fmt: skip
    while any(left):
        went_on = False
        for stage, instructions in enumerate(left):
            # A stage runs until it waits for what another stage has not come to yet.
            while instructions and _is_ready(timeline, stage, instructions[-1]):
                went_on = True
                _do(timeline, stage, instructions.pop(), compute, message_ps)
        assert went_on, "every stage waits for another one"


def _is_ready(timeline: Timeline, stage: int, instruction: Instruction) -> bool:
    return not isinstance(instruction, Wait) or timeline.has(_key(instruction, stage, timeline.num_stages))


def _do(
    timeline: Timeline,
    stage: int,
    instruction: Instruction,
    compute: Callable[[int, Pass], None],
    message_ps: Callable[[int, int], int],
) -> None:
    if isinstance(instruction, Pass):
        compute(stage, instruction)
        return
    key = _key(instruction, stage, timeline.num_stages)
    if isinstance(instruction, Post):
        timeline.post(stage, PHASE, key, message_ps(key[0], key[1]))
    else:
        timeline.wait(stage, key)


def _key(instruction: Post | Wait, stage: int, pp: int) -> tuple[int, int, bool, int]:
    """The message's link and number: sender, receiver, whether it goes forward (of two stages each is both)."""
    forward = instruction.kind in ("send_next", "recv_prev")
    other = (stage + (1 if instruction.kind.endswith("next") else -1)) % pp
    sends = instruction.kind.startswith("send")
    return (*((stage, other) if sends else (other, stage)), forward, instruction.number)
