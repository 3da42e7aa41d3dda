"""Devices: GPUs that torch can use against those that a recipe is for, and cores against ranks."""

from collections import Counter
from collections.abc import Callable

from mempar.runtime.hardware import Gpu
from mempar.tools.doctor.finding import ERROR, NOTE, OK, WARNING, Finding, counted, size
from mempar.tools.doctor.machine import Device, Machine, is_kind

# What a CUDA context of the probe itself takes, and a little: more is somebody else's.
_OWN_BYTES = 1 << 30
# Of what the driver shows, torch shows a little less.
_MEMORY_SHARE = 0.95
# The oldest GPUs that kernels are compiled for (A100).
_LEAST_CAPABILITY = (8, 0)


def check(
    machine: Machine, *, wanted: Gpu | None, num_wanted: int, num_ranks: int, has_scheduler: bool
) -> list[Finding]:
    """Judge them.

    Args:
        machine: what is there.
        wanted: the GPU that the recipe is for; None for a CPU, or without a recipe.
        num_wanted: GPUs of one machine that it wants.
        num_ranks: ranks on this machine.
        has_scheduler: whether this may be the host that jobs are submitted from.
    """
    there = f"; on a login node, run doctor in a job (srun --gpus-per-node={num_wanted} mempar doctor ...)"
    elsewhere = there if has_scheduler else ""
    findings = [_present(machine, wanted, elsewhere)]
    if machine.devices:
        findings += [_kind(machine.devices, wanted, num_wanted, elsewhere)]
        findings += _each(machine.devices, "devices.broken", lambda device: device.problem, _broken)
        findings += _each(machine.devices, "devices.memory", _is_taken, _taken)
        findings += _each(machine.devices, "devices.capability", _is_old, _old)
        findings += _ranks_and_devices(len(machine.devices), num_ranks)
    else:
        findings.append(_cores(machine.num_cores, num_ranks))
    return findings


def _present(machine: Machine, wanted: Gpu | None, elsewhere: str) -> Finding:
    check = "devices.cuda"
    if machine.devices:
        names = ", ".join(f"{count} x {name}" for name, count in Counter(one.name for one in machine.devices).items())
        total, driver = size(machine.devices[0].total_bytes), machine.driver or "unknown"
        values = {"devices": len(machine.devices), "driver": machine.driver}
        return Finding(check=check, level=OK, what=f"{names}, {total} each, driver {driver}", values=values)
    if machine.models and not machine.cuda:
        return Finding(
            check=check,
            level=ERROR if wanted else WARNING,
            what=f"{len(machine.models)} x {machine.models[0]} here, and a torch built for CPUs",
            rule="only a CUDA build of torch uses GPUs; this one trains on the CPU",
            remedy="install torch's CUDA build for this driver, see constraints.txt",
        )
    if machine.cuda and (machine.driver or wanted):
        driver = f"driver {machine.driver}" if machine.driver else "no NVIDIA driver"
        return Finding(
            check=check,
            level=ERROR if wanted or machine.models else NOTE,
            what=f"torch for CUDA {machine.cuda} cannot use a GPU here ({driver}): {machine.problem}",
            rule="runs would go to the CPU, over gloo",
            remedy="see that nvidia-smi lists GPUs, that the driver is new enough for that CUDA, and that neither the "
            f"container nor CUDA_VISIBLE_DEVICES hides them{elsewhere}",
        )
    if wanted:
        return Finding(
            check=check,
            level=ERROR,
            what="no NVIDIA driver and no GPU",
            rule=f"the recipe is for {wanted.label} GPUs",
            remedy=f"run it where they are, or set hardware.gpu= to try it on the CPU{elsewhere}",
        )
    return Finding(check=check, level=OK, what="no GPU: runs go to the CPU, over gloo")


def _kind(devices: tuple[Device, ...], wanted: Gpu | None, num_wanted: int, elsewhere: str) -> Finding:
    check, names = "devices.kind", sorted({device.name for device in devices})
    if len(names) > 1:
        return Finding(
            check=check,
            level=WARNING,
            what=f"GPUs of several kinds: {', '.join(names)}",
            rule="ranks wait for each other at every step, so all go at the pace of the slowest and have its memory",
            remedy="choose equal ones with CUDA_VISIBLE_DEVICES",
        )
    if wanted is None:
        return Finding(check=check, level=OK, what=f"{len(devices)} x {names[0]}; the recipe names no GPU")
    fits = devices[0].total_bytes >= _MEMORY_SHARE * wanted.memory_bytes
    if not fits or not is_kind(names[0], wanted):
        return Finding(
            check=check,
            level=WARNING if fits else ERROR,
            what=f"{names[0]} with {size(devices[0].total_bytes)}; the recipe is for {wanted.label} with "
            f"{size(wanted.memory_bytes)}",
            rule="speeds will differ" if fits else "a layout that fits one kind of GPU may not fit another",
            remedy=f"set hardware.gpu to what is here and look at the estimate (mempar recipes NAME){elsewhere}",
        )
    if len(devices) < num_wanted:
        return Finding(
            check=check,
            level=ERROR,
            what=f"{len(devices)} x {names[0]}; the recipe wants {num_wanted} on a machine",
            rule="every rank needs a GPU of its own",
            remedy="ask for more GPUs a node, or for more nodes (--nodes, --nproc-per-node)",
        )
    return Finding(check=check, level=OK, what=f"{wanted.label} as the recipe wants, {len(devices)} of {num_wanted}")


def _each(
    devices: tuple[Device, ...], check: str, applies: Callable[[Device], object], say: Callable[[str, Device], Finding]
) -> list[Finding]:
    """One finding for all devices that something is wrong with, in the words of the first."""
    numbers = [index for index, device in enumerate(devices) if applies(device)]
    if not numbers:
        return []
    found = say(f"GPU {', '.join(map(str, numbers))}", devices[numbers[0]])
    return [Finding(**{**found.as_dict(), "check": check, "values": {"gpus": numbers}})]


def _broken(which: str, device: Device) -> Finding:
    return Finding(
        check="",
        level=ERROR,
        what=f"{which}: {device.problem}",
        rule="a rank on it will fail",
        remedy="look at nvidia-smi and dmesg for it (Xid); in exclusive mode another process has it; drain the node",
    )


def _is_taken(device: Device) -> bool:
    return not device.problem and device.total_bytes - device.free_bytes > _OWN_BYTES


def _taken(which: str, device: Device) -> Finding:
    return Finding(
        check="",
        level=WARNING,
        what=f"{which}: {size(device.total_bytes - device.free_bytes)} of {size(device.total_bytes)} are taken",
        rule="other processes compute there, or ranks of an earlier run were left; both memory and speed are shared",
        remedy="see whose they are with nvidia-smi, and end them or take other GPUs",
    )


def _is_old(device: Device) -> bool:
    return device.capability < _LEAST_CAPABILITY


def _old(which: str, device: Device) -> Finding:
    return Finding(
        check="",
        level=WARNING,
        what=f"{which}: {device.name} has compute capability {'.'.join(map(str, device.capability))}",
        rule="kernels are compiled and tested for 8.0 (A100) and later; bf16 is slow before",
        remedy="use later GPUs, or kernels.backend=torch with train.dtype=float32",
    )


def _ranks_and_devices(num_devices: int, num_ranks: int) -> list[Finding]:
    if num_ranks <= num_devices:
        return []
    return [
        Finding(
            check="devices.ranks",
            level=ERROR,
            what=f"{counted(num_ranks, 'rank')} and {counted(num_devices, 'GPU')} on this machine",
            rule="every rank needs a GPU of its own",
            remedy=f"use --nproc {num_devices}, or CUDA_VISIBLE_DEVICES= to run on the CPU",
        )
    ]


def _cores(num_cores: int, num_ranks: int) -> Finding:
    if num_ranks <= num_cores:
        return Finding(
            check="devices.cores", level=OK, what=f"{counted(num_cores, 'core')} for {counted(num_ranks, 'rank')}"
        )
    return Finding(
        check="devices.cores",
        level=WARNING,
        what=f"{counted(num_cores, 'core')} for {counted(num_ranks, 'rank')}",
        rule="on a CPU a rank computes on at least one core; with fewer they wait for each other",
        remedy=f"use at most {num_cores} ranks where time matters, or a cpuset with more cores",
    )
