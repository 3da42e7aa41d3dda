"""The options of `mempar eval`; imports nothing heavy until it runs."""

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="A checkpoints/step_XXXXXXXX directory of any layout, or a run's directory for its newest.",
        show_default=False,
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="A,B",
        help="Tasks or groups of lm-evaluation-harness, or `published`: the paper's nine.",
        show_default=False,
    ),
]
TaskDir = Annotated[
    list[Path] | None,
    typer.Option(help="A directory with tasks of your own, in YAML; their functions are run.", show_default=False),
]
Data = Annotated[
    list[str] | None,
    typer.Option(metavar="PREFIX", help="Prepared data to measure the loss on; again for more.", show_default=False),
]
Samples = Annotated[
    int | None, typer.Option(help="Windows of each --data at the most, evenly over it.", show_default=False)
]
Limit = Annotated[
    float | None, typer.Option(help="Questions of each task: a number, or a share below 1.", show_default=False)
]
NumFewshot = Annotated[
    int | None, typer.Option(help="Examples in a prompt.  \\[default: the task's]", show_default=False)
]
BatchSize = Annotated[int | None, typer.Option(help="Sequences at a time.  \\[default: what fits]", show_default=False)]
Out = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write results and settings.", show_default=False)]


def evaluate(
    checkpoint: Checkpoint,
    tasks: Tasks = None,
    task_dir: TaskDir = None,
    data: Data = None,
    samples: Samples = None,
    limit: Limit = None,
    num_fewshot: NumFewshot = None,
    batch_size: BatchSize = None,
    nproc: Annotated[int, typer.Option(help="Processes that compute; one GPU each.")] = 1,
    tables: Annotated[str, typer.Option(help="memory, mapped (in their files), or auto: what fits.")] = "auto",
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run programs that the model writes (humaneval, mbpp).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of examples in prompts and of drawn continuations.")] = 1234,
    out: Out = None,
) -> None:
    """Evaluate a checkpoint: tasks of lm-evaluation-harness, loss and bits per byte of prepared data.

    Beside the results stand the published figures of models of the same size, where there are any.
    """
    from mempar.tools.evaluate.quiet import be_quiet

    be_quiet()
    from mempar.tools.evaluate import command
    from mempar.tools.evaluate.request import Request

    request = Request(
        checkpoint=checkpoint,
        tasks=tuple(tasks or ()),
        task_dir=tuple(task_dir or ()),
        data=tuple(data or ()),
        samples=samples,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        nproc=nproc,
        tables=tables,
        allow_code=allow_code,
        seed=seed,
        out=out,
    )
    command.evaluate(request, typer.echo)
