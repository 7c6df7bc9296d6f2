"""`train_vqgan.py` itself beside the official order of work, at equal architecture and batch.

    pytest tests/benchmarks/test_speed_vqgan.py -s        OMP_NUM_THREADS=1 for one core

Ours is what a user runs: the script in a process of its own, reading, logging and all; seconds a step are taken from
its metrics.csv. The official order (taming-transformers, `VQModel.training_step` and the `forward` of
`VQLPIPSWithDiscriminator`) is written down here in plain form, without a loop around it and on one batch that is there
already: the autoencoder and LPIPS run forward once for the generator's step and once more for the discriminator's;
lambda comes from two gradients through the decoder's last layer, and `backward` of the sum then runs LPIPS and D
backward a second time. Its tensors lie in the default memory format, its LPIPS is the package's, its SiLU is written
x * sigmoid(x), its Adam is not fused, and it has no bfloat16. VGG16's weights are random on both sides: the time is the
same.
"""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timing import paired_ratios, peak_memory, seconds

from minvqgan import VQGAN, VQGANConfig
from minvqgan.discriminator import PatchDiscriminator
from minvqgan.harness import runtime

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"ch": 32, "ch_mult": (1, 2, 4), "norm_groups": 32, "z_channels": 64, "codebook_size": 512, "code_dim": 64}
STEPS, FIRST = 24, 4  # steps counted are those after the first four


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """64 images: read in the first four steps and kept, as a small dataset is from its second epoch on."""
    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (64 + 8, 64, 64, 3), dtype=np.uint8)):
        part = folder / ("train" if i < 64 else "val")
        part.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(part / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def vgg_home(tmp_path_factory) -> Iterator[Path]:
    """A folder in which torchvision finds (random) weights of VGG16, 0.5 GB: gone at the end."""
    home = tmp_path_factory.mktemp("torch")
    (home / "hub/checkpoints").mkdir(parents=True)
    name = torchvision.models.VGG16_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    torch.save(torchvision.models.vgg16(weights=None).state_dict(), home / "hub/checkpoints" / name)
    yield home
    shutil.rmtree(home)


class Script:
    """train_vqgan.py with D on from its first step; each call is a run of its own and returns its seconds a step."""

    def __init__(self, config: VQGANConfig, batch: int, with_lpips: bool, amp: bool, out: Path, photos, vgg_home):
        flags = " ".join(f"--{k.replace('_', '-')} {getattr(config, k)}" for k in SHARED if k != "ch_mult")
        flags += f" --ch-mult {' '.join(map(str, config.ch_mult))} --image-size {config.image_size}"
        flags += (
            f" --batch-size {batch} --disc-start 0 --disc-warmup 0 --disc-ramp 0 --disc-layers 3 --disc-channels 64"
        )
        flags += f" --perceptual {'vgg16' if with_lpips else 'none'} {'--amp' if amp else '--no-amp'} --device cpu"
        flags += f" --steps {STEPS + 1} --log-every {FIRST} --val-every 1000 --val-images 8"
        flags += f" --data {photos} --resize {config.image_size} --out {out}"
        self.command, self.out = [sys.executable, ROOT / "train_vqgan.py", *flags.split()], out
        self.environment = os.environ | {"TORCH_HOME": str(vgg_home)}
        self.memory = 0.0  # GiB resident at most

    def __call__(self) -> float:
        shutil.rmtree(self.out, ignore_errors=True)  # the script touches no run that is there
        process = subprocess.Popen(self.command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, said.decode()
        self.memory = max(self.memory, usage.ru_maxrss / 2**20)
        rows = {int(row["step"]): row for row in csv.DictReader((self.out / "metrics.csv").open())}
        return (float(rows[STEPS]["seconds"]) - float(rows[FIRST]["seconds"])) / (STEPS - FIRST)


class Official:
    """Model, discriminator, LPIPS, optimizers and a batch; each call is some steps and returns the seconds of one."""

    def __init__(self, config: VQGANConfig, batch: int, with_lpips: bool):
        torch.manual_seed(0)
        self.vqgan, self.disc = VQGAN(config), PatchDiscriminator(3, 64, 3)
        # The official code carries a copy of this package.
        self.lpips = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
        self.with_lpips = with_lpips
        adam = partial(torch.optim.Adam, lr=1e-5, betas=(0.5, 0.9))
        self.opt_g, self.opt_d = adam(self.vqgan.parameters()), adam(self.disc.parameters())
        self.x = torch.rand(batch, 3, config.image_size, config.image_size) * 2 - 1

    def rec_loss(self, x_hat):
        loss = (self.x - x_hat).abs().mean()
        return loss + self.lpips(self.x, x_hat).mean() if self.with_lpips else loss

    @mock.patch("torch.nn.functional.silu", lambda x, inplace=False: x * torch.sigmoid(x))
    def step(self):
        x_hat, quantized = self.vqgan(self.x)
        rec_loss, gen_loss = self.rec_loss(x_hat), -self.disc(x_hat).mean()
        last = self.vqgan.decoder.conv_out.weight
        (rec,) = torch.autograd.grad(rec_loss, last, retain_graph=True)
        (gan,) = torch.autograd.grad(gen_loss, last, retain_graph=True)
        lambda_ = (rec.norm() / (gan.norm() + 1e-4)).clamp(0, 1e4).detach()
        self.opt_g.zero_grad()
        (rec_loss + 0.8 * lambda_ * gen_loss + quantized.loss).backward()
        self.opt_g.step()

        x_hat, _ = self.vqgan(self.x)
        self.rec_loss(x_hat)  # computed at the head of the loss's `forward` and not used in this half of the step
        self.opt_d.zero_grad()
        real, fake = self.disc(self.x), self.disc(x_hat.detach())
        (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        self.opt_d.step()

    def __call__(self, steps: int = 4) -> float:
        return sum(seconds(self.step) for _ in range(steps)) / steps


@pytest.mark.parametrize("side, batch", [(32, 64), (64, 16)])
@pytest.mark.parametrize("with_lpips, float32, bfloat16", [(True, 1.6, 2.4), (False, 1.25, 1.85)])
def test_training_step(side, batch, with_lpips, float32, bfloat16, tmp_path, photos, vgg_home):
    config = VQGANConfig(image_size=side, num_res_blocks=1, **SHARED)
    official = Official(config, batch, with_lpips)
    wanted = {"float32": float32}
    if runtime.pick_amp(None, torch.device("cpu")):
        wanted["bfloat16"] = bfloat16
    ours = {
        name: Script(config, batch, with_lpips, name == "bfloat16", tmp_path / name, photos, vgg_home)
        for name in wanted
    }
    ratios = paired_ratios(official, ours, pairs=3)
    what = f"train_vqgan.py, {side} px, batch {batch}, {'with' if with_lpips else 'without'} LPIPS"
    for name, (median, low, high) in ratios.items():
        print(
            f"\n{what}, {name}: {median:.2f} times as fast ({low:.2f} to {high:.2f}), {ours[name].memory:.1f} GiB",
            end="",
        )
    print(f"; official step {peak_memory(official) / 1024:.1f} GiB")
    assert all(ratios[name][0] >= wanted[name] for name in wanted), ratios
