"""Short trainings for the notebooks: the loops of train_vqgan.py and train_gpt.py without their harness."""

import os
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor
from tqdm import tqdm

from ..gpt import GPT, parameter_groups
from ..harness import data
from ..objective import ObjectiveConfig, adversarial_ramp, stage_one_step
from ..perceptual import LPIPS
from ..quantizer import codebook_stats
from ..vqgan import VQGAN


def shapes(size: int = 32, crops_of: int | None = None, sources: tuple[str, ...] = ("image",)):
    """(training set, held-out set) of the built-in images; crops_of: cut `size` pixels out of larger ones."""
    return data.open_data("shapes", size, crops_of, sources, len(data.shapes.LABELS))


def photographs(size: int = 32):
    """(training set, held-out set) of the folder that the environment variable PHOTOS names; without it of CIFAR-10 if
    torchvision has downloaded it, else of the built-in shapes."""
    cifar10 = (data.TORCHVISION_ROOT / "cifar-10-batches-py").is_dir()
    return data.open_data(os.environ.get("PHOTOS") or ("cifar10" if cifar10 else "shapes"), size)


def batches(dataset, size: int, seed: int = 0) -> Iterator[dict]:
    """Endless shuffled batches."""
    return data.train_loader(dataset, size, seed, start=0, workers=0)


def held_out(dataset, count: int) -> dict:
    """One batch of held-out images, the same every time."""
    return next(data.held_out_batches(dataset, count, count))


def fit_vqgan(
    model: VQGAN,
    dataset,
    steps: int,
    batch_size: int = 32,
    lr: float = 1e-3,
    objective: ObjectiveConfig | None = None,
    perceptual: LPIPS | None = None,
    discriminator: torch.nn.Module | None = None,
    disc_lr: float = 1e-4,
    disc_start: int = 0,
    disc_ramp: int = 1,
    revive_every: int = 20,
    seed: int = 0,
    each: Callable[[int, dict], None] | None = None,
) -> dict[str, list[float]]:
    """Train a first-stage model in place, on its device; returns what was measured at every step.

    The loop is that of train_vqgan.py without its flags. discriminator: learns from step disc_start on, and its
    gradient comes in over disc_ramp steps. revive_every: 0 leaves the codebook as it is. each: called after every step
    with (step, measurements).
    """
    torch.manual_seed(seed)  # of revival and dropout; whoever makes the networks seeds their weights
    vqgan, disc, objective = model, discriminator, objective or ObjectiveConfig()
    device = next(vqgan.parameters()).device
    opt_g = torch.optim.Adam(vqgan.parameters(), lr, betas=(0.5, 0.9))
    opt_d = disc and torch.optim.Adam(disc.parameters(), disc_lr, betas=(0.5, 0.9))
    disc_steps, history = (disc_start, 0, disc_ramp), {}

    stream = batches(dataset, batch_size, seed)
    revives = revive_every > 0 and not vqgan.config.gumbel
    if revives:
        # Codes begin where latents are. Before the first step all count as dead, so this places every one of them.
        first = next(stream)
        with torch.no_grad():
            vqgan.quantizer.revive_dead_codes(vqgan.eval().encode(first["image"].to(device)).z)
        stream = chain([first], stream)

    vqgan.train()
    for step in tqdm(range(1, steps + 1), leave=False, disable=None):
        disc_on = disc is not None and step > disc_steps[0]
        adv_fraction = adversarial_ramp(step, *disc_steps) if disc_on else None

        x = next(stream)["image"].to(device)  # (B, C, H, W)
        terms, quantized = stage_one_step(vqgan, disc, perceptual, x, objective, adv_fraction)
        opt_g.step()
        opt_g.zero_grad()
        if disc_on:
            opt_d.step()
            opt_d.zero_grad()
        if revives and step % revive_every == 0:
            vqgan.quantizer.revive_dead_codes(quantized.z)

        measured = {name: value.item() for name, value in terms.items()}
        counts = torch.bincount(quantized.indices.flatten(), minlength=vqgan.config.codebook_size)
        measured["usage"], measured["perplexity"] = codebook_stats(counts)
        for name, value in measured.items():
            history.setdefault(name, []).append(value)
        if each is not None:
            each(step, measured)
    vqgan.eval()
    return history


def fit_tokens(
    model: torch.nn.Module,
    loss: Callable[[Tensor], Tensor],
    parts: tuple[Tensor, ...],
    steps: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    each: Callable[[int], None] | None = None,
) -> list[float]:
    """Train a model of codes in place by AdamW with a cosine learning rate; returns the loss of every step.

    parts: tensors with one row per image (codes, conditions). loss: of the rows drawn from each.
    """
    torch.manual_seed(seed)
    groups = parameter_groups(model, 0.01) if isinstance(model, GPT) else model.parameters()
    opt = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, max(1, steps), 0.1 * lr)
    generator, history = torch.Generator().manual_seed(seed), []
    model.train()
    for step in tqdm(range(1, steps + 1), leave=False, disable=None):
        rows = torch.randint(len(parts[0]), (batch_size,), generator=generator)
        value = loss(*(part[rows] for part in parts))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        schedule.step()
        history.append(value.item())
        if each is not None:
            each(step)
    model.eval()
    return history


@torch.no_grad()
def codes_of(vqgan: VQGAN, dataset, count: int) -> tuple[Tensor, Tensor]:
    """Codes (N, h, w) and classes (N,) of `count` images of a dataset, evenly spread."""
    found, device = data.held_out_batches(dataset, 100, count), next(vqgan.buffers()).device
    pairs = [(vqgan.encode_indices(b["image"].to(device)), b["class"]) for b in found]
    codes, classes = zip(*pairs, strict=True)
    return torch.cat(codes), torch.cat(classes)
