"""The checks of the notebooks' exercises, one for each. A check is called with the student's function or class, and
compares its results by the functions of checking.py.

What is right is defined by loops, autograd and modules built here, never by the package's own functions: students may
read and copy the package. Another seed gives other numbers and sizes; hidden tests use one.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..discriminator import PatchDiscriminator
from ..gpt import GPT, GPTConfig
from ..vqgan import VQGAN, VQGANConfig
from . import runs
from .checking import ask, call, check, compare, copy_of, gradients, integer, with_helpers


@check
def to_model_range(student, g):
    """uint8 (..., H, W, 3), any number of leading dimensions -> float32 (..., 3, H, W) in [-1, 1]"""
    mistakes = {
        "the channel axis must come before the rows": lambda p: p / 127.5 - 1,
        "black (0) must become -1: the range is [-1, 1], not [0, 1]": lambda p: p.movedim(-1, -3) / 255,
        "white (255) must become exactly 1: divide by 127.5, not by 128": lambda p: p.movedim(-1, -3) / 128 - 1,
    }
    for leading in ((2,), (), (2, 4)):
        pixels = torch.randint(256, (*leading, integer(g, 4, 6), 7, 3), dtype=torch.uint8, generator=g)
        ask(student, (pixels,), lambda p: torch.stack(p.unbind(-1), -3) / 127.5 - 1, mistakes)


@check
def bits_per_pixel(student, g):
    """the bits of an image's codes, log2(K) each, divided by its number of pixels"""
    mistakes = {
        "one code stands for f x f pixels: an image has (H / f) (W / f) codes": lambda H, W, f, K: math.log2(K),
        "math.log is to base e: bits need math.log2": lambda H, W, f, K: math.log(K) / f**2,
    }
    cases = [(8 * integer(g, 1, 9), 8 * integer(g, 10, 20), 8, integer(g, 5, 3000)) for _ in range(4)]
    for case in [(256, 256, 16, 1024), (32, 32, 4, 1000), *cases]:
        ask(student, case, lambda H, W, f, K: math.log2(K) / f**2, mistakes)


@check
def inside(student, g):
    """the absolute change inside the f x f pixels of the code, divided by that of the whole image"""
    f, (i, j) = integer(g, 2, 4), torch.randperm(6, generator=g)[:2].tolist()
    table, kernel = torch.randn(9, 3, generator=g), torch.randn(3, 3, f + 2, f + 2, generator=g)

    def decode(indices: Tensor) -> Tensor:
        return F.conv_transpose2d(table[indices].permute(0, 3, 1, 2), kernel, stride=f, padding=1)

    def right(decode, indices, i, j, code, f) -> float:
        changed = indices.clone()
        changed[0, i, j] = code
        change = (decode(changed) - decode(indices)).abs().sum((0, 1))
        return (change[f * i : f * i + f, f * j : f * j + f].sum() / change.sum()).item()

    ask(student, (decode, torch.randint(8, (1, 6, 6), generator=g), i, j, 8, f), right)


@check
def latent_size(student, g):
    """(h, w), or ValueError if f does not divide a side"""

    def answer(*args):
        try:
            return student(*args)
        except ValueError:
            return "ValueError"

    def right(H: int, W: int, ch_mult: tuple, halvings: int = -1):
        f = 2 ** (len(ch_mult) + halvings)
        return "ValueError" if H % f or W % f else (H // f, W // f)

    cases = [(100, 96, (1,) * 5), (96, 100, (1,) * 5), (100, 92, (1,) * 5)]
    for m in (0, 5, integer(g, 1, 4), integer(g, 1, 4)):
        ch_mult = tuple(integer(g, 1, 4) for _ in range(m + 1))
        cases.append((2 * integer(g, 1, 4) * 2**m, 2 * integer(g, 5, 9) * 2**m, ch_mult))
    for case in cases:
        ask(answer, case, right, {"n levels have n - 1 halvings between them": {"halvings": 0}})


@check
def receptive_field(student, g):
    """[(kernel, stride), ...] -> side of the input that one output depends on, in pixels"""

    def right(layers: list) -> int:
        first = last = 0  # what output 0 sees, from the last layer to the first
        for kernel, stride in reversed(layers):
            first, last = first * stride, last * stride + kernel - 1
        return last - first + 1

    mistakes = {"strides are ignored: they multiply kernel - 1 of later layers": lambda a: 1 + sum(k - 1 for k, _ in a)}
    cases = [[(integer(g, 1, 4), integer(g, 1, 3)) for _ in range(integer(g, 2, 4))] for _ in range(4)]
    for layers in [[(3, 1)], [(3, 1), (3, 1)], [(4, 2), (4, 2), (4, 1), (4, 1)], *cases]:
        ask(student, (layers,), right, mistakes)


@check
def field_of_E(student, g):
    """pixels that one latent depends on through the convolutions of E"""

    def right(m: int, blocks: int, middle: int = 2) -> int:
        field, step = 3, 1  # conv_in
        for level in range(m + 1):
            field += 4 * blocks * step
            field, step = (field + 2 * step, 2 * step) if level < m else (field, step)
        return field + (4 * middle + 2) * step

    mistakes = {"the two blocks behind the last level are missing": {"middle": 0}}
    for case in ((2, 1), (0, 1), (4, 2), (integer(g, 1, 5), integer(g, 1, 4))):
        ask(student, case, right, mistakes)


@check
def side_seen(student, g):
    """pixels that any channel of the middle output depends on (zeros may have no gradient: use random values)"""
    mistakes = {"every pixel was counted: only those whose gradient is not 0 are seen": lambda network, size: size}
    for kernel, stride in ((1, 1), (3, 2), (1 + 2 * integer(g, 1, 3), integer(g, 1, 2))):
        network = nn.Sequential(
            nn.Conv2d(1, 4, kernel, stride, padding=kernel // 2, bias=False),
            nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False),  # leaves gaps
            nn.Hardshrink(1e-3),  # has no gradient at zeros
        )
        nn.init.zeros_(network[1].weight[0])  # the first channel depends on nothing
        field = kernel + 4 * stride
        ask(student, (network, 80 + 8 * integer(g, 0, 3)), lambda *_, field=field: field, mistakes)
        assert all(p.grad is None for p in network.parameters()), (
            "gradients were left in the network's weights: torch.autograd.grad(..., image) computes the image's alone"
        )


@check
def ResDown(student, g):
    """skip(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))), zeros at the right and bottom, then down"""
    c = integer(g, 3, 6)
    for c_in, c_out in ((c, c), (c, c + 3)):
        parts = {
            "norm1": nn.GroupNorm(1, c_in),
            "conv1": nn.Conv2d(c_in, c_out, 3, padding=1),
            "norm2": nn.GroupNorm(1, c_out),
            "conv2": nn.Conv2d(c_out, c_out, 3, padding=1),
            "skip": nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1),
            "down": nn.Conv2d(c_out, c_out, 3, stride=2),
        }
        block = call(student, c_in, c_out)
        m = copy_of(block, parts)

        def right(x: Tensor, pad=(0, 1, 0, 1), m=m) -> Tensor:
            h = m["conv2"](F.silu(m["norm2"](m["conv1"](F.silu(m["norm1"](x))))))
            return m["down"](F.pad(m["skip"](x) + h, pad))

        mistakes = {"the zeros belong at the right and the bottom only": {"pad": (1, 0, 1, 0)}}
        ask(block, (torch.randn(2, c_in, 8, 6, generator=g),), right, mistakes)


class Largest(TorchFunctionMode):
    """Counts the elements of the largest result of a torch function."""

    elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, result.numel() if type(result) is Tensor else 0)
        return result


def _nearest_in_chunks(z: Tensor, codebook: Tensor, chunk: int) -> Tensor:
    return torch.stack([(row - codebook).square().sum(1).argmin() for row in z])


@check
def nearest_in_chunks(student, g):
    """the number of the nearest code of each row, (N,) int64, the first of those equally near"""
    z, codebook = torch.randn(integer(g, 40, 50), 7, generator=g) * 2, torch.randn(22, 7, generator=g) * 3
    codebook[15] = codebook[3]
    z[0], z[1] = codebook[21] + 0.01, codebook[15]
    near = _nearest_in_chunks
    mistakes = {
        "the largest inner product is not the nearest code: |e|^2 is missing": lambda z, e, _: (z @ e.T).argmax(1),
        "only the last chunk counts: keep the best of the chunks before": lambda z, e, _: 20 + near(z, e[20:], 1),
    }
    for chunk in (5, 1, 22, 100):
        ask(student, (z, codebook, chunk), near, mistakes)
    N, K, D, chunk = 64, 512, 16, 32
    with Largest() as largest:
        call(student, torch.randn(N, D, generator=g), torch.randn(K, D, generator=g), chunk)
    assert largest.elements <= K * D, (  # that is enough for N x chunk distances
        f"{largest.elements} numbers at once: cut the codebook, not z, and compute N x chunk distances by a product"
    )


def _straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    return z_q.detach() + z - z.detach()


@check
def tangent(student, g):
    """T(z) = L(z_q) + (slope of L at z_q) . (z - z_q), with its gradient at z"""
    D = integer(g, 3, 6)
    A, x = torch.randn(4, D, generator=g), torch.randn(4, generator=g)
    z, z_q = torch.randn(2, D, generator=g).unbind()

    def loss(v: Tensor) -> Tensor:
        return 0.5 * (A @ v - x).square().sum()

    def right(loss: Callable, z: Tensor, z_q: Tensor) -> Tensor:
        return loss(z_q) + A.T @ (A @ z_q - x) @ (z - z_q)

    constant = "its value is L(z_q) whatever z is: a tangent changes with z"
    mistakes = {constant: lambda loss, z, z_q: loss(_straight_through(z, z_q))}
    ask(student, (loss, z.requires_grad_(), z_q), right, mistakes, inputs={"z": z})


def _codebook_loss(z: Tensor, z_q: Tensor, beta: float) -> Tensor:
    return F.mse_loss(z_q, z.detach()) + beta * F.mse_loss(z, z_q.detach())


@check
def codebook_gradients(student, g):
    """1. the gradient at z, 2. the gradient at codes, of the codebook loss"""
    K, N, D = integer(g, 5, 8), 12, integer(g, 3, 5)
    z, codes, indices = torch.randn(N, D, generator=g), torch.randn(K, D, generator=g), torch.arange(N) % (K - 2)

    def right(z, codes, indices, beta, loss=_codebook_loss) -> tuple:
        leaves = z.clone().requires_grad_(), codes.clone().requires_grad_()
        return torch.autograd.grad(loss(leaves[0], leaves[1][indices], beta), leaves)

    def last_only(z, codes, indices, beta) -> tuple:
        dz, dcodes = right(z, codes, indices, beta)
        dcodes[indices] = 2 * (codes[indices] - z) / z.numel()
        return dz, dcodes

    def swapped(z: Tensor, z_q: Tensor, beta: float) -> Tensor:
        return _codebook_loss(z_q, z, beta)

    mistakes = {
        "a code feels every latent that chose it: sum over them, as index_add does": last_only,
        "beta weighs the wrong side: it belongs to the term that moves z": {"loss": swapped},
        "the loss is a mean over N D numbers, not a sum": {"loss": lambda *args: N * D * _codebook_loss(*args)},
    }
    ask(student, (z, codes, indices, 0.3 + 0.6 * torch.rand((), generator=g).item()), right, mistakes)


@check
def weights_in_sums(student, g):
    """the weights of 1. the term that moves the codes, 2. the commitment, beside a sum |x - x_hat|^2 of weight 1"""

    def right(x_shape, z_shape, beta, legacy) -> tuple:
        ratio = math.prod(x_shape) / math.prod(z_shape)
        return (ratio * beta, ratio) if legacy else (ratio, ratio * beta)

    mistakes = {
        "beta is on the wrong term: `legacy` puts it on the one that moves the codes": lambda *args: right(*args)[::-1],
        "these weigh the means, and Eq. 4 has sums": lambda x_shape, z_shape, *rest: right((1,), (1,), *rest),
    }
    for legacy in (False, True):
        side, beta = 8 * integer(g, 2, 5), 0.1 + 0.8 * torch.rand((), generator=g).item()
        shapes = (3, side, side), (integer(g, 4, 9), side // 4, side // 4)
        ask(student, (*shapes, beta, legacy), right, mistakes)


@check
def Quantizer(student, g):
    """1. z_q (B, D, h, w), 2. the numbers of the nearest codes, (B, h, w), 3. the codebook loss"""
    B, D, h, w, K = integer(g, 2, 3), integer(g, 4, 5), integer(g, 2, 3), integer(g, 4, 6), integer(g, 8, 12)
    z, beta = torch.randn(B, D, h, w, generator=g).requires_grad_(), 0.3 + 0.6 * torch.rand((), generator=g).item()
    quantizer, other = call(student, K, D, beta), call(student, K, D, beta)
    copy_of(quantizer, {"codebook": nn.Embedding(K, D)})  # a parameter beta would be one too many
    start, codes = other.codebook.weight, quantizer.codebook.weight
    assert len(start.unique(dim=0)) == K, "codes are equal at the start, so the others never learn: make them random"

    def indices(z: Tensor, order=(0, 2, 3, 1)) -> Tensor:
        return _nearest_in_chunks(z.permute(order).reshape(-1, D), codes, K).view(B, h, w)

    def right(z: Tensor, through=_straight_through, loss=_codebook_loss, back=(0, 3, 1, 2)) -> tuple:
        rows, nearest = z.permute(0, 2, 3, 1), codes[indices(z)]  # (B, h, w, D)
        return through(rows, nearest).permute(back).reshape(z.shape), indices(z), loss(rows, nearest, beta)

    mixed = "a position got the numbers of its neighbours: permute moves the axis D to the end, view and reshape do not"
    mistakes = {
        "the axis D must move back: permute does it, view and reshape do not": {"back": (0, 1, 2, 3)},
        "no gradient of z_q reaches z, so the encoder would never learn": {"through": lambda z, z_q: z_q},
        "are z and z_q swapped in the loss?": {"loss": lambda z, z_q, beta: _codebook_loss(z_q, z, beta)},
    }
    with with_helpers(student, _nearest_in_chunks, _straight_through, _codebook_loss):
        found = call(quantizer, z)
        compare(found[1], (z,), indices, {mixed: {"order": (0, 1, 2, 3)}})
        compare(found, (z,), right, mistakes, {"z": z, "the codebook": codes})


@check
def steps_until_dead(student, g):
    """updates until fraction * decay^n < threshold / K for the first time, 0 if it is so at once"""

    def right(fraction: float, K: int, decay: float, threshold: float) -> int:
        steps = 0
        while fraction >= threshold / K:
            fraction, steps = fraction * decay, steps + 1
        return steps

    mistakes = {"one too few: after this many the fraction has not fallen below yet": lambda *args: right(*args) - 1}
    cases = [(1 / 256, 256, 0.98, 0.05), (0.2, 64, 0.9, 0.05), (1e-9, 64, 0.9, 0.05)]
    cases += [(0.5 + torch.rand((), generator=g).item(), integer(g, 8, 999), 0.95, 0.1) for _ in range(4)]
    for case in cases:
        ask(student, case, right, mistakes)


@check
def revive(student, g):
    """the codebook with unused codes moved onto latents, each onto one of its own, drawn at random among all"""
    K, N, dead = integer(g, 10, 14), 40, 7
    codebook, latents = torch.randn(K, 3, generator=g), torch.randn(N, 3, generator=g) + 5
    counts = torch.randint(1, 4, (K,), generator=g)
    counts[torch.randperm(K, generator=g)[:dead]] = 0

    def drawn(counts: Tensor, latents: Tensor, expected: int) -> tuple[int, ...]:
        """Which latents the unused codes were moved onto."""
        found, used = call(student, codebook, counts, latents), counts > 0
        assert torch.equal(found[used], codebook[used]), "codes that are used must stay as they are"
        onto = (found[:, None] == latents).all(2).nonzero()[:, 1].tolist()
        moved = int((found != codebook).any(1).sum())
        assert moved == len(onto), "each unused code must be moved exactly onto one of the latents"
        assert moved == len(set(onto)), "two codes were moved onto one latent: draw without repeating"
        case = f"{int((~used).sum())} codes are unused and there are {len(latents)} latents"
        assert moved == expected, f"{case}: {expected} codes must move, but {moved} did"
        return tuple(onto)

    seen = [drawn(counts, latents, dead) for _ in range(20)]
    assert len(set(sum(seen, ()))) > N // 2, f"only some of {N} latents are ever drawn: draw at random among all"
    drawn(torch.zeros_like(counts), latents[:5], 5)
    drawn(torch.ones_like(counts), latents, 0)


@check
def normalize_features(student, g):
    """the same directions, at every position of length 1 over the channels, with a guard of at most 1e-8"""
    for scale in (10, 0.02):  # a guard that is too large shows where features are small
        f = torch.randn(2, integer(g, 4, 6), 3, 5, generator=g) * scale
        ask(student, (f,), lambda f: F.normalize(f, dim=1), tolerance=1e-3)
    f[0, :, 1, 1] = 0  # a ReLU can leave a position with nothing
    out = call(student, f.requires_grad_())
    assert out.isfinite().all(), "a position where all channels are 0 becomes NaN or infinite: guard the norm"
    (grad,) = torch.autograd.grad(out.sum(), f)
    assert grad.abs().max() < 1e6, (
        f"the gradient where all channels are 0 is {grad.abs().max():.0e}, which ruins the decoder: the guard belongs "
        "under the root, as in (sum + 1e-8).sqrt(), whose slope is 1e4 at most"
    )


@check
def layer_distance(student, g):
    """for each image the sum over channels of w_c (fx - fy)^2, mean over positions"""
    B, C = integer(g, 2, 4), integer(g, 5, 7)

    def right(fx: Tensor, fy: Tensor, w: Tensor) -> Tensor:
        return torch.stack([sum(w[c] * (fx - fy)[b, c].square().mean() for c in range(C)) for b in range(B)])

    mistakes = {"the channels are summed; only the positions are averaged": lambda *args: right(*args) / C}
    ask(student, (*torch.randn(2, B, C, 4, 6, generator=g), torch.rand(C, generator=g)), right, mistakes)


def _hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return sum((1 + x).clamp(min=0).mean() / 2 for x in (-logits_real, logits_fake))


@check
def best_disc(student, g):
    """1. the D at each place that makes p (1 - D)^2 + q (1 + D)^2 smallest, 2. the loss there, half their sum"""

    def right(p: Tensor, q: Tensor) -> tuple:  # by trying all D
        D = torch.linspace(-1, 1, 20001, dtype=p.dtype)[:, None]
        costs = p * (1 - D).square() + q * (1 + D).square()
        return D[costs.argmin(0), 0], costs.min(0).values.sum() / 2

    mistakes = {
        "this is the best D of the log loss, a probability": lambda p, q: (p / (p + q), right(p, q)[1]),
        "this is the best D of the hinge, a sign": lambda p, q: ((p - q).sign(), right(p, q)[1]),
    }
    p, q = torch.randn(2, integer(g, 20, 40), generator=g).double().softmax(1)
    ask(student, (p, q), right, mistakes, tolerance=1e-3)


@check
def pull_on_G(student, g):
    """the derivative of G's loss at each logit, finite also where |logit| is 800"""
    losses = {"minimax": lambda v: -F.softplus(v), "non-saturating": lambda v: F.softplus(-v), "hinge": torch.neg}

    def right(logits: Tensor, kind: str) -> Tensor:
        logits = logits.clone().requires_grad_()
        return torch.autograd.grad(losses[kind](logits).sum(), logits)[0]

    logits = torch.cat([4 * torch.randn(integer(g, 6, 9), generator=g), torch.tensor([-800.0, 800.0])]).double()
    for kind in losses:
        ask(student, (logits, kind), right)


def _lambda_of(rec_loss: Tensor, gan_loss: Tensor, last_weight: Tensor) -> Tensor:
    rec, gan = (torch.autograd.grad(v, last_weight, retain_graph=True)[0].norm() for v in (rec_loss, gan_loss))
    return (rec / (gan + 1e-6)).clamp(0, 1e4)


@check
def lambda_of(student, g):
    """lambda = |grad rec_loss| / (|grad gan_loss| + 1e-6) at the last layer's weight, in [0, 10000], detached"""
    mistakes = {"upside down: the reconstruction's gradient is above the line": lambda r, g, w: _lambda_of(g, r, w)}
    # Large and small lambda, a GAN gradient about as small as delta, and one that vanishes.
    for rec_scale, gan_scale in ((1, 0.01), (1, 50), (1e-3, 2e-6), (1, 0)):
        network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3, padding=1))
        x_hat, weight = network(torch.randn(2, 2, 6, 6, generator=g)), network[1].weight
        args = rec_scale * (x_hat - 1).abs().mean(), gan_scale * x_hat.square().mean(), weight
        found = call(student, *args)
        assert all(p.grad is None for p in network.parameters()), (
            "a gradient was left in .grad, and the next step would add to it: use torch.autograd.grad, not backward()"
        )
        try:
            compare(found, args, _lambda_of, mistakes, tolerance=1e-3)
        except RuntimeError:
            raise AssertionError("the graph is freed, but the step still needs it: use retain_graph=True") from None
        assert not found.requires_grad, "lambda must be detached: otherwise the network learns to make it small"


@check
def weight_of_D(student, g):
    """|ramp disc_weight min(lambda, max_lambda) grad L_GAN| / |grad L_rec|"""

    def right(rec, gan, step, disc_weight, max_lambda, start, alone, ramp, length: bool = True) -> float:
        fraction = sorted((0.0, (step - start - alone) / ramp, 1.0))[1]
        return float(fraction * disc_weight * min(rec / gan, max_lambda) * (gan / rec if length else 1))

    mistakes = {
        "D learns alone before the ramp begins": lambda *args: right(*args[:6], 0, args[7]),
        "this is the factor before L_GAN: multiply by |grad L_GAN| / |grad L_rec|": {"length": False},
    }
    start, alone, ramp = integer(g, 50, 99), integer(g, 10, 30), integer(g, 20, 60)
    for rec, gan in ((0.2, 0.9), (0.2, 40.0), (0.01, 0.7)):
        for step in (start + alone // 2, start + alone + ramp // 3, start + alone + 2 * ramp):
            ask(student, (rec, gan, step, 0.8, 0.05, start, alone, ramp), right, mistakes)


def _stage_one(vqgan, disc, opt_g, opt_d, x, disc_weight, vq=1, gan=None, disc_in_g=0, gan_in_d=0, clear=True) -> tuple:
    """One step by the definition; the keywords make mistakes."""
    x_hat, quantized = vqgan(x)
    l1, gan_loss, disc_loss = (x - x_hat).abs().mean(), -disc(x_hat).mean(), _hinge_loss(disc(x), disc(x_hat))
    lambda_ = _lambda_of(l1, gan_loss, vqgan.decoder.conv_out.weight).detach()
    gan_loss = (gan(disc_weight, lambda_) if gan else disc_weight * lambda_) * gan_loss
    losses = l1 + vq * quantized.loss + gan_loss + disc_in_g * disc_loss, disc_loss + gan_in_d * gan_loss
    for loss, network in zip(losses, (vqgan, disc), strict=True):
        parameters = tuple(network.parameters())
        for p, d in zip(parameters, gradients(loss, parameters), strict=True):
            p.grad = d if clear or network is disc or p.grad is None else p.grad + d
    opt_g.step()
    opt_d.step()
    return l1.item(), lambda_.item()


def _record(seen: list, opt: torch.optim.Optimizer, *_) -> None:
    parameters = opt.param_groups[0]["params"]
    seen.append(torch.cat([(p * 0 if p.grad is None else p.grad).detach().flatten() for p in parameters]))


@check
def stage_one(student, g):
    """in each of two steps the gradients 1. of G's loss and 2. of D's, with the same x_hat, and 3. (L1, lambda)"""
    config = VQGANConfig(image_size=16, ch=8, ch_mult=(1, 2), z_channels=16, code_dim=4, codebook_size=32)
    networks = VQGAN(config), PatchDiscriminator(channels=8, num_layers=1)
    with torch.no_grad():  # logits of size 1, on both sides of the margin
        networks[1].layers[-1].weight *= 20
    disc_weight = 0.3 + 0.5 * torch.rand((), generator=g).item()
    # Two colours an image, left and right.
    images = (torch.rand(2, 4, 3, 1, 2, generator=g) * 1.6 - 0.8).repeat_interleave(8, 4).repeat(1, 1, 1, 16, 1)

    def two_steps(step: Callable = _stage_one, **mistake) -> tuple:
        copies, seen = copy.deepcopy(networks), ([], [])
        opts = [torch.optim.SGD(network.parameters(), 1e-3) for network in copies]
        for opt, gradients_of_steps in zip(opts, seen, strict=True):
            opt.register_step_pre_hook(functools.partial(_record, gradients_of_steps))
        said = [step(*copies, *opts, x, disc_weight, **mistake) for x in images]
        return *seen, said

    mistakes = {
        "D's loss moves G: show D x_hat.detach(), or G learns to make fakes easy to tell": {"disc_in_g": 1},
        "L_GAN is not weighted by lambda": {"gan": lambda w, lambda_: w},
        "disc_weight is missing": {"gan": lambda w, lambda_: lambda_},
        "the sign of L_GAN is wrong: L_GAN = -mean D(x_hat)": {"gan": lambda w, lambda_: -w * lambda_},
        "the codebook loss, quantized.loss, is missing": {"vq": 0},
        "the second step still holds the first one's gradients: zero_grad is missing": {"clear": False},
        "G's loss left a gradient in D, which teaches D to call fakes real: clear it first": {"gan_in_d": 1},
    }
    try:
        with with_helpers(student, _hinge_loss, _lambda_of):
            found = two_steps(functools.partial(call, student))
    except AssertionError as error:
        hint = "D must be shown x_hat.detach(), or its loss goes back through G, whose graph is already freed. "
        raise AssertionError(hint * ("second time" in str(error)) + str(error)) from error
    compare(found, (), two_steps, mistakes, tolerance=2e-3)


# What is wrong with a run -> what its rows show.
SIGNS = {
    "healthy": "both L1 fall together, many codes are used, and the mean logits stay within the margins",
    "collapse": "perplexity stays far below that of the others",
    "D overpowers G": "the mean logits lie beyond the margins, far apart",
    "D learns nothing": "the two mean logits are equal, and disc_loss is 1",
    "overfitting": "val_l1 falls with l1 at first, then stops while l1 goes on",
    "wrong range": "val_l1 is far above l1 and hardly falls at all",
}


@check
def diagnose_run(student, g):
    """one of the names in TROUBLES"""
    every_row = g.initial_seed() == 0  # with other seeds: runs of other seeds too, and some of the rows of each
    for seed in range(1 if every_row else runs.SEEDS):
        for trouble, rows in runs.load(seed).items():
            kept = sorted(torch.randperm(len(rows), generator=g)[: len(rows) if every_row else 12].tolist())
            found = call(student, [rows[i] for i in kept])
            assert found in SIGNS, f"return one of {', '.join(SIGNS)}: got {found!r}"
            assert found == trouble, f"a run was called {found!r}, but {SIGNS[trouble]}: {trouble!r}"


@check
def causal_mask(student, g):
    """(T, T) bool, True on and below the diagonal"""

    def right(T: int, ahead: int = 0) -> Tensor:
        return torch.tensor([[j <= i + ahead for j in range(T)] for i in range(T)])

    mistakes = {
        "the mask is transposed: row i is the position that looks, column j what it looks at": lambda T: right(T).T,
        "off by one: a token may see itself, since position i predicts token i + 1": {"ahead": -1},
    }
    for T in (5, 1, integer(g, 6, 12), integer(g, 13, 30)):
        ask(student, (T,), right, mistakes)


@check
def sequence_loss(student, g):
    """-log p(s | r), mean over the tokens of s"""

    def right(logits: Tensor, s: Tensor, first: int | None = None) -> Tensor:
        first = logits.shape[1] - s.shape[1] if first is None else first  # the last condition token predicts s_1
        rows = [(logits[b, first + t], s[b, t]) for b in range(s.shape[0]) for t in range(s.shape[1])]
        return sum(row.exp().sum().log() - row[code] for row, code in rows) / len(rows)

    mistakes = {
        "s_1 is predicted at the last condition token, number R - 1: the first T logits are others": {"first": 0}
    }
    for R in (integer(g, 2, 4), 1):
        B, T, K = integer(g, 2, 4), integer(g, 4, 6), 7
        logits, s = torch.randn(B, R + T - 1, K, generator=g), torch.randint(K, (B, T), generator=g)
        ask(student, (logits, s), right, mistakes)


@check
def top_p(student, g):
    """the smallest set of most likely codes that reaches p, cut by rank and not by value, renormalised"""

    def right(q: Tensor, p: float, more: int = 0) -> Tensor:
        order = sorted(range(len(q)), key=lambda k: -q[k].item())
        reached = (n for n in range(1, len(q)) if sum(q[k].item() for k in order[:n]) >= p)
        kept = order[: next(reached, len(q)) + more]
        q = torch.stack([q[k] * (k in kept) for k in range(len(q))])
        return q / q.sum()

    mistakes = {
        "put each probability back to its own code": lambda q, p: right(q, p).sort(descending=True).values,
        "the code that crosses p belongs to the set: 0.5 does not reach 0.6, 0.5 + 0.25 does": {"more": -1},
    }
    q = torch.tensor([0.125, 0.5, 0.25, 0.125])
    cases = [(q, 0.6), (q, 0.5), (q, 0.75), (torch.tensor([0.7, 0.2, 0.1]), 0.01)]
    for case in [*cases, *((torch.randn(integer(g, 7, 11), generator=g).softmax(0), p) for p in (0.3, 0.9, 1.0))]:
        ask(student, case, right, mistakes)
    ask(lambda q, p: int((student(q, p) > 0).sum()), (torch.full((8,), 0.125), 0.5), lambda q, p: 4)  # ties


@check
def coded_bits(student, g):
    """-log2 p of a code, for each of its f x f pixels"""
    mistakes = {"these are nats: a bit is ln 2 = 0.69 of them": lambda nats, f: nats / f**2}
    for f in (16, 2, integer(g, 3, 8)):
        nats = 1 + 5 * torch.rand((), generator=g).item()
        ask(student, (nats, f), lambda nats, f: math.log2(math.exp(nats)) / f**2, mistakes)


@check
def cached_attention(student, g):
    """1. attention of the new token to all so far, 2. (keys, values), each with the new one last"""
    B, T, D = integer(g, 1, 3), integer(g, 5, 8), 2 * integer(g, 3, 6)

    def right(q, k, v, past, scale: float = D**-0.5) -> tuple:
        k, v = (torch.cat(pair, 1) for pair in zip(past or (k[:, :0], v[:, :0]), (k, v), strict=True))
        return (q @ k.mT * scale).softmax(-1) @ v, (k, v)

    past = None
    for _ in range(T):
        args = *torch.randn(3, B, 1, D, generator=g), past
        _, past = ask(student, args, right, {"the scores are not divided by sqrt(D)": {"scale": 1.0}})


@check
def PrefixBlock(student, g):
    """x + proj(attention(norm1(x))), then x + mlp(norm2(x)) with GELU; qkv is [q, k, v], each one head after another"""
    for heads, R, T in ((3, 3, 4), (2, integer(g, 4, 5), integer(g, 2, 5)), (1, 0, 5)):
        C = 4 * heads
        block = call(student, C, heads)
        linears = [m for m in getattr(block, "mlp", nn.Identity()).modules() if isinstance(m, nn.Linear)]
        assert len(linears) == 2, f"self.mlp must hold two nn.Linear, got {len(linears)}"
        block.wider, block.back = linears  # under names of our own, whatever the student calls them
        parts = {name: nn.LayerNorm(C) for name in ("norm1", "norm2")}
        sizes = {"qkv": (C, 3 * C), "proj": (C, C), "wider": (C, 4 * C), "back": (4 * C, C)}
        m = copy_of(block, parts | {name: nn.Linear(*size) for name, size in sizes.items()})

        def right(x, R, both=True, ahead=0, scale=(C // heads) ** -0.5, m=m, heads=heads) -> Tensor:
            B, N, C = x.shape
            may = torch.tensor([[j <= i + ahead or (both and max(i, j) < R) for j in range(N)] for i in range(N)])
            q, k, v = m["qkv"](m["norm1"](x)).view(B, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
            weights = (q @ k.mT * scale).masked_fill(~may, -math.inf).softmax(-1)
            h = x + m["proj"]((weights @ v).transpose(1, 2).reshape(x.shape))
            return h + m["back"](F.gelu(m["wider"](m["norm2"](h))))

        mistakes = {
            "the tokens of c see each other in both directions": {"both": False},
            "a token sees its future": {"ahead": R + T},
            "divide the scores by the root of a head's dimensions, C / heads, not of C": {"scale": C**-0.5},
            "the scores are not divided by the root of a head's dimensions": {"scale": 1.0},
        }
        # The tolerance lets GPT-2's approximation of the GELU pass.
        ask(block, (torch.randn(2, R + T, C, generator=g), R), right, mistakes, tolerance=1e-3)


@check
def codes_kept(student, g):
    """how many codes, from the likeliest on, reach p together, if p_k is proportional to r^(k / tau)"""

    def right(r: float, tau: float, p: float) -> int:
        probabilities = (torch.arange(3000).double() * math.log(r) / tau).softmax(0)
        return 1 + int((probabilities.cumsum(0) < p).sum())

    mistakes = {
        "the code that crosses p belongs to the set: round up": lambda *args: right(*args) - 1,
        "a higher temperature keeps more codes, not fewer": lambda r, tau, p: right(r, 1 / tau, p),
    }
    cases = torch.rand(10, 3, generator=g) * torch.tensor([0.6, 2.0, 0.75]) + torch.tensor([0.3, 0.4, 0.2])
    for case in [(0.5, 2.0, 0.9), *cases.tolist()]:
        ask(student, case, right, mistakes)


@check
def generate(student, g):
    """(B, T) codes, each the first at which the sum of the probabilities exceeds its u"""
    B, R, T, K = integer(g, 2, 4), integer(g, 2, 3), integer(g, 5, 7), 8
    table, read = torch.randn(101, K, generator=g) * 2, []

    def step(tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """A transformer whose logits depend on all tokens so far, which are its state."""
        read.extend(tokens[0])
        state = tokens if state is None else torch.cat([state, tokens], 1)
        sums = (state * torch.arange(7, 7 + state.shape[1])).cumsum(1) % 101
        return table[sums[:, -tokens.shape[1] :]], state

    def right(step, r: Tensor, u: Tensor, temperature: float, top_k: int | None) -> Tensor:
        codes = torch.zeros(B, T, dtype=torch.int64)
        for b, t in itertools.product(range(B), range(T)):
            logits = step(torch.cat([r[b], codes[b, :t]])[None], None)[0][0, -1].double() / temperature
            p = torch.where(logits >= logits.sort().values[-(top_k or K)], logits.exp(), 0).tolist()
            codes[b, t] = next(k for k in range(K) if sum(p[: k + 1]) > u[b, t].item() * sum(p))
        return codes

    r, u = torch.randint(K, K + 4, (B, R), generator=g), torch.rand(B, T, generator=g)
    u[0, 0], u[1, 0] = 0.0, 1 - 2**-24
    for temperature, top_k in ((1.0, None), (0.5, None), (1.0, 2), (2.0, 3)):
        read.clear()
        found = call(student, step, r, u, temperature, top_k)
        assert len(read) == R + T - 1, (
            f"the transformer was given {len(read)} tokens instead of R + T - 1 = {R + T - 1}: first r, then each new "
            "code alone. The state holds the rest, and what follows the last code is not needed"
        )
        compare(found, (step, r, u, temperature, top_k), right, {})


@check
def diagnose(student, g):
    """what the held-out curve shows: fine, overfits, guesses or leaks"""
    t = torch.linspace(0, 1, 40)
    learned = 0.6 + 0.4 * (-6 * t).exp()
    curves = {  # training and held-out, in units of ln K
        "fine": (learned - 0.15 * t, learned),
        "overfits": (1 - 0.95 * t, learned + 0.5 * (t - 0.4).clamp(min=0)),
        "guesses": (torch.ones(40), torch.ones(40)),
        "leaks": ((-30 * t).exp() + 0.02, (-20 * t).exp() + 0.02),
    }
    gap = {"a gap does not mean that it overfits: this held-out loss has never turned": lambda *_: "overfits"}
    for K, (name, pair) in itertools.product((256, integer(g, 500, 2000)), curves.items()):
        noisy = (math.log(K) * (curve + 0.01 * torch.randn(40, generator=g)).clamp(min=0.01) for curve in pair)
        ask(student, (*noisy, K), lambda *_, name=name: name, gap if name == "fine" else {})


@check
def sequence(student, g):
    """[c_1 | c_2 | ... | s], c_1 numbered from K on, and each later condition from the end of the one before"""

    def right(s: Tensor, conditions: list, K: int) -> Tensor:
        starts = [K + sum(count for _, count in conditions[:i]) for i in range(len(conditions))]
        return torch.cat([c + start for (c, _), start in zip(conditions, starts, strict=True)] + [s], 1)

    s, K = torch.randint(9, (3, integer(g, 5, 7)), generator=g), integer(g, 9, 20)
    conditions = [(torch.randint(n, (3, integer(g, 1, 3)), generator=g), n) for n in (integer(g, 3, 6), 8, 2)]
    for count in (1, 2, 3):
        ask(student, (s, conditions[:count], K), right)


@check
def posterior(student, g):
    """p(c | s) of each image, (B, C)"""

    def right(nats: Tensor, T: int, prior: Tensor) -> Tensor:
        joint = prior.double() * (-T * nats.double()).exp()
        return (joint / joint.sum(1, keepdim=True)).float()

    mistakes = {
        "a sequence has T codes: -log p(s | c) is T times the nats a code": lambda a, _, prior: right(a, 1, prior),
        "the prior is missing": lambda nats, T, prior: right(nats, T, torch.ones_like(prior)),
    }
    for T, low in ((4, 0.1), (64, 4.0)):
        prior = 0.2 + torch.rand(5, generator=g)
        args = low + 0.3 * torch.rand(3, 5, generator=g), T, prior / prior.sum()
        found = call(student, *args)
        assert found.isfinite().all(), "exp(-T nats) is 0 in float32: a softmax of log p divides by the largest first"
        compare(found, args, right, mistakes)


@check
def guided(student, g):
    """the softmax of the guided logits, (K,)"""

    def right(p: Tensor, p_c: Tensor, scale: float) -> Tensor:
        given_c = p * p_c / (p * p_c).sum()
        return (p.log() + scale * (given_c.log() - p.log())).softmax(0)

    both = "p(s_i) keeps the exponent 1"
    mistakes = {both: lambda p, p_c, scale: (p * p_c) ** scale / ((p * p_c) ** scale).sum()}
    p, p_c = torch.rand(2, integer(g, 7, 11), generator=g).clamp(min=0.05)
    for scale in (1.0, 0.0, 2.5):
        ask(student, (p / p.sum(), p_c, scale), right, mistakes)


@check
def learn(student, g):
    """the loss of each step; the transformer reads [K + c | s] without the last code of s"""
    K, T, steps = 16, 5, 120
    starts, guess = torch.randperm(K, generator=g), math.log(K)

    def data(count: int) -> tuple[Tensor, Tensor, Tensor]:
        """s, c, and the tokens to read. c says all of s but the first code, which is one of four."""
        c = torch.randint(K, (count,), generator=g)
        s = (starts[c][:, None] + torch.arange(T)) % K
        s[:, 0] = (starts[c] + torch.randint(4, (count,), generator=g)) % K
        return s, c, torch.cat([K + c[:, None], s[:, :-1]], 1)

    gpt, seen = GPT(GPTConfig(num_codes=K, num_cond=K, block_size=T, n_layer=1, n_head=2, n_embd=32)), set()
    watch = gpt.register_forward_pre_hook(lambda _, args: seen.update(map(tuple, args[0].tolist())))
    s, c, tokens = data(200)
    losses = call(student, gpt, s, c, K, steps)
    watch.remove()
    assert len(losses) == steps, f"return one loss for each of the {steps} steps: got {len(losses)}"
    assert 0.5 * guess < float(losses[0]) < 2 * guess, (
        f"the first loss is {float(losses[0]):.2f}, and guessing costs {guess:.2f}: is it the mean over all codes?"
    )
    rows = set(map(tuple, tokens.tolist()))
    assert len(rows & seen) > 0.75 * len(rows), (
        f"of {len(rows)} different [K + c | s] only {len(rows & seen)} were ever read: draw a new batch in every step"
    )
    s, c, tokens = data(200)
    with torch.no_grad():
        nats = F.cross_entropy(gpt(tokens).transpose(1, 2), s, reduction="none").mean(0)
    assert nats[1:].mean() < 0.1 * guess, (
        f"after {steps} steps a held-out code costs {nats[1:].mean():.2f} nats, but it follows from c: is s_i "
        "predicted at the token before it, does the optimizer step?"
    )
    assert nats[0] < (guess + math.log(4)) / 2, "the first code is not learned: the last token of c predicts s_1"


def _window(i: int, size: int, n: int) -> int:
    """The definition: of all windows inside, the one whose middle is nearest to i."""
    return min(range(size - n + 1), key=lambda a: abs(a + n // 2 - i))


def _context(i: int, j: int, h: int, w: int, n: int) -> list[tuple[int, int]]:
    top, left = _window(i, h, n), _window(j, w, n)
    return [(a, b) for a in range(top, top + n) for b in range(left, left + n) if (a, b) < (i, j)]


@check
def context_of(student, g):
    """the positions of the window that come before (i, j), in reading order"""
    for _ in range(20):
        n = integer(g, 1, 4)
        h, w = n + integer(g, 0, 4), n + integer(g, 0, 4)
        args = integer(g, 0, h - 1), integer(g, 0, w - 1), h, w, n
        found = [tuple(map(int, place)) for place in call(student, *args)]
        late = [place for place in found if place >= args[:2]]
        assert not late, f"(i, j) = {args[:2]}: {late and late[0]} is not there yet when it is predicted"
        compare(found, args, _context, {})


@check
def rounds(student, g):
    """(rounds with one window at a time, rounds with all windows that are ready at a time)"""

    def right(h: int, w: int, n: int) -> tuple[int, int]:
        first = [_window(j, w, n) for j in range(w)]  # where the window of each column begins
        when, windows = torch.zeros(h, w), sorted(set(first))
        for i, left in itertools.product(range(h), windows):
            columns = [j for j in range(w) if first[j] == left]
            before = when[_window(i, h, n) : i + 1, left : left + n].clone()
            before[-1, columns[0] - left :] = 0
            when[i, columns] = before.max() + 1
        return h * len(windows), int(when.max())

    mistakes = {
        "codes that share a window are drawn in one round": lambda h, w, n: (h * w, right(h, w, n)[1]),
        "a row is never more rounds behind the one above than it has windows": (
            lambda h, w, n: (right(h, w, n)[0], w - n + 1 + (h - 1) * (n // 2))
        ),
    }
    for case in ((16, 16, 8), (4, 4, 4), (6, 5, 4), (integer(g, 6, 9), integer(g, 9, 12), 2 * integer(g, 1, 3))):
        ask(student, case, right, mistakes)


@check
def slide(student, g):
    """(h, w) codes, each the first at which the sum of the probabilities exceeds u[i, j]"""
    K, contexts = 7, []
    table = torch.rand(211, K, generator=g) * (torch.arange(K) > 0)  # code 0 has no probability

    def predict(context: Tensor) -> Tensor:
        contexts.append(context.tolist())
        total = functools.reduce(lambda total, code: (total * 17 + code + 1) % 211, context.tolist(), 5)
        return table[total] / table[total].sum()

    for h, w, n in ((3, 3, 3), (5, 7, 3), (6, 4, 4), (3 + integer(g, 0, 3), 4 + integer(g, 0, 3), 2)):
        u = torch.rand(h, w, generator=g)
        u[0, 0] = 0
        contexts.clear()
        found, given = call(student, predict, u, n), contexts.copy()
        assert len(given) == h * w, f"predict was called {len(given)} times for {h * w} codes, expected once for each"
        truth = torch.zeros(h, w, dtype=torch.int64)
        for (i, j), got in zip(itertools.product(range(h), range(w)), given, strict=True):
            want = [int(truth[place]) for place in _context(i, j, h, w, n)]
            assert got == want, (
                f"{h} x {w} codes, n = {n}: {(i, j)} was predicted from {got}, but its window holds {want} before it"
            )
            p = predict(torch.tensor(want, dtype=torch.int64)).cumsum(0)
            truth[i, j] = next((k for k in range(K) if p[k] > u[i, j]), K - 1)
            if found.shape == truth.shape and found[i, j] != truth[i, j]:
                break  # what follows depends on it
        compare(found, (predict, u, n), lambda *_, truth=truth: truth, {})


def _trace_of_root(C: Tensor) -> Tensor:
    return torch.linalg.eigvals(C).real.clamp(min=0).sqrt().sum()


@check
def frechet(student, g):
    """|mean_1 - mean_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))"""

    def right(mean_1, C_1, mean_2, C_2, trace_of_root=_trace_of_root) -> Tensor:
        return (mean_1 - mean_2).square().sum() + C_1.trace() + C_2.trace() - 2 * trace_of_root(C_1 @ C_2)

    entries = "the root of a matrix is not the root of its entries"
    for d, rank in ((1, 1), (2, 2), (4, 4), (6, 3)):
        mean_1, mean_2 = torch.randn(2, d, generator=g, dtype=torch.float64)
        A, B = torch.randn(2, d, rank, generator=g, dtype=torch.float64)
        args = mean_1, A @ A.T, mean_2, B @ B.T
        found = call(student, *args)
        assert found.isfinite(), "rounding makes eigenvalues of 0 slightly negative: clamp them before the root"
        compare(found, args, right, {entries: {"trace_of_root": lambda C: C.abs().sqrt().trace()}})


@check
def precision_recall(student, g):
    """(precision, recall): the fraction of fake covered by balls around real, and of real by balls around fake"""

    def covered(points: list, centres: list, k: int) -> float:
        reach = [sorted(math.dist(a, b) for b in centres)[k] for a in centres]  # [0] is the point itself
        inside = [any(math.dist(p, a) <= r for a, r in zip(centres, reach, strict=True)) for p in points]
        return sum(inside) / len(inside)

    def right(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
        return covered(fake.tolist(), real.tolist(), k), covered(real.tolist(), fake.tolist(), k)

    mistakes = {
        "precision and recall are swapped": lambda real, fake, k: right(fake, real, k),
        "the nearest neighbour of a point is the point itself": lambda real, fake, k: right(real, fake, k - 1),
    }
    for N, M, k in ((9, 12, 1), (20, 14, 3), (integer(g, 20, 30), integer(g, 20, 30), 2)):
        points = torch.randn(N, 2, generator=g), torch.randn(M, 2, generator=g) * 0.8 + 0.5
        ask(student, (*points, k), right, mistakes)


@check
def causal_kernel(student, g):
    """(k, k), 1 in the rows above, left of the middle and, if it sees itself, in the middle, else 0"""

    def right(k: int, sees_itself: bool) -> Tensor:
        return (torch.arange(k * k) < k * k // 2 + sees_itself).view(k, k).float()

    for case in itertools.product((3, 1, 1 + 2 * integer(g, 2, 4), 1 + 2 * integer(g, 5, 7)), (False, True)):
        ask(lambda *case: call(student, *case) * torch.ones(()), case, right)


@check
def rejection(student, g):
    """(fraction that is kept, fraction of the kept ones that shows what was asked)"""

    def right(q: float, t: float) -> tuple[float, float]:
        grid = itertools.product(range(20), range(20))  # the first 20 q rows are right, 20 t columns are told rightly
        kept = [i < round(20 * q) for i, j in grid if (i < round(20 * q)) == (j < round(20 * t))]
        return len(kept) / 400, sum(kept) / len(kept)

    mistakes = {
        "wrong samples that are taken for right ones are kept, too": lambda q, t: (q * t, 1.0),
        "how many of the kept ones are right depends on q": lambda q, t: (right(q, t)[0], t),
    }
    for q, t in ((4, 15), (10, 20), (integer(g, 1, 19), integer(g, 11, 19))):
        ask(student, (q / 20, t / 20), right, mistakes)
