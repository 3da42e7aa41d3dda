"""The gates of style and packaging that a linter does not know: sizes, test files, start-up time, pins."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "mempar"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_HELP_SECONDS = 1.0
HELP_ATTEMPTS = 3


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def dotted_name(path: Path) -> str:
    """Name a source file as it is imported: mempar.parallel.ranks."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def names_in_tests() -> set[str]:
    """Collect every dotted mempar name that a test file imports or writes in a string."""
    names: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        names.update(re.findall(r"\bmempar(?:\.\w+)+", text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {prefix for name in names for prefix in prefixes(name)}


def prefixes(name: str) -> list[str]:
    """mempar.a.b stands for mempar.a too: `from mempar.dims import even_cuts` names mempar.dims."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(2, len(parts) + 1)]


def is_tested(path: Path, test_stems: set[str], named: set[str]) -> bool:
    *rooms, module = path.relative_to(PACKAGE).with_suffix("").parts
    by_room = any(stem.startswith(f"test_{room}_") for room in rooms for stem in test_stems)
    # The files of an operation's folder are tested together, as the operation.
    by_operation = rooms[:1] == ["kernels"] and f"test_{rooms[-1]}" in test_stems
    return f"test_{module}" in test_stems or by_room or by_operation or dotted_name(path) in named


def test_sources_are_found():
    assert SOURCES, f"no Python file under {PACKAGE}; the other tests here would pass without looking at anything"


def test_every_module_has_a_docstring():
    offenders = [relative(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert not offenders, f"modules without a docstring: {offenders}; say what the module is for"


def test_no_file_is_too_long():
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    offenders = {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}
    assert not offenders, f"files longer than {MAX_FILE_LINES} lines: {offenders}; split them by what they do"


def test_no_function_is_too_long():
    lengths = {
        f"{relative(path)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in SOURCES
        for node in functions(path)
    }
    offenders = {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}
    assert not offenders, f"functions longer than {MAX_FUNCTION_LINES} lines: {offenders}; name their parts"


def test_every_module_has_a_test():
    stems = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    named = names_in_tests()
    sources = [path for path in SOURCES if not path.name.startswith("__") and "recipes" not in path.parts]
    offenders = [relative(path) for path in sources if not is_tested(path, stems, named)]
    assert not offenders, (
        f"modules without a test: {offenders}; "
        "x/y.py wants a file test_y.py or test_x_*.py, or a test file that imports or names mempar.x.y"
    )


def test_version_of_the_package_is_the_installed_one():
    import importlib.metadata

    import mempar

    installed = importlib.metadata.version("mempar")
    assert installed == mempar.__version__, f"installed {installed}, source {mempar.__version__}; run `make setup`"


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.split(r"[\[<>=~!; ]", line)[0] for line in project["dependencies"]}
    for extra in ("dev", "data", "hf", "report"):
        wanted |= {re.split(r"[\[<>=~!; ]", line)[0] for line in project["optional-dependencies"][extra]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    # An extra of ours may name another.
    wanted -= {"mempar"}
    assert wanted <= pinned, f"not pinned in constraints.txt: {sorted(wanted - pinned)}; add a line for each"


@pytest.mark.parametrize("heavy", ["torch", "megatron", "triton", "numpy"])
def test_command_line_starts_without(heavy: str):
    code = f"import sys, mempar.cli; sys.exit({heavy!r} in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, f"importing mempar.cli imports {heavy}; import it where it is used\n{result.stderr}"


def _seconds_of_children() -> float:
    """Of a core: what they would take if nobody else used it."""
    times = os.times()
    return times.children_user + times.children_system


def test_help_answers_in_a_second():
    command = [str(Path(sysconfig.get_path("scripts")) / "mempar"), "--help"]
    seconds: list[float] = []
    # The best of a few attempts is a property of the program; the others are the machine being busy.
    for _ in range(HELP_ATTEMPTS):
        start = _seconds_of_children()
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        seconds.append(_seconds_of_children() - start)
        assert result.returncode == 0, result.stderr
        if min(seconds) < MAX_HELP_SECONDS:
            return
    pytest.fail(f"`mempar --help` took {min(seconds):.2f} s at best; under {MAX_HELP_SECONDS} s: import less at start")
