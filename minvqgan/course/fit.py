"""Short trainings for the notebooks: the loops of train_vqgan.py and train_gpt.py without their harness."""

from collections.abc import Callable, Iterator

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
    """Train a first-stage model in place; returns what was measured at every step.

    discriminator: joins at step disc_start, its gradient comes in over disc_ramp steps. revive_every: 0 for a codebook
    that begins and stays as the paper has it. each: called after every step with (step, measurements).
    """
    torch.manual_seed(seed)
    revive_every = 0 if model.config.gumbel else revive_every
    kind, channels = model.config.input_kind, model.config.in_channels
    opt_g = torch.optim.Adam(model.parameters(), lr, betas=(0.5, 0.9))
    opt_d = None if discriminator is None else torch.optim.Adam(discriminator.parameters(), disc_lr, betas=(0.5, 0.9))
    objective = objective or ObjectiveConfig()
    stream, history = batches(dataset, batch_size, seed), {}
    model.train()
    for step in tqdm(range(1, steps + 1), leave=False, disable=None):
        x = data.to_input(next(stream), kind, channels)
        if step == 1 and revive_every:
            with torch.no_grad():
                model.quantizer.revive_dead_codes(model.eval().encode(x).z)
            model.train()
        disc_on = discriminator is not None and step > disc_start
        adv_fraction = adversarial_ramp(step, disc_start, 0, disc_ramp) if disc_on else None
        terms, quantized = stage_one_step(model, discriminator, perceptual, x, objective, adv_fraction)
        opt_g.step()
        opt_g.zero_grad()
        if disc_on:
            opt_d.step()
            opt_d.zero_grad()
        if revive_every and step % revive_every == 0:
            model.quantizer.revive_dead_codes(quantized.z)
        counts = torch.bincount(quantized.indices.flatten(), minlength=model.config.codebook_size)
        measured = {name: value.item() for name, value in terms.items()}
        measured["usage"], measured["perplexity"] = codebook_stats(counts)
        for name, value in measured.items():
            history.setdefault(name, []).append(value)
        if each is not None:
            each(step, measured)
    model.eval()
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
    """Train a model of codes in place by AdamW, lr falling in a half cosine; returns the loss of every step.

    parts: tensors with a row an image (codes, conditions). loss: of the rows that were drawn from each.
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
