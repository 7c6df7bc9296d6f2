"""Images for training: folders (see folders.py), torchvision datasets by name, and the built-in `shapes`.

A dataset yields dicts of the sources asked for, `image` (3, S, S) in [-1, 1], `labels` (S, S) int64, `depth` (1, S, S)
in [-1, 1], and of `class`, an int. `to_input` turns a batch of them into what a VQGAN of an input kind reads:

    rgb     (B, 3, S, S)  the image
    gray    (B, 1, S, S)  its luminance
    edges   (B, 1, S, S)  its edges
    lowres  (B, 3, S, S)  the image at a quarter of its resolution, scaled back
    labels  (B, L, S, S)  a label map, one-hot with 0 and 1
    depth   (B, 1, S, S)  a depth map, or any other one-channel image
"""

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..conditioning import coordinates
from . import folders, imagefiles, processes, shapes
from .runtime import UserError, say

SOURCE_OF = {"rgb": "image", "gray": "image", "edges": "image", "lowres": "image", "labels": "labels", "depth": "depth"}
KINDS = tuple(SOURCE_OF)
CACHE_BYTES = 2**29  # drawn shapes and decoded small images are kept in memory up to this, by all workers together


def input_channels(kind: str, num_labels: int | None) -> int:
    """Channels of a model's input of this kind. Raises UserError for labels without their number."""
    if kind != "labels":
        return 3 if kind in ("rgb", "lowres") else 1
    if not num_labels:
        raise UserError("--input labels needs --num-labels: how many labels are there?")
    return num_labels


def to_input(batch: dict, kind: str, num_labels: int | None = None) -> Tensor:
    """A batch of a dataset's dicts -> the model's input (B, C, S, S), on the batch's device. See the table above."""
    x = batch[SOURCE_OF[kind]]
    if kind == "labels":
        return F.one_hot(x, num_labels).permute(0, 3, 1, 2).float()
    if kind in ("rgb", "depth"):
        return x
    if kind == "lowres":
        small = F.interpolate(x, size=[max(1, side // 4) for side in x.shape[2:]], mode="area")
        return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)
    gray = (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)  # ITU-R BT.601
    if kind == "gray":
        return gray
    sobel = x.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    gradients = F.conv2d(F.pad(gray, (1, 1, 1, 1), mode="replicate"), torch.stack([sobel, sobel.T])[:, None])
    return (gradients.norm(dim=1, keepdim=True) * 2 - 1).clamp(-1, 1)


class Cut(NamedTuple):
    """S x S, S = image_size, is cut out of images whose shorter side is scaled to `resize`. seed: of crops and flips.
    coords: also say where the crop lies. fixed: images are always shown whole, so that their codes are computed once.
    """

    image_size: int
    resize: int
    seed: int
    flip: bool
    coords: bool
    fixed: bool


class Images(Dataset):
    """Square images.  dataset[(index, draw)]: `draw` seeds crop and flip; None means the centre, unflipped.

    read(index) -> ({source: array}, class): one image as `imagefiles.read` gives it, not yet cut. classes: names.
    """

    def __init__(self, read: Callable, n: int, classes: tuple[str, ...], cut: Cut):
        self.read, self.n, self.classes, self.cut = read, n, classes, cut
        self.flip, self.fixed = cut.flip, cut.fixed
        self.kept: dict[int, tuple] = {}
        self.room = CACHE_BYTES  # bytes left for it

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: tuple[int, int | None]) -> dict:
        index, draw = key
        arrays, number = self.kept.get(index) or self.read(index)
        taken = sum(a.nbytes for a in arrays.values())
        if taken <= self.room and index not in self.kept:
            self.kept[index] = arrays, number
            self.room -= taken
        height, width = next(iter(arrays.values())).shape[-2:]
        S = self.cut.image_size
        left, top, flip = (width - S) // 2, (height - S) // 2, False
        if draw is not None:
            rng = np.random.default_rng((self.cut.seed, draw))
            left, top = int(rng.integers(width - S + 1)), int(rng.integers(height - S + 1))
            flip = self.flip and rng.random() < 0.5
        out: dict = {"class": number}
        for source, a in arrays.items():
            a = a[..., top : top + S, left : left + S]
            out[source] = imagefiles.to_tensor(a[..., ::-1].copy() if flip else a)
        if self.cut.coords:  # where the crop lies in the image that is shown: in the mirrored one, if it is mirrored
            left = width - S - left if flip else left
            out["coords"] = coordinates(height, width)[:, top : top + S, left : left + S]
        return out


class FolderImages(Images):
    """Images from files, as `folders.open_folder` found them."""

    def __init__(self, root: str, rows: list[folders.Row], sources: tuple[str, ...], num_labels, classes, cut: Cut):
        super().__init__(self.read, len(rows), classes, cut)
        self.root, self.sources, self.num_labels = root, sources, num_labels
        # Arrays and not lists: a million Python strings would take 0.2 GB in every process.
        self.files = np.array([[os.fsencode(path) for path in row.paths] for row in rows])  # (N, sources)
        number_of = {name: number for number, name in enumerate(classes)}
        self.class_of = np.array([number_of[row.name] for row in rows], dtype=np.int32)
        self.bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_()  # one for all of a loader's processes

    def paths(self, index: int) -> list[str]:
        return [os.path.join(self.root, os.fsdecode(name)) for name in self.files[index]]

    def read(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        # A file that cannot be decoded is replaced by the next good one, so that the data order stays the same.
        for i in chain(range(index, self.n), range(index)):
            if self.bad[i]:
                continue
            paths, how = self.paths(i), (self.cut.resize, self.num_labels)
            try:
                arrays = {s: imagefiles.read(path, s, *how) for s, path in zip(self.sources, paths, strict=True)}
            except UserError:
                raise
            except Exception as error:  # Pillow raises a dozen kinds for broken files, struct.error among them
                if not self.bad[i]:  # else another process has just said so
                    self.bad[i] = True
                    say(f"skipped {' + '.join(paths)}: {error} ({int(self.bad.sum())} unreadable so far)")
                continue
            if len({a.shape[-2:] for a in arrays.values()}) > 1:
                raise UserError(f"{' and '.join(paths)} differ in shape: a pair must show the same scene")
            return arrays, int(self.class_of[i])
        raise UserError(f"not one of {self.n} images could be read")


def _read_shape(indices: range, sources: tuple[str, ...], size: int, index: int) -> tuple[dict[str, np.ndarray], int]:
    """One of the built-in images: of seed 0 whatever the training's seed, so that runs can be compared."""
    scene = shapes.draw(0, indices[index], size, size)
    return {source: scene[source] for source in sources}, scene["class"]


def _read_torchvision(dataset, resize: int, index: int) -> tuple[dict[str, np.ndarray], int]:
    """From a torchvision dataset of (PIL image, class) pairs."""
    image, number = dataset[index]
    return {"image": imagefiles.to_array(imagefiles.fit(image.convert("RGB"), resize))}, int(number)


TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
TORCHVISION_ROOT = Path("data")


def _torchvision(name: str, cut: Cut) -> list[Images]:
    import torchvision

    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        processes.wait()  # until the first process of this machine has downloaded it
    try:
        dataset = getattr(torchvision.datasets, TORCHVISION[name])
        both = [dataset(TORCHVISION_ROOT, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # no network, a moved mirror, a broken archive
        place = TORCHVISION_ROOT.resolve()
        raise UserError(f"{name} could not be downloaded ({error}); put it into {place} or name a folder") from None
    if first:
        processes.wait()
    cut = cut._replace(flip=cut.flip and name != "mnist")  # a mirrored 3 is no 3
    return [Images(partial(_read_torchvision, one, cut.resize), len(one), tuple(one.classes), cut) for one in both]


def open_data(
    name: str,
    image_size: int,
    resize: int | None = None,
    sources: tuple[str, ...] = ("image",),
    num_labels: int | None = None,
    seed: int = 0,
    flip: bool = True,
) -> tuple[Images, Images]:
    """(training set, held-out set) of a folder, a torchvision dataset or `shapes`. Both have `.classes`, their names.

    image_size: side of the square images. resize: scale the shorter side to this before cutting (image_size).
    sources: of "image", "labels", "depth", "coords" (where a crop lies, (1, S, S) in [0, 1]).
    seed: of crops and flips. Raises UserError, one line each, for everything a user can get wrong.
    """
    resize, coords, sources = resize or image_size, "coords" in sources, tuple(s for s in sources if s != "coords")
    if resize < image_size:
        raise UserError(f"--resize {resize} is smaller than --image-size {image_size}: nothing could be cut out")
    cut = Cut(image_size, resize, seed, flip, coords, fixed=resize == image_size)
    if name == "shapes":
        if "labels" in sources and num_labels and num_labels < len(shapes.LABELS):
            raise UserError(f"shapes has {len(shapes.LABELS)} labels; --num-labels {num_labels} is too few")
        cut, both = cut._replace(flip=False), (range(1000, 13000), range(1000))  # no flip: each scene is new
        reads = [partial(_read_shape, some, sources, resize) for some in both]
        return tuple(Images(read, len(read.args[0]), shapes.KINDS, cut) for read in reads)
    root = os.path.expanduser(name)
    if os.path.isdir(root):
        train, val, classes, square = folders.open_folder(root, sources)
        how = (sources, num_labels, classes, cut._replace(fixed=cut.fixed and square))
        return FolderImages(root, train, *how), FolderImages(root, val, *how)
    if name not in TORCHVISION:
        names = ", ".join(["shapes", *TORCHVISION])
        raise UserError(f"--data {root}: no such folder, and no dataset of that name ({names})")
    if sources != ("image",):
        raise UserError(f"{name} has images only, no {sources[-1]}")
    return tuple(_torchvision(name, cut))


def check_outside(out: str, name: str) -> None:
    """Raises UserError for a run folder among the images: resumed, it would train on its own images."""
    root = Path(name).expanduser()
    if name != "shapes" and root.is_dir() and Path(out).resolve().is_relative_to(root.resolve()):
        raise UserError(f"--out {out} lies in --data {name}, and its images would join the training; choose another")


def check_classes(name: str, found: tuple[str, ...], known: tuple[str, ...], count: int) -> None:
    """Raises UserError if a dataset has other classes than a model (`known`, `count` of them): a new folder among them
    would shift all numbers after it. Of models whose classes have no names, only the count is compared."""
    nameless = known in ((), tuple(map(str, range(count))))
    if found == known or (nameless and len(found) == count):
        return
    odd = sorted(set(found) ^ set(known)) or found
    raise UserError(f"{name} has {len(found)} classes, the model {count} others: {', '.join(odd[:5])}")


class Stream(Sampler):
    """Endless (index, draw) keys: shuffled anew each epoch, `draw` counts up. The key at a position depends on the seed
    and that position alone, so a resumed run sees what it would have seen, with any number of workers or processes."""

    def __init__(self, n: int, seed: int, start: int = 0, rank: int = 0, world: int = 1):
        self.n, self.seed, self.start, self.rank, self.world = n, seed, start, rank, world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, epoch = self.start + self.rank, None
        while True:
            if position // self.n != epoch:
                epoch = position // self.n
                order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
            yield int(order[position % self.n]), position
            position += self.world


def begin_worker(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which reach all processes: the step under way still needs its images. The main process
    ends its workers. Each worker gets its part of the cache."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    loader = get_worker_info()
    loader.dataset.room //= loader.num_workers


def loader(dataset, batch_size: int, keys, workers: int = 0, pin: bool = False) -> DataLoader:
    """Batches of the images at these keys."""
    # A generator of its own: a loader draws a seed when it starts. Taken from the global generator, it would make a
    # resumed run differ from an uninterrupted one.
    how = {"worker_init_fn": begin_worker, "pin_memory": pin, "generator": torch.Generator().manual_seed(0)}
    return DataLoader(dataset, batch_size, sampler=keys, num_workers=workers, **how)


def train_loader(dataset, batch_size: int, seed: int, start: int, workers: int, rank=0, world=1, pin=False):
    """Endless batches for one process. start: the number of images that all processes together have seen before."""
    return iter(loader(dataset, batch_size, Stream(len(dataset), seed, start, rank, world), workers, pin))


def held_out_batches(dataset, batch_size: int, limit: int) -> Iterator[dict]:
    """`limit` held-out images, centre-cropped, always the same: evenly spread, because they are sorted by class."""
    count = min(limit, len(dataset))
    return iter(loader(dataset, batch_size, [(i * len(dataset) // count, None) for i in range(count)]))


def open_image(path: str | Path, kind: str, num_labels: int) -> Tensor:
    """An image file at its own size, as a VQGAN of this input kind reads it: (1, C, H, W). Raises UserError."""
    source = SOURCE_OF[kind]
    try:
        image = imagefiles.to_tensor(imagefiles.read(path, source, num_labels=num_labels))
    except UserError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds of error for broken files
        raise UserError(f"{path} cannot be read as an image ({error})") from None
    return to_input({source: image[None]}, kind, num_labels)
