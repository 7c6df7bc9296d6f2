"""Drawing one code after another, s_i ~ p(s_i | s_<i, c), and a window that slides over images of any size (Sec. 3.2,
Fig. 3).

All randomness is one uniform number u for each code, drawn in advance (`uniforms`, `choose`). So a seed gives the same
image in any batch, with or without the cache, and in whatever order a large image is filled. (bfloat16 and float32 give
different images; in bfloat16 a CPU also rounds a batch of one differently where a window slides or most is given.)

Letters: B batch, K codes, R condition tokens, T image tokens, h x w latents, n x n the window.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gpt import GPT, KVCache


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn. The defaults sample from the model's distribution as it is."""

    temperature: float = 1.0  # below 1 sharpens; 0 takes the most likely code
    top_k: int | None = None  # only the k most likely codes
    top_p: float | None = None  # only the most likely codes that together have this probability
    guidance: float = 1.0  # above 1 exaggerates what c changes (Ho & Salimans 2022, arXiv:2207.12598)
    stride: int = 1  # columns by which a sliding window moves, see `window_start`
    wave: bool = True  # False: one segment at a time, for the same codes
    use_cache: bool = True  # False: everything is recomputed for each code, for the same codes
    on_token: Callable[[int], None] | None = None  # called with the number of codes just drawn, for a progress bar

    def __post_init__(self):
        for fits, name in (
            (self.temperature >= 0, "temperature"),  # NaN is not
            (self.top_k is None or self.top_k >= 1, "top_k"),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p"),
            (abs(self.guidance) < float("inf"), "guidance"),
            (self.stride >= 1, "stride"),
        ):
            if not fits:
                raise ValueError(f"{name} {getattr(self, name)} leaves nothing to draw")


def uniforms(seed: int, numbers: Sequence[int], count: int) -> Tensor:
    """u for `count` codes of each image, (len(numbers), count). Image number i of a seed has a generator of its own, so
    its batch and the number of images do not matter. Two seeds share no image, as far as 32 bits tell them apart."""
    seeds = (zlib.crc32(f"{seed} {i}".encode()) for i in numbers)
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(s)) for s in seeds])


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """logits (B, K) -> (B, K), with -inf at the codes that may not be chosen.

    top-p: of the codes that top-k leaves, the smallest set of most likely ones whose probabilities reach top_p
    (Holtzman et al. 2019, arXiv:1904.09751). The most likely one always stays. Of equal logits the first ones stay.
    """
    K = logits.shape[1]
    k, top_p = min(top_k or K, K), 1 if top_p is None else top_p
    if k == K and top_p == 1:
        return logits
    falling = logits.topk(k).values  # (B, k); much faster than sorting all K when k is small
    p = falling.softmax(1)
    stays = (p.cumsum(1) - p < top_p) | (top_p == 1)  # (B, k): the codes before it do not reach top_p
    count = stays.sum(1, keepdim=True).clamp_min(1)  # (B, 1)
    lowest = falling.gather(1, count - 1)  # (B, 1), the lowest logit that stays
    above, equal = logits > lowest, logits == lowest
    room = count - above.sum(1, keepdim=True)  # how many of those equal to the lowest stay
    return logits.masked_fill(~(above | equal & (equal.cumsum(1) <= room)), float("-inf"))


def choose(logits: Tensor, u: Tensor, sampling: Sampling) -> Tensor:
    """logits (B, K) float32, u (B,) uniform in [0, 1) -> codes (B,): where the cumulative distribution passes u.

    Example: p = 0.5, 0.3, 0.2 adds up to 0.5, 0.8, 1, so u = 0.6 chooses code 1.
    """
    if sampling.temperature < 1e-30:  # float32 cannot divide by it
        return logits.argmax(1)
    logits = (logits - logits.amax(1, keepdim=True)) / sampling.temperature  # at most 0: no overflow
    p = filter_logits(logits, sampling.top_k, sampling.top_p).softmax(1)
    # Two guards against rounding: on a GPU the sum can grow at a code of p = 0, and it can end just below 1.
    cumulative = p.cumsum(1) * (p > 0)  # (B, K); float32, because Apple's GPUs have no float64
    passed = cumulative > u[:, None] * cumulative.amax(1, keepdim=True)
    return passed.byte().argmax(1)  # the first one


def continue_tokens(gpt: GPT, r: Tensor, s: Tensor, u: Tensor, sampling: Sampling, null: int | None = None) -> Tensor:
    """Continue s by one code for each column of u: [r | s | new] -> new (B, T_new).

    r (B, R) condition tokens, s (B, T) codes that are there already, u (B, T_new) uniforms.
    null: the token of a dropped condition; guidance other than 1 needs one, else ValueError.
    """
    guided, T_new, conditions = sampling.guidance != 1, u.shape[1], [r]
    if guided:
        if null is None:
            raise ValueError("guidance needs a model that was trained with dropped conditions (--drop-cond)")
        conditions.append(torch.full_like(r, null))  # with and without c, read as one batch
    elif len(u) == 1 and gpt.head.weight.dtype == torch.bfloat16 and T_new >= r.shape[1] + s.shape[1]:
        # A CPU rounds the product of a single row differently, and two rows take as long as one. Not where most of the
        # work is to read what is given, which would be read twice.
        conditions.append(r)
    tokens, new = torch.cat([torch.cat([c, s], 1) for c in conditions]), []
    with torch.inference_mode():  # 6 % faster than no_grad on a CPU
        length = tokens.shape[1] + T_new
        cache = KVCache(gpt.config, len(tokens), length, gpt.position_embedding) if sampling.use_cache else None
        for i in range(T_new):
            logits = gpt(tokens, cache, last_only=True)[:, 0].float()  # (B, K), or (2 B, K) of two conditions
            if len(conditions) == 2:
                with_c, without_c = logits.chunk(2)
                logits = without_c + sampling.guidance * (with_c - without_c)
            code = choose(logits, u[:, i], sampling)  # (B,)
            new.append(code)
            column = code.repeat(len(conditions))[:, None]
            tokens = column if sampling.use_cache else torch.cat([tokens, column], 1)
            if sampling.on_token:
                sampling.on_token(len(code))
    # Joined outside: autograd refuses tensors that were made in inference mode.
    return torch.stack(new, 1) if new else s.new_empty(len(u), 0)


def window_start(i: int, size: int, n: int, stride: int = 1) -> int:
    """First row (or column) of the window in which position i of `size` is predicted. i lies in its middle, n // 2, or
    nearer to its border where the image ends (Fig. 3): for n = 8, size = 20: i = 2 -> 0, i = 10 -> 6, i = 19 -> 12.

    DEPARTURE: with a stride of N the window stops only at every N-th column, and the N positions around its middle are
    predicted in it. It is read once for N codes, which takes a third of the time at N = 4, but they have up to N / 2
    columns less of context on either side. Held-out codes cost 0.03 nats more at N = 4 and 0.07 at 8, of 3.12.
    """
    return min(max((i - n // 2 + stride // 2) // stride * stride, 0), size - n)


@dataclass(frozen=True)
class Segment:
    """Neighbouring positions of one row that are predicted in the same n x n window, and so from one cache."""

    row: int
    col: int
    length: int
    top: int  # of the window
    left: int
    n: int

    @property
    def prefix(self) -> int:
        """Tokens of the window that come before the segment's first one."""
        return (self.row - self.top) * self.n + self.col - self.left

    def of(self, m: Tensor) -> Tensor:
        """The segment's part of a map: (B, h, w) -> (B, length), a view."""
        return m[:, self.row, self.col : self.col + self.length]

    def window(self, m: Tensor) -> Tensor:
        """The window's part of a map: (B, h, w) -> (B, n * n)."""
        return m[:, self.top : self.top + self.n, self.left : self.left + self.n].flatten(1)


def row_segments(row: int, first: int, h: int, w: int, n: int, stride: int = 1) -> list[Segment]:
    """The columns of a row from `first` on, cut where the window moves."""
    segments = []
    for left, group in itertools.groupby(range(first, w), lambda col: window_start(col, w, n, stride)):
        columns = list(group)
        segments.append(Segment(row, columns[0], len(columns), window_start(row, h, n), left, n))
    return segments


def schedule(h: int, w: int, n: int, start: int = 0, wave: bool = True, stride: int = 1) -> Iterator[list[Segment]]:
    """All segments of an h x w image from raster position `start` on, in batches that can be predicted at once.

    A segment must wait until the row above is finished up to the right edge of its window. So each row follows half a
    window behind the one above, and about 2 w / n rows advance together. Far from the borders, with n = 6, the
    positions X are one batch:

        # # # # # # # # X .
        # # # # # X . . . .
        # # X . . . . . . .

    The segments of a batch have equal prefix and length. wave=False: one at a time.
    """
    waiting = [row_segments(i, max(0, start - i * w), h, w, n, stride) for i in range(h)]
    while any(waiting):
        ready = []
        for above, row in zip([[], *waiting], waiting, strict=False):
            # The row above is finished, at least up to this window's right edge.
            if row and (not above or above[0].col >= row[0].left + n):
                ready.append(row[0])
        batches: dict[tuple[int, int], list[Segment]] = {}
        for segment in ready if wave else ready[:1]:
            waiting[segment.row].pop(0)
            batches.setdefault((segment.prefix, segment.length), []).append(segment)
        yield from batches.values()


def slide(
    gpt: GPT, r: Tensor, s: Tensor, u: Tensor, n: int, sampling: Sampling, start: int = 0, null: int | None = None
) -> Tensor:
    """Fill an image larger than the n x n latents that the transformer was trained on -> s (B, h, w).

    r: a map of condition tokens (B, h, w), cut to each window, or (B, R) tokens that precede every window.
    s (B, h, w): its codes before raster position `start` are kept. u (B, h, w): uniforms. null: see `continue_tokens`.
    Raises ValueError for an image smaller than the window, or a stride beyond it.
    """
    B, h, w = s.shape
    if h < n or w < n:
        raise ValueError(f"{h} x {w} latents are fewer than the {n} x {n} that the transformer was trained on")
    if sampling.stride > n:
        raise ValueError(f"a stride of {sampling.stride} is not between 1 and {n}, the side of the window")
    s = s.clone()
    for batch in schedule(h, w, n, start, sampling.wave, sampling.stride):
        prefix = torch.cat([a.window(s)[:, : a.prefix] for a in batch])  # (B * len(batch), prefix)
        tokens = torch.cat([a.window(r) for a in batch]) if r.ndim == 3 else r.repeat(len(batch), 1)
        new = continue_tokens(gpt, tokens, prefix, torch.cat([a.of(u) for a in batch]), sampling, null)
        for a, codes in zip(batch, new.split(B), strict=True):
            a.of(s).copy_(codes)
    return s


def reject(scores: Tensor, rate: float) -> Tensor:
    """Rejection sampling (Sec. 4.4). scores (n,): a classifier's, for what was asked. Returns the indices of the best
    fraction `rate`, in (0, 1], of the images, best first; one at least."""
    return scores.argsort(descending=True, stable=True)[: max(1, round(rate * len(scores)))]
