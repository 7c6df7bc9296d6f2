"""Pictures as tokens, for training the transformer: computed once where they stay the same, on the fly where they do
not.

The first stage is frozen. A picture that is always shown whole (or mirrored) always has the same codes, and encoding it
again in every epoch would cost more than the transformer's own step.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..conditioning import Condition
from ..two_stage import TwoStage
from ..vqgan import VQGAN
from .data import SOURCE_OF, Stream, held_out_batches, to_input, train_loader


def sources_of(vqgan: VQGAN, condition: Condition | None) -> tuple[tuple[str, ...], int | None]:
    """(what a dataset must yield for this first stage and condition, number of labels): see `data.open_data`."""
    configs = [vqgan.config]
    if condition is not None and condition.kind == "spatial":
        configs.append(condition.vqgan.config)
    sources = dict.fromkeys(SOURCE_OF[config.input_kind] for config in configs)
    if condition is not None and condition.kind == "coords":
        sources["coords"] = None
    num_labels = [config.in_channels for config in configs if config.input_kind == "labels"]
    return tuple(sources), num_labels[0] if num_labels else None


def condition_input(model: TwoStage) -> Callable[[dict], Tensor]:
    """The function that takes what the model is conditioned on out of a dataset's batch."""
    kind = model.condition.kind
    if kind == "spatial":
        config = model.condition.vqgan.config
        return lambda batch: to_input(batch, config.input_kind, config.in_channels)
    return lambda batch: batch["coords" if kind == "coords" else "class"]


@torch.no_grad()
def encode(model: TwoStage, batch: dict, to_c, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch of pictures -> s (B, T), r (B, R), both int64 on the device."""
    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    x = to_input(batch, model.vqgan.config.input_kind, model.vqgan.config.in_channels)
    return model.image_tokens(x), model.condition_tokens(to_c(batch)).flatten(1)


def mirrored(batch: dict) -> dict:
    """The batch with all its pictures mirrored."""
    return {k: v.flip(-1) if v.ndim > 1 else v for k, v in batch.items()}


def table(model: TwoStage, dataset, to_c, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes of all pictures of a set without random crops: s (N, V, T), r (N, V, R), int32, on the CPU. V = 2 views, as
    it is and mirrored, where the set is to be flipped, else 1."""
    rows: list[tuple[Tensor, Tensor]] = []
    keys = [(i, None) for i in range(len(dataset))]
    loader = DataLoader(dataset, 100, sampler=keys, generator=torch.Generator().manual_seed(0))
    for batch in tqdm(loader, desc="codes", leave=False, dynamic_ncols=True):
        views = [batch, mirrored(batch)] if dataset.flip else [batch]
        encoded = [encode(model, view, to_c, device) for view in views]
        rows.append(tuple(torch.stack(parts, 1).int().cpu() for parts in zip(*encoded, strict=True)))
    s, r = zip(*rows, strict=True)
    return torch.cat(s), torch.cat(r)


def batches(
    model: TwoStage,
    dataset,
    to_c,
    batch_size: int,
    seed: int,
    start: int,
    workers: int,
    rank: int,
    world: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (s (B, T), r (B, R)) for one process; `start`: pictures that all processes together have seen before."""
    if not dataset.fixed:
        for batch in train_loader(dataset, batch_size, seed, start, workers, rank, world, device.type == "cuda"):
            yield encode(model, batch, to_c, device)
    s, r = table(model, dataset, to_c, device)
    stream = iter(Stream(len(dataset), seed, start, rank, world))
    while True:
        index, position = torch.tensor([next(stream) for _ in range(batch_size)]).T
        view = (index + position // len(dataset)) % s.shape[
            1
        ]  # each picture as it is in one epoch, mirrored in the next
        yield s[index, view].long().to(device), r[index, view].long().to(device)


def held_out(model: TwoStage, dataset, to_c, limit: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes of `limit` held-out pictures, centre-cropped: s (N, T), r (N, R)."""
    encoded = [encode(model, batch, to_c, device) for batch in held_out_batches(dataset, 100, limit)]
    s, r = zip(*encoded, strict=True)
    return torch.cat(s), torch.cat(r)


@torch.no_grad()
def mean_nats(model: TwoStage, tokens: tuple[Tensor, Tensor], batch_size: int) -> float:
    """-log p(s | r) in nats a token, the mean over all given pictures. Leaves the model in the mode it was in."""
    training = model.gpt.training
    model.eval()
    total = sum(model(s, r).double().sum().item() for s, r in zip(*(t.split(batch_size) for t in tokens), strict=True))
    model.train(training)
    return total / tokens[0].numel()
