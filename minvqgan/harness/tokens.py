"""Images as tokens, for training the transformer: computed once where they stay the same, else on the fly.

The first-stage model is frozen. An image that is always shown whole (or mirrored) always has the same codes, and
encoding it again in every epoch would cost more than the transformer's own step.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..conditioning import Condition
from ..two_stage import TwoStage, condition_length
from ..vqgan import VQGAN
from . import checkpoint, processes
from .data import SOURCE_OF, Stream, begin_worker, held_out_batches, to_input
from .run import Run
from .runtime import UserError


def sources_of(vqgan: VQGAN, condition: Condition | None) -> tuple[tuple[str, ...], int | None]:
    """(what a dataset must yield for this first-stage model and condition, number of labels): see `data.open_data`."""
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
    """A batch of images -> s (B, T), r (B, R), both int64 on the device."""
    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    x = to_input(batch, model.vqgan.config.input_kind, model.vqgan.config.in_channels)
    return model.image_tokens(x), model.condition_tokens(to_c(batch)).flatten(1)


def mirrored(batch: dict) -> dict:
    """The batch with all its images mirrored. Coordinates say where a pixel lies in the image that is shown, so they
    stay as they are, as for a random crop of a mirrored image."""
    return {k: v.flip(-1) if v.ndim > 1 and k != "coords" else v for k, v in batch.items()}


def images_at_a_time(model: TwoStage) -> int:
    """As many as have 2^18 pixels, 256 of 32 px: --batch-size is for gradients, and may be small."""
    return max(1, 2**18 // (model.config.n * model.vqgan.config.f) ** 2)


def table(model: TwoStage, dataset, to_c, device, workers=0, rank=0, world=1) -> tuple[Tensor, Tensor]:
    """Codes of the images rank, rank + world, ... of a dataset without random crops: s (N, V, T), r (N, V, R), int32,
    on the CPU. V = 2 views, as it is and mirrored, where the dataset is to be flipped, else 1."""
    rows: list[tuple[Tensor, Tensor]] = []
    keys = [(i, None) for i in range(rank, len(dataset), world)]
    own = torch.Generator().manual_seed(0)
    how = {"num_workers": workers, "worker_init_fn": begin_worker, "generator": own}
    loader = DataLoader(dataset, images_at_a_time(model), sampler=keys, **how)
    for batch in tqdm(loader, desc="codes", leave=False, dynamic_ncols=True, disable=rank > 0):
        views = [batch, mirrored(batch)] if dataset.flip else [batch]
        encoded = [encode(model, view, to_c, device) for view in views]
        rows.append(tuple(torch.stack(views, 1).int().cpu() for views in zip(*encoded, strict=True)))
    s, r = zip(*rows, strict=True)
    return torch.cat(s), torch.cat(r)


def kept_table(run: Run, model: TwoStage, dataset, to_c) -> tuple[Tensor, Tensor]:
    """`table` of the whole dataset, computed by all processes together and kept in the run folder: a resumed run finds
    it there, if models and files are still the same."""
    path, identity = run.out / "codes.pt", _identity(model, dataset)
    if len(dataset) < run.world:
        raise UserError(f"{len(dataset)} training images are too few for {run.world} processes")
    found = _found(path, identity, model, len(dataset)) if run.rank == 0 else None
    if not processes.says_rank_0(found is not None):
        run.say(f"computing the codes of {len(dataset)} images, once")
        own = table(model, dataset, to_c, run.device, run.workers, run.rank, run.world)
        s, r = (processes.gathered(rows, run.rank, run.world) for rows in own)
        if run.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = {"identity": identity, "s": s, "r": r}
            checkpoint.save(path, "codes", **found)
    processes.wait()
    found = found or checkpoint.read(path, "codes")
    return found["s"], found["r"]


def _found(path: Path, identity: str, model: TwoStage, count: int) -> dict | None:
    """Codes of this identity, if they are there. What is broken or of other models is made anew, also what could not be
    codes of this one: an index beyond the embedding, in a file from elsewhere, is a crash of the GPU."""
    if not path.exists():
        return None
    try:
        saved = checkpoint.read(path, "codes")
    except UserError:
        return None
    lengths = (model.config.n**2, condition_length(model.condition, model.config.n))
    limits = (model.vqgan.config.codebook_size, model.gpt.config.num_codes + model.gpt.config.num_cond)
    possible = all(
        t.ndim == 3 and (len(t), t.shape[2]) == (count, length) and t.min() >= 0 and t.max() < limit
        for t, length, limit in zip((saved["s"], saved["r"]), lengths, limits, strict=True)
    )
    return saved if saved["identity"] == identity and possible else None


def _identity(model: TwoStage, dataset) -> str:
    """A digest of what the codes depend on: the weights that make them, and the dataset."""
    digest = hashlib.sha256(dataset.identity().encode())
    weights = {**model.vqgan.state_dict(prefix="x."), **model.condition.state_dict(prefix="c.")}
    for name, tensor in weights.items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    digest.update(f"{model.config} {model.condition.kind} {model.condition.num_tokens}".encode())
    return digest.hexdigest()


def batches(run: Run, model: TwoStage, dataset, to_c) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (s (B, T), r (B, R)) for this process, from where the run stands."""
    if dataset.fixed:
        seen = run.step * run.args.batch_size
        stream = Stream(len(dataset), run.args.seed, seen, run.rank, run.world)
        return rows_of(*kept_table(run, model, dataset, to_c), stream, run.micro_batch, run.device)
    return (encode(model, batch, to_c, run.device) for batch in run.batches(dataset))


def rows_of(s: Tensor, r: Tensor, stream: Stream, batch_size: int, device: torch.device):
    """Endless batches of a table's rows: each image as it is in one epoch, mirrored in the next."""
    keys = iter(stream)
    while True:
        index, position = torch.tensor([next(keys) for _ in range(batch_size)]).T
        view = (index + position // len(s)) % s.shape[1]
        yield s[index, view].long().to(device), r[index, view].long().to(device)


def held_out(model: TwoStage, dataset, to_c, limit: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes of `limit` held-out images, centre-cropped: s (N, T), r (N, R)."""
    batches = held_out_batches(dataset, images_at_a_time(model), limit)
    encoded = [encode(model, batch, to_c, device) for batch in batches]
    s, r = zip(*encoded, strict=True)
    return torch.cat(s), torch.cat(r)


@torch.no_grad()
def mean_nats(model: TwoStage, tokens: tuple[Tensor, Tensor], batch_size: int) -> float:
    """-log p(s | r) in nats a token, the mean over all given images. Leaves the model in the mode it was in."""
    training = model.gpt.training
    model.eval()
    total = sum(model(s, r).sum().item() for s, r in zip(*(t.split(batch_size) for t in tokens), strict=True))
    model.train(training)
    return total / tokens[0].numel()
