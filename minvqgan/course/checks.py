"""The marking of the notebooks' exercises: one function each, which takes a student's function or class and a seed.

Returning means right; an AssertionError says which property is violated, in words that help. They compare with
definitions (loops, autograd, hand-made cases), not with the package's own functions, so that a student may copy the
package and must still understand it. Another seed gives other numbers: that is what hidden tests use.
"""

import copy
import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..discriminator import PatchDiscriminator
from ..gpt import GPT, GPTConfig
from ..vqgan import VQGAN, VQGANConfig


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


def _call(student: Callable, *args):
    """The student's answer. What was handed in must come out as it was: others still need it."""
    before = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
    found = student(*args)
    for number, (now, then) in enumerate(zip(args, before, strict=True), start=1):
        assert not isinstance(now, Tensor) or torch.equal(now, then), (
            f"argument {number} was changed in place: whoever called still needs it. Make a new tensor instead"
        )
    return found


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
    """uint8 images (..., H, W, 3) -> float (..., 3, H, W) in [-1, 1]."""
    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8, generator=_generator(seed))
    pixels[0, 0, 0] = torch.tensor([0, 255, 51], dtype=torch.uint8)
    x = _call(student, pixels)
    assert x.shape == (2, 3, 5, 7), f"channels belong before the rows: got {tuple(x.shape)}, expected (2, 3, 5, 7)"
    assert x.dtype == torch.float32, f"expected float32, got {x.dtype}"
    assert x[0, 0, 0, 0] == -1, f"black (0) must become -1, not {x[0, 0, 0, 0]:.3f}"
    assert x[0, 1, 0, 0] == 1, f"white (255) must become 1, not {x[0, 1, 0, 0]:.3f}"
    _close(x, pixels.permute(0, 3, 1, 2).double() / 127.5 - 1, "the values between black and white")
    for shape, expected in (((5, 7, 3), (3, 5, 7)), ((2, 4, 5, 7, 3), (2, 4, 3, 5, 7))):
        try:
            found = tuple(student(torch.zeros(shape, dtype=torch.uint8)).shape)
        except RuntimeError:
            found = "an error"
        assert found == expected, (
            f"(..., H, W, 3) means any number of dimensions before: {shape} must become {expected}, got {found}. "
            "Count the axes from the end"
        )
    _right("to_model_range")


def bits_per_pixel(student: Callable, seed: int = 0) -> None:
    """(H, W, f, K) -> bits that the codes of an image take, divided by its pixels."""
    assert math.isclose(student(256, 256, 16, 1024), 16 * 16 * 10 / 256**2), (
        "256 x 256 pixels with f = 16 are 16 x 16 codes of log2(1024) = 10 bits each: 2560 bits over 65536 pixels"
    )
    assert math.isclose(student(32, 32, 4, 1000), 64 * math.log2(1000) / 32**2), (
        "1000 codes carry log2(1000) = 9.97 bits each: do not round. (An entropy coder reaches it.)"
    )
    g = _generator(seed)
    for _ in range(5):
        m, h, w, K = (int(torch.randint(1, high, (1,), generator=g)) for high in (5, 20, 20, 3000))
        f = 2**m
        truth = h * w * math.log2(K) / (h * f * w * f)
        found = student(h * f, w * f, f, K)
        assert math.isclose(found, truth), f"H, W, f, K = {h * f}, {w * f}, {f}, {K}: got {found}, expected {truth}"
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
    for H, W in ((100, 96), (96, 100)):
        try:
            student(H, W, (1, 2, 4, 8, 16))
        except ValueError:
            continue
        raise AssertionError(
            f"{H} x {W}: 100 is not divisible by f = 16. Either side must raise ValueError, not be rounded"
        )
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


def side_seen(student: Callable, seed: int = 0) -> None:
    """(network, size) -> side of the square of input pixels that the middle of the network's output depends on."""
    g = _generator(seed)
    for _ in range(4):
        kernels = [1 + 2 * int(torch.randint(0, 3, (1,), generator=g)) for _ in range(3)]
        strides = [1 + int(torch.randint(0, 2, (1,), generator=g)) for _ in range(3)]
        layers, field, step = [], 1, 1
        for channels, kernel, stride in zip((1, 4, 4), kernels, strides, strict=True):
            layers.append(nn.Conv2d(channels, 4, kernel, stride, padding=kernel // 2))
            nn.init.normal_(layers[-1].weight, generator=g)
            field, step = field + (kernel - 1) * step, step * stride
        network = nn.Sequential(*layers)
        found = _call(student, network, 96)
        what = f"kernels {kernels}, strides {strides}"
        assert found != 96 or field >= 96, (
            f"{what}: every pixel was counted. Only those with a gradient other than 0 are seen"
        )
        assert found == field, f"{what}: got {found}, the middle output depends on {field} pixels a side"
        assert all(p.grad is None for p in network.parameters()), (
            "gradients were left in the network's weights: torch.autograd.grad asks for that of the image alone"
        )
    blind = nn.Conv2d(1, 2, 3, padding=1)
    with torch.no_grad():
        blind.weight[0] = 0
    try:
        found = student(blind, 32)
    except (RuntimeError, IndexError, ValueError):
        found = "an error"
    assert found == 3, f"all channels of the output count: here the first depends on nothing. Got {found}, expected 3"
    _right("side_seen")


def ResDown(student: Callable, seed: int = 0) -> None:
    """A module of (c_in, c_out): x (B, c_in, H, W) -> (B, c_out, H/2, W/2), a residual block and a halving."""
    torch.manual_seed(seed)
    for c_in, c_out in ((6, 6), (4, 8)):
        block = student(c_in, c_out)
        kinds = {
            "norm1": nn.GroupNorm,
            "conv1": nn.Conv2d,
            "norm2": nn.GroupNorm,
            "conv2": nn.Conv2d,
            "down": nn.Conv2d,
        }
        for name, kind in kinds.items():
            assert isinstance(getattr(block, name, None), kind), f"self.{name} must be an nn.{kind.__name__}"
        skip = getattr(block, "skip", None)
        if c_in == c_out:
            assert isinstance(skip, nn.Identity), (
                "with equal channels the skip must be nn.Identity: nothing to learn there"
            )
        else:
            assert isinstance(skip, nn.Conv2d) and skip.kernel_size == (1, 1), (
                f"{c_in} channels cannot be added to {c_out}: the skip must be a 1 x 1 convolution"
            )
        with torch.no_grad():
            for p in block.parameters():
                p.copy_(torch.randn_like(p) * 0.5)
        x = torch.randn(2, c_in, 8, 6)
        with torch.no_grad():
            out = _call(block, x)
            h = block.conv1(F.silu(block.norm1(x)))
            h = block.conv2(F.silu(block.norm2(h)))
            weights = block.down.weight, block.down.bias
            truth = F.conv2d(F.pad(skip(x) + h, (0, 1, 0, 1)), *weights, stride=2)
            around = F.conv2d(skip(x) + h, *weights, stride=2, padding=1)
            alone = F.conv2d(F.pad(h, (0, 1, 0, 1)), *weights, stride=2)
        assert out.shape == truth.shape, (
            f"8 x 6 must become 4 x 3: got {tuple(out.shape)}, expected {tuple(truth.shape)}"
        )
        assert not torch.allclose(out, around, atol=1e-4), (
            "padding=1 puts zeros all around, and each window is shifted by a pixel: zeros at the right and bottom only"
        )
        assert not torch.allclose(out, alone, atol=1e-4), "the skip is missing: the block *adds* to its input"
        _close(
            out,
            truth,
            "skip(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))), then zeros at the right and bottom and down",
        )
    _right("ResDown")


# 02 quantizer


def nearest_in_chunks(student: Callable, seed: int = 0) -> None:
    """z (N, D), codebook (K, D), chunk -> indices (N,) int64, by N x chunk distances at a time."""
    g = _generator(seed)
    z, codebook = torch.randn(50, 7, generator=g) * 2, torch.randn(22, 7, generator=g) * 3
    codebook[15] = codebook[3]  # of equal distances the first counts, as in argmin
    z[0], z[1] = codebook[21] + 0.01, codebook[15]
    truth = torch.tensor([min(range(22), key=lambda k: (row - codebook[k]).square().sum().item()) for row in z])
    found = _call(student, z, codebook, 5)
    assert found.shape == (50,), f"one index a row of z: got shape {tuple(found.shape)}, expected (50,)"
    assert found.dtype == torch.int64, f"indices must be int64, got {found.dtype}"
    farthest = torch.cdist(z, codebook).argmax(1)
    assert not torch.equal(found, farthest), "that is the code farthest away: argmin, not argmax"
    largest = (z @ codebook.T).argmax(1)
    assert not torch.equal(found, largest) or torch.equal(largest, truth), (
        "the largest inner product is not the nearest code: a long code wins it against a near one. |e|^2 is missing"
    )
    assert found.max() >= 5, "all indices are below the chunk's size: add where the chunk begins in the codebook"
    assert found[0] == 21, "22 codes in chunks of 5: the last chunk has 2. Was it left out?"
    equal = (found == 15) & (truth == 3)
    wrong = int(((found != truth) & ~equal).sum())
    assert wrong == 0, f"{wrong} of 50 vectors did not get their nearest code"
    assert not equal.any(), "codes 3 and 15 are equal: the first counts, so only a *smaller* distance replaces the best"
    for chunk in (1, 22, 100):
        assert torch.equal(student(z, codebook, chunk), truth), (
            f"the codes found must not depend on the chunk's size ({chunk})"
        )
    z, codebook = torch.randn(2048, 8, generator=g), torch.randn(1024, 8, generator=g)
    with Watch() as watch:
        student(z, codebook, 32)
    assert watch.largest < 2048 * 1024, "all N x K distances were made at once: the memory must not grow with K"
    assert watch.largest <= 2048 * 32, (
        "an N x chunk x D block was made (all differences at once): use |z - e|^2 = |z|^2 - 2 z.e + |e|^2, a product"
    )
    assert watch.calls < 1500, f"{watch.calls} calls of torch for 32 chunks: a Python loop over the rows of z?"
    _right("nearest_in_chunks")


def straight_through(student: Callable, seed: int = 0) -> None:
    """z, z_q (N, D) -> the value of z_q with the gradient of z."""
    g = _generator(seed)
    z = torch.randn(6, 4, generator=g, requires_grad=True)
    z_q = torch.randn(6, 4, generator=g, requires_grad=True)
    upstream = torch.randn(6, 4, generator=g)
    out = _call(student, z, z_q)
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
    beta = 0.1 + 0.8 * torch.rand((), generator=g).item()
    loss = _call(student, z, z_q, beta)
    mse = (z - z_q).square().mean().item()
    assert not math.isclose(loss.item(), 1.25 * mse, rel_tol=1e-4), (
        f"beta is {beta:.3f} here, and the loss is that of 0.25: use the argument"
    )
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


def Quantizer(student: Callable, seed: int = 0) -> None:
    """A module of (codebook_size, code_dim, beta): z (B, D, h, w) -> (z_q (B, D, h, w), indices (B, h, w), loss)."""
    g = _generator(seed)
    B, D, h, w, K, beta = 2, 4, 3, 5, 9, 0.1 + 0.8 * torch.rand((), generator=g).item()
    quantizer = student(K, D, beta)
    assert isinstance(getattr(quantizer, "codebook", None), nn.Embedding), "self.codebook must be an nn.Embedding"
    codes = quantizer.codebook.weight
    assert codes.shape == (K, D), (
        f"the codebook holds K codes of D dimensions: got {tuple(codes.shape)}, expected {(K, D)}"
    )
    with torch.no_grad():
        codes.copy_(torch.randn(K, D, generator=g))
    z = torch.randn(B, D, h, w, generator=g, requires_grad=True)
    z_q, indices, loss = _call(quantizer, z)
    assert z_q.shape == z.shape, f"z_q has the shape of z, {tuple(z.shape)}: got {tuple(z_q.shape)}"
    assert indices.shape == (B, h, w) and indices.dtype == torch.int64, (
        f"indices are int64 (B, h, w) = {(B, h, w)}: got {indices.dtype} {tuple(indices.shape)}"
    )
    truth = torch.zeros(B, h, w, dtype=torch.int64)
    for b in range(B):
        for i in range(h):
            for j in range(w):
                truth[b, i, j] = (z[b, :, i, j] - codes).square().sum(1).argmin()
    assert torch.equal(indices, truth), (
        "indices are not those of the nearest codes. Did a place get its neighbours' numbers? (B, D, h, w) must "
        "become (B, h, w, D) before it becomes rows: view and reshape do not move an axis"
    )
    _close(z_q, codes[truth].permute(0, 3, 1, 2), "z_q holds the code of each place: is its axis D moved back?")
    upstream = torch.randn(z.shape, generator=g)
    dz, dcodes = torch.autograd.grad(z_q, (z, codes), upstream, retain_graph=True, allow_unused=True)
    assert dz is not None, "no gradient of z_q reaches z: the encoder would never learn (straight through)"
    _close(dz, upstream, "straight through: the gradient at z must be the one at z_q")
    assert dcodes is None or not dcodes.any(), "the gradient of z_q reaches the codes: they learn from the loss alone"
    dz, dcodes = torch.autograd.grad(loss, (z, codes), allow_unused=True)
    assert dz is not None and dcodes is not None, "the loss has two terms: one moves the codes, one the latents"
    leaf, rows = z.detach(), codes.detach()[truth].permute(0, 3, 1, 2)
    _close(loss, (1 + beta) * (leaf - rows).square().mean(), "the loss: (1 + beta) times the mean squared difference")
    _close(dz, beta * 2 * (leaf - rows) / z.numel(), "beta weighs the commitment: the loss' gradient at z")
    pull = torch.zeros(K, D).index_add(
        0, truth.flatten(), (2 * (rows - leaf) / z.numel()).permute(0, 2, 3, 1).reshape(-1, D)
    )
    _close(dcodes, pull, "each code is moved by all the latents that chose it: the loss' gradient at the codebook")
    _right("Quantizer")


def revive(student: Callable, seed: int = 0) -> None:
    """(codebook (K, D), counts (K,), latents (N, D)) -> the codebook with unused codes moved onto latents."""
    g = _generator(seed)
    K, D, N = 12, 3, 40
    codebook, latents = torch.randn(K, D, generator=g), torch.randn(N, D, generator=g) + 5
    counts = torch.randint(1, 9, (K,), generator=g)
    unused = torch.randperm(K, generator=g)[:7]
    counts[unused] = 0
    found = _call(student, codebook, counts, latents)
    assert found.shape == (K, D), f"the shape must stay {(K, D)}, got {tuple(found.shape)}"
    used = counts > 0
    assert torch.equal(found[used], codebook[used]), "codes that are used must stay as they are"
    rows = [
        int((latents == code).all(1).nonzero()[0, 0]) if (latents == code).all(1).any() else None
        for code in found[~used]
    ]
    assert any(row is not None for row in rows), "unused codes must be moved onto latents of the batch"
    assert None not in rows, "each unused code must lie exactly on one of the latents"
    assert len(set(rows)) == len(rows), (
        "two codes were put onto the same latent, where only one of them will ever be chosen: draw without repeating"
    )
    again = [_call(student, codebook, counts, latents) for _ in range(4)]
    assert any(not torch.equal(found, other) for other in again), (
        "the same latents every time: draw at random, or all new codes come from one corner of one image"
    )
    few = _call(student, codebook, torch.zeros_like(counts), latents[:5])
    assert few.isfinite().all() and few.shape == (K, D), "with fewer latents than unused codes as many as possible move"
    nothing = _call(student, codebook, torch.ones_like(counts), latents)
    assert torch.equal(nothing, codebook), "where every code is used, nothing changes"
    _right("revive")


# 03 perceptual loss


def normalize_features(student: Callable, seed: int = 0) -> None:
    """Feature maps (B, C, H, W) -> the same directions, at every position of length 1 over the channels."""
    f = torch.randn(2, 5, 3, 4, generator=_generator(seed)) * 10
    out = _call(student, f)
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
    dead.requires_grad_()
    out = student(dead)
    assert out.isfinite().all(), "a position where all channels are 0 gives NaN or infinity: guard the norm"
    (grad,) = torch.autograd.grad(out.sum(), dead)
    assert grad.isfinite().all(), (
        "the gradient where all channels are 0 is NaN: the root's slope at 0 is infinite. Add the guard under the root"
    )
    assert grad.abs().max() < 1e6, (
        f"the gradient where all channels are 0 is {grad.abs().max():.0e}, and one such step ruins the decoder. The "
        "guard must stand under the root: (sum + 1e-8).sqrt() has a slope of 1e4 at most"
    )
    _right("normalize_features")


def layer_distance(student: Callable, seed: int = 0) -> None:
    """Normalised maps fx, fy (B, C, H, W) and w (C,) -> (B,)."""
    g = _generator(seed)
    fx, fy, w = torch.randn(3, 5, 4, 6, generator=g), torch.randn(3, 5, 4, 6, generator=g), torch.rand(5, generator=g)
    truth = torch.zeros(3)
    for b in range(3):
        for c in range(5):
            truth[b] += w[c] * (fx[b, c] - fy[b, c]).square().sum() / 24
    found = _call(student, fx, fy, w)
    assert found.shape == (3,), f"one distance an image: got shape {tuple(found.shape)}, expected (3,)"
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
    before, layer = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3, padding=1)
    z = torch.randn(2, 2, 6, 6)

    def losses(scale: float) -> tuple[Tensor, Tensor]:
        x_hat = layer(before(z))
        return (x_hat - 1).abs().mean(), scale * x_hat.square().mean()

    rec_loss, gan_loss = losses(0.01)
    found = student(rec_loss, gan_loss, layer.weight)
    assert not found.requires_grad, (
        "lambda is not detached: its own gradient would be learned from, and the network would make it small"
    )
    assert all(p.grad is None for p in [*before.parameters(), *layer.parameters()]), (
        "a gradient was left in .grad, which the step that follows would add to its own: backward() reaches every "
        "weight, torch.autograd.grad only the one that is asked for"
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


def _two_colours(count: int, g: torch.Generator) -> Tensor:
    """Images (count, 3, 16, 16): one colour on the left, another on the right."""
    colours = torch.rand(count, 3, 1, 2, generator=g) * 1.6 - 0.8
    return colours.repeat_interleave(8, 3).expand(-1, -1, 16, -1).contiguous()


def _stage_one_gradients(vqgan: nn.Module, disc: nn.Module, x: Tensor, weight: float) -> dict:
    """The gradients of one step by the definition, and of what is easily added or forgotten."""
    G, D = list(vqgan.parameters()), list(disc.parameters())
    x_hat, quantized = vqgan(x)
    l1, gan = (x - x_hat).abs().mean(), -disc(x_hat).mean()
    last = vqgan.decoder.conv_out.weight
    rec_norm, gan_norm = (torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (l1, gan))
    lambda_ = rec_norm / (gan_norm + 1e-6)

    def flat(loss: Tensor, parameters: list) -> Tensor:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if d is None else d.flatten()
                for p, d in zip(parameters, grads, strict=True)
            ]
        )

    disc_loss = 0.5 * (torch.relu(1 - disc(x)).mean() + torch.relu(1 + disc(x_hat)).mean())
    return {
        "l1": l1.item(),
        "lambda": lambda_.item(),
        "rec": flat(l1, G),
        "codebook": flat(quantized.loss, G),
        "gan": flat(weight * gan, G),
        "gan in D": flat(weight * lambda_ * gan, D),
        "disc in G": flat(disc_loss, G),
        "disc": flat(disc_loss, D),
    }


def stage_one(student: Callable, seed: int = 0) -> None:
    """(vqgan, disc, opt_g, opt_d, x, disc_weight) -> (L1, lambda), after one step of both networks."""
    g = _generator(seed)
    torch.manual_seed(seed)
    config = VQGANConfig(image_size=16, ch=8, ch_mult=(1, 2), z_channels=16, code_dim=4, codebook_size=32)
    vqgan, disc = VQGAN(config), PatchDiscriminator(channels=8, num_layers=1)
    with torch.no_grad():  # logits of size 1, on both sides of the margin
        disc.layers[-1].weight *= 20
    weight = 0.3 + 0.5 * torch.rand((), generator=g).item()
    networks = {"G": vqgan, "D": disc}
    # With SGD of rate 1 what a step takes away *is* the gradient.
    opts = {name: torch.optim.SGD(net.parameters(), 1.0) for name, net in networks.items()}

    def numbers(net: nn.Module) -> Tensor:
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    previous = None
    for _ in range(2):
        x = _two_colours(4, g)
        truth = _stage_one_gradients(copy.deepcopy(vqgan), copy.deepcopy(disc), x, weight)
        before = {name: numbers(net) for name, net in networks.items()}
        found = _call(student, vqgan, disc, opts["G"], opts["D"], x, weight)
        moved = {name: before[name] - numbers(net) for name, net in networks.items()}
        assert isinstance(found, tuple) and len(found) == 2, "return two numbers: (L1, lambda)"
        l1, lambda_ = (float(value) for value in found)
        assert moved["G"].any() and moved["D"].any(), "after the step both networks must have moved: opt_g and opt_d"

        def alike(a: Tensor, b: Tensor) -> bool:
            return ((a - b).norm() < 2e-3 * b.norm() + 1e-7).item()

        rec, codebook, gan = (truth[name] for name in ("rec", "codebook", "gan"))
        right = rec + codebook + truth["lambda"] * gan
        assert previous is None or not alike(moved["G"], right + previous), (
            "the second step still holds the first one's gradients: zero_grad"
        )
        assert not alike(moved["G"], right + truth["disc in G"]), (
            "D's loss moved G: show D x_hat.detach(), or G learns to be called fake"
        )
        assert not alike(moved["G"], rec + codebook + gan), "L_GAN is not weighted by lambda"
        assert not alike(moved["G"], rec + truth["lambda"] * gan), "the codebook loss, quantized.loss, is missing"
        assert not alike(moved["G"], rec + codebook + truth["lambda"] * gan / weight), "disc_weight is missing"
        assert alike(moved["G"], right), (
            "G must move along L1 + L_VQ + disc_weight lambda L_GAN, L_GAN = -mean D(x_hat)"
        )
        assert not alike(moved["D"], truth["disc"] + truth["gan in D"]), (
            "G's loss left a gradient in D, which now learns to call fakes real: clear it before D's own backward pass"
        )
        assert alike(moved["D"], truth["disc"]), (
            "D must move along the halved hinge loss of x and of the same x_hat that G learned from"
        )
        assert math.isclose(l1, truth["l1"], rel_tol=1e-3), f"L1 is {truth['l1']:.4f} here, not {l1:.4f}"
        assert math.isclose(lambda_, truth["lambda"], rel_tol=1e-2), (
            f"lambda is {truth['lambda']:.4f} here, not {lambda_:.4f}"
        )
        previous = moved["G"]
        with torch.no_grad():  # back, since a step of rate 1 is far too long
            for name, net in networks.items():
                nn.utils.vector_to_parameters(before[name] - 1e-3 * moved[name], net.parameters())
    _right("stage_one")


# 05 transformer


def causal_mask(student: Callable, seed: int = 0) -> None:
    """T -> (T, T) bool, True where row i may look at column j."""
    mask = student(5)
    assert mask.shape == (5, 5) and mask.dtype == torch.bool, f"expected a bool (5, 5), got {mask.dtype} {mask.shape}"
    T = 3 + seed % 11
    truth = torch.tensor([[j <= i for j in range(T)] for i in range(T)])
    assert not torch.equal(student(T), truth.T), (
        "the mask is transposed: row i is the position that looks, column j what it looks at; row 0 sees itself alone"
    )
    assert mask[2, 2], "a token may see itself: the mask is off by one (position i predicts token i + 1, not i)"
    assert not mask[2, 3], "a token sees the one it has to predict: the mask is off by one"
    assert mask[4, 0], "the last token sees the first one too"
    assert not mask[0, 4], "the first token sees the last: that is the future"
    assert torch.equal(student(T), truth), f"wrong for T = {T}"
    _right("causal_mask")


def sequence_loss(student: Callable, seed: int = 0) -> None:
    """logits (B, R + T - 1, K) of [r | s without its last], s (B, T) -> mean of -log p(s | r) over s alone."""
    g = _generator(seed)
    B, R, T, K = 2, 3, 4, 7
    logits, s = torch.randn(B, R + T - 1, K, generator=g), torch.randint(K, (B, T), generator=g)
    total = 0.0
    for b in range(B):
        for t in range(T):
            row = logits[b, R - 1 + t].tolist()  # what follows the last condition token is s_1
            total -= row[s[b, t]] - math.log(sum(map(math.exp, row)))
    found = _call(student, logits, s)
    assert found.shape == (), f"one number, the mean over B and T: got shape {tuple(found.shape)}"
    shifted = F.cross_entropy(logits[:, :T].flatten(0, 1), s.flatten())
    assert not torch.isclose(found, shifted, rtol=1e-4), (
        "the first T logits were taken: those at the condition's places. What predicts s_1 stands at the condition's "
        "last token, number R - 1; the loss must not count the condition"
    )
    assert not math.isclose(found.item(), total / B, rel_tol=1e-4), "the mean over the tokens, not their sum"
    _close(found, total / (B * T), "-log p(s | r), mean over the tokens of s")
    _right("sequence_loss")


def top_p(student: Callable, seed: int = 0) -> None:
    """probabilities (K,), p -> the smallest set of likeliest codes that reaches p, renormalised."""
    found = _call(student, torch.tensor([0.1, 0.5, 0.3, 0.1]), 0.6)
    assert found.shape == (4,), f"one probability a code: got shape {tuple(found.shape)}, expected (4,)"
    assert not torch.allclose(found, torch.tensor([0.625, 0.375, 0, 0])), (
        "the right probabilities in sorted order: put each back to its own code (scatter by the order of the sort)"
    )
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
        out, past = _call(student, q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], past)
        assert past[0].shape == (2, t + 1, 8), (
            f"after {t + 1} tokens the cache must hold {t + 1} keys, it holds {past[0].shape[1]}"
        )
        _close(out, truth[:, t : t + 1], f"token {t}: the cached result is unlike the full pass")
    _right("cached_attention")


def PrefixBlock(student: Callable, seed: int = 0) -> None:
    """A module of (C, heads): x (B, R + T, C), R -> (B, R + T, C), a pre-norm block in which all of c sees all of c."""
    torch.manual_seed(seed)
    C, heads, R, T = 12, 3, 3, 4
    block = student(C, heads)
    for name, kind in {"norm1": nn.LayerNorm, "norm2": nn.LayerNorm, "qkv": nn.Linear, "proj": nn.Linear}.items():
        assert isinstance(getattr(block, name, None), kind), f"self.{name} must be an nn.{kind.__name__}"
    count = sum(p.numel() for p in block.parameters())
    assert count == 12 * C**2 + 13 * C, (
        f"{count} parameters, expected 12 C^2 + 13 C = {12 * C**2 + 13 * C}: two norms, qkv (C to 3 C), proj (C to C), "
        "and an MLP over a width of 4 C, all with their biases"
    )
    x = torch.randn(2, R + T, C)
    with torch.no_grad():
        for p in block.parameters():  # the numbers of a fresh layer are too small to tell things apart
            p.copy_(torch.randn_like(p) * (0.5 if p.ndim == 2 else 0.2) + (1 if p is block.norm1.weight else 0))
    for prefix in (R, 0):
        x = torch.randn(1, R + T, C, requires_grad=True)
        out = _call(block, x, prefix)
        assert out.shape == x.shape, f"the shape must stay {tuple(x.shape)}, got {tuple(out.shape)}"
        for i in range(R + T):
            (grad,) = torch.autograd.grad(out[0, i].square().sum(), x, retain_graph=True)
            sees = grad[0].abs().sum(1) > 0
            for j in range(R + T):
                may = j <= i or (i < prefix and j < prefix)
                assert may or not sees[j], f"R = {prefix}: token {i} sees token {j}, which lies in its future"
                assert sees[j] or not may, f"R = {prefix}: token {i} does not see token {j}" + (
                    ": the tokens of c see each other in both directions" if j > i else ""
                )
    x = torch.randn(2, R + T, C)
    with torch.no_grad():
        q, k, v = block.qkv(block.norm1(x)).view(2, R + T, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        may = torch.ones(R + T, R + T, dtype=torch.bool).tril()
        may[:R, :R] = True

        def by_definition(scale: float) -> Tensor:
            scores = (q @ k.transpose(2, 3) * scale).masked_fill(~may, -math.inf)
            h = x + block.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
            return h + block.mlp(block.norm2(h))

        found = block(x, R)
        assert not torch.allclose(found, by_definition(C**-0.5), atol=1e-4), (
            "the scores are divided by sqrt(C): each head has C / heads dimensions, and the root of those counts"
        )
        _close(
            found,
            by_definition((C // heads) ** -0.5),
            "unlike the definition x + attention(norm1(x)), then h + mlp(norm2(h)); qkv's outputs are q, k, v, each "
            "the heads one after another",
        )
    _right("PrefixBlock")


class _Counting:
    """A transformer to sample from: logits depend on all tokens so far; counts what it reads."""

    def __init__(self, K: int, g: torch.Generator):
        self.table, self.read = torch.randn(101, K, generator=g) * 2, 0

    def __call__(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        self.read += tokens.shape[1]
        total = torch.zeros(len(tokens), dtype=torch.int64) if state is None else state
        rows = []
        for column in tokens.T:
            total = (total * 31 + column + 7) % 101
            rows.append(self.table[total])
        return torch.stack(rows, 1), total


def generate(student: Callable, seed: int = 0) -> None:
    """(step, r, u, temperature, top_k) -> codes (B, T), drawn one after another from step, which keeps a cache."""
    g = _generator(seed)
    B, R, T, K = 3, 2, 6, 8
    model = _Counting(K, g)
    r, u = torch.randint(K, K + 4, (B, R), generator=g), torch.rand(B, T, generator=g)
    u[0, 0], u[1, 0] = 0.0, 1 - 2**-24

    def truth(temperature: float, top_k: int | None) -> Tensor:
        codes = torch.zeros(B, T, dtype=torch.int64)
        for b in range(B):
            total = 0
            for token in r[b].tolist():
                total = (total * 31 + token + 7) % 101
            for t in range(T):
                logits = model.table[total] / temperature
                keep = sorted(range(K), key=lambda k: -logits[k].item())[: top_k or K]
                p = [math.exp(logits[k]) if k in keep else 0.0 for k in range(K)]
                passed = [k for k in range(K) if sum(p[: k + 1]) > u[b, t].item() * sum(p)]
                codes[b, t] = passed[0]
                total = (total * 31 + passed[0] + 7) % 101
        return codes

    for temperature, top_k in ((1.0, None), (0.5, None), (1.0, 2), (2.0, 3), (1.0, 1)):
        model.read = 0
        found = _call(student, model, r, u, temperature, top_k)
        what, expected = f"temperature {temperature}, top_k {top_k}", truth(temperature, top_k)
        assert found.shape == (B, T) and found.dtype == torch.int64, (
            f"T new codes a row, int64 {(B, T)}: got {found.dtype} {tuple(found.shape)}"
        )
        assert model.read == R + T - 1, (
            f"{what}: the transformer was given {model.read} tokens for R + T - 1 = {R + T - 1}. First r, then each "
            "new code alone: the state holds the rest, and what follows the last code is not needed"
        )
        assert torch.equal(found[:, 0], expected[:, 0]), (
            f"{what}: the first codes are {found[:, 0].tolist()}, expected {expected[:, 0].tolist()}. A code is the "
            "first one at which the sum of the probabilities (of the last token's logits) exceeds u"
        )
        assert torch.equal(found, expected), f"{what}: right at first, then not. Is each u used at its own position?"
    _right("generate")


# 06 conditioning


def sequence(student: Callable, seed: int = 0) -> None:
    """s (B, T) codes in [0, K), c (B, R) condition indices, K -> [c | s], each with numbers of its own."""
    g = _generator(seed)
    K = 16
    s, c = torch.randint(K, (3, 6), generator=g), torch.randint(5, (3, 2), generator=g)
    s[0, 0], c[0, 0] = 0, 0
    found = _call(student, s, c, K)
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
    _right("sequence")


def guided(student: Callable, seed: int = 0) -> None:
    """logits with c, without c (B, K), scale -> logits to sample from."""
    g = _generator(seed)
    with_c, without_c = torch.randn(2, 9, generator=g), torch.randn(2, 9, generator=g)
    _close(_call(student, with_c, without_c, 1.0), with_c, "scale 1 must be the model's own p(s | c)")
    _close(student(with_c, without_c, 0.0), without_c, "scale 0 must be p(s), without the condition")
    _close(student(with_c, without_c, 3.0), 3 * with_c - 2 * without_c, "scale 3: three steps from without to with")
    _right("guided")


def learn(student: Callable, seed: int = 0) -> None:
    """(gpt, s (N, T), c (N,), K, steps) -> losses; trains p(s | c) of sequences [K + c | s]."""
    g = _generator(seed)
    torch.manual_seed(seed)
    K, classes, T, N = 6, 4, 5, 200
    shift = torch.randperm(K, generator=g)[:classes]  # what the class says: where the sequence begins

    def data(count: int) -> tuple[Tensor, Tensor]:
        c = torch.randint(classes, (count,), generator=g)
        return (shift[c][:, None] + torch.arange(T)) % K, c

    # R + T - 1 tokens fit: the last code is predicted and never read.
    gpt = GPT(GPTConfig(num_codes=K, num_cond=classes, block_size=T, n_layer=1, n_head=2, n_embd=16))

    def held_out() -> float:
        with torch.no_grad():
            s, c = data(100)
            logits = gpt(torch.cat([K + c[:, None], s[:, :-1]], 1))
            return F.cross_entropy(logits.flatten(0, 1), s.flatten()).item()

    try:
        losses = _call(student, gpt, *data(N), K, 120)
    except ValueError as error:
        assert "more than" not in str(error), (
            f"{error}: the transformer reads [c | s] without its last code, which is predicted and never read"
        )
        raise
    assert len(losses) == 120, f"one loss for each of the 120 steps: got {len(losses)}"
    assert 0.5 * math.log(K) < losses[0] < 2 * math.log(K), (
        f"the first loss is {losses[0]:.2f}; an untrained transformer guesses, for about ln {K} = {math.log(K):.2f} "
        "nats a code: is it the mean over all codes?"
    )
    nats = held_out()
    assert nats < 0.1 * math.log(K), (
        f"after 120 steps a held-out code costs {nats:.2f} nats, guessing costs {math.log(K):.2f}, and these sequences "
        "follow from c alone. Is [K + c | s] read, is s_1 predicted at the last token of c, does the optimizer step?"
    )
    _right("learn")


# 07 high resolution


def window_start(student: Callable, seed: int = 0) -> None:
    """(i, size, n) -> first row (column) of the window that position i is predicted in."""
    assert student(0, 20, 8) == 0, "at the upper border the window begins at 0, not above the image"
    assert student(19, 20, 8) == 12, "at the lower border the window ends with the image: 20 - 8 = 12"
    assert student(10, 20, 8) == 6, "inside, i sits in the window's middle: 10 - 8 // 2 = 6"
    g = _generator(seed)
    for _ in range(20):
        n = int(torch.randint(1, 9, (1,), generator=g))
        size = n + int(torch.randint(0, 12, (1,), generator=g))
        for i in range(size):
            first = student(i, size, n)
            assert 0 <= first <= size - n, f"i = {i} of {size}, n = {n}: the window {first} leaves the image"
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


def slide(student: Callable, seed: int = 0) -> None:
    """(predict, u (h, w), n) -> codes (h, w), each drawn from predict(the codes of its n x n window before it)."""
    g = _generator(seed)
    K = 7
    table = torch.rand(211, K, generator=g)
    lengths = []

    def predict(context: Tensor) -> Tensor:
        assert context.ndim == 1, f"predict takes the window's codes as one row: got shape {tuple(context.shape)}"
        lengths.append(len(context))
        total = 5
        for code in context.tolist():
            total = (total * 17 + code + 1) % 211
        return table[total] / table[total].sum()

    def draw(p: Tensor, u: float) -> int:
        total = 0.0
        for k in range(K):
            total += p[k].item()
            if total > u:
                return k
        return K - 1

    for h, w, n in ((3, 3, 3), (5, 7, 3), (6, 4, 4), (4, 5, 2)):
        u = torch.rand(h, w, generator=g)
        truth, expected = torch.zeros(h, w, dtype=torch.int64), []
        for i in range(h):
            for j in range(w):
                top, left = (min(max(a - n // 2, 0), size - n) for a, size in ((i, h), (j, w)))
                window = [truth[a, b] for a in range(top, top + n) for b in range(left, left + n) if (a, b) < (i, j)]
                # Rows above in the window, then those to the left: the transformer's positions mean places.
                truth[i, j] = draw(predict(torch.tensor(window[: (i - top) * n + j - left])), u[i, j].item())
                expected.append((i - top) * n + j - left)
        lengths.clear()
        found = _call(student, predict, u, n)
        what = f"{h} x {w} codes, windows of {n} x {n}"
        assert len(lengths) == h * w, f"{what}: predict was called {len(lengths)} times, once a code is {h * w}"
        assert found.shape == (h, w) and found.dtype == torch.int64, f"{what}: got {found.dtype} {tuple(found.shape)}"
        for place, (got, want) in enumerate(zip(lengths, expected, strict=True)):
            assert got == want, (
                f"{what}: code {divmod(place, w)} was predicted from {got} codes, its window has {want} before it "
                "(whole rows above, then those to the left)"
            )
        if h == w == n:
            assert torch.equal(found, truth), f"{what}: where the image is one window, this must be plain sampling"
        assert torch.equal(found, truth), (
            f"{what}: the right numbers of codes, but not the right ones in the right order"
        )
    _right("slide")


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
    """scores (n,), rate -> indices of the best fraction, best first; one at least."""
    scores = torch.rand(40, generator=_generator(seed))
    for rate, count in ((0.25, 10), (1.0, 40), (0.001, 1)):
        found = _call(student, scores, rate)
        assert len(found) == count, f"rate {rate} of 40 images keeps {count}, not {len(found)}"
        truth = sorted(range(40), key=lambda i: -scores[i].item())[:count]
        worst = sorted(range(40), key=lambda i: scores[i].item())[:count]
        assert found.tolist() != worst or worst == truth, "those are the worst: a high score is good"
        assert found.tolist() == truth, "the best first"
    _right("accepted")


ALL = {name: f for name, f in globals().items() if inspect.isfunction(f) and not name.startswith("_")}
