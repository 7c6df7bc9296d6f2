"""Where the time goes, and how it grows.

    python tests/benchmarks/report.py                       prints, and draws figures/growth.png

A step of stage one part by part; counted operations a second beside what a large matrix product reaches on the same
machine in the same precision; and the cost over image size, codebook size and sequence length. On a CUDA machine also
images/s, tokens/s and peak memory of the paper's models, with and without bfloat16 and torch.compile.
"""

import argparse
import runpy
import statistics
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from minvqgan import Sampling
from minvqgan.gpt import GPT, GPTConfig, parameter_groups
from minvqgan.harness import flags, judges, runtime
from minvqgan.objective import ObjectiveConfig, generator_loss, hinge_loss, reconstruction_loss, stage_one_step
from minvqgan.perceptual import LPIPS, VGG16Features
from minvqgan.quantizer import VectorQuantizer
from minvqgan.sampler import continue_tokens

ROOT = Path(__file__).resolve().parents[2]
TRAIN_VQGAN, TRAIN_GPT = (runpy.run_path(str(ROOT / f"train_{name}.py")) for name in ("vqgan", "gpt"))
REPEATS = 5
SIDE = {"cpu": 2048, "mps": 4096, "cuda": 8192}  # of the matrices that show what a machine can do: fills it


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


def flags_of(script: dict, preset: str, **changes):
    """The flags of a training script with a preset."""
    words = ["--preset", preset]
    for name, value in changes.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return script["parse_flags"](words)[0]


def random_lpips(name: str, image_size: int) -> LPIPS:
    """On VGG16 of random weights, which takes the same time and no download."""
    weights = [torch.rand(c) for c in (64, 128, 256, 512, 512)]
    return LPIPS(VGG16Features(torchvision.models.vgg16(weights=None).features), weights)


class StageOne:
    """A preset's networks and optimizers as train_vqgan.py builds them, a random batch, and its step with D on."""

    def __init__(self, preset: str, device, amp=False, compiled=False, **changes):
        args = flags_of(TRAIN_VQGAN, preset, **changes)
        args.compile = compiled
        TRAIN_VQGAN["check"](args)
        load = random_lpips if args.perceptual == "vgg16" else judges.load_perceptual
        with mock.patch.object(judges, "load_perceptual", load):
            self.vqgan, self.disc, self.lpips, self.opt_g, self.opt_d = TRAIN_VQGAN["build"](args, device)
        self.amp, self.objective = amp, flags.config(ObjectiveConfig, args)
        x = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device) * 2 - 1
        self.x = x.contiguous(memory_format=torch.channels_last)

    def step(self):
        stage_one_step(self.vqgan, self.disc, self.lpips, self.x, self.objective, 1.0, self.amp)
        self.adam()
        self.zero_grad()

    def adam(self):
        for opt in (self.opt_g, self.opt_d):
            opt.step()

    def zero_grad(self):
        for opt in (self.opt_g, self.opt_d):
            opt.zero_grad()

    def parts(self) -> dict:
        """The parts of a step that can be called alone."""
        x, vqgan, leaf = self.x, self.vqgan, self.x.clone().requires_grad_()
        z = vqgan.latents(x).detach()
        z_q = vqgan.quantizer(z).z_q.detach()

        def rec():
            loss = reconstruction_loss(x, leaf, self.objective, self.lpips)["rec_loss"]
            torch.autograd.grad(loss.float(), leaf)

        def disc():
            real, fake = self.disc(x).float(), self.disc(leaf).float()
            torch.autograd.grad(generator_loss(fake), leaf, retain_graph=True)
            hinge_loss(real, fake).backward()

        return {
            "E": lambda: vqgan.latents(x),
            "quantizer": lambda: vqgan.quantizer(z),
            "G": lambda: vqgan.decode(z_q),
            "L1 and perceptual, there and back": rec,
            "D, there and back": disc,
        }


def stage_two(preset: str, device, T: int, K: int, compiled: bool = False, **changes):
    """(the transformer of a preset, its optimizer, a batch of sequences)."""
    args = flags_of(TRAIN_GPT, preset, **changes)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(K, 1, T, args.n_layer, args.n_head, args.n_embd)).to(device)
    if compiled:
        gpt.compile()
    opt = torch.optim.AdamW(parameter_groups(gpt, 0.01), 1e-6, fused=True)
    return gpt, opt, torch.randint(0, K, (args.batch_size, T + 1), device=device)


def gpt_step(gpt, opt, s, amp: bool):
    with torch.autocast(s.device.type, torch.bfloat16, enabled=amp):
        logits = gpt(s[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), s[:, 1:].flatten())
    loss.backward()
    opt.step()
    opt.zero_grad()


def sample(gpt, s, use_cache: bool = True):
    """As many new sequences as s has, of the same length."""
    start, u = s[:, :1], torch.rand(len(s), s.shape[1] - 1, device=s.device)
    continue_tokens(gpt.eval(), start, start[:, :0], u, Sampling(use_cache=use_cache))


def peak_flops(device, dtype=torch.float32) -> float:
    """Operations a second in a matrix product of n x n, the most that this machine was seen to do."""
    n = SIDE[device.type]
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ a, device)


def profile(preset: str, device, amp: bool) -> None:
    """A step part by part, and its operations a second beside the peak."""
    run = StageOne(preset, device, amp)
    dtype = torch.bfloat16 if amp else torch.float32
    parts, whole, peak = {}, seconds(run.step, device), peak_flops(device, dtype)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        parts = {name: seconds(part, device) for name, part in run.parts().items()}
    stage_one_step(run.vqgan, run.disc, run.lpips, run.x, run.objective, 1.0, run.amp)
    parts["both Adams"] = seconds(run.adam, device)  # with the gradients of one step, again and again
    run.zero_grad()
    parts["back through G and E, lambda"] = whole - sum(parts.values())
    side, batch = run.x.shape[-1], len(run.x)
    print(f"\na step of stage one, preset {preset}, {str(dtype)[6:]}: {batch} images of {side} x {side}, {whole:.3f} s")
    for name, spent in parts.items():
        print(f"  {name:34} {spent / whole:5.0%}")
    flops = operations(run)
    print(f"  {flops / 1e9:.1f} G operations a step, {flops / whole / 1e9:.0f} G a second:", end=" ")
    print(f"{flops / whole / peak:.1%} of the {peak / 1e9:.0f} G that a product of large matrices reaches here")


def operations(run: StageOne) -> int:
    """Multiplications and additions of a step. torch's counter cannot follow a gradient that ends at a module's input,
    so D and the perceptual network are given a view of it."""

    def disc(x):
        return run.disc(x.view_as(x))

    def lpips(x, x_hat):
        return run.lpips(x, x_hat.view_as(x_hat))

    with FlopCounterMode(display=False) as counter:
        stage_one_step(run.vqgan, disc, run.lpips and lpips, run.x, run.objective, 1.0, run.amp)
    return counter.get_total_flops()


def growth(device) -> dict[str, dict[str, list]]:
    """Seconds over sizes: {panel: {curve: [(size, seconds), ...]}}."""
    curves: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for side in (32, 64, 96, 128, 192):
        run = StageOne("tiny", device, image_size=side, batch_size=4)
        spent = seconds(run.step, device)
        curves["side of the image, in pixels"]["step of stage one, 4 images"].append((side, spent))
    z = torch.randn(8, 64, 16, 16, device=device)
    for K in (256, 1024, 4096, 16384):
        spent = seconds(partial(VectorQuantizer(K, 64).to(device).eval(), z), device)
        curves["codes in the codebook"]["quantizing 2048 latents"].append((K, spent))
    for T in (64, 128, 256, 512, 1024):
        gpt, opt, s = stage_two("tiny", device, T, 256, batch_size=4)
        lines = curves["codes in a sequence"]
        lines["step of stage two, 4 sequences"].append((T, seconds(partial(gpt_step, gpt, opt, s, False), device)))
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
        ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)  # above, not on the curves
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def throughput(device, first: str, second: str, T: int, K: int) -> None:
    """Images and tokens a second and peak memory, plain, with bfloat16, and compiled."""
    ways = [(False, False)] + [(True, False)] * runtime.pick_amp(None, device)
    ways += [(True, True)] * (device.type == "cuda")
    for amp, compiled in ways:
        how = ("bfloat16" if amp else "float32") + (", compiled" if compiled else "")
        run = StageOne(first, device, amp, compiled)
        measure(f"stage one, {first}, {how}", run.step, len(run.x), "images", device)
        del run  # or its memory would count for what comes next
        gpt, opt, s = stage_two(second, device, T, K, compiled)
        measure(f"stage two, {second}, {how}", partial(gpt_step, gpt, opt, s, amp), T * len(s), "tokens", device)
        del opt
        gpt = gpt.bfloat16() if amp else gpt
        measure(f"sampling, {second}, {how}", partial(sample, gpt, s[:8]), T * 8, "tokens", device)


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
    for preset in ("tiny", "small"):
        for amp in [False] + [True] * runtime.pick_amp(None, device):
            profile(preset, device, amp)
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
