"""One run of a study: `python -m mempar.tools.study.one_run DIR`, a rank of training that is asked what it knows.

The directory is that of a training run, with `entrant.json` beside `config.yaml`. It is trained by the engine's own
loop; every so many steps the model is asked for facts, and what it knew goes into `curve.jsonl`; `times.jsonl` says
what each step took. At the end `result.json` is written. A run that was ended or killed goes on from its newest
checkpoint when it is started again.
"""

import json
from pathlib import Path

from mempar.runtime.launch.heartbeat import Heartbeat
from mempar.runtime.launch.stopping import Stopping
from mempar.runtime.launch.worker import leave, main
from mempar.runtime.run_dir import RunDir

ENTRANT, CURVE, TIMES, RESULT = "entrant.json", "curve.jsonl", "times.jsonl", "result.json"


def study_rank(
    paths: RunDir, load: Path | None, launched: float, stopping: Stopping, heartbeat: Heartbeat, *, go_on: bool = False
) -> None:
    """Train and examine the run that lies in a directory, in a world of its own; see `run_rank`."""
    import torch.distributed as dist

    from mempar.runtime import bringup

    bringup.join_world()
    heartbeat.identify(dist.get_rank())
    train_and_examine(paths, stopping, heartbeat)
    dist.destroy_process_group()


def train_and_examine(paths: RunDir, stopping: Stopping, heartbeat: Heartbeat) -> None:
    """Do the run that lies in a directory, or go on with it, on the world's one rank.

    Args:
        paths: of the run.
        stopping: what signals to this process ask for; a run that is stopped has no result.
        heartbeat: signs of life.

    Raises:
        MemparError: when losses are not finite any more.
    """
    from mempar.runtime import bringup
    from mempar.runtime.overrides import load_yaml
    from mempar.runtime.train import Trainer
    from mempar.tools.study.clock import Clock
    from mempar.tools.study.examination import Examination

    run = load_yaml(paths.config)
    world = bringup.lay_out(run)
    trainer = Trainer(run, world, paths, paths.latest_checkpoint(), stopping, heartbeat)
    clock = Clock(paths.root / TIMES, trainer.progress.step)
    examination = Examination(trainer, json.loads((paths.root / ENTRANT).read_text()), paths.root / CURVE, clock)
    trainer.after_step = examination.after_step
    trainer.train()
    if not stopping.agreed:
        examination.write_result(paths.root / RESULT)
    bringup.tear_down(world)


if __name__ == "__main__":
    leave(main(study_rank))
