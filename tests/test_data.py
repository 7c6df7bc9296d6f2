"""Folders, torchvision datasets and shapes: every odd file ends as the right numbers, every mistake as one line."""

import hashlib
import io
import os
import pickle
import struct
import subprocess
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from helpers import NoFloat64, make_photos
from PIL import Image, PngImagePlugin, features

from minvqgan.harness import data, folders, pictures, shapes
from minvqgan.harness.data import open_data, to_input
from minvqgan.harness.imagefiles import read
from minvqgan.harness.runtime import UserError

RED = (255, 0, 0)
FLAT = Image.new("RGB", (8, 6), RED)


def items(*datasets) -> list[dict]:
    return [dataset[i, None] for dataset in datasets for i in range(len(dataset))]


def deep(value: float, dtype) -> Image.Image:
    return Image.fromarray(np.full((6, 8), value, dtype))


GRAY = (128, 128, 128)
IMAGES = {
    "rgb.png": (FLAT, RED),
    "palette.png": (FLAT.convert("P", palette=Image.Palette.ADAPTIVE), RED),
    "cmyk.tif": (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), RED),
    "solid.png": (Image.new("RGBA", (8, 6), (255, 0, 0, 255)), RED),
    "clear.png": (Image.new("RGBA", (8, 6), (255, 0, 0, 0)), (255, 255, 255)),  # lies on white
    "gray.png": (Image.new("L", (8, 6), 128), GRAY),
    "gray_alpha.png": (Image.new("LA", (8, 6), (128, 255)), GRAY),
    "float.tif": (deep(128 / 255, np.float32), GRAY),
    # Guessed from the pixels, a constant 255 was white and a constant 256 black.
    "255.png": (deep(255, np.uint16), (1, 1, 1)),
    "256.tif": (deep(256, np.int32), (1, 1, 1)),
    "white.png": (deep(65535, np.uint16), (255, 255, 255)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_every_mode_becomes_rgb(tmp_path, name):
    image, colour = IMAGES[name]
    image.save(tmp_path / name)
    assert np.array_equal(read(tmp_path / name, "image"), np.broadcast_to(np.uint8(colour)[:, None, None], (3, 6, 8)))
    if image.mode.startswith("I"):
        assert np.allclose(read(tmp_path / name, "depth"), np.asarray(image)[None] / 65535 * 2 - 1, atol=1e-6)


def exif(orientation: int, broken: bool) -> bytes:
    """EXIF of an orientation and, if broken, of an exposure bias that is a signed number where Pillow, which writes
    what it has read, can only write unsigned ones."""
    entries = [struct.pack("<HHII", 0x0112, 3, 1, orientation)]
    entries += [struct.pack("<HHIi", 0x9204, 9, 1, -5)] * broken
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("broken", [False, True])
def test_exif_orientation_is_applied(tmp_path, broken):
    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((0, 0), RED)
    image.save(tmp_path / "turned.png", exif=exif(6, broken))  # to be turned by 90 degrees clockwise
    found = read(tmp_path / "turned.png", "image")
    assert found.shape == (3, 8, 4) and tuple(found[:, 0, 3]) == RED


def test_odd_files_show_their_pixels(tmp_path, capfd):
    """Broken metadata once made whole folders unreadable. Pillow refuses more than 1 MB of text or colour profile, and
    image generators keep their settings in the text."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    files = {
        "text.png": {"pnginfo": text},
        "profile.png": {"icc_profile": bytes(3_000_000)},
        "garbage.png": {"exif": b"Exif\0\0garbage!garbage!"},
        "garbage.jpg": {"exif": b"Exif\0\0garbage!garbage!", "quality": 100, "subsampling": 0},
        "cut.png": {"exif": exif(6, broken=True)[:20]},
        "moving.gif": {"save_all": True, "append_images": [Image.new("RGB", (8, 6), "blue")]},  # the first frame counts
        "exact.webp": {"lossless": True},
    }
    files |= {"new.avif": {"quality": 100}} if "avif" in features.modules and features.check("avif") else {}
    files |= {"new.jp2": {}} if features.check("jpg_2000") else {}
    for name, how in files.items():
        FLAT.save(tmp_path / name, **how)
    found = items(*open_data(str(tmp_path), 4))
    assert len(found) == len(files) and "skipped" not in capfd.readouterr().err
    for item in found:
        assert (item["image"] - torch.tensor([1.0, -1, -1])[:, None, None]).abs().max() < 0.05


def test_a_large_jpeg_is_as_sharp_as_its_pixels(tmp_path):
    """It is decoded at a fraction of its size, but not of fewer pixels than are shown."""
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (320, 320, 3), np.uint8))
    pixels.resize((64, 64)).resize((512, 512)).save(tmp_path / "a.jpg", quality=95)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    ours, truth = (read(tmp_path / name, "image", resize=64).astype(float) for name in ("a.jpg", "a.png"))
    assert np.abs(ours - truth).mean() < 0.07 * truth.std()


def test_a_file_that_is_locked_for_a_moment_is_read(tmp_path, monkeypatch):
    (path,) = make_photos(tmp_path, n=1)
    opened, refused = Image.open, []

    def open_(*args, **kwargs):
        if not refused:
            refused.append(args)
            raise PermissionError(13, "Permission denied", str(path))
        return opened(*args, **kwargs)

    monkeypatch.setattr(Image, "open", open_)
    assert read(path, "image").shape == (3, 36, 40) and refused


def test_broken_files_are_skipped_and_named_once_and_nothing_is_executed(tmp_path, capfd, monkeypatch):
    """Pillow asks Ghostscript to draw an EPS file, whatever its name says. Control characters do not reach the
    terminal."""
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **how: pytest.fail(f"started {words}"))
    good = make_photos(tmp_path, n=40)[0].read_bytes()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n0 0 40 40 rectfill\nshowpage\n"
    bad = {"red\x1b[31m\n.png": b"not an image", "drawn.jpg": eps}
    make_photos(tmp_path / "wide", n=1, size=(400, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # Pillow refuses twice as many
    half = {name: good[: len(good) // 2] for name in ("half\x1b[2J.png", os.fsdecode(b"latin\xe4.png"))}  # good headers
    for name, content in (bad | half).items():
        (tmp_path / name).write_bytes(content)
    for name, value in {"nan": np.nan, "bright": 200.0, "negative": -1.0}.items():  # floats that have no scale
        pixels = np.full((20, 20), 0.5, np.float32)
        pixels[3, 4] = value
        Image.fromarray(pixels).save(tmp_path / f"{name}.tif")
    datasets = open_data(str(tmp_path), 16)
    assert sum(map(len, datasets)) == 45
    for _ in range(2):
        assert all(x["image"].shape == (3, 16, 16) and x["image"].isfinite().all() for x in items(*datasets))
    err = capfd.readouterr().err
    names = ("red?[31m?.png", "drawn.jpg", "half?[2J.png", "latin?.png", "nan.tif", "bright.tif", "negative.tif")
    assert [err.count(name) for name in (*names, "\x1b")] == [1] * 7 + [0]
    assert "skipped as unreadable: 3" in err and err.count("unreadable so far") == 5
    assert "wide/photo_00.png: Image size (40000 pixels) exceeds limit" in err
    assert "nan.tif: float images must lie in [0, 1]" in err


def test_label_maps_are_read_by_index(tmp_path):
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4)
    plain, palette = Image.fromarray(indices), Image.fromarray(indices, mode="P")
    palette.putpalette([0] * 768)  # all black to the eye
    for image in (plain, palette):
        image.save(tmp_path / "map.png")
        assert np.array_equal(read(tmp_path / "map.png", "labels"), indices)
    with pytest.raises(UserError, match=r"map\.png: holds label 11, but --num-labels 11 allows 0 to 10"):
        read(tmp_path / "map.png", "labels", num_labels=11)
    for mode in ("RGB", "F"):
        Image.new(mode, (4, 3)).save(tmp_path / "other.tif")
        with pytest.raises(UserError, match=rf"other\.tif: a label map has one .*, this image is {mode}"):
            read(tmp_path / "other.tif", "labels")


@pytest.mark.parametrize("size", [(50, 30), (7, 5), (300, 90)])
def test_range_size_and_crops_of_a_folder(tmp_path, size):
    """Small images are enlarged, large ones scaled down."""
    make_photos(tmp_path, n=2, size=size)
    train, again = (open_data(str(tmp_path), image_size=24)[0] for _ in range(2))
    draws = torch.stack([train[0, draw]["image"] for draw in range(8)])
    assert draws.shape == (8, 3, 24, 24) and draws.dtype == torch.float32 and -1 <= draws.min() < draws.max() <= 1
    assert len(draws.unique(dim=0)) > 4 and not train.fixed
    assert torch.equal(again[0, 7]["image"], draws[7])  # a crop depends on (seed, draw) alone


def tree(folder, files: str) -> None:
    """Square images of 8 pixels; files: "cat/ 3, dog/ 2, notes.txt" is three images in cat/, two in dog/ and a text."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), RED).save(content, "PNG")
    for words in files.split(", "):
        name, _, count = words.partition(" ")
        for path in [folder / name / f"{i}.png" for i in range(int(count))] if count else [folder / name]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.getvalue())


def stems_of(dataset) -> set[str]:
    paths = [os.path.relpath(dataset.paths(i)[0], dataset.root) for i in range(len(dataset))]
    return {os.path.splitext(path)[0].replace(os.sep, "/") for path in paths}


def test_held_out_images_are_chosen_by_their_names_alone(tmp_path):
    """Drawn by the seed, 48 of 50 were others in stage two, and one file more or less redrew all of them."""
    tree(tmp_path, "a/ 300, b/ 300")
    train, val = open_data(str(tmp_path), 8)
    names = [f"{name}/{i}" for name in "ab" for i in range(300)]
    share = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8 for name in names}
    assert stems_of(val) == {name for name in names if share[name] < 0.05} and 15 < len(val) < 45
    assert stems_of(train) == set(names) - stems_of(val)
    assert stems_of(open_data(str(tmp_path), 8, seed=5)[1]) == stems_of(val)
    for i in range(0, 300, 2):
        (tmp_path / "a" / f"{i}.png").unlink()
    tree(tmp_path, "b/late/ 200, c/ 50")
    later = open_data(str(tmp_path), 8)
    for before, after in ((train, later[0]), (val, later[1])):
        kept = {name for name in stems_of(before) if (tmp_path / f"{name}.png").exists()}
        assert kept == stems_of(after) & set(names)


@pytest.mark.parametrize("n", [2, 3, 20])
def test_a_class_keeps_an_image_for_training_and_one_image_is_held_out(tmp_path, n):
    tree(tmp_path, ", ".join(f"{i}/ {1 + (i == 0)}" for i in range(n - 1)))
    train, val = open_data(str(tmp_path), 8)
    assert len(val) == 1 and set(train.class_of) == set(range(n - 1))


@pytest.mark.parametrize(
    "files, classes, said",
    [
        ("bus/ 5, car/ 5, train/ 5", "bus car train 15", "not a split, because there are images in bus, car"),
        ("train/a/ 5, train/b/ 5, val/a/ 2, val/b/ 2", "a b 10+4", "4 held out, from val/"),
        ("training/a/ 5, training/b/ 5, validation/b/ 2", "a b 10+2", "2 held out, from validation/"),
        ("train/a/ 2, train/b/ 2, val/a/ 2, val/z/ 2", "a b 3+1", "ignored: val/, which has other classes than train/"),
        ("train/a/ 2, train/b/ 2, test/ 9", "a b 3+1", "ignored: test/, which has other classes than train/"),
        ("Train/ 5, Test/ 3", " 5+3", "3 held out, from Test/"),
        ("train/ 5, valid/ 3, test/ 4, a.png", " 5+3", "from valid/; ignored: 5 outside train/ and valid/"),
        ("train/ 5, notes.txt", " 5", "chosen by their names; not read: 1 .txt"),
        ("cat/ 5, dog/ 5, stray.png", "cat dog 10", "2 classes (cat 5, dog 5); 1 held out"),
        ("cat/ 5, dog/ 5, stray.png", "cat dog 10", "ignored: 1 beside the subfolders"),
        ("all.png, of.png, these.png, best/ 2", " 5", "no classes, because most images lie outside the subfolders"),
        ("0/ 1, 10/ 2, 9/ 3", "0 9 10 6", "3 classes (0 1, 9 3, 10 2)"),
        ("cat/ 3, cat/a.heic, cat/b.HEIC, cat/raw", "cat 3", "not read: 2 .heic, 1 without ending"),
        ("cat/ 3, cat/.hidden.png, .cache/ 4", "cat 3", "one subfolder, hence one class"),
    ],
)
def test_layouts_and_what_is_said_of_them(tmp_path, capfd, monkeypatch, files, classes, said):
    """classes: their names, and the number of images: in all, or training + held out."""
    tree(tmp_path, files)
    train, val = open_data(str(tmp_path), 8)
    *names, numbers = classes.split(" ")
    assert train.classes == val.classes == (tuple(names) or ("",)) and train.fixed
    found = f"{len(train)}+{len(val)}" if "+" in numbers else str(len(train) + len(val))
    assert found == numbers
    for dataset in (train, val):  # the class is that of the folder
        for i in range(len(dataset)):
            assert dataset.classes[dataset[i, None]["class"]] in ("", *dataset.paths(i)[0].split("/"))
    err = capfd.readouterr().err
    assert said in err and err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")  # the first process alone says what was found
    open_data(str(tmp_path), 8)
    assert capfd.readouterr().err == ""


def test_a_million_names_take_little_memory(tmp_path):
    """As Python objects 200,000 pairs of a path and a class took 90 MB, in every process."""
    rows = [folders.Row(f"{i}", f"class_{i % 10}", (f"class_{i % 10}/image_{i:07d}.png",), True) for i in range(20_000)]
    classes, cut = tuple(f"class_{i}" for i in range(10)), data.Cut(8, 8, 0, True, False, True)
    dataset = data.FolderImages(str(tmp_path), rows, ("image",), None, classes, cut)
    assert len(pickle.dumps((dataset.files, dataset.class_of))) < 20_000 * 40
    assert dataset.paths(7) == [str(tmp_path / "class_7" / "image_0000007.png")]


def test_links_are_followed_and_loops_are_not(tmp_path, capfd):
    make_photos(tmp_path / "far" / "cats", n=2)
    (tmp_path / "far" / "cats" / "round").symlink_to(tmp_path / "far" / "cats")
    make_photos(tmp_path / "data" / "dogs", n=2)
    data_folder = tmp_path / "data"
    (data_folder / "cats").symlink_to(tmp_path / "far" / "cats")
    (data_folder / "best").symlink_to("dogs")  # before the folder itself
    links = {"again": data_folder, "up": tmp_path, "all": "/", "itself": "itself", "gone.png": "nothing"}
    for name, to in links.items():
        (data_folder / "dogs" / name).symlink_to(to)
    os.mkfifo(data_folder / "dogs" / "pipe.png")
    train, val = open_data(str(data_folder), 16)
    assert train.classes == ("cats", "dogs") and len(train) + len(val) == 4
    assert "not read: 2 .png (broken link)" in capfd.readouterr().err


def make_pairs(folder, n=4) -> list[str]:
    """n pairs of 24 x 20 pixels: label maps of 0 to 5, and gray images that are 40 times as bright. Their names."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    names = [f"pair_{i:02d}.png" for i in range(n)]
    for i, name in enumerate(names):
        labels = np.random.default_rng(i).integers(0, 6, (20, 24), dtype=np.uint8)
        Image.fromarray(labels).save(folder / "labels" / name)
        Image.fromarray(labels * 40).save(folder / "images" / name)
    return names


def test_pairs_are_cut_alike_and_held_out_together(tmp_path):
    names, both = make_pairs(tmp_path, n=30), ("image", "labels")
    train, _ = open_data(str(tmp_path), 16, resize=20, sources=both, num_labels=6)
    for draw in range(20):
        pair = train[draw % len(train), draw]
        assert torch.equal(((pair["image"][0] + 1) * 127.5).round() / 40, pair["labels"].float())
    sets = [open_data(str(tmp_path), 16, sources=s)[1] for s in (("image",), ("labels",), both)]
    image, label, pair = ({stem.rpartition("/")[2] for stem in stems_of(dataset)} for dataset in sets)
    assert image == label == pair
    Image.new("L", (10, 10)).save(tmp_path / "labels" / names[0])
    with pytest.raises(UserError, match=r"pair_00\.png and .*pair_00\.png differ in shape"):
        items(*open_data(str(tmp_path), 16, sources=both, num_labels=6))
    (tmp_path / "labels" / names[1]).unlink()
    with pytest.raises(UserError, match=r"images/pair_01\.png has no partner of the same name in images and labels"):
        open_data(str(tmp_path), 16, sources=both)
    with pytest.raises(UserError, match=r"image and depth together need .*images beside .*depth"):
        open_data(str(tmp_path / "images"), 16, sources=("image", "depth"))


def test_input_kinds():
    """Nothing that goes to the device is float64, which Apple's GPUs do not have."""
    n = len(shapes.LABELS)
    with NoFloat64():
        train, _ = open_data("shapes", 32, sources=("image", "labels", "depth", "coords"))
        batch = {k: v[None] for k, v in train[0, 0].items() if k != "class"}
        inputs = {kind: to_input(batch, kind, n) for kind in data.KINDS}
    for kind, channels in (("rgb", 3), ("gray", 1), ("edges", 1), ("lowres", 3), ("labels", n), ("depth", 1)):
        x = inputs[kind]
        assert x.shape == (1, channels, 32, 32) == (1, data.input_channels(kind, n), 32, 32)
        assert -1 <= x.min() < x.max() <= 1, kind
    assert torch.equal(to_input(batch, "labels", n).argmax(1), batch["labels"])
    pillows = torch.from_numpy(np.array(pictures.to_image(batch["image"][0]).convert("L"))) / 127.5 - 1
    assert (to_input(batch, "gray")[0] - pillows).abs().max() < 0.02
    for ours, channel in zip(to_input(batch, "lowres")[0], batch["image"][0], strict=True):
        pillows = Image.fromarray(channel.numpy()).reduce(4).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.abs(ours.numpy() - np.asarray(pillows)).max() < 1e-5
    x = torch.full((1, 3, 5, 6), -1.0)
    x[..., 3:] = 1.0  # a vertical step of height 2, whose Sobel response is 2 on both sides of it
    edges = to_input({"image": x}, "edges")[0, 0]
    assert torch.equal(edges, torch.tensor([-1.0, -1, 1, 1, -1, -1]).expand(5, -1))


def test_shapes_are_held_out_and_each_seed_has_its_own():
    train, val = open_data("shapes", 32)
    for dataset, first in ((train, 1000), (val, 0)):
        scenes = [shapes.draw(0, first + i, 32, 32)["image"] for i in (0, len(dataset) - 1)]
        assert [np.array_equal(dataset[i, None]["image"], scenes[i]) for i in (0, -1)] == [True, True]
    assert (len(train), len(val), train.flip, train.fixed) == (12000, 1000, False, True)
    assert not open_data("shapes", 16, resize=20)[0].fixed
    a, again, other = (shapes.draw(seed, 5, 32, 32)["image"] for seed in (0, 0, 1))
    assert np.array_equal(a, again) and not np.array_equal(a, other)


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (48, 80)])
def test_shapes_label_and_depth_agree_with_the_image(size):
    seen = set()
    for index in range(40):
        scene = shapes.draw(0, index, *size)
        image, labels, depth = scene["image"], scene["labels"], scene["depth"]
        assert image.shape == (3, *size) and labels.shape == size and depth.shape == (1, *size)
        assert np.abs(image).max() <= 1 and np.abs(depth).max() <= 1
        kinds = {shapes.LABELS[i] for i in np.unique(labels)} - {"sky", "ground", "sun"}
        assert kinds == {shapes.KINDS[scene["class"]]}
        assert 0.1 < (labels >= 3).mean() < 0.6  # large enough to be told apart
        assert depth[0][labels >= 3].min() > depth[0][labels == 0].max()
        seen |= kinds
    assert seen == set(shapes.KINDS)


def test_the_same_scene_at_every_size():
    for index in range(10):
        small, large = (shapes.draw(0, index, side, side)["image"] for side in (32, 128))
        assert np.abs(large.reshape(3, 32, 4, 32, 4).mean((2, 4)) - small).mean() < 0.05


def test_stream_depends_on_seed_and_position_alone():
    def take(n, **kwargs):
        it = iter(data.Stream(10, seed=3, **kwargs))
        return [next(it) for _ in range(n)]

    whole = take(35)
    assert sorted(i for i, _ in whole[:10]) == sorted(i for i, _ in whole[10:20]) == list(range(10))
    assert [i for i, _ in whole[:10]] != [i for i, _ in whole[10:20]]
    assert take(12, start=23) == whole[23:]
    two = [take(17, rank=r, world=2) for r in range(2)]
    assert [key for pair in zip(*two, strict=True) for key in pair] == whole[:34]


def test_the_cache_is_that_of_all_workers_together(monkeypatch):
    monkeypatch.setattr(data, "get_worker_info", lambda: SimpleNamespace(dataset=dataset, num_workers=4))
    monkeypatch.setattr(data.signal, "signal", lambda *a: None)
    dataset, _ = open_data("shapes", 16)
    data.begin_worker(0)
    assert dataset.room == data.CACHE_BYTES // 4
    dataset.room = 16 * 16 * 3 * 4
    assert [dataset[i, None] for i in range(3)] and len(dataset.kept) == 1 and dataset.room == 0


def test_a_torchvision_set_by_name(tmp_path, monkeypatch):
    """MNIST in its own file format, made here: 4 training and 2 test images."""
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 4), ("t10k", 2)):
        pixels = np.random.default_rng(0).integers(0, 256, (n, 28, 28), np.uint8)
        header = struct.pack(">iiii", 2051, n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, n) + bytes(range(3, 3 + n)))
    train, val = open_data("mnist", 28)
    assert (len(train), len(val), len(train.classes), train.flip, train.fixed) == (4, 2, 10, False, True)
    assert val[1, None]["class"] == 4
    assert torch.equal(val[1, None]["image"][0], torch.from_numpy(pixels[1]) / 127.5 - 1)
    with pytest.raises(UserError, match="mnist has images only"):
        open_data("mnist", 28, sources=("labels",))
    opened = mock.Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", opened)
    with pytest.raises(UserError, match=r"could not be downloaded \(no network\); put it into /.*/data or"):
        open_data("cifar10", 32)
    opened.assert_called_once_with(data.TORCHVISION_ROOT, train=True, download=True)


def test_held_out_images_come_from_all_classes(tmp_path):
    tree(tmp_path, ", ".join(f"{part}/{name}/ 5" for part in ("train", "val") for name in "abcd"))
    _, val = open_data(str(tmp_path), 8)
    batches = list(data.held_out_batches(val, batch_size=3, limit=8))
    assert [b["class"].tolist() for b in batches] == [[0, 0, 1], [1, 2, 2], [3, 3]]
    assert len(list(data.held_out_batches(val, 3, 1000))) == 7


@pytest.mark.parametrize("counts, side", [((3, 3), 16), ((4, 2, 4), 32), ((1,), 16), ((5,), 80)])
def test_grids_are_those_of_torchvision(counts, side):
    """Its `make_grid` without its import, which takes longer than that of torch."""
    rows = [torch.rand(count, 3, side, side) * 2 - 1 for count in counts]
    blank = torch.ones(3, side, side)
    cells = torch.stack([image for row in rows for image in [*row, *[blank] * (max(counts) - len(row))]])
    cells = cells.repeat_interleave(max(1, 64 // side), 2).repeat_interleave(max(1, 64 // side), 3)
    truth = torchvision.utils.make_grid(cells, nrow=max(counts), pad_value=1.0)
    pixels = ((truth + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(pictures.grid(rows)), pixels)
