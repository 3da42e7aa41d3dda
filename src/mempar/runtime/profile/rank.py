"""One rank of a profile: `python -m mempar.runtime.profile.rank DIR`, started as a rank of a training run is.

It trains the run in DIR/config.yaml for a few steps and records all but the first, whose time is that of allocating
and, on a GPU, of compiling. Nothing is saved but the recording.
"""

import dataclasses
import json
from pathlib import Path

from mempar.errors import MemparError
from mempar.runtime.launch.heartbeat import Heartbeat, Phase
from mempar.runtime.launch.stopping import Stopping
from mempar.runtime.launch.worker import leave, main
from mempar.runtime.run_dir import RunDir

# Says how many steps are wanted.
REQUEST = "profile.json"
WARM_UP_STEPS = 1


def profile_rank(
    paths: RunDir, load: Path | None, launched: float, stopping: Stopping, heartbeat: Heartbeat, *, go_on: bool = False
) -> None:
    """Record steps of the run that lies in a directory, on this rank; see `run_rank`.

    Raises:
        MemparError: when it was asked to stop before it was through.
    """
    import torch
    import torch.distributed as dist

    from mempar.runtime import bringup
    from mempar.runtime.data.samples import Samples, micro_batches
    from mempar.runtime.data.tokenizer import vocab_size
    from mempar.runtime.model import build_model
    from mempar.runtime.optim import Optimizers
    from mempar.runtime.overrides import load_yaml
    from mempar.runtime.profile.recorder import Recorder
    from mempar.runtime.schedule import lr_factors
    from mempar.runtime.step import Stepper

    run, num_steps = load_yaml(paths.config), json.loads((paths.root / REQUEST).read_text())["steps"]
    stopping.limit(launched, run.train.time_limit_minutes)
    bringup.join_world(run.train.collective_timeout)
    heartbeat.identify(dist.get_rank())
    world = bringup.lay_out(run)
    grid, device = world.placement.grid, world.device
    model = build_model(run, world, vocab_size(run))
    stepper = Stepper(run, world, model, Optimizers(run, world, model), stopping, heartbeat)
    samples = Samples(run, run.data.paths, run.data.weights, run.train.seed)
    recorder = Recorder(world, model)
    for step in range(WARM_UP_STEPS + num_steps):
        heartbeat.mark(Phase.DATA, step + 1)
        count = run.train.global_batch_size
        batches = micro_batches(
            samples, run, step * count, count=count, dp_rank=grid.dp_rank(world.rank), dp=grid.dp, device=device
        )
        heartbeat.mark(Phase.FORWARD_BACKWARD, step + 1)
        factors = lr_factors(run, step)
        if step < WARM_UP_STEPS:
            stepper.train(batches, factors)
        else:
            with recorder.step(step + 1):
                stepper.train(batches, factors)
        if stopping.agreed:
            raise MemparError(f"the profile was ended by {stopping.agreed}; nothing is left of it; start it again.")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    ceiling = [dataclasses.asdict(point) for point in recorder.ceiling()]
    dataclasses.replace(recorder.take(), device=name, ceiling=ceiling).save(paths.root)
    heartbeat.mark(Phase.ENDING, WARM_UP_STEPS + num_steps)
    bringup.tear_down(world)
    dist.destroy_process_group()


if __name__ == "__main__":
    leave(main(profile_rank))
