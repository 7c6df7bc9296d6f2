"""What users get wrong, script by script: one line, exit code 2, and nothing of theirs is lost.

In the order of the table: folders, broken files, odd files, sizes, labels and pairs, checkpoints, weights that cannot
be downloaded, losses that are no numbers, full disks.
"""

import os
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import assert_one_line_error, make_photos, run_inside, run_script
from PIL import Image

from minvqgan.harness import checkpoint, data
from minvqgan.harness.classifier import Classifier, save_classifier

STAGE_ONE = (
    "train_vqgan.py --image-size 16 --ch 8 --ch-mult 1 2 --z-channels 8 --code-dim 4 --codebook-size 16 --batch-size 4 "
    "--steps 4 --val-images 8 --val-every 4 --save-every 1 --disc-channels 8"
).split()
STAGE_TWO = (
    "train_gpt.py --n-layer 1 --n-head 2 --n-embd 16 --batch-size 4 --steps 4 --val-images 8 --val-every 4 "
    "--save-every 1 --vqgan rgb/last.pt"
).split()
EVALUATE = "evaluate.py --features none --perceptual none --images 8 --out eval".split()
# The scripts that read folders, each as it takes --data.
READERS = {
    "train_vqgan": [*STAGE_ONE, "--out", "new"],
    "train_gpt": [*STAGE_TWO, "--cond", "none", "--out", "new"],
    "evaluate": [*EVALUATE, "--vqgan", "rgb/last.pt"],
}
# Every flag that takes a checkpoint: what is typed before it, and the file that belongs there.
CHECKPOINTS = {
    "train_vqgan --resume": (["train_vqgan.py", "--steps", "9", "--resume", "--out"], "rgb/last.pt"),
    "train_vqgan --perceptual": ([*STAGE_ONE, "--out", "new", "--perceptual"], "judge.pt"),
    "train_gpt --resume": (["train_gpt.py", "--steps", "9", "--resume", "--out"], "none/last.pt"),
    "train_gpt --vqgan": ([*STAGE_TWO[:-2], "--out", "new", "--vqgan"], "rgb/last.pt"),
    "train_gpt --cond-vqgan": ([*STAGE_TWO, "--out", "new", "--cond", "spatial", "--cond-vqgan"], "labels/last.pt"),
    "sample --gpt": (["sample.py", "-n", "1", "--gpt"], "none/best.pt"),
    "sample --classifier": ("sample.py -n 1 --reject 0.5 --gpt class/best.pt --classifier".split(), "judge.pt"),
    "evaluate --vqgan": ([*EVALUATE, "--vqgan"], "rgb/last.pt"),
    "evaluate --gpt": ([*EVALUATE, "-n", "2", "--gpt"], "none/best.pt"),
    "evaluate --features": (["evaluate.py", "--vqgan", "rgb/last.pt", "--features"], "judge.pt"),
    "evaluate --perceptual": (["evaluate.py", "--vqgan", "rgb/last.pt", "--perceptual"], "judge.pt"),
    "evaluate --classifier": ([*EVALUATE, "-n", "2", "--gpt", "class/best.pt", "--classifier"], "judge.pt"),
}


def make_pairs(folder, top: int, n: int = 8) -> None:
    """Pictures with label maps of 0 to `top`."""
    rng = np.random.default_rng(0)
    (folder / "labels").mkdir(parents=True)
    for photo in make_photos(folder / "images", n, size=(24, 20)):
        labels = rng.integers(0, top + 1, (20, 24), dtype=np.uint8)
        labels[0, 0] = top
        Image.fromarray(labels).save(folder / "labels" / photo.name)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Pictures, label maps, first stages of both, transformers and a classifier: all that the scripts take."""
    folder = tmp_path_factory.mktemp("house")
    make_pairs(folder / "pairs", top=2)
    names = data.open_data("shapes", 16)[0].classes
    torch.manual_seed(0)
    save_classifier(folder / "judge.pt", Classifier(names))
    for words in (
        [*STAGE_ONE, "--out", "rgb"],
        [*STAGE_ONE, "--data", "pairs", "--input", "labels", "--num-labels", "3", "--out", "labels"],
        [*STAGE_TWO, "--cond", "none", "--out", "none"],
        [*STAGE_TWO, "--out", "class"],
        [*STAGE_TWO, *"--data pairs --cond spatial --cond-vqgan labels/last.pt --out spatial".split()],
    ):
        done = run_inside(*words, cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def assert_refused(house, words, *answer) -> None:
    """One line, and not even a run folder is begun."""
    assert_one_line_error(run_inside(*words, cwd=house), *answer)
    assert not (house / "new").exists()


@pytest.mark.parametrize("script", READERS)
def test_folders_without_pictures(house, tmp_path, script):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.png").write_text("not a picture")
    make_photos(tmp_path / "single", n=1)
    for name, answer in (
        ("nowhere", ("nowhere", "no such folder")),
        ("empty", ("no readable image in", "empty")),
        ("texts", ("no readable image in", "texts")),
        ("texts/one.png", ("is a file", "give the folder")),
        ("single", ("single", "at least two")),
    ):
        assert_refused(house, [*READERS[script], "--data", tmp_path / name], *answer)


@pytest.mark.parametrize(
    "words", ["--gpt none/best.pt --complete", "--gpt spatial/best.pt --cond-image"], ids=["complete", "cond-image"]
)
def test_pictures_that_cannot_be_read(house, tmp_path, words):
    (tmp_path / "text.png").write_text("not a picture")
    whole = next((house / "pairs" / "labels").iterdir()).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for name, answer in (("nowhere.png", "no picture at"), ("text.png", "cannot be read"), ("half.png", "cannot be")):
        assert_refused(house, ["sample.py", *words.split(), tmp_path / name], answer, name)


@pytest.mark.parametrize("script", READERS)
def test_broken_files_among_good_ones(house, tmp_path, script):
    """Skipped, counted, named once, also where two workers read; the script goes on."""
    for part in ("train", "val"):
        good = make_photos(tmp_path / part, n=6)[0].read_bytes()
        (tmp_path / part / f"text_{part}.jpg").write_text("not a picture")
        (tmp_path / part / f"half_{part}.png").write_bytes(good[: len(good) // 2])  # a good header, half of the pixels
    # evaluate.py reads the held-out pictures alone, and has no --workers.
    parts, more = (["val"], []) if script == "evaluate" else (["train", "val"], ["--workers", "2"])
    done = run_script(*READERS[script], "--data", tmp_path, "--out", tmp_path / "run", *more, cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    for part in parts:
        assert done.stderr.count(f"text_{part}.jpg") == 1 and done.stderr.count(f"half_{part}.png") == 1
        assert "1 unreadable" in done.stderr


def odd_pictures(folder) -> dict[str, np.ndarray]:
    """One picture in every odd way there is to store it, 16 x 16: {file: its true pixels (16, 16, 3)}."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = np.meshgrid(np.arange(16), np.arange(16))
    gray = (x * 8 + y * 4).astype(np.uint8)
    rgb = np.stack([gray, 255 - gray, np.full_like(gray, 90)], 2)
    of_gray = np.repeat(gray[:, :, None], 3, 2)
    truth = {}

    def keep(name: str, image: Image.Image, pixels: np.ndarray, **how) -> None:
        image.save(folder / name, **how)
        truth[name] = pixels

    keep("gray.png", Image.fromarray(gray), of_gray)
    keep("gray_alpha.png", Image.merge("LA", [Image.fromarray(gray), Image.new("L", (16, 16), 255)]), of_gray)
    keep("sixteen.png", Image.fromarray(gray.astype(np.uint16) * 257), of_gray)
    few = (rgb // 64) * 64
    palette = Image.fromarray(few).quantize(256, dither=Image.Dither.NONE)
    keep("palette.png", palette, np.asarray(palette.convert("RGB")))
    solid = Image.fromarray(rgb).convert("RGBA")
    keep("rgba.png", solid, rgb)
    keep("clear.png", Image.fromarray(np.dstack([rgb, np.zeros_like(gray)])), np.full_like(rgb, 255))
    cmyk = Image.fromarray(np.dstack([255 - rgb, np.zeros_like(gray)]), "CMYK")
    keep("cmyk.tif", cmyk, rgb)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    keep("turned.png", Image.fromarray(np.rot90(rgb).copy()), rgb, exif=exif)
    frames = [Image.fromarray(few), Image.new("RGB", (16, 16), "blue")]
    frames = [frame.quantize(64, dither=Image.Dither.NONE) for frame in frames]
    keep("moving.gif", frames[0], np.asarray(frames[0].convert("RGB")), save_all=True, append_images=frames[1:])
    return truth


@pytest.mark.parametrize("script", READERS)
def test_odd_files_are_read(house, tmp_path, script):
    for part in ("train", "val"):
        odd_pictures(tmp_path / "odd" / part)
    words = [*READERS[script], "--data", tmp_path / "odd", "--out", tmp_path / "run"]
    done = run_inside(*words, cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "skipped" not in done.stderr


def test_odd_files_are_converted_correctly(house, tmp_path):
    """sample.py, told to keep all of a picture, shows its reconstruction: the same as that of its true pixels."""

    def kept(path) -> np.ndarray:
        words = ["sample.py", "--gpt", "none/best.pt", "-n", "1", "--keep", "1", "--complete", path]
        done = run_inside(*words, "--out", tmp_path / "out.png", cwd=house)
        assert done.returncode == 0, done.stderr[-2000:]
        return np.asarray(Image.open(tmp_path / "out.png"))

    for name, pixels in odd_pictures(tmp_path / "odd").items():
        Image.fromarray(pixels).save(tmp_path / "plain.png")
        assert np.array_equal(kept(tmp_path / "odd" / name), kept(tmp_path / "plain.png")), name


@pytest.mark.parametrize("script", READERS)
def test_pictures_smaller_than_the_crop_are_enlarged(house, tmp_path, script):
    make_photos(tmp_path / "small", n=6, size=(7, 5))
    words = [*READERS[script], "--data", tmp_path / "small", "--out", tmp_path / "run"]
    done = run_inside(*words, cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]


def test_sizes_that_do_not_fit(house):
    for words, answer in (
        ([*READERS["train_vqgan"], "--image-size", "33"], ("not divisible by f = 2", "32 or 34")),
        ([*READERS["train_gpt"], "--image-size", "15"], ("not divisible by f = 2", "use 14 or 16")),
        (["sample.py", "--gpt", "none/best.pt", "--size", "17x16"], ("divisible by f = 2", "16x16 works")),
        (["sample.py", "--gpt", "none/best.pt", "--size", "8x16"], ("below the 16x16",)),
        ([*READERS["evaluate"], "--image-size", "15"], ("not divisible by f = 2", "use 14 or 16")),
        ([*EVALUATE, "--gpt", "none/best.pt", "--image-size", "20"], ("--image-size 20", "16 x 16")),
        (
            [*READERS["train_vqgan"], "--image-size", "8", "--disc-layers", "1", "--perceptual", "vgg16"],
            ("8 pixels are too few", "--perceptual none"),
        ),
    ):
        assert_refused(house, words, *answer)


SPATIAL = [*STAGE_TWO, *"--cond spatial --cond-vqgan labels/last.pt --out new --data".split()]
PAIRED = {
    "train_vqgan": [*STAGE_ONE, *"--input labels --num-labels 3 --out new --data".split()],
    "train_gpt": SPATIAL,
    "evaluate": [*EVALUATE, "--gpt", "spatial/best.pt", "--data"],
}


@pytest.mark.parametrize("script", PAIRED)
def test_labels_outside_the_range(house, tmp_path, script):
    make_pairs(tmp_path / "more", top=3)
    done = run_inside(*PAIRED[script], tmp_path / "more", "--out", tmp_path / "run", cwd=house)
    assert_one_line_error(done, "labels/photo_0", "holds label 3", "0 to 2")
    if script == "evaluate":
        label_map = next((tmp_path / "more" / "labels").iterdir())
        words = ["sample.py", "--gpt", "spatial/best.pt", "--cond-image", label_map]
        assert_refused(house, words, "holds label 3", "0 to 2", label_map.name)


@pytest.mark.parametrize("script", ["train_gpt", "evaluate"])
def test_pairs_that_do_not_match(house, tmp_path, script):
    make_pairs(tmp_path / "lonely", top=2)
    (tmp_path / "lonely" / "labels" / "photo_03.png").unlink()
    assert_refused(house, [*PAIRED[script], tmp_path / "lonely"], "photo_03.png has no partner", "labels")
    make_pairs(tmp_path / "unlike", top=2)
    for name in ("photo_00.png", "photo_01.png"):  # one of them held out, or both not
        Image.new("L", (9, 9)).save(tmp_path / "unlike" / "labels" / name)
    done = run_inside(*PAIRED[script], tmp_path / "unlike", "--out", tmp_path / "run", "--seed", "0", cwd=house)
    if script == "train_gpt":
        assert_one_line_error(done, "photo_0", "differ in shape")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("flag", CHECKPOINTS)
def test_checkpoints_that_do_not_fit(house, tmp_path, flag):
    """Truncated, of another kind, of another configuration, with code in it: one line, and the file stays as it is."""
    words, name = CHECKPOINTS[flag]
    (tmp_path / "run").mkdir()
    path, mark = tmp_path / "run" / "last.pt", tmp_path / "executed"
    given = path.parent if flag.endswith("--resume") else path
    whole, content = (house / name).read_bytes(), checkpoint.read(house / name)
    other = house / ("judge.pt" if content["kind"] != "classifier" else "rgb/last.pt")
    weights = "gpt" if content["kind"] == "two_stage" else "model"
    first = next(iter(content[weights]))
    odd = content | {weights: content[weights] | {first: torch.zeros(3, 3)}}

    def attempt(*answer) -> None:
        before = path.read_bytes()
        assert_refused(house, [*words, given], *answer)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == ["last.pt"]

    path.write_bytes(whole[: len(whole) // 2])
    attempt("last.pt is truncated")
    path.write_bytes(other.read_bytes())
    attempt("last.pt holds a")
    torch.save(odd, path)
    attempt("last.pt", first, "another shape")
    torch.save(content | {"flags": Bomb(mark)}, path)
    attempt("last.pt holds objects other than tensors; nothing in it was executed")
    assert not mark.exists()


@pytest.mark.parametrize(
    "words, answer",
    [
        ([*READERS["train_vqgan"], "--perceptual", "vgg16"], "--perceptual small"),
        ("sample.py --gpt class/best.pt --reject 0.5 --classifier resnet18".split(), "resnet18"),
    ],
    ids=["train_vqgan", "sample"],
)
def test_weights_that_cannot_be_downloaded(house, tmp_path, words, answer):
    """A proxy that does not exist stands for a machine without network."""
    done = run_script(*words, cwd=house, limit=no_network(tmp_path))
    assert_one_line_error(done, "https://", answer)
    assert not (house / "new").exists()


def no_network(cache) -> str:
    env = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "TORCH_HOME": str(cache)}
    return "; ".join(f"export {name}={value}" for name, value in env.items())


def test_evaluation_without_downloaded_weights(house, tmp_path):
    """What can be measured is, and one line for each judge says what is missing."""
    words = "evaluate.py --vqgan rgb/last.pt --images 8 --out".split()
    done = run_script(*words, tmp_path / "eval", cwd=house, limit=no_network(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    missing = [line for line in done.stdout.splitlines() if line.startswith("without ")]
    assert [line.split(":")[0] for line in missing] == ["without vgg16", "without inception"]
    assert "psnr" in done.stdout and "lpips " not in done.stdout and "fid " not in done.stdout


@pytest.mark.parametrize("script", ["train_vqgan", "train_gpt"])
def test_losses_that_are_no_numbers(house, tmp_path, script):
    """The script stops, says at which step and which term, keeps last.pt from before, and goes on from it."""
    run = tmp_path / "run"
    assert run_inside(*READERS[script], "--out", run, cwd=house).returncode == 0  # four steps
    again = [READERS[script][0], "--resume", "--out", run, "--steps", "12", "--save-every", "8"]
    done = run_inside(*again, "--lr", "1e20", cwd=house)
    assert_one_line_error(done, "step ", " is ", "last good checkpoint", "--resume", "--lr")
    assert re.search(r"step [5-8]: \w+ is (nan|inf)", done.stderr)
    assert checkpoint.read(run / "last.pt")["step"] == 4
    done = run_inside(*again, "--lr", "1e-4", cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    assert checkpoint.read(run / "last.pt")["step"] == 12


@pytest.mark.parametrize(
    "words, kilobytes",
    [
        ("train_vqgan.py --resume --steps 9 --out rgb", 20),
        ("train_gpt.py --resume --steps 9 --out none", 20),
        ("sample.py -n 1 --gpt none/best.pt --out there/full.png", 0),
        ("evaluate.py --vqgan rgb/last.pt --features judge.pt --perceptual none --images 10 --out there", 1),
    ],
    ids=["train_vqgan", "train_gpt", "sample", "evaluate"],
)
def test_a_full_disk(house, tmp_path, words, kilobytes):
    """A limit of the size of files stands for it. What was there before is intact."""
    for name in ("rgb/last.pt", "none/last.pt", "none/best.pt", "judge.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(house / name, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    done = run_script(*words.split(), cwd=tmp_path, limit=f"ulimit -f {kilobytes}")
    assert_one_line_error(done, "cannot write")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pt")} == before
