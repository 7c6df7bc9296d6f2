"""Where the time goes, and how it grows.

    python tests/benchmarks/report.py                       prints, and draws figures/growth.png

A step of stage one part by part; counted operations beside what a large matrix product reaches on the same machine; and
the cost over image size, codebook size and sequence length. On a CUDA machine also images/s, tokens/s and peak memory
of the paper's models, with and without bfloat16 and torch.compile.
"""

import argparse
import contextlib
import runpy
import statistics
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from minvqgan import VQGAN, Sampling, VQGANConfig
from minvqgan.discriminator import PatchDiscriminator
from minvqgan.gpt import GPT, GPTConfig, parameter_groups
from minvqgan.harness import runtime
from minvqgan.objective import adaptive_weight, generator_loss, hinge_loss
from minvqgan.perceptual import LPIPS, VGG16Features
from minvqgan.quantizer import VectorQuantizer
from minvqgan.sampler import continue_tokens

ROOT = Path(__file__).resolve().parents[2]
TRAIN_VQGAN, TRAIN_GPT = (runpy.run_path(str(ROOT / f"train_{name}.py")) for name in ("vqgan", "gpt"))
REPEATS = 5


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function, device: torch.device, repeats: int = REPEATS) -> float:
    """The median of several runs, after one that allocates and chooses kernels."""
    function()
    times = []
    for _ in range(repeats):
        began = now(device)
        function()
        times.append(now(device) - began)
    return statistics.median(times)


class Clock(dict):
    """Seconds by name; off for the first step."""

    def __init__(self, device):
        super().__init__()
        self.device, self.on = device, False

    @contextlib.contextmanager
    def __call__(self, name: str):
        began = now(self.device)
        yield
        if self.on:
            self[name] = self.get(name, 0.0) + now(self.device) - began


class StageOne:
    """A preset's networks and optimizers and a random batch; `step` is that of train_vqgan.py with D on."""

    def __init__(self, preset: str, device, amp=False, compiled=False, perceptual=True, **changes):
        flags = TRAIN_VQGAN["PRESETS"]["tiny"] | TRAIN_VQGAN["PRESETS"][preset] | changes
        fields = [name for name in TRAIN_VQGAN["MODEL_FLAGS"] if name in flags]
        self.device, self.amp = device, amp
        placed = {"device": device, "memory_format": torch.channels_last}
        torch.manual_seed(0)
        self.vqgan = VQGAN(VQGANConfig(**{name: flags[name] for name in fields})).to(**placed)
        self.disc = PatchDiscriminator(3, flags["disc_channels"], flags["disc_layers"]).to(**placed)
        self.lpips = None
        if perceptual and flags["perceptual"] == "vgg16":
            weights = [torch.rand(c) for c in (64, 128, 256, 512, 512)]  # of the right shape: the time is the same
            self.lpips = LPIPS(VGG16Features(torchvision.models.vgg16(weights=None).features), weights).to(**placed)
        self.opt_g, self.opt_d = (
            torch.optim.Adam(m.parameters(), 1e-6, betas=(0.5, 0.9), fused=True) for m in (self.vqgan, self.disc)
        )
        side = flags["image_size"]
        x = torch.rand(flags["batch_size"], 3, side, side, device=device) * 2 - 1
        self.x = x.contiguous(memory_format=torch.channels_last)
        if compiled:
            torch._functorch.config.donated_buffer = False
            for part in (self.vqgan.encoder, self.vqgan.decoder.layers, self.disc, self.lpips):
                if part is not None:
                    part.compile()

    def step(self, clock):
        x = self.x
        with runtime.autocast(self.device, self.amp):
            with clock("E"):
                z = self.vqgan.latents(x)
            with clock("quantizer"):
                quantized = self.vqgan.quantizer(z)
            with clock("G"):
                x_hat = self.vqgan.decode(quantized.z_q)
        x_hat = x_hat.float()
        leaf = x_hat.detach().requires_grad_()
        shown = leaf.view_as(leaf)  # torch's counter of operations cannot follow a gradient that ends at an input
        with clock("L1 and LPIPS, there and back"):
            with runtime.autocast(self.device, self.amp):
                rec_loss = (x - leaf).abs().mean()
                if self.lpips is not None:
                    rec_loss = rec_loss + self.lpips(x, shown).mean()
            (grad,) = torch.autograd.grad(rec_loss, leaf)
        with clock("D, there and back"):
            with runtime.autocast(self.device, self.amp):
                real, fake = self.disc(x).float(), self.disc(shown).float()
            (gan_grad,) = torch.autograd.grad(generator_loss(fake), leaf, retain_graph=True)
            hinge_loss(real, fake).backward()
        with clock("lambda"):
            lambda_, _, _ = adaptive_weight(grad, gan_grad, x_hat, self.vqgan.decoder.conv_out.weight)
        with clock("G and E back"):
            torch.autograd.backward([x_hat, quantized.loss], [grad + 0.8 * lambda_ * gan_grad, None])
        with clock("both Adams"):
            for opt in (self.opt_g, self.opt_d):
                opt.step()
                opt.zero_grad()


def silent(name):
    return contextlib.nullcontext()


def stage_two(preset: str, device, T: int, K: int, compiled: bool = False, **changes):
    """(the transformer of a preset, its optimizer, a batch of sentences)."""
    flags = TRAIN_GPT["PRESETS"]["tiny"] | TRAIN_GPT["PRESETS"][preset] | changes
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(K, 1, T, flags["n_layer"], flags["n_head"], flags["n_embd"], 0.0)).to(device)
    if compiled:
        gpt.compile()
    opt = torch.optim.AdamW(parameter_groups(gpt, 0.01), 1e-6, fused=True)
    return gpt, opt, torch.randint(0, K, (flags["batch_size"], T + 1), device=device)


def gpt_step(gpt, opt, s, amp: bool):
    with runtime.autocast(s.device, amp):
        logits = gpt(s[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), s[:, 1:].flatten())
    loss.backward()
    opt.step()
    opt.zero_grad()


def sample(gpt, s, amp: bool = False, use_cache: bool = True):
    """As many new sentences as s has, of the same length."""
    start, u = s[:, :1], torch.rand(len(s), s.shape[1] - 1, device=s.device)
    gpt.eval()
    with runtime.autocast(s.device, amp):
        continue_tokens(gpt, start, start[:, :0], u, Sampling(), use_cache=use_cache)


def peak_flops(device, dtype=torch.float32, n: int = 2048) -> float:
    """Operations a second in a matrix product of n x n, the most that this machine was seen to do."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ a, device)


def profile(preset: str, device) -> None:
    """A step part by part, and its operations beside the peak."""
    run, clock = StageOne(preset, device), Clock(device)
    run.step(clock)
    clock.on = True
    for _ in range(REPEATS):
        run.step(clock)
    whole = sum(clock.values())
    side, batch = run.x.shape[-1], len(run.x)
    print(f"\na step of stage one, preset {preset}: {batch} pictures of {side} x {side}, {whole / REPEATS:.3f} s")
    for name, spent in clock.items():
        print(f"  {name:30} {spent / whole:5.0%}")
    with FlopCounterMode(display=False) as counter:
        run.step(silent)
    flops, peak = counter.get_total_flops(), peak_flops(device)
    pace = flops * REPEATS / whole
    print(f"  {flops / 1e9:.1f} G operations a step, {pace / 1e9:.0f} G a second: {pace / peak:.0%} of the", end=" ")
    print(f"{peak / 1e9:.0f} G that a product of 2048 x 2048 matrices reaches here")


def growth(device) -> dict[str, dict[str, list]]:
    """Seconds over sizes: {panel: {curve: [(size, seconds), ...]}}."""
    curves: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for side in (32, 64, 96, 128, 192):
        run = StageOne("tiny", device, image_size=side, batch_size=4)
        spent = seconds(partial(run.step, silent), device)
        curves["side of the picture, in pixels"]["step of stage one, 4 pictures"].append((side, spent))
    z = torch.randn(8, 64, 16, 16, device=device)
    for K in (256, 1024, 4096, 16384):
        spent = seconds(partial(VectorQuantizer(K, 64).to(device).eval(), z), device)
        curves["codes in the codebook"]["quantizing 2048 latents"].append((K, spent))
    for T in (64, 128, 256, 512, 1024):
        gpt, opt, s = stage_two("tiny", device, T, 256, batch_size=4)
        lines = curves["codes in a sentence"]
        lines["step of stage two, 4 sentences"].append((T, seconds(partial(gpt_step, gpt, opt, s, False), device)))
        lines["sampling 4, cached"].append((T, seconds(partial(sample, gpt, s), device, repeats=2)))
        if T <= 256:  # beyond, it takes minutes
            spent = seconds(partial(sample, gpt, s, use_cache=False), device, repeats=2)
            lines["sampling 4, without a cache"].append((T, spent))
    return curves


def draw(curves, path: Path) -> None:
    figure, axes = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.2))
    for ax, (panel, lines) in zip(axes, curves.items(), strict=True):
        for marker, (name, points) in zip("o^s", lines.items(), strict=False):
            ax.plot(*zip(*points, strict=True), marker=marker, label=name)
        ax.set(xlabel=panel, ylabel="seconds", xscale="log", yscale="log")
        ticks = [size for size, _ in next(iter(lines.values()))]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def throughput(device, first: str, second: str, T: int, K: int) -> None:
    """Images and tokens a second and peak memory, plain, with bfloat16, and compiled."""
    ways = [(False, False), (True, False), (True, True)] if device.type == "cuda" else [(False, False)]
    for amp, compiled in ways:
        how = ("bfloat16" if amp else "float32") + (", compiled" if compiled else "")
        run = StageOne(first, device, amp, compiled)
        measure(f"stage one, {first}, {how}", partial(run.step, silent), len(run.x), "images", device)
        del run  # or its memory would count for what comes next
        gpt, opt, s = stage_two(second, device, T, K, compiled)
        measure(f"stage two, {second}, {how}", partial(gpt_step, gpt, opt, s, amp), T * len(s), "tokens", device)
        del opt
        measure(f"sampling, {second}, {how}", partial(sample, gpt, s[:8], amp=amp), T * 8, "tokens", device)


def measure(what: str, function, count: int, unit: str, device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    pace = count / seconds(function, device, repeats=3)
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    print(f"{what}: {pace:,.0f} {unit}/s{memory}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--figure", type=Path, default=ROOT / "figures" / "growth.png", help="where the curves go")
    args = p.parse_args()
    device = torch.device(args.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    profile("tiny", device)
    profile("small", device)
    cuda = device.type == "cuda"
    throughput(device, *(("paper", "gpt2-medium", 511, 1024) if cuda else ("tiny", "tiny", 64, 256)))
    curves = growth(device)
    for panel, lines in curves.items():
        for name, points in lines.items():
            print(f"{name}, over {panel}: " + ", ".join(f"{size}: {spent:.4f} s" for size, spent in points))
    draw(curves, args.figure)
    print(args.figure)


if __name__ == "__main__":
    main()
