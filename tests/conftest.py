"""Fixtures of the whole session: the pool of ranks, and the figures that tests want to be seen."""

import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mempar.kernels.dispatch import interpreted
from mempar.parallel import collectives
from rank_pool import RankPool
from thread_groups import THREAD_DIST, Threads, launch_one_at_a_time

FIGURES = pytest.StashKey[dict[str, float]]()


def pytest_configure() -> None:
    """Let programs under test be interrupted where a shell started this in the background, with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tests of kernels run on any device; see tests/kernels/conftest.py."""
    parser.addoption("--device", default="cpu", help="where tests of kernels run: cpu or cuda")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Ranks that stay warm for the session; see rank_pool.py."""
    pool = RankPool()
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture
def fresh_seed() -> int:
    """Seed torch afresh; pytest shows the seed when a test fails, and torch.manual_seed(it) repeats the test."""
    seed = torch.seed()
    print(f"torch seed {seed}")
    return seed % 2**31


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute in one thread: operations of a few thousand numbers are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def modules_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let transformers keep the code of models in a place of its own, and ask the hub for nothing."""
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(hub, "is_offline_mode", lambda: True)
        yield


@pytest.fixture(scope="session")
def note_figure(pytestconfig: pytest.Config) -> Callable[[str, float], None]:
    """Note a number; the largest of each name is printed at the end of the session."""
    figures = pytestconfig.stash.setdefault(FIGURES, {})

    def note(name: str, value: float) -> None:
        figures[name] = max(value, figures.get(name, value))

    return note


@pytest.fixture(scope="module")
def in_threads() -> Iterator[Threads]:
    """Runs functions as members of groups between threads; see thread_groups.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "dist", THREAD_DIST)
        if interpreted():
            launch_one_at_a_time(patch)
        yield Threads()


@pytest.fixture
def rng() -> random.Random:
    """Fresh random numbers, torch's too."""
    seed = torch.seed()
    # Shown by pytest when a test fails; torch.manual_seed(it) and random.Random(it) repeat the test.
    print(f"torch and random seed {seed}")
    return random.Random(seed)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the figures of a worker to the session that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = session.config.stash.get(FIGURES, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Join the figures of the workers."""
    figures = node.config.stash.setdefault(FIGURES, {})
    for name, value in getattr(node, "workeroutput", {}).get("figures", {}).items():
        figures[name] = max(value, figures.get(name, value))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the figures."""
    figures = config.stash.get(FIGURES, {})
    if figures:
        terminalreporter.section("largest deviations")
        for name, value in sorted(figures.items()):
            terminalreporter.write_line(f"{name}: {value:.3g}")
