"""The marking of the notebooks' exercises: one function each, which takes a student's function and a seed.

Returning means right; an AssertionError says which property is violated, in words that help. They compare with
definitions (loops, autograd, hand-made cases), not with the package's own functions, so that a student may copy the
package and must still understand it. Another seed gives other numbers: that is what hidden tests use.
"""

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _right(name: str) -> None:
    print(f"right: {name}")


def _close(found, truth, what: str, tolerance: float = 1e-4) -> None:
    assert isinstance(found, Tensor), f"{what}: expected a tensor, got {type(found).__name__}"
    truth = torch.as_tensor(truth)
    assert found.shape == truth.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(truth.shape)}"
    assert not found.isnan().any(), f"{what}: NaN"
    error = (found.detach().double() - truth.double()).abs().max().item() if truth.numel() else 0.0
    size = truth.double().abs().max().item() if truth.numel() else 0.0
    assert error <= tolerance * max(1.0, size), f"{what}: off by {error:.3g}"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Watch(TorchFunctionMode):
    """Counts the calls of torch's functions and the numbers in their largest result."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


# 00 tour


def to_model_range(student: Callable, seed: int = 0) -> None:
    """uint8 pictures (..., H, W, 3) -> float (..., 3, H, W) in [-1, 1]."""
    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8, generator=_generator(seed))
    pixels[0, 0, 0] = torch.tensor([0, 255, 51], dtype=torch.uint8)
    x = student(pixels)
    assert x.shape == (2, 3, 5, 7), f"channels belong before the rows: got {tuple(x.shape)}, expected (2, 3, 5, 7)"
    assert x.dtype == torch.float32, f"expected float32, got {x.dtype}"
    assert x[0, 0, 0, 0] == -1, f"black (0) must become -1, not {x[0, 0, 0, 0]:.3f}"
    assert x[0, 1, 0, 0] == 1, f"white (255) must become 1, not {x[0, 1, 0, 0]:.3f}"
    _close(x, pixels.permute(0, 3, 1, 2).double() / 127.5 - 1, "the values between black and white")
    _right("to_model_range")


def bits_per_pixel(student: Callable, seed: int = 0) -> None:
    """(H, W, f, K) -> bits that the codes of a picture take, divided by its pixels."""
    assert math.isclose(student(256, 256, 16, 1024), 16 * 16 * 10 / 256**2), (
        "256 x 256 pixels with f = 16 are 16 x 16 codes of log2(1024) = 10 bits each: 2560 bits over 65536 pixels"
    )
    g = _generator(seed)
    for _ in range(5):
        m, h, w, k = (int(torch.randint(1, high, (1,), generator=g)) for high in (5, 20, 20, 12))
        f = 2**m
        truth = h * w * k / (h * f * w * f)
        found = student(h * f, w * f, f, 2**k)
        assert math.isclose(found, truth), f"H, W, f, K = {h * f}, {w * f}, {f}, {2**k}: got {found}, expected {truth}"
    _right("bits_per_pixel")


# 01 autoencoder


def latent_size(student: Callable, seed: int = 0) -> None:
    """(H, W, ch_mult) -> (h, w); ValueError where a side is not divisible by f."""
    assert tuple(student(256, 256, (1, 1, 2, 2, 4))) == (16, 16), (
        "five levels have four halvings between them (f = 16, not 32): 256 x 256 becomes 16 x 16"
    )
    g = _generator(seed)
    for _ in range(5):
        m, h, w = (int(torch.randint(low, 9, (1,), generator=g)) for low in (0, 1, 1))
        m = min(m, 5)
        H, W = h * 2**m, w * 2**m
        found = tuple(student(H, W, (1,) * (m + 1)))
        assert found == (h, w), f"{H} x {W} through {m + 1} levels: got {found}, expected {(h, w)}; mind H before W"
    try:
        student(100, 96, (1, 2, 4, 8, 16))
    except ValueError:
        pass
    else:
        raise AssertionError("100 is not divisible by f = 16: that must raise ValueError, not be rounded")
    _right("latent_size")


def receptive_field(student: Callable, seed: int = 0) -> None:
    """[(kernel, stride), ...] -> side of the input that one output sees."""
    assert student([(3, 1)]) == 3, "one 3 x 3 convolution sees 3 pixels"
    assert student([(3, 1), (3, 1)]) == 5, "two 3 x 3 convolutions see 5 pixels: each adds kernel - 1 = 2"
    assert student([(4, 2), (4, 2), (4, 1), (4, 1)]) == 34, (
        "after a stride each further pixel stands for several input pixels: the growth is multiplied by all strides "
        "before. D of two layers, (4, 2), (4, 2), (4, 1), (4, 1), sees 34 pixels"
    )
    g = _generator(seed)
    for _ in range(4):
        layers = [
            (int(torch.randint(1, 5, (1,), generator=g)), int(torch.randint(1, 3, (1,), generator=g))) for _ in range(4)
        ]
        x = torch.zeros(1, 1, 200, dtype=torch.float64, requires_grad=True)
        h = x
        for kernel, stride in layers:
            h = F.conv1d(h, torch.ones(1, 1, kernel, dtype=torch.float64), stride=stride)
        h[0, 0, 3].backward()
        seen = x.grad[0, 0].nonzero()
        truth = int(seen.max() - seen.min()) + 1
        # A stride wider than its kernel skips pixels in between, but the extent is the same.
        assert student(layers) == truth, f"{layers}: got {student(layers)}, autograd sees {truth}"
    _right("receptive_field")


# 02 quantizer


def nearest_code(student: Callable, seed: int = 0) -> None:
    """z (N, D), codebook (K, D) -> indices (N,) int64, without a loop over N or K."""
    g = _generator(seed)
    z, codebook = torch.randn(50, 7, generator=g), torch.randn(20, 7, generator=g) * 3
    truth = torch.tensor([min(range(20), key=lambda k: (row - codebook[k]).square().sum().item()) for row in z])
    found = student(z, codebook)
    assert found.shape == (50,), f"one index a row of z: got shape {tuple(found.shape)}, expected (50,)"
    assert found.dtype == torch.int64, f"indices must be int64, got {found.dtype}"
    farthest = torch.cdist(z, codebook).argmax(1)
    assert not torch.equal(found, farthest), "that is the code farthest away: argmin, not argmax"
    largest = (z @ codebook.T).argmax(1)
    assert not torch.equal(found, largest) or torch.equal(largest, truth), (
        "the largest inner product is not the nearest code: a long code wins it against a near one. |e|^2 is missing"
    )
    wrong = int((found != truth).sum())
    assert wrong == 0, f"{wrong} of 50 vectors did not get their nearest code"
    z, codebook = torch.randn(4096, 32, generator=g), torch.randn(1024, 32, generator=g)
    with Watch() as watch:
        student(z, codebook)
    assert watch.largest < 4096 * 1024 * 32, (
        "an N x K x D block was made (all differences at once): use |z - e|^2 = |z|^2 - 2 z.e + |e|^2, a matrix product"
    )
    assert watch.calls < 100, f"{watch.calls} calls of torch for 4096 x 1024: a Python loop? One matrix product will do"
    _right("nearest_code")


def straight_through(student: Callable, seed: int = 0) -> None:
    """z, z_q (N, D) -> the value of z_q with the gradient of z."""
    g = _generator(seed)
    z = torch.randn(6, 4, generator=g, requires_grad=True)
    z_q = torch.randn(6, 4, generator=g, requires_grad=True)
    upstream = torch.randn(6, 4, generator=g)
    out = student(z, z_q)
    _close(out, z_q, "forward, the value must be z_q's")
    assert out.requires_grad, "no gradient reaches z: the encoder would never learn. (Detach the difference, not all.)"
    dz, dz_q = torch.autograd.grad(out, (z, z_q), upstream, allow_unused=True)
    assert dz is not None, "no gradient reaches z: the encoder would never learn. This is the straight-through step"
    _close(dz, upstream, "the gradient that reaches z must be the one at the output, unchanged")
    assert dz_q is None or not dz_q.any(), "a gradient reaches z_q: the codes must learn from the codebook loss alone"
    _right("straight_through")


def codebook_loss(student: Callable, seed: int = 0) -> None:
    """z, z_q (N, D), beta -> |sg[z] - z_q|^2 + beta |sg[z_q] - z|^2, means over all numbers (Eq. 4)."""
    g = _generator(seed)
    z = torch.randn(6, 4, generator=g, requires_grad=True)
    z_q = torch.randn(6, 4, generator=g, requires_grad=True)
    beta = 0.25
    loss = student(z, z_q, beta)
    mse = (z - z_q).square().mean().item()
    assert loss.shape == (), f"one number is expected, got shape {tuple(loss.shape)}"
    _close(loss, (1 + beta) * mse, "the value must be (1 + beta) times the mean squared difference")
    dz, dz_q = torch.autograd.grad(loss, (z, z_q), allow_unused=True)
    assert dz is not None and dz.any(), "the commitment term moves nobody: z gets no gradient. One detach too many"
    assert dz_q is not None and dz_q.any(), "the codes get no gradient: they would never move to the latents"
    full = 2 * (z_q - z).detach() / z.numel()  # d mse / d z_q
    ratio_q, ratio_z = (dz_q / full).mean().item(), (dz / -full).mean().item()
    assert not (math.isclose(ratio_q, 1 + beta, rel_tol=1e-3) and math.isclose(ratio_z, 1 + beta, rel_tol=1e-3)), (
        "both terms move both sides: the stop-gradients (detach) are missing"
    )
    assert not (math.isclose(ratio_q, beta, rel_tol=1e-3) and math.isclose(ratio_z, 1, rel_tol=1e-3)), (
        "beta stands at the wrong term: it weighs the commitment (which moves z), not the term that moves the codes. "
        "This is the bug of the official code"
    )
    _close(dz_q, full, "the term that moves the codes has weight 1: its gradient at z_q")
    _close(dz, -beta * full, "the commitment has weight beta: its gradient at z")
    _right("codebook_loss")


# 03 perceptual loss


def normalize_features(student: Callable, seed: int = 0) -> None:
    """Feature maps (B, C, H, W) -> the same directions, at every position of length 1 over the channels."""
    f = torch.randn(2, 5, 3, 4, generator=_generator(seed)) * 10
    out = student(f)
    assert out.shape == f.shape, f"the shape must stay {tuple(f.shape)}, got {tuple(out.shape)}"
    lengths = out.square().sum(1).sqrt()
    over_space = out.square().sum((2, 3)).sqrt()
    assert not torch.allclose(over_space, torch.ones(2, 5), atol=1e-3), (
        "normalised over the positions; LPIPS scales each position to length 1 over the channels (dim 1)"
    )
    assert not torch.allclose(out, f / f.abs().sum(1, keepdim=True), atol=1e-4), "that is the L1 norm; L2 is meant"
    _close(lengths, torch.ones(2, 3, 4), "at every position the length over the channels must be 1", 1e-3)
    truth = torch.stack([f[:, :, i, j] / f[:, :, i, j].norm(dim=1)[:, None] for i in range(3) for j in range(4)], 2)
    _close(out, truth.view(2, 5, 3, 4), "the direction of each position's vector must stay", 1e-3)
    dead = f.clone()
    dead[0, :, 1, 1] = 0  # a ReLU can leave a position with nothing
    assert student(dead).isfinite().all(), "a position where all channels are 0 gives NaN or infinity: guard the norm"
    _right("normalize_features")


def layer_distance(student: Callable, seed: int = 0) -> None:
    """Normalised maps fx, fy (B, C, H, W) and w (C,) -> (B,)."""
    g = _generator(seed)
    fx, fy, w = torch.randn(3, 5, 4, 6, generator=g), torch.randn(3, 5, 4, 6, generator=g), torch.rand(5, generator=g)
    truth = torch.zeros(3)
    for b in range(3):
        for c in range(5):
            truth[b] += w[c] * (fx[b, c] - fy[b, c]).square().sum() / 24
    found = student(fx, fy, w)
    assert found.shape == (3,), f"one distance a picture: got shape {tuple(found.shape)}, expected (3,)"
    assert not torch.allclose(found, truth / 5, rtol=1e-3), "the channels are summed, only the positions are averaged"
    assert not torch.allclose(found, truth * 24, rtol=1e-3), "the positions are averaged, not summed"
    _close(found, truth, "sum over channels of w_c (fx - fy)^2, mean over positions")
    _right("layer_distance")


# 04 adversarial


def hinge_loss(student: Callable, seed: int = 0) -> None:
    """Logits of real and of fake patches -> L_D, halved."""
    zero = torch.zeros(2, 1, 3, 3)
    assert math.isclose(student(zero, zero).item(), 1.0), "a D that answers 0 to everything has the loss 1 (halved sum)"
    sure = torch.full((2, 1, 3, 3), 5.0)
    value = student(sure, -sure).item()
    assert value == 0, (
        f"a D that is right with a margin has the loss 0, not {value:.2f}: is a sign wrong, or the clamp at 0 missing?"
    )
    assert math.isclose(student(-sure, sure).item(), 6.0), "a D that is wrong everywhere by 5 has the loss 1 + 5"
    g = _generator(seed)
    real, fake = torch.randn(2, 1, 3, 3, generator=g), torch.randn(4, 1, 3, 3, generator=g)
    terms = [sum(max(0.0, 1 - v) for v in real.flatten().tolist()) / real.numel()]
    terms.append(sum(max(0.0, 1 + v) for v in fake.flatten().tolist()) / fake.numel())
    _close(student(real, fake), sum(terms) / 2, "mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat)), halved")
    _right("hinge_loss")


def adaptive_weight(student: Callable, seed: int = 0) -> None:
    """(rec_loss, gan_loss, last_weight) -> lambda of Eq. 7, a detached scalar."""
    torch.manual_seed(seed)
    layer = torch.nn.Conv2d(4, 3, 3, padding=1)
    hidden = torch.randn(2, 4, 6, 6)

    def losses(scale: float) -> tuple[Tensor, Tensor]:
        x_hat = layer(hidden)
        return (x_hat - 1).abs().mean(), scale * x_hat.square().mean()

    rec_loss, gan_loss = losses(0.01)
    found = student(rec_loss, gan_loss, layer.weight)
    assert not found.requires_grad, (
        "lambda is not detached: its own gradient would be learned from, and the network would make it small"
    )
    norms = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in losses(0.01)]
    truth = norms[0] / (norms[1] + 1e-6)
    assert not torch.isclose(found, 1 / truth, rtol=1e-2), "upside down: the reconstruction's norm stands above"
    assert found.shape == (), f"one number is expected, got shape {tuple(found.shape)}"
    _close(found, truth, "|grad rec_loss| / (|grad gan_loss| + 1e-6), at the last layer's weight", 1e-3)
    rec_loss, gan_loss = losses(0.0)
    assert student(0 * rec_loss, gan_loss, layer.weight).isfinite(), (
        "two vanishing gradients give 0 / 0: delta = 1e-6 below the line is missing"
    )
    found = student(rec_loss, gan_loss, layer.weight)
    assert found <= 1e4 + 1, "clamp lambda to [0, 10000]: a vanishing GAN gradient makes it explode"
    rec_loss, gan_loss = losses(0.01)
    student(rec_loss, gan_loss, layer.weight)
    (rec_loss + gan_loss).backward()  # the graph must still be there
    _right("adaptive_weight")


# 05 transformer


def causal_mask(student: Callable, seed: int = 0) -> None:
    """T -> (T, T) bool, True where row i may look at column j."""
    mask = student(5)
    assert mask.shape == (5, 5) and mask.dtype == torch.bool, f"expected a bool (5, 5), got {mask.dtype} {mask.shape}"
    assert mask[2, 2], "a token may see itself: the mask is off by one (position i predicts token i + 1, not i)"
    assert not mask[2, 3], "a token sees the one it has to predict: the mask is off by one"
    assert mask[4, 0], "the last token sees the first; is the mask transposed?"
    assert not mask[0, 4], "the first token sees the last: that is the future"
    T = 3 + seed % 11
    truth = torch.tensor([[j <= i for j in range(T)] for i in range(T)])
    assert torch.equal(student(T), truth), f"wrong for T = {T}"
    _right("causal_mask")


def sentence_loss(student: Callable, seed: int = 0) -> None:
    """logits (B, R + T - 1, K) of [r | s without its last], s (B, T) -> mean of -log p(s | r) over s alone."""
    g = _generator(seed)
    B, R, T, K = 2, 3, 4, 7
    logits, s = torch.randn(B, R + T - 1, K, generator=g), torch.randint(K, (B, T), generator=g)
    total = 0.0
    for b in range(B):
        for t in range(T):
            row = logits[b, R - 1 + t].tolist()  # what follows the last condition token is s_1
            total -= row[s[b, t]] - math.log(sum(map(math.exp, row)))
    found = student(logits, s)
    assert found.shape == (), f"one number, the mean over B and T: got shape {tuple(found.shape)}"
    shifted = F.cross_entropy(logits[:, :T].flatten(0, 1), s.flatten())
    assert not torch.isclose(found, shifted, rtol=1e-4), (
        "the first T logits were taken: those at the condition's places. What predicts s_1 stands at the condition's "
        "last token, number R - 1; the loss must not count the condition"
    )
    assert not math.isclose(found.item(), total / B, rel_tol=1e-4), "the mean over the tokens, not their sum"
    _close(found, total / (B * T), "-log p(s | r), mean over the tokens of s")
    _right("sentence_loss")


def top_p(student: Callable, seed: int = 0) -> None:
    """probabilities (K,), p -> the smallest set of likeliest codes that reaches p, renormalised."""
    found = student(torch.tensor([0.1, 0.5, 0.3, 0.1]), 0.6)
    assert found[1] > 0 and found[2] > 0, (
        "the code that crosses p belongs to the set: 0.5 alone does not reach 0.6, 0.5 + 0.3 does"
    )
    assert found[0] == 0 and found[3] == 0, "0.5 + 0.3 reach 0.6 already: the others must have probability 0"
    assert math.isclose(found.sum().item(), 1, rel_tol=1e-4), "what is left must be renormalised to sum 1"
    only = student(torch.tensor([0.7, 0.2, 0.1]), 0.01)
    assert only[0] == 1, "the likeliest code always stays, however small p is"
    g = _generator(seed)
    for p in (0.3, 0.9, 1.0):
        q = torch.randn(9, generator=g).softmax(0)
        kept, reached = [], 0.0
        for k in sorted(range(9), key=lambda k: -q[k].item()):
            if reached >= p:
                break
            kept.append(k)
            reached += q[k].item()
        truth = torch.zeros(9)
        truth[kept] = q[kept] / q[kept].sum()
        _close(student(q, p), truth, f"p = {p}: codes in their own places, likeliest kept, renormalised")
    _right("top_p")


def cached_attention(student: Callable, seed: int = 0) -> None:
    """q, k, v (B, 1, D) of a new token, past None or (keys, values) -> (out (B, 1, D), (keys, values))."""
    g = _generator(seed)
    q, k, v = (torch.randn(2, 6, 8, generator=g) for _ in range(3))
    truth = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    past = None
    for t in range(6):
        out, past = student(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], past)
        assert past[0].shape == (2, t + 1, 8), (
            f"after {t + 1} tokens the cache must hold {t + 1} keys, it holds {past[0].shape[1]}"
        )
        _close(out, truth[:, t : t + 1], f"token {t}: the cached result is unlike the full pass")
    _right("cached_attention")


# 06 conditioning


def sentence(student: Callable, seed: int = 0) -> None:
    """s (B, T) codes in [0, K), c (B, R) condition indices, K -> [c | s], each with numbers of its own."""
    g = _generator(seed)
    K = 16
    s, c = torch.randint(K, (3, 6), generator=g), torch.randint(5, (3, 2), generator=g)
    s[0, 0], c[0, 0] = 0, 0
    found = student(s, c, K)
    assert found.shape == (3, 8), f"condition and image together have R + T = 8 tokens: got {tuple(found.shape)}"
    assert not torch.equal(found[:, :6] % K, s) or torch.equal(found[:, 2:], s), (
        "the condition comes first: what follows it can be learned from it, what stands before it cannot"
    )
    assert found[0, 0] != 0, (
        "condition index 0 and image code 0 have the same number: the transformer cannot tell 'start' from code 0. "
        "Number the condition from K on"
    )
    assert torch.equal(found[:, 2:], s), "the image's codes must keep their numbers"
    assert torch.equal(found[:, :2], c + K), "condition tokens are numbered K + index"
    _right("sentence")


def guided(student: Callable, seed: int = 0) -> None:
    """logits with c, without c (B, K), scale -> logits to sample from."""
    g = _generator(seed)
    with_c, without_c = torch.randn(2, 9, generator=g), torch.randn(2, 9, generator=g)
    _close(student(with_c, without_c, 1.0), with_c, "scale 1 must be the model's own p(s | c)")
    _close(student(with_c, without_c, 0.0), without_c, "scale 0 must be p(s), without the condition")
    _close(student(with_c, without_c, 3.0), 3 * with_c - 2 * without_c, "scale 3: three steps from without to with")
    _right("guided")


# 07 high resolution


def window_start(student: Callable, seed: int = 0) -> None:
    """(i, size, n) -> first row (column) of the window that position i is predicted in."""
    assert student(0, 20, 8) == 0, "at the upper border the window begins at 0, not above the picture"
    assert student(19, 20, 8) == 12, "at the lower border the window ends with the picture: 20 - 8 = 12"
    assert student(10, 20, 8) == 6, "inside, i sits in the window's middle: 10 - 8 // 2 = 6"
    g = _generator(seed)
    for _ in range(20):
        n = int(torch.randint(1, 9, (1,), generator=g))
        size = n + int(torch.randint(0, 12, (1,), generator=g))
        for i in range(size):
            first = student(i, size, n)
            assert 0 <= first <= size - n, f"i = {i} of {size}, n = {n}: the window {first} leaves the picture"
            assert first <= i < first + n, f"i = {i} of {size}, n = {n}: position {i} is not in its window"
            best = min(range(size - n + 1), key=lambda a: abs(a + n // 2 - i))
            assert first == best, f"i = {i} of {size}, n = {n}: got {first}; {best} has i nearest to its middle"
    _right("window_start")


def context_of(student: Callable, seed: int = 0) -> None:
    """(i, j, h, w, n) -> positions (row, col) that p(s_ij) is conditioned on: those of its window before it."""
    g = _generator(seed)
    for _ in range(20):
        n = int(torch.randint(1, 5, (1,), generator=g))
        h, w = (n + int(torch.randint(0, 5, (1,), generator=g)) for _ in range(2))
        i, j = (int(torch.randint(size, (1,), generator=g)) for size in (h, w))
        top, left = (min(max(a - n // 2, 0), size - n) for a, size in ((i, h), (j, w)))
        truth = [(a, b) for a in range(top, top + n) for b in range(left, left + n) if a < i or (a == i and b < j)]
        found = [tuple(position) for position in student(i, j, h, w, n)]
        assert (i, j) not in found, f"({i}, {j}) itself is what is predicted: it must not be in its context"
        later = [p for p in found if p > (i, j)]
        assert not later, f"({i}, {j}): {later[0]} comes later in reading order and is not there yet"
        assert sorted(found) == truth, f"({i}, {j}) of {h} x {w}, n = {n}: got {sorted(found)}, expected {truth}"
        assert found == truth, "the context must come in reading order: the transformer's positions mean places"
    _right("context_of")


# 08 experiments


def causal_kernel(student: Callable, seed: int = 0) -> None:
    """(k, sees_itself) -> (k, k) mask of a convolution that looks only at what comes before in reading order."""
    for k in (3, 5):
        for sees_itself in (False, True):
            mask = student(k, sees_itself)
            middle = k // 2
            assert mask.shape == (k, k), f"expected ({k}, {k}), got {tuple(mask.shape)}"
            assert bool(mask[middle, middle]) == sees_itself, (
                "the first layer must not see the position it predicts, all later ones must: the middle is wrong"
            )
            assert mask[middle, middle + 1 :].sum() == 0, "to the right of the middle lies the future"
            assert mask[middle + 1 :].sum() == 0, "the rows below the middle are the future"
            assert mask[:middle].all(), "the rows above are the past, also to the right: all of it may be seen"
            assert mask[middle, :middle].all(), "in the middle row all to the left may be seen"
    _right("causal_kernel")


def accepted(student: Callable, seed: int = 0) -> None:
    """scores (n,), rate -> indices of the best share, best first; one at least."""
    scores = torch.rand(40, generator=_generator(seed))
    for rate, count in ((0.25, 10), (1.0, 40), (0.001, 1)):
        found = student(scores, rate)
        assert len(found) == count, f"rate {rate} of 40 pictures keeps {count}, not {len(found)}"
        truth = sorted(range(40), key=lambda i: -scores[i].item())[:count]
        worst = sorted(range(40), key=lambda i: scores[i].item())[:count]
        assert found.tolist() != worst or worst == truth, "those are the worst: a high score is good"
        assert found.tolist() == truth, "the best first"
    _right("accepted")


ALL = {name: f for name, f in globals().items() if inspect.isfunction(f) and not name.startswith("_")}
