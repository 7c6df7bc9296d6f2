"""Where the time of a training step goes, and how it grows with the sizes: as in results/README.md.

    python tests/benchmarks/report.py                       prints, and draws figures/growth.png

A step of stage one part by part; its operations a second beside those of a large matrix product on the same machine in
the same precision; and the cost over image size, codebook size and sequence length. On a CUDA machine also images/s,
codes/s and peak memory of the paper's models.
"""

import runpy
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import torch
import torchvision
from torch.utils.benchmark import Timer
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
SIDE = {"cpu": 2048, "mps": 4096, "cuda": 8192}  # of matrices that are large enough to fill the machine


def seconds(function: Callable) -> float:
    """The median over at least five seconds. A GPU is waited for."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=5).median


def random_lpips(name: str, image_size: int) -> LPIPS:
    """On VGG16 of random weights, which takes the same time and no download."""
    weights = [torch.rand(c) for c in (64, 128, 256, 512, 512)]
    return LPIPS(VGG16Features(torchvision.models.vgg16(weights=None).features), weights)


class StageOne:
    """A preset's networks and optimizers as train_vqgan.py builds them, a random batch, and its step with D on."""

    def __init__(self, preset: str, device, amp=False, more: str = ""):
        args, _ = TRAIN_VQGAN["parse_flags"](["--preset", preset, *more.split()])
        TRAIN_VQGAN["check"](args)
        load = random_lpips if args.perceptual == "vgg16" else judges.load_perceptual
        with mock.patch.object(judges, "load_perceptual", load):
            self.vqgan, self.disc, self.lpips, *self.optimizers = TRAIN_VQGAN["build"](args, device)
        self.amp, self.objective = amp, flags.config(ObjectiveConfig, args)
        x = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device) * 2 - 1
        self.x = x.contiguous(memory_format=torch.channels_last)

    def gradients(self):
        stage_one_step(self.vqgan, self.disc, self.lpips, self.x, self.objective, 1.0, self.amp)

    def adam(self):
        for opt in self.optimizers:
            opt.step()

    def step(self):
        self.gradients()
        self.adam()
        for opt in self.optimizers:
            opt.zero_grad()

    def parts(self) -> dict[str, Callable]:
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

    def operations(self) -> int:
        """Multiplications and additions of a step. torch's counter cannot follow a gradient that ends at a module's
        input, so D and the perceptual network are given a view of it."""

        def disc(x):
            return self.disc(x.view_as(x))

        def lpips(x, x_hat):
            return self.lpips(x, x_hat.view_as(x_hat))

        with FlopCounterMode(display=False) as counter:
            stage_one_step(self.vqgan, disc, self.lpips and lpips, self.x, self.objective, 1.0, self.amp)
        return counter.get_total_flops()


def profile(preset: str, device, amp: bool) -> None:
    """A step part by part, and its operations a second beside those of a product of two large matrices."""
    run, dtype, n = StageOne(preset, device, amp), torch.bfloat16 if amp else torch.float32, SIDE[device.type]
    a, whole = torch.randn(n, n, device=device, dtype=dtype), seconds(run.step)
    peak = 2 * n**3 / seconds(lambda: a @ a)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        parts = {name: seconds(part) for name, part in run.parts().items()}
    run.gradients()
    parts["both Adams"] = seconds(run.adam)  # with the gradients of one step, again and again
    parts["back through G and E, lambda"] = whole - sum(parts.values())
    side, batch = run.x.shape[-1], len(run.x)
    print(f"\na step of stage one, preset {preset}, {str(dtype)[6:]}: {batch} images of {side} x {side}, {whole:.3f} s")
    for name, spent in parts.items():
        print(f"  {name:34} {spent / whole:5.0%}")
    flops = run.operations()
    print(f"  {flops / 1e9:.1f} G operations a step, {flops / whole / 1e9:.0f} G a second:", end=" ")
    print(f"{flops / whole / peak:.1%} of the {peak / 1e9:.0f} G that a product of large matrices reaches here")


class StageTwo:
    """A preset's transformer, its optimizer, and a batch of sequences of T codes."""

    def __init__(self, preset: str, device, T: int, K: int, amp=False, more: str = ""):
        args, _ = TRAIN_GPT["parse_flags"](["--preset", preset, *more.split()])
        self.gpt = GPT(GPTConfig(K, 1, T, args.n_layer, args.n_head, args.n_embd)).to(device)
        self.opt = torch.optim.AdamW(parameter_groups(self.gpt, 0.01), 1e-6, fused=True)
        self.amp, self.s = amp, torch.randint(0, K, (args.batch_size, T + 1), device=device)

    def step(self):
        with torch.autocast(self.s.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.gpt(self.s[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.s[:, 1:].flatten())
        loss.backward()
        self.opt.step()
        self.opt.zero_grad()

    def sample(self, use_cache: bool = True):
        """As many new sequences as a batch has, of the same length."""
        start, u = self.s[:, :1], torch.rand(len(self.s), self.s.shape[1] - 1, device=self.s.device)
        continue_tokens(self.gpt.eval(), start, start[:, :0], u, Sampling(use_cache=use_cache))


def growth(device) -> dict[str, dict[str, list]]:
    """Seconds over sizes: {panel: {curve: [(size, seconds), ...]}}."""
    curves: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for side in (32, 64, 96, 128, 192):
        run = StageOne("tiny", device, more=f"--image-size {side} --batch-size 4")
        curves["side of the image, in pixels"]["step of stage one, 4 images"].append((side, seconds(run.step)))
    z = torch.randn(8, 64, 16, 16, device=device)
    for K in (256, 1024, 4096, 16384):
        spent = seconds(partial(VectorQuantizer(K, 64).to(device).eval(), z))
        curves["codes in the codebook"]["quantizing 2048 latents"].append((K, spent))
    for T in (64, 128, 256, 512, 1024):
        run, lines = StageTwo("tiny", device, T, 256, more="--batch-size 4"), curves["codes in a sequence"]
        lines["step of stage two, 4 sequences"].append((T, seconds(run.step)))
        lines["sampling 4, cached"].append((T, seconds(run.sample)))
        if T <= 256:  # beyond, it takes minutes
            lines["sampling 4, without a cache"].append((T, seconds(partial(run.sample, use_cache=False))))
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


def throughput(device, amp: bool) -> None:
    """Images and codes a second and peak memory of the paper's models, on a GPU."""
    one, T = StageOne("paper", device, amp), 511
    measure("stage one, paper", amp, one.step, len(one.x), "images")
    del one  # or its memory would count for what comes next
    two = StageTwo("gpt2-medium", device, T, 1024, amp)
    measure("stage two, gpt2-medium", amp, two.step, T * len(two.s), "codes")
    two.opt, two.s, two.gpt = None, two.s[:8], two.gpt.bfloat16() if amp else two.gpt
    measure("sampling, gpt2-medium", amp, two.sample, T * 8, "codes")


def measure(what: str, amp: bool, function: Callable, count: int, unit: str) -> None:
    torch.cuda.reset_peak_memory_stats()
    pace, memory = count / seconds(function), torch.cuda.max_memory_allocated() / 2**30
    print(f"{what}, {'bfloat16' if amp else 'float32'}: {pace:,.0f} {unit}/s, {memory:.1f} GiB", flush=True)


def main() -> None:
    device, figure = runtime.pick_device("auto"), ROOT / "figures" / "growth.png"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    precisions = [False, True] if runtime.pick_amp(None, device) else [False]
    for preset in ("tiny", "small"):
        for amp in precisions:
            profile(preset, device, amp)
    for amp in precisions if device.type == "cuda" else []:
        throughput(device, amp)
    curves = growth(device)
    for panel, lines in curves.items():
        for name, points in lines.items():
            print(f"{name}, over {panel}: " + ", ".join(f"{size}: {spent:.4f} s" for size, spent in points))
    draw(curves, figure)
    print(figure)


if __name__ == "__main__":
    main()
