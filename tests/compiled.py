"""Compiles Triton's kernels for GPUs that are not there, as an operation would launch them, and reads the result.

`launches(op)` runs an operation on CPU tensors with a driver that has the wanted architecture but no device: Triton's
own launcher specialises every kernel by the arguments it gets and compiles it, and nothing is run. What an operation
computes from a kernel's output afterwards is computed from unwritten memory: the operations' launches do not depend on
it. Registers, stack and instructions are read from the machine code with the tools that Triton brings.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
# Shared memory that a block may use, in KiB (CUDA C++ Programming Guide, compute capabilities).
SHARED_KIB = {80: 163, 90: 227, 100: 227}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """An operation as some user launches it, and what its kernels may cost.

    Attributes:
        launch: calls the operation on CPU tensors.
        registers: of a thread, at most, on every architecture.
        vector_loads: loads of 16 bytes from global memory, at least, in one of the kernels.
        may_spill: kernels that are known to spill, for a reason given beside them.
    """

    launch: Callable[[], object]
    registers: int
    vector_loads: int
    may_spill: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel as one architecture would run it.

    Attributes:
        name: of the kernel.
        ttir: Triton's own intermediate code.
        registers: of a thread.
        stack: bytes of a thread's stack, where registers spill to.
        shared: bytes of shared memory.
        instructions: how often each instruction of the machine occurs, with its modifiers.
    """

    name: str
    ttir: str
    registers: int
    stack: int
    shared: int
    instructions: Counter[str]

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes a thread, or of whole tiles, from global memory."""
        return self.count(r"LDG\S*\.128|LDGSTS\S*\.128|UTMALDG")

    def count(self, pattern: str) -> int:
        """Instructions that match a pattern from their start."""
        return sum(number for name, number in self.instructions.items() if re.match(pattern, name))


class _Target:
    """What Triton asks its driver for when it compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling(architecture: int, found: dict[str, Any]) -> Iterator[None]:
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.setdefault(kernel.hash, kernel)

    before = driver._active
    driver.set_active(_Target(architecture))
    try:
        with patch.object(JITFunction, "run", compile_only):
            yield
    finally:
        driver._active = before


def launches(operation: Callable[[], object], architecture: int) -> list[Compiled]:
    """Compile every kernel that an operation launches, for one architecture such as 90."""
    found: dict[str, Any] = {}
    with _compiling(architecture, found):
        operation()
    return [_inspect(kernel) for kernel in found.values()]


@functools.cache
def _inspect(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, machine = (_tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name))
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert numbers is not None, usage
    registers, stack, local = map(int, numbers.groups())
    return Compiled(
        name=kernel.name,
        ttir=kernel.asm["ttir"],
        registers=registers,
        stack=stack + local,
        shared=kernel.metadata.shared,
        instructions=Counter(_INSTRUCTION.findall(machine)),
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


_OPERATION = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = (\S+) ?(.*?)( : .*)?$")


def _operations(ttir: str) -> dict[str, tuple[str, str, str]]:
    """Operations by the name of their result: what they are, their operands, their types.

    What a loop carries, or a branch results in, depends on what it starts from and on what is yielded.
    """
    operations: dict[str, tuple[str, str, str]] = {}
    open_regions: list[tuple[str, list[tuple[str, str]]]] = []
    for line in (line.split(" loc(")[0] for line in ttir.splitlines()):
        match = _OPERATION.match(line)
        if match:
            name, operation, operands, types = match.groups()
            operations[name] = (operation, operands, types or "")
        if re.search(r"\bscf\.(for|if|while)\b", line):
            carried = re.findall(r"(%\w+) = (%\w+)", line.partition("iter_args")[2])
            open_regions.append((match.group(1) if match else "", carried))
            for inner, start in carried:
                operations[inner] = ("carried", start, "")
        yielded = re.match(r"\s*scf\.yield (%.*)", line)
        if yielded and open_regions:
            result, carried = open_regions[-1]
            given = re.findall(r"%\w+", yielded.group(1))
            for (inner, start), value in zip(carried, given, strict=False):
                operations[inner] = ("carried", f"{start} {value}", "")
            if result:
                before = operations[result][1] if result in operations else ""
                operations[result] = ("region", f"{before} {' '.join(given)}", "")
        # An `else` goes on with its region.
        if re.match(r"\s*}(?! else)", line) and open_regions:
            open_regions.pop()
    return operations


def narrow_addresses(ttir: str) -> list[str]:
    """Lines of Triton's intermediate code that add to an address what may have overflown 32 bits.

    What a program's first number or something loaded (a row, an entry, a bag) is part of grows without bound: it must
    be widened to 64 bits before it is multiplied and before it is added to an address. Columns, tiles and the other
    numbers of a program are bounded by a row.
    """
    operations = _operations(ttir)

    def ancestors(name: str, seen: dict[str, None]) -> dict[str, None]:
        if name not in seen and name in operations:
            seen[name] = None
            # What was loaded does not depend on how its address was made.
            if operations[name][0] != "tt.load":
                for operand in re.findall(r"%\w+", operations[name][1]):
                    ancestors(operand, seen)
        return seen

    def grows(name: str) -> bool:
        origins = [operations[each] for each in ancestors(name, {})]
        return any(
            operation == "tt.load" or (operation, rest) == ("tt.get_program_id", "x") for operation, rest, _ in origins
        )

    def is_narrow(name: str) -> bool:
        return re.search(r"\bi32>?$|xi32>?$", operations[name][2]) is not None

    found = []
    for name, (operation, operands, types) in operations.items():
        if operation != "tt.addptr":
            continue
        offset = re.findall(r"%\w+", operands)[1]
        products = [each for each in ancestors(offset, {}) if operations[each][0] == "arith.muli" and is_narrow(each)]
        narrow_offset = re.search(r"i32>?$", types) is not None
        if any(map(grows, products)) or (narrow_offset and grows(offset)):
            found.append(f"{name} = {operation} {operands}{types}")
    return found
