"""Every kernel, compiled for GPUs of three generations: no spills, wide loads, no atomics, 64-bit addresses."""

from types import ModuleType

import pytest

import compile_peer
import compile_product_topk
import compile_reduce_rows
import compile_row_update
import compile_segment_route
import compile_weighted_gather
from compiled import ARCHITECTURES, SHARED_KIB, Case, launches, narrow_addresses

MODULES: tuple[ModuleType, ...] = (
    compile_peer,
    compile_product_topk,
    compile_reduce_rows,
    compile_row_update,
    compile_segment_route,
    compile_weighted_gather,
)
CASES: dict[str, Case] = {name: case for module in MODULES for name, case in module.CASES.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_compile_within_their_budget(name: str, architecture: int) -> None:
    case = CASES[name]
    kernels = launches(case.launch, architecture)
    assert kernels
    for kernel in kernels:
        found = f"{kernel.name} on sm_{architecture}: {kernel.registers} registers, {kernel.stack} bytes of stack"
        assert kernel.stack == 0 or kernel.name in case.may_spill, found
        assert kernel.count("LDL|STL") == 0 or kernel.name in case.may_spill, found
        assert kernel.registers <= case.registers, found
        assert kernel.shared <= SHARED_KIB[architecture] * 1024, kernel.shared
        assert not kernel.count(r"ATOMG|RED\b|REDG"), kernel.instructions
        assert narrow_addresses(kernel.ttir) == [], kernel.name
    assert max(kernel.wide_loads for kernel in kernels) >= case.vector_loads


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("adagrad-")])
def test_a_statistic_is_read_by_all_warps_before_one_thread_writes_it(name: str) -> None:
    for kernel in launches(CASES[name].launch, 90):
        lines = kernel.ttir.splitlines()
        (barrier,) = (place for place, line in enumerate(lines) if "barrier" in line)
        assert all(place < barrier for place, line in enumerate(lines) if "tt.load" in line)
        assert all(place > barrier for place, line in enumerate(lines) if "tt.store" in line)


def test_narrow_addresses_are_found() -> None:
    body = """
    %0 = tt.get_program_id x : i32 loc(#loc1)
    %1 = arith.muli %0, %c64_i32 : i32 loc(#loc2)
    %2 = tt.addptr %arg0, %1 : !tt.ptr<f32>, i32 loc(#loc3)
    %3 = tt.load %arg1 : !tt.ptr<i32> loc(#loc3)
    %4 = arith.extsi %3 : i32 to i64 loc(#loc3)
    %5 = tt.addptr %arg0, %4 : !tt.ptr<f32>, i64 loc(#loc3)
    %6 = tt.addptr %arg0, %3 : !tt.ptr<f32>, i32 loc(#loc3)
    """
    assert [line.split()[0] for line in narrow_addresses(body)] == ["%2", "%6"]


def test_narrow_addresses_are_found_where_loops_carry_them() -> None:
    body = """
    %0 = tt.get_program_id x : i32 loc(#loc1)
    %1 = arith.muli %0, %stride : i32 loc(#loc2)
    %2 = arith.extsi %0 : i32 to i64 loc(#loc2)
    %3:2 = scf.for %i = %c0_i32 to %n step %c1_i32 iter_args(%place = %1, %far = %2) -> (i32, i64)  : i32 {
      %4 = tt.addptr %arg0, %place : !tt.ptr<f32>, i32 loc(#loc3)
      %5 = tt.addptr %arg0, %far : !tt.ptr<f32>, i64 loc(#loc3)
      %6 = arith.addi %place, %c1_i32 : i32 loc(#loc3)
      %7 = arith.addi %far, %c1_i64 : i64 loc(#loc3)
      scf.yield %6, %7 : i32, i64 loc(#loc4)
    } loc(#loc5)
    %8 = tt.addptr %arg0, %3#0 : !tt.ptr<f32>, i32 loc(#loc3)
    """
    assert [line.split()[0] for line in narrow_addresses(body)] == ["%4", "%8"]
