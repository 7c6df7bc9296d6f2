"""Images for training: folders, torchvision datasets by name, and the built-in `shapes`.

A dataset yields dicts with the sources asked for (`image` (3, S, S) in [-1, 1], `labels` (S, S) int64, `depth` (1, S,
S) in [-1, 1]) and `class`, an int. `to_input` turns a batch of them into what a VQGAN of an input kind reads:

    rgb     (B, 3, S, S)  the image
    gray    (B, 1, S, S)  its luminance
    edges   (B, 1, S, S)  its edges
    lowres  (B, 3, S, S)  the image at a quarter of its resolution, scaled back
    labels  (B, L, S, S)  a label map, one-hot with 0 and 1
    depth   (B, 1, S, S)  a depth map, or any other one-channel image

A folder of pairs has `images/` beside `labels/` (or `depth/`), equal names in both; any other folder is searched
recursively and its subfolders are the classes. `train/` and `val/` above that are respected.

Folders and files come from strangers: what is no image of the formats below is skipped and named, never a reason to
stop, and no other program is ever asked to read it.
"""

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..conditioning import coordinates
from . import shapes
from .runtime import UserError, printable

SOURCE_OF = {"rgb": "image", "gray": "image", "edges": "image", "lowres": "image", "labels": "labels", "depth": "depth"}
KINDS = tuple(SOURCE_OF)
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif"}
# What Pillow may take a file for, whatever its name says: among its other readers is one that starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 2**27  # of an image scaled to the training size; a strip of 1 x 10^6 pixels would take gigabytes
LOWRES_FACTOR = 4
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
        small = F.interpolate(x, size=[max(1, side // LOWRES_FACTOR) for side in x.shape[2:]], mode="area")
        return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)
    gray = (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)  # ITU-R BT.601
    if kind == "gray":
        return gray
    sobel = x.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    gradients = F.conv2d(F.pad(gray, (1, 1, 1, 1), mode="replicate"), torch.stack([sobel, sobel.T])[:, None])
    return (gradients.norm(dim=1, keepdim=True) * 2 - 1).clamp(-1, 1)


# Reading files. Every odd mode ends as 8-bit RGB, one channel in [-1, 1], or an array of labels.


def _open(path: Path, size: int | None = None) -> Image.Image:
    image = Image.open(path, formats=FORMATS)  # an animation opens at its first frame
    if size and image.format == "JPEG":
        image.draft(None, (2 * size, 2 * size))  # large photos are decoded at a fraction of their size
    return ImageOps.exif_transpose(image)  # a phone held upright stores the image lying on its side


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _deep_to_unit(image: Image.Image) -> np.ndarray:
    """16-bit and float images -> (H, W) float32 in [0, 1]. Pillow's own conversion clips them at 255.

    The file's mode alone says what is white: 65535 for whole numbers, 1 for floats. A look at the pixels would take a
    dark image for a bright one. Raises ValueError for floats outside [0, 1], whose scale nobody can know.
    """
    a = np.asarray(image).astype(np.float32)
    if image.mode != "F":
        return (a / 65535).clip(0, 1)
    if not (a.min() >= 0 and a.max() <= 1):  # NaN is not
        raise ValueError(f"float images must lie in [0, 1], this one lies in [{a.min():.4g}, {a.max():.4g}]")
    return a


def read_rgb(path: Path, size: int | None = None) -> Image.Image:
    """Any image as RGB; transparent parts lie on white. `size`: the smallest side that will be needed, for speed."""
    image = _open(path, size)
    if _is_deep(image):
        image = Image.fromarray((_deep_to_unit(image) * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_depth(path: Path) -> Image.Image:
    """Any image as one float channel in [-1, 1], with the precision the file has."""
    image = _open(path)
    unit = _deep_to_unit(image) if _is_deep(image) else np.asarray(image.convert("L"), dtype=np.float32) / 255
    return Image.fromarray(unit * 2 - 1)


def read_labels(path: Path) -> Image.Image:
    """An index image: its numbers are the labels, a palette is ignored. Raises UserError for another kind of image."""
    image = _open(path)
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise UserError(f"{path}: a label map has one channel of indices, this image is {image.mode}")
    return Image.fromarray(np.asarray(image).astype(np.int32))


READERS = {"image": read_rgb, "labels": read_labels, "depth": read_depth}


def _fit(image: Image.Image, resize: int, smooth: bool) -> Image.Image:
    """Scale the shorter side to `resize`. Labels take the nearest pixel: between 2 and 6 there is no label 4."""
    scale = resize / min(image.size)
    size = tuple(max(resize, round(side * scale)) for side in image.size)
    if size == image.size:
        return image
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too long a strip")
    return image.resize(size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)


def to_tensor(image: Image.Image, source: str) -> Tensor:
    a = np.array(image)
    if source == "labels":
        return torch.from_numpy(a.astype(np.int64))  # (S, S)
    if source == "depth":
        return torch.from_numpy(a).clamp(-1, 1)[None]  # (1, S, S)
    return torch.from_numpy(a).permute(2, 0, 1) / 127.5 - 1  # (3, S, S)


def crop_place(width: int, height: int, S: int, seed: int, draw: int | None, flip: bool) -> tuple[int, int, bool]:
    """(left, top, mirrored) of an S x S crop, a function of (seed, draw); draw None: the centre, not mirrored."""
    if draw is None:
        return (width - S) // 2, (height - S) // 2, False
    rng = np.random.default_rng((seed, draw))
    left, top = int(rng.integers(width - S + 1)), int(rng.integers(height - S + 1))
    return left, top, flip and rng.random() < 0.5


class FolderImages(Dataset):
    """Images from files.  dataset[(index, draw)]: `draw` seeds crop and flip; None means the centre, unflipped.

    files: one dict {source: path} an image; class_of: its class, an index into `classes`.
    resize: the shorter side is scaled to this, then image_size x image_size are cut out.
    """

    def __init__(self, files, class_of, classes, image_size, resize, num_labels=None, seed=0, flip=True, coords=False):
        self.files, self.class_of, self.classes = files, class_of, classes
        self.image_size, self.resize, self.num_labels = image_size, resize, num_labels
        self.seed, self.flip, self.coords = seed, flip, coords
        self.fixed = False  # True where all images are known to be shown whole: never cropped at random
        self.bad = torch.zeros(len(files), dtype=torch.bool).share_memory_()  # one for all of a loader's processes
        self.kept: dict[tuple[int, str], Image.Image] = {}
        self.room = CACHE_BYTES  # bytes left for it

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> str:
        """What the images depend on, for codes that are kept: files, with size and time of each, and their cut."""
        stats = [
            (str(p), p.exists() and (p.stat().st_size, p.stat().st_mtime_ns)) for f in self.files for p in f.values()
        ]
        return f"{stats} {self.image_size} {self.resize} {self.flip} {self.coords}"

    def _read(self, index: int, source: str) -> Image.Image:
        if (index, source) in self.kept:
            return self.kept[index, source]
        path = self.files[index][source]
        image = read_rgb(path, self.resize) if source == "image" else READERS[source](path)
        image.load()
        if source == "labels" and self.num_labels:
            top = int(np.asarray(image).max())
            if top >= self.num_labels or np.asarray(image).min() < 0:
                raise UserError(
                    f"{path}: holds label {top}, but --num-labels {self.num_labels} allows 0 to {self.num_labels - 1}"
                )
        image = _fit(image, self.resize, smooth=source != "labels")
        bytes_taken = image.width * image.height * (3 if source == "image" else 4)
        if bytes_taken <= self.room:
            self.kept[index, source] = image
            self.room -= bytes_taken
        return image

    def __getitem__(self, key: tuple[int, int | None]) -> dict:
        index, draw = key
        # A file that cannot be decoded is replaced by the next good one, so that the data order stays the same.
        for step in range(len(self.files)):
            i = (index + step) % len(self.files)
            if self.bad[i]:
                continue
            try:
                return self._sample(i, draw)
            except UserError:
                raise
            except Exception as error:  # Pillow raises a dozen kinds for broken files, struct.error among them
                if self.bad[i]:  # another process has just said so
                    continue
                self.bad[i] = True
                name = " + ".join(str(path) for path in self.files[i].values())
                say(f"skipped {name}: {error} ({int(self.bad.sum())} unreadable so far)")
        raise UserError("not one of the images could be read")

    def _sample(self, index: int, draw: int | None) -> dict:
        images = {source: self._read(index, source) for source in self.files[index]}
        sizes = {image.size for image in images.values()}
        if len(sizes) > 1:
            names = " and ".join(str(path) for path in self.files[index].values())
            raise UserError(f"{names} differ in shape: a pair must show the same scene")
        width, height = sizes.pop()
        S = self.image_size
        left, top, flip = crop_place(width, height, S, self.seed, draw, self.flip)
        out: dict = {"class": self.class_of[index]}
        for source, image in images.items():
            t = to_tensor(image.crop((left, top, left + S, top + S)), source)
            out[source] = t.flip(-1) if flip else t
        if self.coords:  # where the crop lies in the image that is shown: in the mirrored one, if it is mirrored
            left = width - S - left if flip else left
            out["coords"] = coordinates(height, width)[:, top : top + S, left : left + S]
        return out


class ShapesImages(Dataset):
    """The built-in images; `indices` of seed 0 whatever the training's seed is, so that runs can be compared."""

    classes = shapes.KINDS
    flip = False  # every scene is a new draw already

    def __init__(self, indices: range, image_size: int, resize: int, sources: tuple[str, ...], seed: int):
        self.indices, self.image_size, self.resize, self.sources, self.seed = indices, image_size, resize, sources, seed
        self.fixed = resize == image_size
        self.kept: dict[int, dict] = {}
        self.room = CACHE_BYTES

    def identity(self) -> str:
        """As in FolderImages."""
        return f"shapes {self.indices} {self.image_size} {self.sources}"

    def __len__(self) -> int:
        return len(self.indices)

    def _scene(self, index: int) -> dict:
        if index in self.kept:
            return self.kept[index]
        scene = shapes.draw(0, self.indices[index], self.resize, self.resize)
        out = {
            s: coordinates(self.resize, self.resize) if s == "coords" else torch.from_numpy(scene[s])
            for s in self.sources
        }
        out["class"] = scene["class"]
        bytes_taken = sum(v.nbytes for k, v in out.items() if k != "class")
        if bytes_taken <= self.room:
            self.kept[index] = out
            self.room -= bytes_taken
        return out

    def __getitem__(self, key: tuple[int, int | None]) -> dict:
        index, draw = key
        S, scene = self.image_size, self._scene(index)
        left, top, _ = crop_place(self.resize, self.resize, S, self.seed, draw, flip=False)
        return {k: v if k == "class" else v[..., top : top + S, left : left + S] for k, v in scene.items()}


class TorchvisionImages(FolderImages):
    """A torchvision dataset of (PIL image, class) pairs, cropped and flipped like files are."""

    def __init__(self, wrapped, classes, image_size, resize, seed, flip, coords):
        files = [{"image": i} for i in range(len(wrapped))]
        super().__init__(files, {}, classes, image_size, resize, None, seed, flip, coords)
        self.wrapped = wrapped

    def identity(self) -> str:
        """As in FolderImages."""
        return f"{type(self.wrapped).__name__} {len(self)} {self.image_size} {self.resize} {self.flip} {self.coords}"

    def _read(self, index: int, source: str) -> Image.Image:
        image, number = self.wrapped[index]  # both come from one read
        self.class_of[index] = int(number)
        return _fit(image.convert("RGB"), self.resize, smooth=True)


# Datasets by name: (class, arguments of the training set, of the held-out set).
TORCHVISION = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashion-mnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "oxford-pets": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
}
DIGITS = {"mnist", "svhn"}  # a mirrored 3 is no 3
SQUARE = {"cifar10", "cifar100", "mnist", "fashion-mnist", "svhn", "stl10"}
TORCHVISION_ROOT = Path("data")


def _torchvision(name: str, image_size: int, resize: int, seed: int, flip: bool, coords: bool):
    cls, *arguments = TORCHVISION[name]
    sets = []
    for kwargs in arguments:
        try:
            wrapped = getattr(torchvision.datasets, cls)(TORCHVISION_ROOT, download=True, **kwargs)
        except (OSError, RuntimeError) as error:  # no network, a moved mirror, a broken archive
            raise UserError(
                f"{name} is not in ./{TORCHVISION_ROOT} and could not be downloaded ({error}); "
                "put it there or name a folder"
            ) from None
        count = max((int(wrapped[i][1]) for i in range(len(wrapped))), default=0) + 1 if cls == "SVHN" else 0
        classes = tuple(map(str, getattr(wrapped, "classes", None) or range(count)))
        sets.append(TorchvisionImages(wrapped, classes, image_size, resize, seed, flip and name not in DIGITS, coords))
        sets[-1].fixed = name in SQUARE and resize == image_size
    return sets[0], sets[1]


def say(text: str) -> None:
    """A line about the data, with names from strangers' folders in it."""
    print(printable(text), file=sys.stderr)


def _find(root: Path) -> list[Path]:
    """All files in root with an image's name. Links are followed, but no folder is entered twice, nor one that root
    lies in: loops would never end, and a link to / would be a walk through the whole machine."""
    seen = {_identity(parent) for parent in root.resolve().parents}
    folders, links, found = [root], [], []
    while folders or links:
        folder = folders.pop() if folders else links.pop()  # links last: a folder is found under its own name
        try:
            identity = _identity(folder)
            if identity in seen:
                say(f"skipped {folder}: a link to a folder that is searched already, or to one around {root}")
                continue
            inside = sorted(os.listdir(folder), reverse=True)
        except OSError as error:
            say(f"skipped {folder}: {error.strerror}")
            continue
        seen.add(identity)
        for path in (folder / name for name in inside if not name.startswith(".")):
            if os.path.isdir(path):
                (links if path.is_symlink() else folders).append(path)
            elif path.suffix.lower() in EXTENSIONS and os.path.isfile(path):  # no pipe, no device
                found.append(path)
    return sorted(found)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _readable(paths: list[Path]) -> dict[Path, bool]:
    """The files whose header is that of an image, and whether it is square. Broken pixels behind a good header are met
    while training."""
    good, bad = {}, []
    for path in paths:
        try:
            with Image.open(path, formats=FORMATS) as image:
                good[path] = image.width == image.height
        except Exception:
            bad.append(path)
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        say(f"skipped {len(bad)} unreadable files: {', '.join(map(str, bad[:3]))}{more}")
    return good


def _scan(root: Path, sources: tuple[str, ...]) -> tuple[list[dict[str, Path]], list[str], bool]:
    """The images under `root`, each {source: path}, the class name of each ("" where there are none), and whether all
    are square."""
    folders = {"image": "images", "labels": "labels", "depth": "depth"}
    if not (root / "images").is_dir() or not any((root / folders[s]).is_dir() for s in ("labels", "depth")):
        if len(sources) > 1:
            raise UserError(
                f"{root}: {' and '.join(sources)} together need {root}/images beside {root}/{folders[sources[1]]}"
            )
        paths = _readable(_find(root))
        names = [p.relative_to(root).parts[0] if len(p.relative_to(root).parts) > 1 else "" for p in paths]
        return [{sources[0]: p} for p in paths], names, all(paths.values())
    found, square = {}, True
    for source in sources:
        folder = root / folders[source]
        if not folder.is_dir():
            raise UserError(f"{root} has no folder {folders[source]}/")
        paths = _readable(_find(folder))
        found[source] = {p.relative_to(folder).with_suffix(""): p for p in paths}
        square = square and all(paths.values())
    first = found[sources[0]]
    for source in sources[1:]:
        for stem in sorted(first.keys() ^ found[source].keys()):
            lonely = first.get(stem) or found[source][stem]
            raise UserError(f"{lonely} has no partner of the same name in {'/'.join(folders[s] for s in sources)}")
    return [{source: found[source][stem] for source in sources} for stem in sorted(first)], [""] * len(first), square


Split = tuple[list[dict[str, Path]], list[str]]  # files and the class name of each


def _split(files: list, names: list[str], seed: int) -> tuple[Split, Split]:
    """(training set, held-out set) of a folder: 5 % are held out, one at least, the same ones for a seed. A class
    keeps one image for training."""
    left, held_out = Counter(names), []
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(files))]
    for i in order:
        if len(held_out) < max(1, len(files) // 20) and left[names[i]] > 1:
            held_out.append(i)
            left[names[i]] -= 1
    held_out = set(held_out or order[:1])
    chosen = ([i for i in range(len(files)) if (i in held_out) == want] for want in (False, True))
    return tuple(([files[i] for i in numbers], [names[i] for i in numbers]) for numbers in chosen)


def _of_known_classes(split: Split, known: set[str]) -> Split:
    """Without images of classes that the training set does not have: no model could know them."""
    strange = sorted(set(split[1]) - known)
    if strange:
        say(f"skipped held-out images of classes without training images: {', '.join(strange)}")
    pairs = [(file, name) for file, name in zip(*split, strict=True) if name in known]
    return [file for file, _ in pairs], [name for _, name in pairs]


def _folder(root: Path, image_size: int, resize: int, sources, num_labels, seed: int, flip: bool):
    if not root.exists():
        raise UserError(
            f"--data {root}: no such folder, and no dataset of that name ({', '.join(['shapes', *TORCHVISION])})"
        )
    if not root.is_dir():
        raise UserError(f"--data {root} is a file; give the folder that holds the images")
    split = (root / "train").is_dir() and (root / "val").is_dir()
    if not split and (root / "train").is_dir():
        root = root / "train"  # else "train" would be the name of the only class
    coords, sources = "coords" in sources, tuple(s for s in sources if s != "coords")
    scanned = [_scan(root / name, sources) for name in ("train", "val")] if split else [_scan(root, sources)]
    square = all(square for _, _, square in scanned)
    splits = [(files, names) for files, names, _ in scanned]
    if split:
        splits[1] = _of_known_classes(splits[1], set(splits[0][1]))
    for (files, _), name in zip(splits, ("train", "val"), strict=False):
        if not files:
            raise UserError(
                f"no readable image in {root / name if split else root} (looked for {', '.join(sorted(EXTENSIONS))})"
            )
    if not split:
        if len(splits[0][0]) < 2:
            raise UserError(f"{root} holds one image; at least two are needed, one of them held out")
        splits = _split(*splits[0], seed)
    classes = tuple(sorted({name for _, names in splits for name in names}))
    sets = tuple(
        FolderImages(
            files, [classes.index(n) for n in names], classes, image_size, resize, num_labels, seed, flip, coords
        )
        for files, names in splits
    )
    for images in sets:
        images.fixed = square and resize == image_size
    return sets


def open_data(
    name: str,
    image_size: int,
    resize: int | None = None,
    sources: tuple[str, ...] = ("image",),
    num_labels: int | None = None,
    seed: int = 0,
    flip: bool = True,
) -> tuple[Dataset, Dataset]:
    """(training set, held-out set) of a folder, a torchvision dataset or `shapes`. Both have `.classes`, their names.

    image_size: side of the square images. resize: scale the shorter side to this before cutting (image_size).
    sources: of "image", "labels", "depth", "coords" (where a crop lies, (1, S, S) in [0, 1]).
    Raises UserError, one line each, for everything a user can get wrong.
    """
    resize = resize or image_size
    if resize < image_size:
        raise UserError(f"--resize {resize} is smaller than --image-size {image_size}: nothing could be cut out")
    if not name.strip():
        raise UserError("--data is empty: give a folder, shapes, or the name of a dataset")
    if name == "shapes":
        if "labels" in sources and num_labels and num_labels < len(shapes.LABELS):
            raise UserError(f"shapes has {len(shapes.LABELS)} labels; --num-labels {num_labels} is too few")
        train, val = range(1000, 13000), range(1000)
        return tuple(ShapesImages(indices, image_size, resize, sources, seed) for indices in (train, val))
    if name in TORCHVISION and not Path(name).is_dir():
        if set(sources) - {"image", "coords"}:
            raise UserError(f"{name} has images only, no {sources[-1]}")
        return _torchvision(name, image_size, resize, seed, flip, "coords" in sources)
    try:
        root = Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"--data {name}: there is no user of that name") from None
    return _folder(root, image_size, resize, sources, num_labels, seed, flip)


def check_outside(out: str, name: str) -> None:
    """Raises UserError for a run folder among the images: resumed, it would train on its own pictures."""
    root = Path(os.path.expanduser(name))
    searched = [root / "train", root / "val"] if (root / "train").is_dir() else [root] if root.is_dir() else []
    place = Path(os.path.realpath(out))  # `resolve` raises for a loop of links
    if name != "shapes" and any(place.is_relative_to(os.path.realpath(folder)) for folder in searched):
        raise UserError(f"--out {out} lies in --data {name}, and its pictures would join the images; choose another")


def check_classes(name: str, found: tuple[str, ...], known: tuple[str, ...], count: int) -> None:
    """Raises UserError where the classes of a dataset are not those that a model was trained on: another folder among
    them would shift all numbers behind it. Numbers for names, as the official models have, say only how many."""
    nameless = known in ((), tuple(map(str, range(count))))
    if found == known or (nameless and len(found) == count):
        return
    odd = sorted(set(found) ^ set(known)) or found
    raise UserError(f"{name} has {len(found)} classes, the model {count} others: {', '.join(odd[:5])}")


class Stream(Sampler):
    """Endless (index, draw) keys: a new shuffle each epoch, `draw` counting up. What comes at position p depends on
    (seed, p) alone, so a resumed run goes on where it stood, with any number of workers or processes."""

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
    """A terminal sends Ctrl-C to all of its processes, and a cluster SIGTERM: a reader that obeyed would be missing for
    the step that is still to be saved. The readers end when the training does. Each keeps its part of the cache."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    loader = get_worker_info()
    loader.dataset.room //= loader.num_workers


def train_loader(
    dataset, batch_size: int, seed: int, start: int, workers: int, rank: int = 0, world: int = 1, pin: bool = False
):
    """Endless batches for one process; `start`: images that all processes together have seen before."""
    # A generator of its own: the loader draws a worker seed on creation, and from the global generator that would make
    # a resumed run differ from an uninterrupted one.
    own = torch.Generator().manual_seed(seed)
    sampler = Stream(len(dataset), seed, start, rank, world)
    how = {"num_workers": workers, "worker_init_fn": begin_worker, "pin_memory": pin, "generator": own}
    return iter(DataLoader(dataset, batch_size, sampler=sampler, **how))


def held_out_batches(dataset, batch_size: int, limit: int) -> Iterator[dict]:
    """`limit` held-out images, centre-cropped, always the same: evenly spread, for folders are sorted by class."""
    count = min(limit, len(dataset))
    keys = [(i * len(dataset) // count, None) for i in range(count)]
    yield from DataLoader(dataset, batch_size, sampler=keys, generator=torch.Generator().manual_seed(0))
