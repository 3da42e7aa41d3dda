"""Tasks by their names: those of the harness, ours and those of directories; found, checked and loaded.

A directory's tasks are YAML files in the harness's own format, and so are ours (tasks/ beside this file). Where they
are all that is asked for, the harness's 14,000 are not looked at, which takes some seconds.
"""

import difflib
import fnmatch
import importlib
import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mempar.errors import ConfigError
from mempar.runtime.named_path import is_directory
from mempar.tools.evaluate.quiet import be_quiet

OURS = Path(__file__).parent / "tasks"
# The paper's nine, and those of them that run no programs: files in tasks/.
GROUP = "published"
SAFE_GROUP = "published_without_code"
_NUM_NEAR = 6
# What `datasets` calls data that lie in files: nothing to fetch.
_FILES = frozenset({"arrow", "csv", "imagefolder", "json", "parquet", "text", "webdataset"})


def harness(module: str = "") -> ModuleType:
    """Import the harness, or a module of it.

    Raises:
        ConfigError: when it is not installed.
    """
    be_quiet()
    try:
        found = importlib.import_module(f"lm_eval.{module}" if module else "lm_eval")
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs the package `lm-eval`, which cannot be imported ({error}); tasks come from "
            "lm-evaluation-harness; pip install 'mempar[hf]'."
        ) from None
    # What they warn about is said here in other words, or concerns the harness's own models.
    for logger in ("lm_eval", "huggingface_hub"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return found


def find_tasks(names: Sequence[str], folders: Sequence[Path]) -> tuple[Any, list[str]]:
    """Find tasks.

    Args:
        names: of tasks, groups or tags; several may stand in one, with commas between them, and `*` may stand in one.
        folders: directories with more tasks.

    Returns:
        The harness's TaskManager that knows them, and their names.

    Raises:
        ConfigError: for names that are unknown, with near ones, and for directories that hold no tasks.
    """
    wanted = list(dict.fromkeys(part for name in names for part in name.split(",") if part))
    if not wanted:
        raise ConfigError(f"--tasks {','.join(names)} names nothing; it takes names of tasks, e.g. --tasks {GROUP}.")
    manager_of = harness("tasks").TaskManager
    for folder in folders:
        _check_folder(folder)
    places = [OURS, *folders]
    manager = manager_of(include_path=places, include_defaults=False)
    if any(task is None for name in wanted for task in leaves(name, manager.task_index)):
        manager = manager_of(include_path=places)
    found = []
    for name in wanted:
        matching = fnmatch.filter(manager.all_tasks, name) if set(name) & set("*?[") else [name]
        if not matching or not set(matching) <= set(manager.all_tasks):
            raise _unknown(name, manager.all_tasks, folders)
        for one in matching:
            entry = manager.task_index[one]
            # A tag is shorthand for tasks, and nothing in the results has its name.
            found += sorted(entry.tags) if entry.kind.name == "TAG" else [one]
    return manager, list(dict.fromkeys(found))


def leaves(name: str, index: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[dict[str, Any] | None]:
    """Settings of the tasks that a name stands for, as the harness's index knows them; None for what it misses.

    Args:
        name: of a task, a group or a tag.
        index: of the harness's TaskManager.
        above: groups that it stands in; one that stands in itself ends there.
    """
    entry = index.get(name)
    if entry is None or entry.kind.name not in ("GROUP", "TAG"):
        yield None if entry is None else entry.cfg
        return
    members = sorted(entry.tags) if entry.kind.name == "TAG" else entry.cfg.get("task")
    for member in members if isinstance(members, list) else [members]:
        inner = member.get("group", member.get("task")) if isinstance(member, dict) else member
        if inner not in above:
            yield from leaves(str(inner), index, (*above, name))


def load_tasks(manager: Any, names: Sequence[str], *, allow_code: bool) -> dict[str, Any]:
    """Load tasks with their data.

    Args:
        manager: as `find_tasks` has found it.
        names: of tasks and groups.
        allow_code: whether code that the model writes may run here.

    Returns:
        What the harness evaluates: tasks and groups.

    Raises:
        ConfigError: for tasks that run code that the model has written, unless that is allowed; for data that are not
            here and cannot be fetched; for tasks that are wrong in themselves.
    """
    settings = [task for name in names for task in leaves(name, manager.task_index) if task is not None]
    unsafe = [str(task["task"]) for task in settings if task.get("unsafe_code")]
    if unsafe and not allow_code:
        raise _runs_code(unsafe)
    if allow_code:
        # What the library that runs it asks for.
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        loaded = manager.load(list(names))
    except Exception as error:
        # A task is data from elsewhere: whatever is wrong with it, or with fetching its own, is bad input.
        raise _not_loaded(error, names, settings) from None
    hidden = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if hidden and not allow_code:
        raise _runs_code(hidden)
    return loaded


def _check_folder(folder: Path) -> None:
    """Refuse a directory of tasks without any, or with a file that the harness would silently pass over."""
    there = is_directory(folder, "--task-dir")
    files = sorted(folder.rglob("*.yaml")) if there else []
    if not files:
        why = "holds no .yaml file" if there else "is no directory"
        raise ConfigError(
            f"--task-dir {folder} {why}; it holds tasks in the harness's format, one YAML file each; name such a "
            "directory."
        )
    load = harness("tasks._yaml_loader").load_yaml
    for path in files:
        try:
            load(path, resolve_func=False)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{path} cannot be read ({type(error).__name__}: {reason}); tasks of --task-dir are YAML files in the "
                "harness's format; mend it, or move it away."
            ) from None


def _unknown(name: str, known: Sequence[str], folders: Sequence[Path]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=_NUM_NEAR, cutoff=0.6)
    near += [one for one in known if name and one.startswith(name) and one not in near][: _NUM_NEAR - len(near)]
    hint = f"the nearest are {', '.join(near)}" if near else "none has a name like it"
    place = f" and those in {', '.join(str(folder) for folder in folders)}" if folders else ""
    return ConfigError(
        f"--tasks {name} is not known: {hint}; tasks are those of lm-evaluation-harness, our `{GROUP}`{place}; correct "
        "the name, or name a directory of your own with --task-dir."
    )


def _runs_code(names: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{', '.join(names)}: such tasks run programs that the model writes, with your rights and without a sandbox; "
        "that is done only when asked for; give --allow-code where nothing can be lost (a container without secrets), "
        f"or leave them out (`{SAFE_GROUP}` is `{GROUP}` without them)."
    )


def _not_loaded(error: Exception, names: Sequence[str], settings: Sequence[dict[str, Any]]) -> ConfigError:
    reason = " ".join(str(error).split()) or type(error).__name__
    away = [task for task in settings if task.get("dataset_path") and task["dataset_path"] not in _FILES]
    if not isinstance(error, OSError) or not away:
        return ConfigError(
            f"--tasks {','.join(names)} cannot be loaded ({type(error).__name__}: {reason}); a task's YAML says where "
            "its data are and how they become questions; mend it, or leave that task out."
        )
    sets = ", ".join(dict.fromkeys(str(task["dataset_path"]) for task in away))
    return ConfigError(
        f"--tasks {','.join(names)}: data are not on this machine and cannot be fetched ({reason}); they come from the "
        f"Hugging Face hub ({sets}), and stay in its cache; run the same command once where there is a network, "
        "--limit 1 is enough, and copy the cache (HF_HOME) here."
    )


def set_up(tasks: dict[str, Any], *, num_fewshot: int | None, seed: int) -> list[str]:
    """Set how many examples stand in prompts, and which, as the harness's own command does.

    Args:
        tasks: by name, loaded.
        num_fewshot: examples; None for what each task says.
        seed: of the choice of examples.

    Returns:
        What is otherwise than asked.

    Raises:
        ConfigError: for more examples than a task has documents to choose them from.
    """
    kept = []
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        elif num_fewshot:
            kept.append(name)
        task.set_fewshot_seed(seed=seed)
        _check_examples(name, task)
    if not kept:
        return []
    more = f" and {len(kept) - _NUM_NEAR} more" if len(kept) > _NUM_NEAR else ""
    return [f"no examples in prompts of {', '.join(kept[:_NUM_NEAR])}{more}: these tasks are made for none"]


def _check_examples(name: str, task: Any) -> None:
    """Refuse more examples in prompts than there are documents; tasks of classes of their own may choose otherwise."""
    wanted, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if not wanted or sampler is None:
        return
    # A question is no example for itself.
    split = task.fewshot_cfg.split
    own = split is not None and split == task.config.test_split
    available = max(0, len(sampler.fewshot_docs()) - own)
    if wanted > available:
        raise ConfigError(
            f"{name} takes {wanted} examples in a prompt, and has {available} documents to choose them from; each "
            f"stands there once; use --num-fewshot {available} or less, or give the task more."
        )


def failed(error: Exception, tasks: dict[str, Any], names: Sequence[str]) -> ConfigError:
    """What is said of tasks that raise something while they ask or judge: which it is, and where in the code.

    Args:
        error: what was raised.
        tasks: by name, loaded.
        names: of what was asked for.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    raising = [frame.f_locals.get("self") for frame, _ in frames]
    name = next((name for name, task in tasks.items() if any(task is one for one in raising)), ",".join(names))
    frame, line = frames[-1]
    reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return ConfigError(
        f"--tasks {name} cannot be evaluated ({reason}; {Path(frame.f_code.co_filename).name}, line {line}); a task's "
        "YAML and functions say how it asks and judges; mend it, or leave that task out."
    )
