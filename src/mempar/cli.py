"""The command line: `mempar --help`.

Commands import what they need when they run, so that help answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mempar import __version__
from mempar.errors import ConfigError, MemparError
from mempar.tools.plan.options import plan

app = typer.Typer(
    name="mempar",
    help="Pretrain language models with memory layers, on megatron-core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What several commands take.
Recipe = Annotated[str, typer.Argument(help="A recipe's name, a YAML file, or module:function.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. train.steps=100.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out, in this layout.")]
StartFrom = Annotated[Path | None, typer.Option("--from", help="Start a new run from a checkpoint of any layout.")]
Out = Annotated[
    Path | None, typer.Option(help="Directory of the run.  \\[default: runs/NAME-TIME]", show_default=False)
]
Nodes = Annotated[
    int | None, typer.Option(help="How many.  \\[default: what the recipe is laid out for]", show_default=False)
]
Port = Annotated[
    int | None, typer.Option(help="Where nodes meet on the first one; a free one by default.", show_default=False)
]
Hostfile = Annotated[Path | None, typer.Option(help="With --on ssh: lines of `HOST slots=N`.", show_default=False)]
Profile = Annotated[
    Path | None, typer.Option(help="What the cluster needs to know of itself, in YAML.", show_default=False)
]
# Flags that come before a launch profile's values.
Partition = Annotated[str | None, typer.Option(help="Of SLURM, before the profile's.", show_default=False)]
Account = Annotated[str | None, typer.Option(help="Of SLURM, before the profile's.", show_default=False)]
TimeLimit = Annotated[str | None, typer.Option(help="Of an allocation, e.g. 24:00:00.", show_default=False)]
Image = Annotated[str | None, typer.Option(help="Of a container, in which pyxis runs the ranks.", show_default=False)]
Modules = Annotated[list[str] | None, typer.Option(help="To load on every node; again for more.")]
Variables = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For all processes; again for more.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mempar {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pretrain language models with memory layers, on megatron-core."""


@app.command()
def train(
    recipe: Recipe,
    assignments: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(help="Ranks on this machine.  \\[default: pp * lcm(tp*cp, mp)]", show_default=False)
    ] = None,
    out: Out = None,
    resume: Resume = False,
    start_from: StartFrom = None,
) -> None:
    """Train a recipe on this machine. SIGTERM or ^C lets it save and end; a second ^C ends it at once."""
    from mempar.tools import train_command

    train_command.train(
        recipe,
        assignments or [],
        num_ranks=nproc,
        out=out,
        resume=resume,
        start_from=start_from,
        say=typer.echo,
    )


@app.command()
def launch(
    recipe: Recipe,
    assignments: Overrides = None,
    place: Annotated[str, typer.Option("--on", help="local, ssh or slurm.")] = "local",
    nodes: Nodes = None,
    nproc_per_node: Annotated[
        int | None, typer.Option(help="Ranks on each.  \\[default: its GPUs, or slots]", show_default=False)
    ] = None,
    hostfile: Hostfile = None,
    profile: Profile = None,
    partition: Partition = None,
    account: Account = None,
    time: TimeLimit = None,
    container_image: Image = None,
    module: Modules = None,
    env: Variables = None,
    max_restarts: Annotated[
        int, typer.Option(help="After failures, from the last good checkpoint; under SLURM, of the job.")
    ] = 0,
    port: Port = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be started, and write nothing.")] = False,
    out: Out = None,
    resume: Resume = False,
    start_from: StartFrom = None,
) -> None:
    """Start a recipe on this machine, on hosts over ssh, or as a SLURM job.

    SIGTERM or ^C lets a run on this machine or over ssh save and end, as `scancel --signal=TERM JOB` does a job.
    """
    from mempar.tools.launch.command import Request
    from mempar.tools.launch.command import launch as launch_run
    from mempar.tools.launch.places import given_flags
    from mempar.tools.launch.profile import LaunchProfile, with_flags
    from mempar.tools.launch.profile_file import read_profile

    of_slurm = {"partition": partition, "account": account, "time": time, "container_image": container_image}
    request = Request(
        recipe=recipe,
        assignments=tuple(assignments or ()),
        place=place,
        profile=with_flags(
            read_profile(profile) if profile else LaunchProfile(), **of_slurm, modules=module or (), env=env or ()
        ),
        flags=given_flags(**of_slurm, module=module, env=env, port=port),
        nodes=nodes,
        per_node=nproc_per_node,
        hostfile=hostfile,
        max_restarts=max_restarts,
        port=port,
        dry_run=dry_run,
        out=out,
        resume=resume,
        start_from=start_from,
    )
    launch_run(request, typer.echo)


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoints/step_XXXXXXXX directory.")],
    other: Annotated[Path | None, typer.Argument(help="Another one, of any layout, to compare it with.")] = None,
) -> None:
    """Check that a checkpoint is whole, or that two hold the same weights and optimizer state.

    Ends with status 1 when something is damaged or the two differ.
    """
    from mempar.tools.verify import verify as verify_checkpoint

    verify_checkpoint(checkpoint, other, typer.echo)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A checkpoints/step_XXXXXXXX directory, a Hugging Face model, or a DeepSpeed universal checkpoint.",
            show_default=False,
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.", show_default=False)],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="The layout, e.g. tp=2 mp=8 mp_rows=4; 1 where nothing is said. memory.KEY=VALUE adds memory layers "
            "to a model without any.",
        ),
    ] = None,
    form: Annotated[str, typer.Option("--to", help="mempar, hf or deepspeed.")] = "mempar",
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave the optimizers' state out; training begins anew.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Cast weights to float32, bf16 or float64, with --weights-only.", show_default=False)
    ] = "",
    max_memory: Annotated[str, typer.Option(help="That all workers together may take.")] = "4GiB",
    workers: Annotated[
        int | None, typer.Option(help="Jobs at a time; two a core by default.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a conversion that was interrupted.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> None:
    """Turn a checkpoint into what another layout's ranks would have saved, or into another format and back.

    The optimizers' state comes along, but to Hugging Face, which has no place for it.

    It takes one machine, no GPU, and no more memory than is given; DST is there when it is whole.
    """
    from mempar.tools.convert import command

    command.convert(
        source,
        destination,
        assignments or [],
        form=form,
        weights_only=weights_only,
        dtype=dtype,
        max_memory=max_memory,
        workers=workers,
        resume=resume,
        dry_run=dry_run,
        say=typer.echo,
    )


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files, or directories of files: text, JSON lines (.jsonl, .json, .ndjson) or Parquet, plain or .gz, "
            ".bz2, .xz, .zst.",
            show_default=False,
        ),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="byte, hf:PATH_OR_NAME, sentencepiece:FILE or tiktoken:NAME_OR_FILE, as in data.tokenizer.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="PREFIX", help="Writes PREFIX.bin, PREFIX.idx and PREFIX.json.", show_default=False)
    ],
    workers: Annotated[
        int | None, typer.Option(help="Processes that encode; one a core by default.", show_default=False)
    ] = None,
    documents: Annotated[
        str, typer.Option(help="A document of a text file is the whole file, a line or a paragraph.")
    ] = "file",
    field: Annotated[str, typer.Option(help="Key of JSON lines, or column of Parquet, that holds the text.")] = "text",
    form: Annotated[
        str | None, typer.Option("--format", help="text, jsonl or parquet; by the names of the files by default.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave documents out that are no text, and count them.")
    ] = False,
) -> None:
    """Turn text into the .bin/.idx files that data.paths name.

    Documents keep their order, each closed by the tokenizer's end-of-document token.

    Call an interrupted command again to go on where it stopped.
    """
    from mempar.tools.prepare import command

    command.prepare(
        inputs,
        tokenizer=tokenizer,
        out=out,
        workers=workers,
        form=form,
        unit=documents,
        field=field,
        skip_bad=skip_bad,
        say=typer.echo,
    )


@app.command()
def profile(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name, a YAML file, or module:function.", show_default=False)
    ] = None,
    assignments: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(help="Ranks on this machine.  \\[default: pp * lcm(tp*cp, mp)]", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(help="To measure, after one to warm up.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Directory to make.", show_default=False)] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A B", help="Compare two profiles instead: directories, or report.json.", show_default=False
        ),
    ] = None,
) -> None:
    """Train a few steps with marks on, and say where the time went and what was sent.

    Writes report.json (every phase of every layer, step and rank: bytes predicted and measured, time, bandwidth,
    waiting), trace.json for ui.perfetto.dev and report.html, a page with plots, into --out.
    """
    if diff is not None:
        if recipe is not None or out is not None or nproc is not None:
            raise ConfigError(
                "--diff compares two profiles that are there; it stands without RECIPE, --nproc or --out; drop them."
            )
        from mempar.tools.profile.compare import compare

        compare(*diff, typer.echo)
        return
    if recipe is None:
        raise ConfigError("nothing to profile: a RECIPE, or --diff A B, is needed; `mempar recipes` lists recipes.")
    from mempar.tools.profile import command

    command.profile(recipe, assignments or [], num_ranks=nproc, num_steps=steps, out=out, say=typer.echo)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe's resolved config.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="List the tiny twins too, which train on a CPU: NAME_tiny.")
    ] = False,
) -> None:
    """List the recipes with sizes, GPUs and layouts, or print one with every setting."""
    from mempar.tools import recipe_list

    typer.echo(recipe_list.show(name, as_json=as_json, tiny=tiny))


app.command()(plan)


@app.command()
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe to look for: a name, a YAML file, or module:function.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. train.save_interval=100.")
    ] = None,
    place: Annotated[str, typer.Option("--on", help="local, ssh or slurm.")] = "local",
    nodes: Annotated[
        int | None,
        typer.Option(help="How many.  \\[default: all hosts, the allocation's, the recipe's]", show_default=False),
    ] = None,
    hostfile: Hostfile = None,
    profile: Profile = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run.  \\[default: runs]", show_default=False)
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(help="Ranks of a node to try out.  \\[default: slots, one a GPU, or two]", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look for what would stop a run on this machine, or on the nodes of a launch, or slow it down; say what to do.

    Versions, devices, network, disk, limits, clocks, and collectives tried out, on all nodes together; with --on slurm
    inside an allocation or in one of its own. Ends with status 1 when a run would fail.
    """
    from mempar.tools.doctor import command
    from mempar.tools.launch.profile import LaunchProfile
    from mempar.tools.launch.profile_file import read_profile

    request = command.Request(
        recipe=recipe,
        assignments=tuple(assignments or ()),
        place=place,
        profile=read_profile(profile) if profile else LaunchProfile(),
        nodes=nodes,
        hostfile=hostfile,
        out=out,
        num_ranks=nproc,
        as_json=as_json,
    )
    raise typer.Exit(command.doctor(request, typer.echo))


def main() -> None:
    """Run the command line; bad input ends with one message and status 2."""
    try:
        app()
    except MemparError as error:
        typer.echo(f"mempar: {error}", err=True)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        typer.echo("mempar: interrupted", err=True)
        sys.exit(130)
