"""Images as tokens for training the transformer: computed once where they stay the same, else on the fly.

The first-stage model is frozen. An image that is always shown whole (or mirrored) always has the same codes, and
encoding it again in every epoch would cost more than the transformer's own step.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..conditioning import Condition
from ..two_stage import TwoStage
from ..vqgan import VQGAN
from . import checkpoint, processes, runtime
from .data import SOURCE_OF, Images, Stream, held_out_batches, loader, to_input
from .run import Run
from .runtime import UserError


def sources_of(vqgan: VQGAN, condition: Condition | None) -> tuple[tuple[str, ...], int | None]:
    """(what a dataset must yield for this first-stage model and condition, number of labels): see `data.open_data`."""
    kind = condition.kind if condition else "class"
    configs = [vqgan.config] + ([condition.vqgan.config] if kind == "spatial" else [])
    sources = [SOURCE_OF[config.input_kind] for config in configs] + (["coords"] if kind == "coords" else [])
    num_labels = [config.in_channels for config in configs if config.input_kind == "labels"]
    return tuple(dict.fromkeys(sources)), num_labels[0] if num_labels else None


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
    """The batch with all its images mirrored. Coordinates stay as they are: they say where a pixel lies in the image
    that is shown."""
    return {k: v.flip(-1) if v.ndim > 1 and k != "coords" else v for k, v in batch.items()}


def images_at_a_time(model: TwoStage) -> int:
    """Encoding batch of about 2^18 pixels, independent of --batch-size."""
    return max(1, 2**18 // (model.config.n * model.vqgan.config.f) ** 2)


def table(model: TwoStage, dataset: Images, to_c, device, workers=0, rank=0, world=1) -> tuple[Tensor, Tensor]:
    """Codes of the images rank, rank + world, ... of a dataset without random crops: s (N, V, T), r (N, V, R), int32,
    on the CPU. V views of each image: as it is and, where the dataset is to be flipped, mirrored."""
    rows: list[tuple[Tensor, Tensor]] = []
    keys = [(i, None) for i in range(rank, len(dataset), world)]
    batches = loader(dataset, images_at_a_time(model), keys, workers)
    for batch in runtime.progress_bar(rank, batches, desc="codes", leave=False):
        views = [batch, mirrored(batch)] if dataset.flip else [batch]
        encoded = [encode(model, view, to_c, device) for view in views]
        rows.append(tuple(torch.stack(views, 1).int().cpu() for views in zip(*encoded, strict=True)))
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def kept_table(run: Run, model: TwoStage, dataset: Images, to_c) -> tuple[Tensor, Tensor]:
    """`table` of the whole dataset, computed by all processes together and kept in the run folder. A resumed run finds
    it there; if --data or the number of images has changed, or the file is broken, it is computed anew."""
    path, found, images = run.out / "codes.pt", {}, [run.args.data, len(dataset)]
    if run.step:
        with contextlib.suppress(UserError):
            found = checkpoint.read(path, "codes")
    if not all(processes.gather(found.get("images") == images)):
        if len(dataset) < run.world:
            raise UserError(f"{len(dataset)} training images are too few for {run.world} processes")
        run.say(f"computing the codes of {len(dataset)} images, once")
        own = table(model, dataset, to_c, run.device, run.workers, run.rank, run.world)
        found = {name: processes.gathered(rows) for name, rows in zip("sr", own, strict=True)}
        if run.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(path, "codes", images=images, **found)
    return found["s"], found["r"]


def batches(run: Run, model: TwoStage, dataset: Images, to_c) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (s (B, T), r (B, R)) for this process, beginning where the run stands."""
    if dataset.fixed:
        seen = run.step * run.args.batch_size
        stream = Stream(len(dataset), run.args.seed, seen, run.rank, run.world)
        return rows_of(*kept_table(run, model, dataset, to_c), stream, run.micro_batch, run.device)
    return (encode(model, batch, to_c, run.device) for batch in run.batches(dataset))


def rows_of(s: Tensor, r: Tensor, stream: Stream, batch_size: int, device: torch.device):
    """Endless batches of a table's rows. An image is mirrored in every other epoch."""
    keys = iter(stream)
    while True:
        index, position = torch.tensor([next(keys) for _ in range(batch_size)]).T
        view = (index + position // len(s)) % s.shape[1]
        yield s[index, view].long().to(device), r[index, view].long().to(device)


def held_out(model: TwoStage, dataset, to_c, limit: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes of `limit` held-out images, centre-cropped: s (N, T), r (N, R)."""
    batches = held_out_batches(dataset, images_at_a_time(model), limit)
    encoded = [encode(model, batch, to_c, device) for batch in batches]
    return tuple(torch.cat(rows) for rows in zip(*encoded, strict=True))


@torch.no_grad()
def mean_nats(model: TwoStage, tokens: tuple[Tensor, Tensor], batch_size: int) -> float:
    """-log p(s | r) in nats per token, the mean over all given images. Leaves the model in the mode it was in."""
    training = model.gpt.training
    model.eval()
    total = sum(model(s, r).sum().item() for s, r in zip(*(t.split(batch_size) for t in tokens), strict=True))
    model.train(training)
    return total / tokens[0].numel()
