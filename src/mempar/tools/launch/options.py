"""The options of `mempar launch`; imports nothing heavy until it runs."""

from typing import Annotated

import typer

from mempar.tools.options import Hostfile, Nodes, Out, Overrides, Port, Profile, Recipe, Resume, StartFrom

# Flags that come before a launch profile's values.
Partition = Annotated[str | None, typer.Option(help="Of SLURM, before the profile's.", show_default=False)]
Account = Annotated[str | None, typer.Option(help="Of SLURM, before the profile's.", show_default=False)]
TimeLimit = Annotated[str | None, typer.Option(help="Of an allocation, e.g. 24:00:00.", show_default=False)]
Image = Annotated[str | None, typer.Option(help="Of a container, in which pyxis runs the ranks.", show_default=False)]
Modules = Annotated[list[str] | None, typer.Option(help="To load on every node; again for more.")]
Variables = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For all processes; again for more.")]


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
