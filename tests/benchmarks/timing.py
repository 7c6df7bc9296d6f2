"""Fair timing on a noisy machine: the two are run in turn, and the ratio is taken pair by pair."""

import statistics
import time
from collections.abc import Callable

import torch


def paired_ratio(ours: Callable, theirs: Callable, pairs: int = 9) -> tuple[float, float, float]:
    """How many times as long `theirs` takes: (median of the pairs' ratios, lower and upper quartile)."""
    torch.set_num_threads(2)

    def seconds(function: Callable) -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    seconds(ours), seconds(theirs)  # the first call allocates and chooses kernels
    ratios = []
    for i in range(pairs):  # in turn first and second, so that a slow drift hits both alike
        if i % 2:
            a, b = seconds(ours), seconds(theirs)
        else:
            b, a = seconds(theirs), seconds(ours)
        ratios.append(b / a)
    low, median, high = statistics.quantiles(ratios, n=4)
    return median, low, high
