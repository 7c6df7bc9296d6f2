"""The checks of the notebooks' exercises, one for each. A check is called with the student's function or class.

A right answer prints `right: NAME`. A wrong one raises an AssertionError that says in one sentence what is wrong.
Answers are compared with definitions (loops, autograd, modules built here), never with the package's own functions:
students may read and copy the package. Another seed gives other numbers and sizes; hidden tests use one.
"""

import contextlib
import copy
import functools
import itertools
import math
import operator
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..discriminator import PatchDiscriminator
from ..gpt import GPT, GPTConfig
from ..vqgan import VQGAN, VQGANConfig

ALL: dict[str, Callable] = {}  # name of the exercise -> its check
PACKAGE, TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)


class Wrong(AssertionError):
    def _render_traceback_(self) -> list[str]:
        """Jupyter shows the sentence alone: the lines of this file would not help a student."""
        return [f"Not right yet: {self}"]


def check(body: Callable) -> Callable:
    """Makes a check from a function of (student's answer, generator of random numbers)."""

    def run(student: Callable, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                body(student, torch.Generator().manual_seed(seed))
            except (AssertionError, NotImplementedError) as error:
                raise (Wrong(str(error)) if isinstance(error, AssertionError) else error) from None
            except Exception as error:  # _call has caught the student's own
                raise Wrong(
                    f"the result is not of the form in the docstring: {type(error).__name__}: {error}"
                ) from None
        print(f"right: {body.__name__}")

    ALL[body.__name__] = functools.update_wrapper(run, body)
    return run


def on_call() -> None:
    """Called before each call of a student's function: marking restarts its clock here."""


def _shown(a) -> str:
    if isinstance(a, Tensor):
        return f"{a.dtype} {tuple(a.shape)}".replace("torch.", "")
    return type(a).__name__ if callable(a) or isinstance(a, tuple) else str(a)


def _call(student: Callable, *args, hint: str = ""):
    """The student's result. An error inside becomes a sentence, and the arguments must stay as they were."""
    on_call()
    before = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
    try:
        found = student(*args)
    except NotImplementedError:  # the stub
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.line for f in frames if f.line and not f.filename.startswith((PACKAGE, TORCH))]
        where = f" at `{lines[-1]}`" if lines else ""
        called = ", ".join(map(_shown, args))
        raise AssertionError(f"{hint}{type(error).__name__}{where}: {error} (called with {called})") from error
    for number, (now, then) in enumerate(zip(args, before, strict=True), start=1):
        assert not isinstance(now, Tensor) or torch.equal(now, then), (
            f"argument {number} was changed in place, but the caller still needs it: make a new tensor instead"
        )
    assert found is not None, "the function returned None: is the `return` missing?"
    return found


def _alike(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    if a.shape != b.shape or not b.isfinite().all():
        return False
    a, b = a.detach().double(), b.detach().double()
    return bool(((a - b).abs() <= tolerance * b.abs().max().clamp(min=1)).all()) if a.numel() else True


def _compare(found, truth: Tensor, what: str, mistakes: dict[str, Tensor] | None = None, tolerance=1e-4) -> None:
    """found must be truth in type, shape and numbers. mistakes: sentence -> the result of that known mistake."""
    assert type(found) in (Tensor, nn.Parameter), f"{what}: expected a tensor, got {type(found).__name__}"
    for sentence, wrong in (mistakes or {}).items():
        assert not _alike(found, wrong, tolerance) or _alike(wrong, truth, tolerance), sentence
    for name in ("shape", "dtype"):
        have, want = getattr(found, name), getattr(truth, name)
        assert have == want, f"{what}: got {name} {have}, expected {want}".replace("torch.", "")
    if not _alike(found, truth, tolerance):
        place = torch.unravel_index((found.double() - truth.double()).abs().argmax(), found.shape)
        place = tuple(map(int, place))
        got, expected = found[place].item(), truth[place].item()
        raise AssertionError(f"{what}: got {got:.5g}, expected {expected:.5g}" + f" at {list(place)}" * bool(place))


def _whole(found) -> int:
    try:
        return operator.index(found)
    except TypeError:
        raise AssertionError(f"expected an integer, got {found!r} ({type(found).__name__})") from None


def _int(g: torch.Generator, low: int, high: int) -> int:
    """A random whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _grads(of: Tensor, inputs: tuple, upstream: Tensor | None = None) -> list[Tensor]:
    """Gradients of a student's result, zeros where there is none."""
    if not of.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(of, inputs, upstream, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for x, d in zip(inputs, found, strict=True)]


def _parts(block: nn.Module, expected: dict[str, nn.Module]) -> nn.ModuleDict:
    """Modules of our own with the weights of a student's, which must have the same types, sizes and options."""
    for name, part in expected.items():
        have = repr(getattr(block, name, None)).replace("padding=same", "padding=(1, 1)")
        assert have == repr(part), f"self.{name} must be {part}, got {have}"
    wanted, count = (sum(p.numel() for m in ms for p in m.parameters()) for ms in (expected.values(), [block]))
    assert count == wanted, f"the module has {count} parameters, expected {wanted}: a layer too many or a bias too few?"
    with torch.no_grad():  # fresh weights are too small, and biases too equal, to tell mistakes apart
        for p in block.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    for name, part in expected.items():
        part.load_state_dict(getattr(block, name).state_dict())
    return nn.ModuleDict(expected)


class Watch(TorchFunctionMode):
    """Counts the calls of torch functions and the elements of their largest result."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def _helpers(student: Callable, *helpers: Callable):
    """Correct versions of earlier exercises, in place of the student's own: one mistake costs points once."""
    names = getattr(student, "forward", student).__globals__
    return mock.patch.dict(names, {helper.__name__.strip("_"): helper for helper in helpers})


@check
def to_model_range(student, g):
    """uint8 images (..., H, W, 3) -> float32 (..., 3, H, W) in [-1, 1]."""
    any_number = "(..., H, W, 3) means any number of leading dimensions, so count the axes from the end. "
    for leading, hint in (((2,), ""), ((), any_number), ((2, 4), any_number)):
        pixels = torch.randint(256, (*leading, _int(g, 4, 6), 7, 3), dtype=torch.uint8, generator=g)
        pixels.view(-1)[:2] = torch.tensor([0, 255])
        p = pixels.float().movedim(-1, -3)
        mistakes = {
            "the channel axis must come before the rows: (..., H, W, 3) becomes (..., 3, H, W)": pixels / 127.5 - 1,
            "black (0) must become -1, but it stays 0: the range is [-1, 1], not [0, 1]": p / 255,
            "white (255) must become exactly 1: divide by 127.5, not by 128": p / 128 - 1,
            "the values between black and white are rounded: use / and not //": p // 127.5 - 1,
        }
        found = _call(student, pixels, hint=hint)
        _compare(found, p / 127.5 - 1, f"{hint}uint8 {tuple(pixels.shape)} in the model's range", mistakes)


@check
def bits_per_pixel(student, g):
    """(H, W, f, K) -> bits of an image's codes, divided by its number of pixels."""
    cases = [(256, 256, 16, 1024), (32, 32, 4, 1000)]
    cases += [(8 * _int(g, 1, 9), 8 * _int(g, 10, 20), 8, _int(g, 5, 3000)) for _ in range(4)]
    for H, W, f, K in cases:
        density = torch.tensor((H // f) * (W // f) / (H * W)).double()
        mistakes = {
            "one code stands for f x f pixels: an image has (H / f) (W / f) codes": density * f**2 * math.log2(K),
            "a code that is one of K carries log2(K) bits, not K": density * K,
            "math.log is to base e: bits need math.log2": density * math.log(K),
            "log2(K) is rounded: 1000 codes carry 9.97 bits each": density * round(math.log2(K)),
        }
        found = torch.tensor(float(_call(student, H, W, f, K))).double()
        _compare(found, density * math.log2(K), f"H, W, f, K = {H}, {W}, {f}, {K}", mistakes)


@check
def latent_size(student, g):
    """(H, W, ch_mult) -> (h, w); ValueError if a side is not divisible by f."""
    for _ in range(6):
        m, h, w = _int(g, 0, 5), 2 * _int(g, 1, 4), 2 * _int(g, 5, 9)
        H, W, levels = h * 2**m, w * 2**m, tuple(_int(g, 1, 4) for _ in range(m + 1))
        found = tuple(map(_whole, _call(student, H, W, levels)))
        assert found != (h // 2, w // 2), (
            f"{m + 1} levels have {m} halvings between them: f = {2**m}, not {2 ** (m + 1)}"
        )
        assert found != (w, h), "(h, w) are swapped: the height comes first"
        assert found == (h, w), f"{H} x {W}, ch_mult {levels}: got {found}, expected {(h, w)}"
    for H, W in ((100, 96), (96, 100), (100, 92)):
        try:
            found = student(H, W, (1, 2, 4, 8, 16))
        except ValueError:
            continue
        except Exception as error:
            found = type(error).__name__
        raise AssertionError(f"{H} x {W}: f = 16 does not divide 100, which must raise ValueError, but gave {found}")


@check
def receptive_field(student, g):
    """[(kernel, stride), ...] -> side of the input that one output depends on, in pixels."""
    cases = [[(3, 1)], [(3, 1), (3, 1)], [(4, 2), (4, 2), (4, 1), (4, 1)]]
    cases += [[(_int(g, 1, 4), _int(g, 1, 3)) for _ in range(_int(g, 2, 4))] for _ in range(4)]
    for layers in cases:
        h = x = torch.zeros(1, 1, 400, requires_grad=True)
        for kernel, stride in layers:
            h = F.conv1d(h, torch.ones(1, 1, kernel), stride=stride)
        h[0, 0, 1].backward()
        seen = x.grad[0, 0].nonzero()
        truth, without_strides = int(seen.max() - seen.min()) + 1, 1 + sum(kernel - 1 for kernel, _ in layers)
        found = _whole(_call(student, layers))
        assert found != without_strides or found == truth, (
            f"{layers}: strides are ignored. After a stride, one step on the map is several input pixels: kernel - 1 "
            "is multiplied by all strides before it"
        )
        assert found == truth, f"{layers} (kernel, stride): got {found}, but the gradient spans {truth} pixels"


@check
def side_seen(student, g):
    """(network, size) -> side of the square of input pixels that the middle of the output depends on."""
    blind = nn.Conv2d(1, 2, 3, padding=1)
    nn.init.zeros_(blind.weight[0])
    hint = "All channels of the output count, and the first one of this network depends on nothing. "
    seen = _whole(_call(student, blind, 32, hint=hint))
    zeros = "An image of zeros may have no gradient: use random values. "
    for activation in (nn.Identity(), nn.Identity(), nn.Hardshrink(1e-3)):
        layers, field, step = [], 1, 1
        for channels in (1, 4, 4):
            kernel, stride = 1 + 2 * _int(g, 0, 2), _int(g, 1, 2)
            layers.append(nn.Conv2d(channels, 4, kernel, stride, padding=kernel // 2, bias=False))
            nn.init.normal_(layers[-1].weight, generator=g)
            field, step = field + (kernel - 1) * step, step * stride
        network, size = nn.Sequential(*layers, activation), 80 + 8 * _int(g, 0, 3)
        found = _whole(_call(student, network, size, hint=zeros))
        assert all(p.grad is None for p in network.parameters()), (
            "gradients were left in the network's weights: torch.autograd.grad(..., image) computes the image's alone"
        )
        assert found != size, "every pixel was counted: only those whose gradient is not 0 are seen"
        assert found != field - 1, "off by one: rows 3 to 5 are three rows, 5 - 3 + 1"
        assert found == field, f"got {found}, but the middle output depends on {field} pixels a side"
    assert seen == 3, f"{hint}Got {seen}, expected 3"


@check
def ResDown(student, g):
    """A module of (c_in, c_out): x (B, c_in, H, W) -> (B, c_out, H/2, W/2), a residual block, then a halving."""
    c = _int(g, 3, 6)
    for c_in, c_out in ((c, c), (c, c + 3)):
        parts = {
            "norm1": nn.GroupNorm(1, c_in),
            "conv1": nn.Conv2d(c_in, c_out, 3, padding=1),
            "norm2": nn.GroupNorm(1, c_out),
            "conv2": nn.Conv2d(c_out, c_out, 3, padding=1),
            "skip": nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1),
            "down": nn.Conv2d(c_out, c_out, 3, stride=2),
        }
        block = _call(student, c_in, c_out)
        m = _parts(block, parts)
        x = torch.randn(2, c_in, 8, 6, generator=g)

        def inner(x: Tensor, act: Callable, m: nn.ModuleDict = m) -> Tensor:
            return m["conv2"](act(m["norm2"](m["conv1"](act(m["norm1"](x))))))

        h, skipped = inner(x, F.silu), m["skip"](x)
        mistakes = {
            "the zeros belong at the right and the bottom only: every window is shifted by one pixel": (1, 0, 1, 0),
            "the zeros are missing: without them 8 x 6 becomes 3 x 2 instead of 4 x 3": (0, 0, 0, 0),
        }
        mistakes = {sentence: m["down"](F.pad(skipped + h, pad)) for sentence, pad in mistakes.items()}
        mistakes |= {
            "the skip connection is missing: a residual block adds to its input": m["down"](F.pad(h, (0, 1, 0, 1))),
            "the activation must be SiLU, not ReLU": m["down"](F.pad(skipped + inner(x, F.relu), (0, 1, 0, 1))),
        }
        truth = m["down"](F.pad(skipped + h, (0, 1, 0, 1)))
        what = "skip(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))), zeros at the right and bottom, then down"
        _compare(_call(block, x), truth, what, mistakes)


def _nearest_in_chunks(z: Tensor, codebook: Tensor, chunk: int) -> Tensor:
    return torch.stack([(row - codebook).square().sum(1).argmin() for row in z])


@check
def nearest_in_chunks(student, g):
    """z (N, D), codebook (K, D), chunk -> indices (N,) int64, from N x chunk distances at a time."""
    z, codebook = torch.randn(_int(g, 40, 50), 7, generator=g) * 2, torch.randn(22, 7, generator=g) * 3
    codebook[15] = codebook[3]
    z[0], z[1] = codebook[21] + 0.01, codebook[15]
    squares, products = codebook.square().sum(1), z @ codebook.T
    distances, truth = squares - 2 * products, _nearest_in_chunks(z, codebook, 22)
    mistakes = {
        "these are the codes farthest away: argmin, not argmax": distances.argmax(1),
        "the largest inner product is not the nearest code, as long codes win it: |e|^2 is missing": products.argmax(1),
        "|z - e|^2 = |z|^2 - 2 z.e + |e|^2: the factor 2 is missing": (squares - products).argmin(1),
        "the last code was left out: 22 codes in chunks of 5 leave a chunk of 2": distances[:, :20].argmin(1),
        "only the last chunk counts: keep the best distance of the chunks before": 20 + distances[:, 20:].argmin(1),
        "codes 3 and 15 are equal, and the first counts: only a *smaller* distance replaces the best": (
            torch.where(truth == 3, 15, truth)
        ),
    }
    for chunk in (5, 1, 22, 100):
        found = _call(student, z, codebook, chunk)
        assert not isinstance(found, Tensor) or found.max() >= chunk or chunk > 5, (
            "all indices are below the chunk's size: add where the chunk begins in the codebook"
        )
        _compare(found, truth, f"the number of the nearest code of each row, in chunks of {chunk}", mistakes)
    for N, K, D, chunk in ((512, 256, 4, 32), (16, 2048, 2, 8)):
        with Watch() as watch:
            _call(student, torch.randn(N, D, generator=g), torch.randn(K, D, generator=g), chunk)
        assert watch.largest < N * K, "all N x K distances were computed at once: memory must not grow with K"
        assert watch.largest <= max(N * chunk, K * D), (
            "a block of N x chunk x D was computed, where |z|^2 - 2 z.e + |e|^2 needs only a matrix product"
            if N > K
            else "blocks of chunk x K were computed: cut the codebook, not z, into chunks, since it is K that is large"
        )
        assert watch.calls < 25 * K // chunk, (
            f"{watch.calls} calls of torch for {K // chunk} chunks: a loop over the rows?"
        )


def _straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    return z + (z_q - z).detach()


@check
def straight_through(student, g):
    """z, z_q (N, D) -> the value of z_q with the gradient of z."""
    z, z_q, upstream = torch.randn(3, _int(g, 4, 9), 4, generator=g).unbind()
    out = _call(student, z.requires_grad_(), z_q.requires_grad_())
    _compare(out, z_q, "the value must be that of z_q")
    dz, dz_q = _grads(out, (z, z_q), upstream)
    assert dz.any(), "no gradient reaches z, so the encoder would never learn: detach the difference only"
    _compare(dz, upstream, "the gradient at z must be the one at the output, unchanged")
    assert not dz_q.any(), "a gradient reaches z_q: the codes must learn from the codebook loss only"


def _codebook_loss(z: Tensor, z_q: Tensor, beta: float) -> Tensor:
    return (z_q - z.detach()).square().mean() + beta * (z_q.detach() - z).square().mean()


@check
def codebook_loss(student, g):
    """z, z_q (N, D), beta -> |sg[z] - z_q|^2 + beta |sg[z_q] - z|^2, means over all elements (Eq. 4)."""
    z, z_q = torch.randn(2, _int(g, 4, 9), 4, generator=g).unbind()
    beta = 0.1 + 0.8 * torch.rand((), generator=g).item()
    loss = _call(student, z.requires_grad_(), z_q.requires_grad_(), beta)
    mse = (z - z_q).square().mean()
    mistakes = {
        f"beta is {beta:.3f} here, but the loss is that of 0.25: use the argument": 1.25 * mse,
        "one of the two terms is missing": mse,
        "take the mean over all elements, not the sum": (1 + beta) * mse * z.numel(),
    }
    _compare(loss, (1 + beta) * mse, "the value must be (1 + beta) times the mean squared difference", mistakes)
    dz, dz_q = _grads(loss, (z, z_q))
    full = 2 * (z_q - z).detach() / z.numel()  # d mse / d z_q
    assert dz.any(), "z gets no gradient from the commitment term: one detach too many"
    assert dz_q.any(), "the codes get no gradient, so they would never move to the latents: one detach too many"
    mistakes = {
        "both terms move both sides: the stop-gradients (detach) are missing": (1 + beta) * full,
        "beta weighs the wrong term: it belongs to the commitment, which moves z (the official code has this bug)": (
            beta * full
        ),
    }
    _compare(dz_q, full, "the term that moves the codes has weight 1; its gradient at z_q", mistakes)
    _compare(dz, -beta * full, "the commitment term has weight beta; its gradient at z")


@check
def Quantizer(student, g):
    """A module of (codebook_size, code_dim, beta): z (B, D, h, w) -> (z_q (B, D, h, w), indices (B, h, w), loss)."""
    for _ in range(2):
        B, D, h, w, K = _int(g, 1, 3), _int(g, 4, 5), _int(g, 2, 3), _int(g, 4, 6), _int(g, 8, 12)
        z, upstream = torch.randn(2, B, D, h, w, generator=g).unbind()
        with _helpers(student, _nearest_in_chunks, _straight_through, _codebook_loss):
            _compare_quantizer(student, g, z.requires_grad_(), upstream, K)


def _compare_quantizer(student: Callable, g: torch.Generator, z: Tensor, upstream: Tensor, K: int) -> None:
    (B, D, h, w), beta = z.shape, 0.1 + 0.8 * torch.rand((), generator=g).item()
    quantizer = _call(student, K, D, beta)
    assert isinstance(getattr(quantizer, "codebook", None), nn.Embedding), "self.codebook must be an nn.Embedding"
    codes = quantizer.codebook.weight
    assert codes.shape == (K, D), f"the codebook holds K codes of D numbers, {(K, D)}: got {tuple(codes.shape)}"
    assert len(codes.detach().unique(dim=0)) == K, (
        "codes are equal at the start, so all latents choose the first and the others never learn: let them be random"
    )
    assert len(list(quantizer.parameters())) == 1, "the codes are the only weights: beta is a number, not a parameter"
    with torch.no_grad():
        codes.copy_(torch.randn(K, D, generator=g))
    found = _call(quantizer, z)
    assert isinstance(found, tuple) and len(found) == 3, "return three things: (z_q, indices, loss)"
    z_q, indices, loss = found
    rows = z.permute(0, 2, 3, 1).reshape(-1, D)
    truth, mixed = (_nearest_in_chunks(r, codes, K).view(B, h, w) for r in (rows, z.reshape(-1, D)))
    sentence = (
        "a position got the numbers of its neighbours: (B, D, h, w) must become (B, h, w, D) before it becomes rows, "
        "since view and reshape do not move an axis"
    )
    _compare(indices, truth, "indices are the numbers of the nearest codes, (B, h, w)", {sentence: mixed})
    nearest = codes[truth]  # (B, h, w, D)
    sentence = "the axis D must move back: view and reshape do not move it, permute does"
    what = "z_q holds the code of each position, (B, D, h, w)"
    _compare(z_q, nearest.permute(0, 3, 1, 2), what, {sentence: nearest.reshape(z.shape)})
    dz, dcodes = _grads(z_q, (z, codes), upstream)
    assert dz.any(), "no gradient of z_q reaches z, so the encoder would never learn: use straight_through"
    _compare(dz, upstream, "straight through: the gradient at z must be the one at z_q")
    assert not dcodes.any(), "the gradient of z_q reaches the codes: they must learn from the loss only"
    away = (rows - nearest.view(-1, D)).detach()
    _compare(loss, (1 + beta) * away.square().mean(), "loss is (1 + beta) times the mean squared difference")
    dz, dcodes = _grads(loss, (z, codes))
    assert dz.any() and dcodes.any(), "the loss has two terms: one moves the codes, the other the latents"
    pull = 2 * away / z.numel()
    moved = torch.zeros(K, D).index_add(0, truth.flatten(), -pull)
    sentence = "beta weighs the commitment, which moves z: are z and z_q swapped in the loss?"
    _compare(dcodes, moved, "the loss's gradient at the codebook", {sentence: beta * moved})
    _compare(dz, beta * pull.view(B, h, w, D).permute(0, 3, 1, 2), "the loss's gradient at z")


@check
def revive(student, g):
    """(codebook (K, D), counts (K,), latents (N, D)) -> the codebook with unused codes moved onto latents."""
    K, N, dead = _int(g, 10, 14), 40, 7
    codebook, latents = torch.randn(K, 3, generator=g), torch.randn(N, 3, generator=g) + 5
    counts = torch.randint(1, 4, (K,), generator=g)
    counts[torch.randperm(K, generator=g)[:dead]] = 0

    def drawn(counts: Tensor, latents: Tensor, expected: int) -> list[int]:
        """Which latents the unused codes were moved onto."""
        found = _call(student, codebook, counts, latents)
        used, few = counts > 0, "with fewer latents than unused codes move as many as there are: " * (len(latents) < K)
        assert found.shape == codebook.shape, f"the codebook's shape must stay {tuple(codebook.shape)}"
        assert torch.equal(found[used], codebook[used]), "codes that are used must stay as they are"
        moved = found[(found != codebook).any(1)]
        assert len(moved) or not expected, f"{few}no unused code moved"
        places = [(latents == row).all(1).nonzero().flatten().tolist() for row in moved]
        assert all(places), "each unused code must be moved exactly onto one of the latents"
        numbers = [place[0] for place in places]
        assert len(set(numbers)) == len(numbers), (
            "two codes were moved onto one latent, and only one of them can ever be chosen: draw without repeating"
        )
        assert len(numbers) == expected, f"{few}{len(numbers)} codes moved, expected {expected}"
        return numbers

    seen = [drawn(counts, latents, dead) for _ in range(20)]
    assert len(set(map(tuple, seen))) > 1, "the same latents were taken every time: draw them at random"
    assert len({number for numbers in seen for number in numbers}) > N // 2, (
        "only some latents are ever drawn, so all new codes come from one corner of an image: draw among all N"
    )
    drawn(torch.zeros_like(counts), latents[:5], 5)
    drawn(torch.ones_like(counts), latents, 0)


@check
def normalize_features(student, g):
    """Feature maps (B, C, H, W) -> the same directions, at every position of length 1 over the channels."""
    for scale, hint in ((10, ""), (0.02, " (features are small here: is the guard too large?)")):
        f = torch.randn(2, _int(g, 4, 6), 3, 5, generator=g) * scale
        over_space, squares = F.normalize(f.flatten(2), dim=2).view_as(f), f.square().sum(1, keepdim=True)
        mistakes = {
            "normalised over the positions: LPIPS scales each position to length 1 over the channels": over_space,
            "this is the L1 norm, the sum of absolute values: use the L2 norm": f / f.abs().sum(1, keepdim=True),
            "one norm was used for everything: each position has its own length over the channels": f / f.norm(),
            "divided by the squared length: the root is missing": f / squares,
        }
        what = f"at every position the length over the channels must be 1 and the direction unchanged{hint}"
        _compare(_call(student, f), F.normalize(f, dim=1), what, mistakes, 1e-3)
    f = torch.randn(2, 5, 3, 5, generator=g)
    f[0, :, 1, 1] = 0  # a ReLU can leave a position with nothing
    out = _call(student, f.requires_grad_())
    assert out.isfinite().all(), "a position where all channels are 0 becomes NaN or infinite: guard the norm"
    (grad,) = torch.autograd.grad(out.sum(), f)
    assert grad.isfinite().all(), (
        "the gradient where all channels are 0 is NaN, since the root's slope at 0 is infinite: guard it under the root"
    )
    assert grad.abs().max() < 1e6, (
        f"the gradient where all channels are 0 is {grad.abs().max():.0e}, and one such step ruins the decoder: the "
        "guard belongs under the root, as in (sum + 1e-8).sqrt(), whose slope is 1e4 at most"
    )


@check
def layer_distance(student, g):
    """Normalised maps fx, fy (B, C, H, W) and w (C,) -> (B,)."""
    B, C = _int(g, 2, 4), _int(g, 5, 7)
    fx, fy = torch.randn(2, B, C, 4, 6, generator=g)
    w = torch.rand(C, generator=g)
    means = (fx - fy).square().sum((2, 3)) / 24  # (B, C)
    truth = torch.stack([sum(w[c] * means[b, c] for c in range(C)) for b in range(B)])
    mistakes = {
        "the channels are summed; only the positions are averaged": truth / C,
        "the positions are averaged, not summed": truth * 24,
        "one distance for each image, (B,): do not average over the batch": truth.mean(),
        "take the squared difference, not the absolute one": ((fx - fy).abs().mean((2, 3)) * w).sum(1),
        "the weights w are missing": means.sum(1),
    }
    _compare(_call(student, fx, fy, w), truth, "sum over channels of w_c (fx - fy)^2, mean over positions", mistakes)


def _hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return 0.5 * (torch.relu(1 - logits_real).mean() + torch.relu(1 + logits_fake).mean())


@check
def hinge_loss(student, g):
    """Logits of real and of fake patches -> L_D, halved."""
    real, fake = torch.randn(2, 1, 3, 3, generator=g) * 2, torch.randn(_int(g, 3, 5), 1, 3, 3, generator=g) * 2

    def halved(sign_real: int, sign_fake: int, margin: int = 1, clamp: float = 0.0) -> Tensor:
        costs = [
            [max(clamp, margin + s * v) for v in x.flatten().tolist()]
            for s, x in ((sign_real, real), (sign_fake, fake))
        ]
        return torch.tensor(sum(sum(c) / len(c) for c in costs) / 2)

    truth = halved(-1, 1)
    mistakes = {
        "the loss is halved: 1, not 2, for a D that answers 0 to everything": 2 * truth,
        "the sign of the real logits is wrong: D wants them above 1": halved(1, 1),
        "the sign of the fake logits is wrong: D wants them below -1": halved(-1, -1),
        "both signs are wrong: D wants real logits above 1 and fake ones below -1": halved(1, -1),
        "the clamp at 0 is missing: a logit beyond the margin costs nothing": halved(-1, 1, clamp=-math.inf),
        "the margin is missing: the hinge is at 1, not at 0": halved(-1, 1, margin=0),
    }
    _compare(_call(student, real, fake), truth, "(mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat))) / 2", mistakes)


def _adaptive_weight(rec_loss: Tensor, gan_loss: Tensor, last_weight: Tensor) -> Tensor:
    rec, gan = (torch.autograd.grad(v, last_weight, retain_graph=True)[0].norm() for v in (rec_loss, gan_loss))
    return (rec / (gan + 1e-6)).clamp(0, 1e4).detach()


@check
def adaptive_weight(student, g):
    """(rec_loss, gan_loss, last_weight) -> lambda of Eq. 7, a detached scalar."""
    # Large and small lambda, a GAN gradient about as small as delta, and one that vanishes.
    for rec_scale, gan_scale in ((1, 0.01), (1, 50), (1e-3, 2e-6), (1, 0)):
        before, layer = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3, padding=1)
        x_hat = layer(before(torch.randn(2, 2, 6, 6, generator=g)))
        rec_loss, gan_loss = rec_scale * (x_hat - 1).abs().mean(), gan_scale * x_hat.square().mean()
        rec, gan = (torch.autograd.grad(v, layer.weight, retain_graph=True)[0].norm() for v in (rec_loss, gan_loss))
        ratio = rec / (gan + 1e-6)
        found = _call(student, rec_loss, gan_loss, layer.weight)
        assert isinstance(found, Tensor) and not found.requires_grad, (
            "lambda must be a detached tensor: otherwise the network learns to make lambda small"
        )
        assert all(p.grad is None for p in [*before.parameters(), *layer.parameters()]), (
            "a gradient was left in .grad, and the next step would add to it: use torch.autograd.grad, not backward()"
        )
        mistakes = {
            "upside down: the norm of the reconstruction's gradient is above the line": gan / (rec + 1e-6),
            "delta = 1e-6 must be added to the norm below the line": (rec / gan).clamp(0, 1e4),
            "lambda must be clamped to [0, 10000]: a vanishing GAN gradient makes it explode": ratio,
            "lambda is clamped from below: it may be anything from 0 to 10000": ratio.clamp(1, 1e4),
            "delta is 1e-4, as in the official code: use 1e-6": rec / (gan + 1e-4),
            "the ratio of the losses was taken: lambda is the ratio of their gradients' norms": rec_loss / gan_loss,
        }
        what = "lambda = |grad rec_loss| / (|grad gan_loss| + 1e-6) at the last layer's weight, in [0, 10000]"
        _compare(found, ratio.clamp(0, 1e4), what, mistakes, 1e-3)
        with contextlib.suppress(RuntimeError):
            (rec_loss + gan_loss).backward()
        assert layer.weight.grad is not None, "the graph is freed, but the step still needs it: use retain_graph=True"


@check
def stage_one(student, g):
    """(vqgan, disc, opt_g, opt_d, x, disc_weight) -> (L1, lambda), after one step of both networks."""
    config = VQGANConfig(image_size=16, ch=8, ch_mult=(1, 2), z_channels=16, code_dim=4, codebook_size=32)
    vqgan, disc = VQGAN(config), PatchDiscriminator(channels=8, num_layers=1)
    with torch.no_grad():  # logits of size 1, on both sides of the margin
        disc.layers[-1].weight *= 20
    weight, previous = 0.3 + 0.5 * torch.rand((), generator=g).item(), None
    # With SGD at rate 1, the change of the weights in a step is the gradient.
    opts = [torch.optim.SGD(network.parameters(), 1.0) for network in (vqgan, disc)]
    hint = "D must be shown x_hat.detach(): without it, its loss goes back through G, whose graph is already freed. "
    for _ in range(2):
        # Two colours an image, left and right.
        x = (torch.rand(4, 3, 1, 2, generator=g) * 1.6 - 0.8).repeat_interleave(8, 3).repeat(1, 1, 16, 1)
        truth = _stage_one_gradients(copy.deepcopy(vqgan), copy.deepcopy(disc), x, weight)
        before = [nn.utils.parameters_to_vector(n.parameters()).detach() for n in (vqgan, disc)]
        try:
            with _helpers(student, _hinge_loss, _adaptive_weight):
                found = _call(student, vqgan, disc, *opts, x, weight)
        except AssertionError as error:
            raise AssertionError(hint * ("second time" in str(error)) + str(error)) from error
        moved = [b - nn.utils.parameters_to_vector(n.parameters()) for b, n in zip(before, (vqgan, disc), strict=True)]
        _compare_step(found, *moved, truth, previous)
        previous = moved[0].detach()
        with torch.no_grad():  # go back, since a step of rate 1 is far too long
            for network, b, m in zip((vqgan, disc), before, moved, strict=True):
                nn.utils.vector_to_parameters(b - 1e-3 * m, network.parameters())


def _stage_one_gradients(vqgan: nn.Module, disc: nn.Module, x: Tensor, weight: float) -> dict:
    """The gradients of one step by the definition, and of what is easily added or forgotten."""

    def flat(loss: Tensor, network: nn.Module) -> Tensor:
        return torch.cat([d.flatten() for d in _grads(loss, tuple(network.parameters()))])

    x_hat, quantized = vqgan(x)
    l1, gan = (x - x_hat).abs().mean(), -disc(x_hat).mean()
    lambda_ = _adaptive_weight(l1, gan, vqgan.decoder.conv_out.weight)
    disc_loss = _hinge_loss(disc(x), disc(x_hat))
    losses = {"rec": l1, "codebook": quantized.loss, "gan": gan, "disc": disc_loss}
    numbers = {"l1": l1.item(), "lambda": lambda_.item(), "weight": weight * lambda_.item(), "disc_weight": weight}
    return (
        numbers
        | {f"{n} in G": flat(v, vqgan) for n, v in losses.items()}
        | {f"{n} in D": flat(v, disc) for n, v in losses.items() if n in ("gan", "disc")}
    )


def _compare_step(found, moved_G: Tensor, moved_D: Tensor, truth: dict, previous: Tensor | None) -> None:
    assert isinstance(found, tuple) and len(found) == 2, "return two numbers: (L1, lambda)"
    assert moved_G.any() and moved_D.any(), "both networks must move in the step: call opt_g.step and opt_d.step"

    def alike(moved: Tensor, gradient: Tensor) -> bool:
        return bool((moved - gradient).norm() < 2e-3 * gradient.norm() + 1e-7)

    rec, codebook, gan = (truth[f"{name} in G"] for name in ("rec", "codebook", "gan"))
    weight = truth["weight"]  # disc_weight times lambda
    right = rec + codebook + weight * gan
    mistakes = {
        "D's loss moves G: show D x_hat.detach(), or G learns to make fakes easy to tell": right + truth["disc in G"],
        "L_GAN is not weighted by lambda": rec + codebook + truth["disc_weight"] * gan,
        "the codebook loss, quantized.loss, is missing": rec + weight * gan,
        "disc_weight is missing": rec + codebook + truth["lambda"] * gan,
        "the sign of L_GAN is wrong: L_GAN = -mean D(x_hat)": rec + codebook - weight * gan,
    }
    if previous is not None:
        mistakes["the second step still holds the first one's gradients: zero_grad is missing"] = right + previous
    for sentence, gradient in mistakes.items():
        assert not alike(moved_G, gradient), sentence
    assert alike(moved_G, right), "G must move along L1 + L_VQ + disc_weight lambda L_GAN with L_GAN = -mean D(x_hat)"
    assert not alike(moved_D, truth["disc in D"] + weight * truth["gan in D"]), (
        "G's loss left a gradient in D, which teaches D to call fakes real: clear it before D's own backward pass"
    )
    assert alike(moved_D, truth["disc in D"]), "D must move along the hinge loss of x and of the x_hat G learned from"
    for name, value in zip(("l1", "lambda"), map(float, found), strict=True):
        assert math.isclose(value, truth[name], rel_tol=1e-2), f"{name} is {truth[name]:.4f} here, got {value:.4f}"


def _causal_mask(T: int) -> Tensor:
    return torch.tensor([[j <= i for j in range(T)] for i in range(T)])


@check
def causal_mask(student, g):
    """T -> (T, T) bool, True where row i may look at column j."""
    for T in (5, 1, _int(g, 6, 12), _int(g, 13, 30)):
        truth, full = _causal_mask(T), torch.ones(T, T, dtype=torch.bool)
        mistakes = {
            "the mask is transposed: row i is the position that looks, column j what it looks at": truth.T,
            "a token may see itself: the mask is off by one (position i predicts token i + 1, not i)": full.tril(-1),
            "a token sees the one it has to predict: the mask is off by one": full.tril(1),
            "every token sees all others, also those it has to predict": full,
        }
        _compare(_call(student, T), truth, f"True on and below the diagonal, T = {T}", mistakes)


@check
def sequence_loss(student, g):
    """logits (B, R + T - 1, K) of [r | s without its last], s (B, T) -> mean of -log p(s | r) over s only."""
    for R in (_int(g, 2, 4), 1):
        B, T, K = _int(g, 2, 4), _int(g, 4, 6), 7
        logits, s = torch.randn(B, R + T - 1, K, generator=g), torch.randint(K, (B, T), generator=g)
        nats = torch.zeros(B, T)
        for b in range(B):
            for t in range(T):
                row = logits[b, R - 1 + t]  # the last condition token predicts s_1
                nats[b, t] = row.exp().sum().log() - row[s[b, t]]
        mistakes = {
            "the first T logits were taken, but s_1 is predicted at the last condition token, number R - 1: the loss "
            "must not count the condition": F.cross_entropy(logits[:, :T].flatten(0, 1), s.flatten()),
            "take the mean over all tokens, not their sum": nats.sum(),
            "the sum over T was taken: take the mean over all tokens": nats.sum() / B,
            "one number is expected, the mean over all tokens": nats.flatten(),
        }
        _compare(_call(student, logits, s), nats.mean(), "-log p(s | r), mean over the tokens of s", mistakes)


@check
def top_p(student, g):
    """probabilities (K,), p -> the smallest set of most likely codes that reaches p, renormalised."""
    q = torch.tensor([0.125, 0.5, 0.25, 0.125])
    cases = [(q, 0.6), (q, 0.5), (q, 0.75), (torch.tensor([0.7, 0.2, 0.1]), 0.01)]
    cases += [(torch.randn(_int(g, 7, 11), generator=g).softmax(0), p) for p in (0.3, 0.9, 1.0)]
    for q, p in cases:
        values, order = q.sort(descending=True)
        needed = 1 + sum(values[:k].sum().item() < p for k in range(1, len(q)))

        def kept(count: int, values: Tensor = values, order: Tensor = order) -> Tensor:
            return torch.zeros(len(values)).scatter(0, order[:count], values[:count] / values[:count].sum())

        truth = kept(needed)
        mistakes = {
            "the probabilities are in sorted order: put each back to its own code": truth.sort(descending=True).values,
            "the kept probabilities must be renormalised to sum 1": torch.where(truth > 0, q, 0),
            "one code too many: the set is complete when its sum reaches p (0.5 reaches p = 0.5)": kept(needed + 1),
            "the code that crosses p belongs to the set: 0.5 does not reach 0.6, 0.5 + 0.25 does": kept(needed - 1),
        }
        _compare(_call(student, q, p), truth, f"the most likely codes that reach {p}, renormalised", mistakes)
    tied = int((_call(student, torch.full((8,), 0.125), 0.5) > 0).sum())
    assert tied == 4, (
        f"of eight equally likely codes four reach p = 0.5, but {tied} were kept: cut by rank, not by value"
    )


@check
def cached_attention(student, g):
    """q, k, v (B, 1, D) of a new token, past None or (keys, values) -> (out (B, 1, D), (keys, values))."""
    B, T, D = _int(g, 1, 3), _int(g, 5, 8), 2 * _int(g, 3, 6)
    q, k, v = torch.randn(3, B, T, D, generator=g)
    past = None
    for t in range(T):
        new = [x[:, t : t + 1] for x in (q, k, v)]
        out, past = _call(student, *new, past)
        for name, cache, want in (("keys", past[0], k[:, : t + 1]), ("values", past[1], v[:, : t + 1])):
            held = cache.shape[1]
            assert held == t + 1, f"after {t + 1} tokens the cache must hold {t + 1} {name}, but it holds {held}"
            assert t == 0 or not torch.equal(cache, want.roll(1, 1)), (
                f"the new one is put in front of the cached {name}: it comes last, in the order of the tokens"
            )
            _compare(cache, want, f"the cached {name} after {t + 1} tokens")
        scores = new[0] @ k[:, : t + 1].mT
        mistakes = {
            "the scores are not divided by sqrt(D)": scores,
            "divide the scores by sqrt(D), not by D": scores / D,
        }
        mistakes = {sentence: wrong.softmax(-1) @ v[:, : t + 1] for sentence, wrong in mistakes.items()}
        truth = (scores / math.sqrt(D)).softmax(-1) @ v[:, : t + 1]
        _compare(out, truth, f"token {t}: the cached result differs from the full pass", mistakes)


@check
def PrefixBlock(student, g):
    """A module of (C, heads): x (B, R + T, C), R -> (B, R + T, C), a pre-norm block; the tokens of c see each other."""
    for heads, R, T in ((3, 3, 4), (2, _int(g, 4, 5), _int(g, 2, 5)), (1, 0, 5)):
        C = 4 * heads
        block = _call(student, C, heads)
        parts = {
            "norm1": nn.LayerNorm(C),
            "norm2": nn.LayerNorm(C),
            "qkv": nn.Linear(C, 3 * C),
            "proj": nn.Linear(C, C),
        }
        linears = [m for m in getattr(block, "mlp", nn.Identity()).modules() if isinstance(m, nn.Linear)]
        assert len(linears) == 2, f"self.mlp must hold two nn.Linear, got {len(linears)}"
        block.wider, block.back = linears  # under names of our own, whatever the student calls them
        m = _parts(block, parts | {"wider": nn.Linear(C, 4 * C), "back": nn.Linear(4 * C, C)})
        _compare_block(block, m, torch.randn(2, R + T, C, generator=g), heads, R)


def _compare_block(block: nn.Module, m: nn.ModuleDict, x: Tensor, heads: int, R: int) -> None:
    B, N, C = x.shape
    may = _causal_mask(N)
    may[:R, :R] = True
    found = _call(block, x.requires_grad_(), R)
    _compare(found.isfinite(), torch.ones(B, N, C, dtype=torch.bool), "the result is finite, (B, R + T, C)")
    for i in range(N):
        sees = _grads(found[0, i].square().sum(), (x,))[0][0].abs().sum(1) > 0
        for j in range(N):
            both = ", but the tokens of c see each other in both directions" * (j > i)
            assert may[i, j] or not sees[j], f"R = {R}: token {i} sees token {j}, which lies in its future"
            assert sees[j] or not may[i, j], f"R = {R}: token {i} does not see token {j}{both}"

    def truth(scale=(C // heads) ** -0.5, act=F.gelu, pre=m["norm1"], mid=m["norm2"], may=may) -> Tensor:
        q, k, v = m["qkv"](pre(x)).view(B, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * scale).masked_fill(~may, -math.inf).softmax(-1)
        h = x + m["proj"]((weights @ v).transpose(1, 2).reshape(x.shape))
        return h + m["back"](act(m["wider"](mid(h))))

    mistakes = {
        "the scores are divided by sqrt(C), but it is the root of a head's dimensions, C / heads": truth(C**-0.5),
        "the scores are not divided by the root of a head's dimensions": truth(1.0),
        "the MLP has no activation, so its two layers are one linear map: put a GELU between": truth(act=nn.Identity()),
        "the MLP's activation must be GELU, not ReLU": truth(act=F.relu),
        "the MLP's activation must be GELU, not SiLU": truth(act=F.silu),
        "the MLP's activation must be GELU, not a sigmoid": truth(act=torch.sigmoid),
        "norm1 is missing: the attention reads norm1(x)": truth(pre=nn.Identity()),
        "norm2 is missing: the MLP reads norm2(x)": truth(mid=nn.Identity()),
    }
    blind = may & ~torch.eye(N, dtype=torch.bool)
    blind[:R, :R] = True
    mistakes["the mask is off by one: a token must see itself, too"] = truth(may=blind)
    tanh = truth(act=functools.partial(F.gelu, approximate="tanh"))  # GPT-2's GELU is as good
    what = "x + proj(attention(norm1(x))), then x + mlp(norm2(x)); qkv gives q, k, v, each with one head after another"
    _compare(found, tanh if _alike(found, tanh) else truth(), what, mistakes)


class _Counting:
    """A transformer to sample from: its logits depend on all tokens so far, and it counts those that it reads."""

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


@check
def generate(student, g):
    """(step, r, u, temperature, top_k) -> codes (B, T), drawn one after another from step, which keeps a cache."""
    B, R, T, K = _int(g, 2, 4), _int(g, 2, 3), _int(g, 5, 7), 8
    model = _Counting(K, g)
    r, u = torch.randint(K, K + 4, (B, R), generator=g), torch.rand(B, T, generator=g)
    u[0, 0], u[1, 0] = 0.0, 1 - 2**-24

    def truth(temperature: float, top_k: int | None, u: Tensor = u) -> Tensor:
        codes = torch.zeros(B, T, dtype=torch.int64)
        for b in range(B):
            for t in range(T):
                logits = model(torch.cat([r[b], codes[b, :t]])[None], None)[0][0, -1].double() / temperature
                keep = sorted(range(K), key=lambda k: -logits[k].item())[: top_k or K]
                p = [math.exp(logits[k]) if k in keep else 0.0 for k in range(K)]
                codes[b, t] = next(k for k in range(K) if sum(p[: k + 1]) > u[b, t].item() * sum(p))
        return codes

    for temperature, top_k in ((1.0, None), (0.5, None), (1.0, 2), (2.0, 3)):
        model.read = 0
        found = _call(student, model, r, u, temperature, top_k)
        assert model.read == R + T - 1, (
            f"the transformer was given {model.read} tokens instead of R + T - 1 = {R + T - 1}: first r, then each new "
            "code alone. The state holds the rest, and what follows the last code is not needed"
        )
        mistakes = {
            "the temperature has no effect: divide the logits by it": truth(1.0, top_k),
            "top_k has no effect": truth(temperature, None),
            "the most likely code was taken every time: draw it by u": truth(temperature, 1),
            "each code has a u of its own: column i belongs to code i": truth(
                temperature, top_k, u[:, :1].repeat(1, T)
            ),
        }
        what = (
            f"temperature {temperature}, top_k {top_k}: the first code at which the sum of the probabilities exceeds u"
        )
        _compare(found, truth(temperature, top_k), what, mistakes)


@check
def sequence(student, g):
    """s (B, T) codes in [0, K), c (B, R) condition indices, K -> [c | s], each with numbers of its own."""
    B, T, R, K = 3, _int(g, 5, 7), _int(g, 1, 3), _int(g, 9, 20)
    s, c = torch.randint(K, (B, T), generator=g), torch.randint(5, (B, R), generator=g)
    s[0, 0], c[0, 0] = 0, 0
    mistakes = {
        "the condition comes first: only what follows it can depend on it": torch.cat([s, c + K], 1),
        "condition index 0 and code 0 have the same number, so the transformer cannot tell them apart: number the "
        "condition from K on": torch.cat([c, s], 1),
        "the codes must keep their numbers: shift the condition, not the codes": torch.cat([c, s + K], 1),
        "condition index i is token K + i: the last code is K - 1, so K is free": torch.cat([c + K + 1, s], 1),
    }
    _compare(_call(student, s, c, K), torch.cat([c + K, s], 1), "[K + c | s], R + T tokens", mistakes)


@check
def guided(student, g):
    """logits with c, without c (B, K), scale -> logits to sample from."""
    with_c, without_c = torch.randn(2, 3, _int(g, 7, 11), generator=g)
    for scale in (1.0, 0.0, 3.0):
        step = scale * (with_c - without_c)
        mistakes = {
            "with scale 1 the result must be the logits with c: start at without_c": with_c + step,
            "the direction is wrong: walk from without_c towards with_c": without_c - step,
            "with scale 0 the result must be the logits without c": scale * with_c,
        }
        _compare(_call(student, with_c, without_c, scale), without_c + step, f"scale {scale}", mistakes)


@check
def learn(student, g):
    """(gpt, s (N, T), c (N,), K, steps) -> losses; trains p(s | c) on sequences [K + c | s]."""
    K, T, steps = 16, 5, 120
    starts, guess = torch.randperm(K, generator=g), math.log(K)

    def data(count: int) -> tuple[Tensor, Tensor]:
        """c says all of s but the first code, which is one of four."""
        c = torch.randint(K, (count,), generator=g)
        s = (starts[c][:, None] + torch.arange(T)) % K
        s[:, 0] = (starts[c] + torch.randint(4, (count,), generator=g)) % K
        return s, c

    # R + T - 1 tokens fit: the last code is predicted and never read.
    gpt, seen = GPT(GPTConfig(num_codes=K, num_cond=K, block_size=T, n_layer=1, n_head=2, n_embd=32)), set()
    watch = gpt.register_forward_pre_hook(lambda _, args: seen.update(map(tuple, args[0].tolist())))
    s, c = data(200)
    losses = _call(student, gpt, s, c, K, steps, hint="The transformer reads [K + c | s] without the last code of s. ")
    watch.remove()
    assert len(losses) == steps, f"return one loss for each of the {steps} steps: got {len(losses)}"
    assert 0.5 * guess < float(losses[0]) < 2 * guess, (
        f"the first loss is {float(losses[0]):.2f}, but an untrained transformer guesses, for ln {K} = {guess:.2f} "
        "nats per code: is it the mean over all codes?"
    )
    rows = set(map(tuple, torch.cat([K + c[:, None], s[:, :-1]], 1).tolist()))
    assert not rows & seen or len(rows & seen) > 0.75 * len(rows), (
        f"of {len(rows)} different sequences only {len(rows & seen)} were ever read: draw a new batch in every step"
    )
    s, c = data(200)
    with torch.no_grad():
        logits = gpt(torch.cat([K + c[:, None], s[:, :-1]], 1))
    nats = F.cross_entropy(logits.transpose(1, 2), s, reduction="none").mean(0)
    assert nats[1:].mean() < 0.1 * guess, (
        f"after {steps} steps a held-out code costs {nats[1:].mean():.2f} nats and guessing {guess:.2f}, but they "
        "follow from c: is [K + c | s] read, is s_i predicted at the token before it, does the optimizer step?"
    )
    assert nats[0] < (guess + math.log(4)) / 2, (
        f"the first code costs {nats[0]:.2f} nats, and one of four is ln 4: s_1 is predicted at the last token of c"
    )


def _window(i: int, size: int, n: int) -> int:
    """The definition: of all windows inside, the one whose middle is nearest to i."""
    return min(range(size - n + 1), key=lambda a: abs(a + n // 2 - i))


@check
def window_start(student, g):
    """(i, size, n) -> first row (column) of the window in which position i is predicted."""
    for size, n in [(20, 8)] + [(9 + _int(g, 0, 12), _int(g, 1, 9)) for _ in range(20)]:
        for i in range(size):
            first, truth = _whole(_call(student, i, size, n)), _window(i, size, n)
            case = f"i = {i} of {size}, n = {n}: got {first}, expected {truth}"
            assert first >= 0, f"{case}: at the upper border the window begins at 0"
            assert first <= size - n, f"{case}: at the lower border the window ends with the image"
            assert first <= i < first + n, f"{case}: position i must be inside its window"
            assert first == truth, f"{case}: inside the image, i is in the middle, n // 2 rows below the window's first"


def _context(i: int, j: int, h: int, w: int, n: int) -> list[tuple[int, int]]:
    top, left = _window(i, h, n), _window(j, w, n)
    return [(a, b) for a in range(top, top + n) for b in range(left, left + n) if (a, b) < (i, j)]


@check
def context_of(student, g):
    """(i, j, h, w, n) -> positions (row, col) that p(s_ij) is conditioned on: those of its window before it."""
    for _ in range(20):
        n = _int(g, 1, 4)
        h, w = n + _int(g, 0, 4), n + _int(g, 0, 4)
        i, j = _int(g, 0, h - 1), _int(g, 0, w - 1)
        found, truth = [tuple(map(_whole, p)) for p in _call(student, i, j, h, w, n)], _context(i, j, h, w, n)
        case = f"({i}, {j}) of {h} x {w}, n = {n}"
        assert (i, j) not in found, f"{case}: the position itself is predicted, so it must not be in its context"
        later = [p for p in found if p > (i, j)]
        assert not later, f"{case}: {later and later[0]} comes later in reading order and is not there yet"
        assert sorted(found) == truth, f"{case}: got {sorted(found)}, expected {truth}"
        assert found == truth, f"{case}: the context must be in reading order, row by row"


@check
def slide(student, g):
    """(predict, u (h, w), n) -> codes (h, w), each drawn from predict(the codes of its n x n window before it)."""
    K, contexts = 7, []
    table = torch.rand(211, K, generator=g) * (torch.arange(K) > 0)  # code 0 has no probability

    def predict(context: Tensor) -> Tensor:
        assert context.ndim == 1, f"predict expects the window's codes as one row (t,), got {tuple(context.shape)}"
        contexts.append(context.tolist())
        total = functools.reduce(lambda total, code: (total * 17 + code + 1) % 211, context.tolist(), 5)
        return table[total] / table[total].sum()

    for h, w, n in ((3, 3, 3), (5, 7, 3), (6, 4, 4), (3 + _int(g, 0, 3), 4 + _int(g, 0, 3), 2)):
        u = torch.rand(h, w, generator=g)
        u[0, 0] = 0
        contexts.clear()
        found, given = _call(student, predict, u, n), contexts.copy()
        case = f"{h} x {w} codes, windows of {n} x {n}"
        assert len(given) == h * w, f"{case}: predict was called {len(given)} times, expected one call for each code"
        truth = torch.zeros(h, w, dtype=torch.int64)
        for (i, j), got in zip(itertools.product(range(h), range(w)), given, strict=True):
            want = [int(truth[place]) for place in _context(i, j, h, w, n)]
            assert len(got) == len(want), (
                f"{case}: code {(i, j)} was predicted from {len(got)} codes, but its window has {len(want)} before it "
                "(all columns of the rows above, then those to the left)"
            )
            assert got == want, f"{case}: code {(i, j)} was predicted from {got}, but its window holds {want}"
            p = predict(torch.tensor(want, dtype=torch.int64)).cumsum(0)
            truth[i, j] = next((k for k in range(K) if p[k] > u[i, j]), K - 1)
            if got != given[-1] and isinstance(found, Tensor) and found.shape == (h, w):
                drawn = found[i, j].item()
                assert drawn == truth[i, j], (
                    f"{case}: code {(i, j)} is {drawn}, expected {truth[i, j]}: the first at which the sum of the "
                    "probabilities exceeds u[i, j]"
                )
        _compare(found, truth, f"{case}: the map of codes")


@check
def causal_kernel(student, g):
    """(k, sees_itself) -> (k, k) mask of a convolution that looks only at what comes before in reading order."""
    for k, sees_itself in itertools.product((3, 1, 1 + 2 * _int(g, 2, 4), 1 + 2 * _int(g, 5, 7)), (False, True)):
        mask, middle = _call(student, k, sees_itself), k * k // 2
        case = f"k = {k}, sees_itself = {sees_itself}"
        assert isinstance(mask, Tensor) and mask.shape == (k, k), f"{case}: expected a tensor of shape {(k, k)}"
        cells = mask.flatten().float()
        assert cells[middle] == sees_itself, (
            f"{case}: the middle is wrong. The first layer must not see the position it predicts; later ones must"
        )
        assert not cells[middle + 1 :].any(), f"{case}: right of the middle and in the rows below lies the future"
        assert (cells[:middle] == 1).all(), (
            f"{case}: the rows above may be seen, also to the right, and all to the left in the middle row: 1 there"
        )


@check
def accepted(student, g):
    """scores (n,), rate -> indices of the best fraction, best first; at least one."""
    for n, rate in ((40, 0.25), (40, 1.0), (40, 0.001), (100, 0.29), (40, 0.21), (2 * _int(g, 10, 30), 0.5)):
        scores, count = torch.randn(n, generator=g), max(1, round(rate * n))
        best = torch.tensor(sorted(range(n), key=lambda i: -scores[i].item()))
        mistakes = {
            "these are the worst: a high score is good": best.flip(0)[:count],
            "these are the scores: return their indices": scores[best[:count]],
        }
        found = _call(student, scores, rate)
        assert len(found) == count, f"rate {rate} of {n} images keeps round({rate * n:g}) = {count}, not {len(found)}"
        _compare(found, best[:count], f"rate {rate} of {n} images, best first", mistakes)
