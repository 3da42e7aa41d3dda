"""The options of `mempar doctor`; imports nothing heavy until it runs."""

from pathlib import Path
from typing import Annotated

import typer

from mempar.tools.options import Hostfile, Profile


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
