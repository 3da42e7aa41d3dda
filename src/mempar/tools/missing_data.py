"""The commands that make the data which a recipe names and which are not there, for all of them at once."""

from pathlib import Path

from mempar.errors import ConfigError
from mempar.recipes.data_sets import DATA_SETS, GATED_TOKENIZERS, commands_of
from mempar.runtime.config import RunConfig


def check_named_data(run: RunConfig) -> None:
    """Refuse a run of which data are missing that are known by name.

    Data that nobody here knows are left to `runtime/preflight.py`, unless known ones are missing too.

    Raises:
        ConfigError: with the commands for every set that is missing.
    """
    wanted = dict.fromkeys((*run.data.paths, *run.data.heldout_paths))
    missing = [path for path in wanted if not all(Path(path + suffix).is_file() for suffix in (".bin", ".idx"))]
    if not any(Path(path).name in DATA_SETS for path in missing):
        return
    lines = [
        f"{len(missing)} of the {len(wanted)} data sets of {run.name} are not there, {missing[0]}.bin for one; every "
        "one must be prepared before a run begins; call these commands, each of which goes on where it was "
        "interrupted, or name data of your own with data.paths and data.weights:"
    ]
    if run.data.tokenizer in GATED_TOKENIZERS:
        page = run.data.tokenizer.removeprefix("hf:")
        lines.append(f"# {run.data.tokenizer}: accept the terms on https://huggingface.co/{page}, then `hf auth login`")
    for path in missing:
        lines += _commands(run, path)
    raise ConfigError("\n".join(lines))


def _commands(run: RunConfig, path: str) -> list[str]:
    name, tokenizer = Path(path).name, run.data.tokenizer
    known = DATA_SETS.get(name)
    if known is None:
        return [f"# {name}", f"mempar prepare INPUT... --tokenizer {tokenizer} --out {path}"]
    share = ""
    if path in run.data.paths and run.data.weights:
        share = f"{run.data.weights[run.data.paths.index(path)]:.1%} of the tokens; "
    page = f"https://huggingface.co/datasets/{known.repository}"
    gated = f"; accept the terms on {page} first, then `hf auth login`" if known.gated else ""
    return [f"# {name}: {share}{known.license}{gated}", *commands_of(name, tokenizer=tokenizer, prefix=path)]
