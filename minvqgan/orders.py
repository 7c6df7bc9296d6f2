"""The order in which the n x n codes of an image are read as a sequence (the paper's appendix, Fig. 47).

An order is a permutation: sequence[:, t] = raster[:, order[t]], where raster is the map row by row. When each position
of a 4 x 4 map is read:

    row             alternate       z-curve         subsample       spiral-out
     0  1  2  3      0  1  2  3      0  1  4  5      0  4  1  5      9 10 11 12
     4  5  6  7      7  6  5  4      2  3  6  7      8 12  9 13      8  1  2 13
     8  9 10 11      8  9 10 11      8  9 12 13      2  6  3  7      7  0  3 14
    12 13 14 15     15 14 13 12     10 11 14 15     10 14 11 15      6  5  4 15

The paper compared all of these and chose row-major, which is also the only one for completion and the sliding window.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def row(n: int) -> Tensor:
    """Row by row, from left to right."""
    return torch.arange(n * n)


def alternate(n: int) -> Tensor:
    """Row by row, every other row from right to left: neighbours in the sequence are neighbours in the image."""
    raster = row(n).view(n, n)
    raster[1::2] = raster[1::2].flip(1)
    return raster.flatten()


def z_curve(n: int, digits: Iterable[int] | None = None) -> Tensor:
    """Square by square, the four quarters of each square before the next square (Morton order).

    A position's rank has the binary digits of row and column in turn: row 1 = 01, column 2 = 10 -> 0110 = 6. `digits`
    says which digit of each comes last in the rank, which before it, and so on; by default the lowest, the second, ...
    """
    rows, cols = row(n) // n, row(n) % n
    digits = range(n.bit_length()) if digits is None else digits
    rank = sum(((cols >> k & 1) << 2 * i) + ((rows >> k & 1) << 2 * i + 1) for i, k in enumerate(digits))
    return rank.argsort()


def subsample(n: int) -> Tensor:
    """Coarse to fine: every 2^k-th position before those between. As the z-curve, with the highest digits last."""
    return z_curve(n, reversed(range(n.bit_length())))


def spiral_out(n: int) -> Tensor:
    """From the middle outwards, clockwise: up 1, right 1, down 2, left 2, up 3, ..."""
    i, j = n // 2, (n - 1) // 2
    order, leg = [(i, j)], 0
    while len(order) < n * n:
        di, dj = ((-1, 0), (0, 1), (1, 0), (0, -1))[leg % 4]
        for _ in range(leg // 2 + 1):
            i, j = i + di, j + dj
            if 0 <= i < n and 0 <= j < n:
                order.append((i, j))
        leg += 1
    return torch.tensor([i * n + j for i, j in order])


def spiral_in(n: int) -> Tensor:
    """From a corner inwards: `spiral_out` backwards."""
    return spiral_out(n).flip(0)


ORDERS = {
    "row": row,
    "subsample": subsample,
    "z-curve": z_curve,
    "spiral-out": spiral_out,
    "spiral-in": spiral_in,
    "alternate": alternate,
}
