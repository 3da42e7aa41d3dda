"""What a run of a study knows, from step to step: asked while it trains, written down row by row, and as a result."""

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from mempar.errors import MemparError
from mempar.runtime.config import RunConfig
from mempar.runtime.data.encoders import load_encoder
from mempar.runtime.data.tokenizer import parse_spec, vocab_size
from mempar.runtime.durable import replace_file
from mempar.runtime.inference.forward import Forward
from mempar.runtime.metrics import read_rows
from mempar.runtime.optim import StepReport
from mempar.runtime.size import model_size
from mempar.runtime.train import Trainer
from mempar.tools.study.accuracy import Recall, ask
from mempar.tools.study.clock import Clock
from mempar.tools.study.corpus import Asked, encode, load_asked
from mempar.tools.study.facts import KINDS


class Examination:
    """Asks the model of a trainer for facts."""

    def __init__(self, trainer: Trainer, entrant: dict[str, Any], curve: Path, clock: Clock) -> None:
        """Prepare the questions.

        Args:
            trainer: of the run.
            entrant: which model it is, where its questions are and how often they are asked.
            curve: the file that grows by a row at each evaluation; rows behind the trainer's step are cut off.
            clock: of the run.
        """
        self.trainer, self.entrant, self._curve, self._clock = trainer, entrant, curve, clock
        run = trainer.run
        self.asked = load_asked(Path(entrant["corpus"]))
        encoder = load_encoder(parse_spec(run.data.tokenizer))
        self.questions = encode(encoder, self.asked)
        # The same facts at every evaluation of every run.
        places = list(range(len(self.asked)))
        random.Random(0).shuffle(places)
        self.some = sorted(places[: entrant["asked"]])
        self.forward = Forward(trainer.model, run, trainer.world, vocab_size(run))
        self.rows = _rows_until(curve, trainer.progress.step)
        replace_file(curve, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        # Those of the interval in which a run was interrupted count in it.
        since = self.rows[-1]["step"] if self.rows else 0
        # Of steps whose loss is not finite, which change nothing, there is none: here as in `after_step`.
        metrics = read_rows(trainer.directory.metrics)
        self._losses = [row["loss"] for row in metrics if row["step"] > since and row.get("loss") is not None]
        clock.go_on()

    def after_step(self, report: StepReport) -> None:
        """Note a training step's loss, and ask if it is time to.

        Raises:
            MemparError: when no loss since the last time is finite, or that of the answers is not.
        """
        if math.isfinite(report.loss):
            self._losses.append(report.loss)
        self._clock.note(self.trainer.progress.step)
        step, last = self.trainer.progress.step, self.trainer.run.train.steps
        if step == last or step % self.entrant["evaluation_interval"] == 0:
            self._examine(step, whole=step == last)

    def _examine(self, step: int, *, whole: bool) -> None:
        places = range(len(self.asked)) if whole else self.some
        recall = ask(self.forward, [self.questions[place] for place in places])
        if not self._losses or not math.isfinite(recall.loss):
            whose = "of the answers" if self._losses else "of every step since the last evaluation"
            raise MemparError(
                f"{self.trainer.run.name} has come to nothing: at step {step} the loss {whose} is not finite; a result "
                "is made of finite losses; study with a lower lr, lr_of or values_lr."
            )
        row = {
            "step": step,
            "accuracy": recall.accuracy,
            "answer_loss": recall.loss,
            "loss": statistics.fmean(self._losses),
            "seconds": self._clock.seconds,
            "cpu_seconds": self._clock.cpu_seconds,
            **self._coverage(),
        }
        if whole:
            row["by_kind"] = _by_kind([self.asked[place] for place in places], recall)
        self.rows.append(row)
        with self._curve.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self._losses = []
        self._clock.go_on()

    def _coverage(self) -> dict[str, float]:
        """Shares of the slots that were read since the last evaluation, and since the beginning."""
        interval = self.entrant["evaluation_interval"]
        return {
            name: share
            for history in self.trainer.optimizers.histories.values()
            for name, share in (
                ("coverage", history.rows_read_in(interval) / len(history.last_read)),
                ("coverage_ever", 1 - history.rows_never_read() / len(history.last_read)),
            )
        }

    def write_result(self, path: Path) -> None:
        """Write what the run came to."""
        run, last = self.trainer.run, self.rows[-1]
        size = model_size(run, vocab_size(run))
        result = {
            "variant": self.entrant["variant"],
            "slots": self.entrant["slots"],
            "seed": run.train.seed,
            "params": size.total_params,
            "table_params": size.memory_params,
            "flops_per_token": size.flops_per_token,
            "steps": last["step"],
            "tokens": self.trainer.progress.tokens,
            "skipped": self.trainer.progress.skipped,
            **{name: value for name, value in last.items() if name != "step"},
            "device": self.trainer.world.device.type,
            "model": _model(run),
            "curve": self.rows,
        }
        replace_file(path, (json.dumps(result, allow_nan=False) + "\n").encode())


def _model(run: RunConfig) -> dict[str, Any]:
    """How the run builds and trains its model, where models of a study differ; see `results.Model`."""
    figures: dict[str, Any] = {"ffn_hidden_size": run.model.ffn_hidden_size, "lr": run.optim.lr}
    if run.moe.num_experts:
        figures |= {"experts": run.moe.num_experts, "experts_of_a_token": run.moe.top_k}
        figures["ffn_hidden_size"] = run.expert_ffn_hidden_size
    if run.memory.enabled:
        figures["memory_layers"] = list(run.memory.layers)
        figures |= {"tables": len(run.memory.table_names), "table_slots": run.memory.num_slots}
        figures["values_lr"] = run.values_lr_of(run.memory)
    return figures


def _by_kind(asked: list[Asked], recall: Recall) -> dict[str, float]:
    kinds = np.array([one.fact.kind for one in asked])
    return {kind: float(recall.right[kinds == kind].mean()) for kind in KINDS if (kinds == kind).any()}


def _rows_until(curve: Path, step: int) -> list[dict[str, Any]]:
    return [row for row in read_rows(curve) if row["step"] <= step] if curve.exists() else []
