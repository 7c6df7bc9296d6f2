"""Fair timing on a noisy machine: all are run in turn, and ratios are taken within each turn."""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def seconds(function: Callable) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def paired_ratios(
    theirs: Callable[[], float], ours: dict[str, Callable[[], float]], pairs: int = 5
) -> dict[str, tuple]:
    """How many times as long `theirs` takes as each of `ours`: {name: (median of the turns' ratios, lowest, highest)}.

    All return their seconds. Each is called once before, to allocate and to choose kernels; every second turn runs
    backwards, so that a slow drift of the machine hits all alike.
    """
    functions = {"": theirs} | ours
    for function in functions.values():
        function()
    ratios: dict[str, list[float]] = {name: [] for name in ours}
    for turn in range(pairs):
        order = list(functions) if turn % 2 else list(functions)[::-1]
        spent = {name: functions[name]() for name in order}
        for name in ours:
            ratios[name].append(spent[""] / spent[name])
    return {name: (statistics.median(r), min(r), max(r)) for name, r in ratios.items()}


def peak_memory(function: Callable) -> float:
    """MiB that a call takes above what the process held before, as glibc and Linux count it; nan elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")

    def kib(name: str) -> int:
        return int(status.read_text().split(f"{name}:")[1].split()[0])

    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is given back, or it would be taken without being seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kib("VmRSS")
    function()
    return (kib("VmHWM") - before) / 1024
