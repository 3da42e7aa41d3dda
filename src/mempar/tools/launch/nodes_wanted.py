"""How many nodes a launch takes, and how many ranks on each, where the command line leaves that open."""

from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig


def nodes_wanted(run: RunConfig, *, nodes: int | None, per_node: int | None, at_most: int | None) -> tuple[int, int]:
    """Settle the numbers of nodes and of ranks on each.

    Args:
        run: what is launched; its GPUs, or the fewest ranks of its layout, are what it is meant for.
        nodes: as asked for; None takes as many as its ranks need.
        per_node: as asked for; None fills nodes of the run's kind of GPU, or shares the ranks out.
        at_most: nodes that there are; None for any number.

    Returns:
        Nodes, and ranks on each.

    Raises:
        ConfigError: for numbers that cannot be, or that do not go round.
    """
    for name, value in (("--nodes", nodes), ("--nproc-per-node", per_node)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1; a run has a rank on every node; raise it.")
    if at_most is not None and nodes is not None and nodes > at_most:
        raise ConfigError(
            f"--nodes {nodes} with --on local: this machine is {at_most} node; use --on ssh or --on slurm for more, or "
            "leave --nodes out."
        )
    ranks, kind = run.num_gpus, run.hardware.kind
    nodes = at_most or nodes
    if per_node is None and kind is not None:
        per_node = min(ranks, kind.gpus_per_node)
    if nodes is None:
        nodes = -(-ranks // per_node) if per_node else 1
    if per_node is None:
        if ranks % nodes:
            raise ConfigError(
                f"--nodes {nodes} for the {ranks} ranks that {run.name} is laid out for: nodes hold equally many; give "
                "--nproc-per-node, or another --nodes."
            )
        per_node = ranks // nodes
    return nodes, per_node
