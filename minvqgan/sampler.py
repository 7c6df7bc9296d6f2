"""One token after another, and a window that slides over images of any size (Sec. 3.2, Fig. 3).

    s_i ~ p(s_i | s_<i, c)        with the distribution sharpened (temperature), cut (top-k, top-p), or pulled towards c

Randomness is one uniform number u per token position, drawn in advance: a token is the code at which the cumulative
distribution passes u. So a seed gives the same image whatever else is in the batch, with or without the cache, and in
whatever order a large image is filled.

`gpt.bfloat16()` converts the weights once, and a token then costs half the memory traffic; logits are filtered in
float32. Rounding is a part of the seed: an image sampled in bfloat16 is another one than that in float32, but the same
for every batch size (for sizes from 2 on where a window slides, or little is left to complete).

Letters: B batch, K codes, R condition tokens, T image tokens, h x w latents, n x n the window.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gpt import GPT, KVCache


@dataclass
class Sampling:
    """How a token is chosen. The defaults sample from the model's distribution as it is.

    temperature: above 0; below 1 sharpens. 0 means greedy, the likeliest code.
    top_k: only the k likeliest codes. top_p: only the likeliest codes that together have this probability.
    guidance: 1 is the model's own p(s | c); above 1 what c changes is exaggerated (needs a model trained with dropped
        conditions; Ho & Salimans 2022, arXiv:2207.12598)
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:  # so that NaN is refused too
            raise ValueError(f"temperature {self.temperature} is not 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} leaves no code")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]")
        if not abs(self.guidance) < float("inf"):
            raise ValueError(f"guidance {self.guidance} is not a finite number")


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """logits (B, K) -> (B, K) with -inf at the codes that may not be chosen. top-p: the smallest set of likeliest codes
    whose probabilities reach top_p (Holtzman et al. 2019, arXiv:1904.09751), of those that top-k leaves; the likeliest
    one always stays. Of equal logits the first ones stay."""
    K = logits.shape[1]
    k, top_p = min(top_k or K, K), 1 if top_p is None else top_p
    if k == K and top_p == 1:
        return logits
    likeliest = logits.topk(k).values  # (B, k), falling; much faster than sorting all K where k is small
    left = torch.full_like(likeliest[:, :1], k, dtype=torch.long)  # (B, 1), how many codes stay
    if top_p < 1:
        p = likeliest.softmax(1)
        # While all likelier codes do not reach top_p; a top_p that is 0 in float32 is reached by none.
        left = (p.cumsum(1) - p < top_p).sum(1, keepdim=True).clamp_min(1)
    last = likeliest.gather(1, left - 1)  # (B, 1), the lowest logit that stays
    above, equal = logits > last, logits == last
    first = equal.cumsum(1) <= left - above.sum(1, keepdim=True)  # a threshold alone would let all equal ones stay
    return torch.where(above | equal & first, logits, float("-inf"))


def choose(logits: Tensor, u: Tensor, sampling: Sampling) -> Tensor:
    """logits (B, K) float32, u (B,) uniform in [0, 1) -> codes (B,). Without float64, which MPS does not have."""
    if sampling.temperature < 1e-30:  # what float32 cannot divide by
        return logits.argmax(1)
    logits = (logits - logits.amax(1, keepdim=True)) / sampling.temperature  # at most 0: no overflow
    p = filter_logits(logits, sampling.top_k, sampling.top_p).softmax(1)
    # A GPU adds in any order, so its sums can rise by a rounding error at a code of p = 0: those are never passed. And
    # u is scaled by the last sum, which rounding leaves a hair below 1: u above it would fall off the end.
    cumulative = p.cumsum(1) * (p > 0)  # (B, K)
    return (cumulative > u[:, None] * cumulative.amax(1, keepdim=True)).byte().argmax(1)  # the first one passed


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """The u of every token position, (len(seeds), count), each row from its own seed."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def continue_tokens(
    gpt: GPT,
    r: Tensor,
    s: Tensor,
    u: Tensor,
    sampling: Sampling,
    null: Tensor | None = None,
    use_cache: bool = True,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Continue s by as many tokens as u has: [r | s | new] -> new (B, T_new).

    r (B, R) condition tokens, s (B, T) image tokens that are there already, u (B, T_new) uniforms.
    null (B, R): tokens of "no condition", needed for guidance other than 1.
    use_cache=False recomputes everything for each token: the definition, and the slow way to check the cache.
    """
    guided, T_new = sampling.guidance != 1, u.shape[1]
    if guided and null is None:
        raise ValueError("guidance needs a model that was trained with dropped conditions")
    rows = [r, null] if guided else [r]  # read in one batch
    if len(u) == 1 and not guided and gpt.head.weight.dtype == torch.bfloat16 and T_new >= r.shape[1] + s.shape[1]:
        # A CPU rounds the product of a single row differently, and two take as long as one. Not where most of the work
        # is reading what is there: that would be read twice.
        rows = [r, r]
    tokens, new = torch.cat([torch.cat([row, s], 1) for row in rows]), []
    with torch.inference_mode():  # no_grad, and no bookkeeping of views either: 6 % of the time on a CPU
        length = tokens.shape[1] + T_new
        cache = KVCache(gpt.config, len(tokens), length, gpt.position_embedding) if use_cache else None
        for i in range(T_new):
            logits, *without_c = gpt(tokens, cache, last_only=True)[:, 0].float().chunk(len(rows))  # (B, K)
            if guided:
                logits = without_c[0] + sampling.guidance * (logits - without_c[0])
            code = choose(logits, u[:, i], sampling)  # (B,)
            new.append(code)
            column = code.repeat(len(rows))[:, None]
            tokens = column if use_cache else torch.cat([tokens, column], 1)
            if on_token:
                on_token(len(code))
    # Joined out here, because what is made in inference mode must never come near training again.
    return torch.stack(new, 1) if new else s.new_empty(len(u), 0)


def window_start(i: int, size: int, n: int, stride: int = 1) -> int:
    """First row (or column) of the window in which position i of `size` is predicted: i sits in its middle, n // 2, or
    nearer to its border where the image ends (Fig. 3).

    DEPARTURE: with a stride of N the window stands only at every N-th place, and the N positions around its middle are
    predicted in it: N codes for one reading of what stands before them, which takes a third of the time at N = 4, for
    up to N / 2 columns less of context on either side. Measured at n = 8 on 64 x 64 latents: held-out codes cost 3.117
    nats at N = 1, 3.116 at 2, 3.148 at 4, 3.186 at 8. At 4 colours change more often within an object, at 8 seams are
    seen where windows meet.
    """
    return min(max((i - n // 2 + stride // 2) // stride * stride, 0), size - n)


@dataclass(frozen=True)
class Run:
    """Neighbouring positions of one row that are predicted in the same window, so that one cache serves them all."""

    row: int
    col: int
    length: int
    top: int  # of the window
    left: int

    def prefix(self, n: int) -> int:
        """Tokens of the window that come before the run's first one."""
        return (self.row - self.top) * n + self.col - self.left


def row_runs(row: int, first: int, h: int, w: int, n: int, stride: int = 1) -> list[Run]:
    """The columns of a row from `first` on, cut into runs."""
    runs: list[Run] = []
    for col in range(first, w):
        top, left = window_start(row, h, n), window_start(col, w, n, stride)
        if runs and runs[-1].left == left:
            last = runs.pop()
            runs.append(Run(row, last.col, last.length + 1, top, left))
        else:
            runs.append(Run(row, col, 1, top, left))
    return runs


def schedule(h: int, w: int, n: int, start: int = 0, wave: bool = True, stride: int = 1) -> Iterator[list[Run]]:
    """All runs of an h x w image from raster position `start` on, in batches that may be predicted at once.

    A run needs every token of its window that comes before it in reading order: in its own row all to the left, in the
    rows above all up to the window's right edge. So a row follows half a window, n / 2 columns, behind the one above:
    about 2 w / n rows advance together as a slanted wave front. A batch holds runs of equal prefix and length.
    wave=False: one by one, in reading order.
    """
    waiting = [row_runs(i, max(0, start - i * w), h, w, n, stride) for i in range(h)]
    done = [min(w, max(0, start - i * w)) for i in range(h)]  # columns finished in each row
    while any(waiting):
        ready = []
        for i in range(h):
            if waiting[i] and (i == 0 or done[i - 1] >= waiting[i][0].left + n):
                ready.append(waiting[i][0])
                if not wave:
                    break
        batches: dict[tuple[int, int], list[Run]] = {}
        for run in ready:
            batches.setdefault((run.prefix(n), run.length), []).append(run)
            waiting[run.row].pop(0)
        yield from batches.values()
        for run in ready:
            done[run.row] = run.col + run.length


def slide(
    gpt: GPT,
    r: Tensor,
    s: Tensor,
    u: Tensor,
    n: int,
    sampling: Sampling,
    start: int = 0,
    null: int | None = None,
    wave: bool = True,
    stride: int = 1,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Fill an image larger than the n x n latents that the transformer was trained on -> s (B, h, w).

    r: a map of condition tokens (B, h, w), cut to each window, or (B, R) tokens that go before every window.
    s (B, h, w): its tokens before raster position `start` are kept. u (B, h, w): uniforms. null: the dropped condition.
    stride: columns by which the window moves, 1 to n; see `window_start`.
    Raises ValueError for another stride, and when the image is smaller than the window.
    """
    B, h, w = s.shape
    if h < n or w < n:
        raise ValueError(f"{h} x {w} latents are fewer than the {n} x {n} that the transformer was trained on")
    if not 1 <= stride <= n:
        raise ValueError(f"a stride of {stride} is not between 1 and {n}, the side of the window")
    s = s.clone()
    for runs in schedule(h, w, n, start, wave, stride):

        def cut(m: Tensor, runs=runs) -> Tensor:  # the runs' windows, (B * len(runs), n * n)
            return torch.cat([m[:, a.top : a.top + n, a.left : a.left + n].flatten(1) for a in runs])

        prefix, length = runs[0].prefix(n), runs[0].length
        tokens = cut(r) if r.ndim == 3 else r.repeat(len(runs), 1)
        nulls = None if null is None else torch.full_like(tokens, null)
        numbers = torch.cat([u[:, a.row, a.col : a.col + length] for a in runs])
        new = continue_tokens(gpt, tokens, cut(s)[:, :prefix], numbers, sampling, nulls, on_token=on_token)
        for a, codes in zip(runs, new.split(B), strict=True):
            s[:, a.row, a.col : a.col + length] = codes
    return s


def reject(scores: Tensor, rate: float) -> Tensor:
    """Rejection sampling (Sec. 4.4): of n images with a classifier's `scores` (n,) for what was asked, the indices of
    the best share `rate` in (0, 1], best first; one at least."""
    if not 0 < rate <= 1:
        raise ValueError(f"an acceptance rate of {rate} is not in (0, 1]")
    return scores.argsort(descending=True, stable=True)[: max(1, round(rate * len(scores)))]
