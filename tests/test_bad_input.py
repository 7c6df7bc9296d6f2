"""What users get wrong, script by script: one line, exit code 2, and nothing of theirs is lost.

In the order of the table: folders, broken files, odd files, sizes, labels and pairs, checkpoints, weights that cannot
be downloaded, losses that are no numbers, full disks. Then what a stranger's file could do to others, what would be
written over, odd flags, requests beyond memory or a day, odd environments.
"""

import os
import pickle
import re
import shutil
import site
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from helpers import ROOT, assert_one_line_error, make_photos, png_that_claims, run_inside, run_script, torchrun
from PIL import Image

from minvqgan.harness import checkpoint, data
from minvqgan.harness.judges import Classifier, save_classifier

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
    """Images with label maps of 0 to `top`."""
    rng = np.random.default_rng(0)
    (folder / "labels").mkdir(parents=True)
    for photo in make_photos(folder / "images", n, size=(24, 20)):
        labels = rng.integers(0, top + 1, (20, 24), dtype=np.uint8)
        labels[0, 0] = top
        Image.fromarray(labels).save(folder / "labels" / photo.name)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Images, label maps, first stages of both, transformers and a classifier: all that the scripts take."""
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
def test_folders_without_images(house, tmp_path, script):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.png").write_text("not an image")
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
def test_images_that_cannot_be_read(house, tmp_path, words):
    (tmp_path / "text.png").write_text("not an image")
    whole = next((house / "pairs" / "labels").iterdir()).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for name, answer in (("nowhere.png", "no image at"), ("text.png", "cannot be read"), ("half.png", "cannot be")):
        assert_refused(house, ["sample.py", *words.split(), tmp_path / name], answer, name)


@pytest.mark.parametrize("script", READERS)
def test_broken_files_among_good_ones(house, tmp_path, script):
    """Skipped, counted, named once, also where two workers read; the script goes on."""
    for part in ("train", "val"):
        good = make_photos(tmp_path / part, n=6)[0].read_bytes()
        (tmp_path / part / f"text_{part}.jpg").write_text("not an image")
        (tmp_path / part / f"half_{part}.png").write_bytes(good[: len(good) // 2])  # a good header, half of the pixels
    # evaluate.py reads the held-out images alone, and has no --workers.
    parts, more = (["val"], []) if script == "evaluate" else (["train", "val"], ["--workers", "2"])
    done = run_script(*READERS[script], "--data", tmp_path, "--out", tmp_path / "run", *more, cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    for part in parts:
        assert done.stderr.count(f"text_{part}.jpg") == 1 and done.stderr.count(f"half_{part}.png") == 1
        assert "1 unreadable" in done.stderr


def odd_images(folder) -> dict[str, np.ndarray]:
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
        odd_images(tmp_path / "odd" / part)
    words = [*READERS[script], "--data", tmp_path / "odd", "--out", tmp_path / "run"]
    done = run_inside(*words, cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "skipped" not in done.stderr


def test_odd_files_are_converted_correctly(house, tmp_path):
    """sample.py, told to keep all of an image, shows its reconstruction: the same as that of its true pixels."""

    def kept(path) -> np.ndarray:
        words = ["sample.py", "--gpt", "none/best.pt", "-n", "1", "--keep", "1", "--complete", path]
        done = run_inside(*words, "--out", tmp_path / "out.png", cwd=house)
        assert done.returncode == 0, done.stderr[-2000:]
        return np.asarray(Image.open(tmp_path / "out.png"))

    for name, pixels in odd_images(tmp_path / "odd").items():
        Image.fromarray(pixels).save(tmp_path / "plain.png")
        assert np.array_equal(kept(tmp_path / "odd" / name), kept(tmp_path / "plain.png")), name


@pytest.mark.parametrize("script", READERS)
def test_images_smaller_than_the_crop_are_enlarged(house, tmp_path, script):
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
            ("8 pixels are too few", "--perceptual small"),
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
    attempt("last.pt", first, "(3, 3) in the file")
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


# What a stranger's file could do to others.


def edited(path, target, **changes) -> None:
    """A checkpoint with other fields."""
    torch.save(checkpoint.read(path) | changes, target)


def test_class_names_of_a_checkpoint_are_no_paths(house, tmp_path):
    content = checkpoint.read(house / "class" / "best.pt")
    names = ["../../evil", f"{tmp_path}/absolute", "a/b", "..", "", "star"]
    edited(house / "class" / "best.pt", tmp_path / "gpt.pt", config=content["config"] | {"classes": names})
    out = tmp_path / "one" / "two" / "out"
    done = run_inside("sample.py", "--gpt", tmp_path / "gpt.pt", "-n", "1", "--out", out, cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    written = sorted(path.name for path in out.iterdir())
    assert len(written) == 6 and "star_0000.png" in written and "0_______evil_0000.png" in written
    assert set(tmp_path.rglob("*.png")) == set(out.iterdir())


def test_an_optimizer_state_of_another_shape_is_refused(house, tmp_path):
    """It ended in SIGSEGV, or a corrupted heap. In a process of its own, which could die."""
    shutil.copytree(house / "rgb", tmp_path / "run")
    content = checkpoint.read(house / "rgb" / "last.pt")
    state = content["opt_g"]["state"] | {0: content["opt_g"]["state"][0] | {"exp_avg": torch.zeros(1)}}
    edited(house / "rgb" / "last.pt", tmp_path / "run" / "last.pt", opt_g=content["opt_g"] | {"state": state})
    done = run_script("train_vqgan.py", "--resume", "--steps", "9", "--out", "run", cwd=tmp_path)
    assert_one_line_error(done, "run/last.pt does not fit", "exp_avg of parameter 0 is (1,)")


def test_a_link_at_the_temporary_name_is_not_followed(house, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    for name in ("last.pt", "best.pt", "metrics.csv", "config.json"):
        (tmp_path / "run" / f".{name}.part").symlink_to(tmp_path / "mine")
    assert run_inside(*STAGE_ONE, "--out", tmp_path / "run", cwd=house).returncode == 0
    assert (tmp_path / "mine").read_text() == "mine"


def test_links_and_pipes_in_a_run_folder_are_not_written_through(house, tmp_path):
    (tmp_path / "mine").write_text("mine")
    run = shutil.copytree(house / "rgb", tmp_path / "run")
    for name in ("loss.png", "best.pt", "metrics.csv", "config.json", "images/step_0000005.png"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path / "mine")
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")  # opened for writing alone it would wait for a reader, for ever
    words = ["train_vqgan.py", "--resume", "--out", run, "--steps"]
    done = run_script(*words, "5", cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (run / "images" / "step_0000005.png").is_file() and (tmp_path / "mine").read_text() == "mine"
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(tmp_path / "made")
    assert_one_line_error(run_inside(*words, "6", cwd=house), "cannot write", ".lock")
    assert not (tmp_path / "made").exists()


def test_links_and_pipes_in_a_run_folder_from_elsewhere(house, tmp_path):
    """An archive can hold them. What a link points to is not written to, and what nobody reads is not waited for."""
    (tmp_path / "mine").write_text("mine")
    shutil.copytree(house / "rgb", tmp_path / "run")
    run = tmp_path / "run"
    for name in ("loss.png", "images/step_0000006.png"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path / "mine")
    for name in (".lock", "metrics.csv"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    done = run_script("train_vqgan.py", "--resume", "--steps", "6", "--out", run, cwd=house, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(tmp_path / "made")
    done = run_inside("train_vqgan.py", "--resume", "--steps", "7", "--out", run, cwd=house)
    assert_one_line_error(done, "cannot write", ".lock")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0000.png").symlink_to(tmp_path / "mine")
    done = run_inside("sample.py", "-n", "1", "--gpt", "none/best.pt", "--out", tmp_path / "out", cwd=house)
    assert done.returncode == 0 and (tmp_path / "out" / "0000.png").is_file()
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "made").exists()


# What would be written over.


def test_outputs_never_replace_an_input(house, tmp_path):
    photo = make_photos(tmp_path / "photos", n=1)[0]
    os.link(photo, tmp_path / "0000.png")
    labels = next((house / "pairs" / "labels").iterdir())
    shutil.copy(labels, tmp_path / "labels.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    none, spatial = (
        ["sample.py", "-n", "1", "--gpt", "none/best.pt"],
        ["sample.py", "-n", "1", "--gpt", "spatial/best.pt"],
    )
    for words in (
        [*none, "--complete", photo, "--out", photo],
        [*none, "--complete", photo, "--out", tmp_path],  # 0000.png is the same file by another name
        [*spatial, "--cond-image", tmp_path / "labels.png", "--out", tmp_path / "labels.png"],
    ):
        assert_refused(house, words, "would be written over")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before
    words = ["-m", "minvqgan.harness.judges", "--steps", "1", "--out", "rgb/best.pt"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=house, env=env, capture_output=True, text=True)
    assert_one_line_error(done, "rgb/best.pt holds a vqgan, not a classifier")


@pytest.mark.parametrize("script", ["train_vqgan", "train_gpt"])
def test_a_run_folder_among_the_images(house, tmp_path, script):
    """Resumed, the run would have trained on its own reconstructions."""
    make_photos(tmp_path / "photos", n=4)
    for part in ("train", "val"):
        make_photos(tmp_path / "parted" / part, n=4)
    (tmp_path / "link").symlink_to("photos")
    inside = {"photos": "photos", "photos/": "photos/run", "link": "photos/run", "parted": "parted/val"}
    for folder, out in inside.items():
        words = [*READERS[script], "--data", tmp_path / folder, "--out", tmp_path / out]
        assert_one_line_error(run_inside(*words, cwd=house), "lies in --data", "choose another")
        assert not (tmp_path / out / "config.json").exists()
    words = [*READERS[script], "--data", tmp_path / "parted", "--out", tmp_path / "parted" / "run"]
    assert run_inside(*words, cwd=house).returncode == 0


def test_a_classifier_that_knows_some_classes_only(house, tmp_path):
    """Equally many classes, most of the same names: by place each would be taken for its neighbour."""
    names = list(data.open_data("shapes", 16)[0].classes)
    save_classifier(tmp_path / "other.pt", Classifier((*names[1:], "another")))
    sample = ["sample.py", *"-n 1 --gpt class/best.pt --reject 0.5 --classifier".split(), tmp_path / "other.pt"]
    assert_refused(house, sample, f"does not know the class {names[0]!r}")


@pytest.mark.parametrize("name", ["best.pt", "config.json", "metrics.csv", "images"])
@pytest.mark.parametrize("script", READERS)
def test_foreign_files_in_the_run_folder(house, tmp_path, script, name):
    """Without last.pt beside them they were written over in silence."""
    name = {"best.pt": "neighbours.png", "images": "metrics.json"}.get(name, name) if script == "evaluate" else name
    if name in ("config.json", "metrics.csv") and script == "evaluate":
        return
    path = tmp_path / "run" / name
    path.parent.mkdir()
    path.mkdir() if name == "images" else path.write_text('{"flags": {"mine": 1}}')
    done = run_inside(*READERS[script], "--out", tmp_path / "run", cwd=house)
    assert_one_line_error(done, "--out", f"{name} of something else, which would be written over")
    assert list((tmp_path / "run").iterdir()) == [path]


def test_codes_of_something_else_are_not_written_over(house, tmp_path):
    path = tmp_path / "run" / "codes.pt"
    path.parent.mkdir()
    torch.save([1, 2], path)
    before = path.read_bytes()
    done = run_inside(*READERS["train_gpt"], "--out", path.parent, cwd=house)
    assert_one_line_error(done, "--out", "holds codes.pt of something else")
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


HOLDS = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_writers_in_one_folder(house, tmp_path):
    """The second is refused; the lock of one that was killed is gone with it."""
    shutil.copytree(house / "rgb", tmp_path / "run")
    words = ["train_vqgan.py", "--resume", "--steps", "5", "--out", tmp_path / "run"]
    command = [sys.executable, "-c", HOLDS, tmp_path / "run" / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = (tmp_path / "run" / "last.pt").read_bytes()
        assert_one_line_error(run_inside(*words, cwd=house), "another process is writing to")
        assert (tmp_path / "run" / "last.pt").read_bytes() == before
        other.kill()
    assert run_inside(*words, cwd=house).returncode == 0


def test_resuming_with_other_classes(house, tmp_path):
    """The numbers of all classes behind a new one would mean others."""
    for name in ("a", "b"):
        make_photos(tmp_path / "photos" / name, n=4, size=(20, 20))
    words = [*STAGE_TWO, "--data", tmp_path / "photos", "--out", tmp_path / "run"]
    assert run_inside(*words, cwd=house).returncode == 0
    make_photos(tmp_path / "photos" / "aa", n=2, size=(20, 20))
    done = run_inside("train_gpt.py", "--resume", "--steps", "9", "--out", tmp_path / "run", cwd=house)
    assert_one_line_error(done, "has 3 classes, the model 2 others: aa")
    done = run_inside(*EVALUATE, "--gpt", tmp_path / "run" / "best.pt", "-n", "2", cwd=house)
    assert_one_line_error(done, "has 3 classes, the model 2 others: aa")


def test_damaged_metrics_do_not_stop_a_run(house, tmp_path):
    shutil.copytree(house / "rgb", tmp_path / "run")
    with open(tmp_path / "run" / "metrics.csv", "ab") as file:
        file.write(b"\x00\xff\xfe,\n\xc2\xb2,1,2\n")
    done = run_inside("train_vqgan.py", "--resume", "--steps", "6", "--out", tmp_path / "run", cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 lines of" in done.stdout and (tmp_path / "run" / "metrics.csv.damaged").exists()


@pytest.mark.parametrize("out", ["--out taken/x.png", "--out taken", "--out x.png --steps-gif taken/x.gif"])
def test_names_that_cannot_be_written_are_found_before_the_work(house, tmp_path, out, monkeypatch):
    """Hours of sampling, or of training a classifier, were lost to them."""
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setattr("minvqgan.two_stage.TwoStage.sample_indices", None)
    gpt = ["--gpt", house / "none" / "best.pt"]
    assert_one_line_error(run_inside("sample.py", *gpt, *out.split(), cwd=tmp_path), "cannot write", "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    words = ["-m", "minvqgan.harness.judges", "--steps", "1000000000", "--out", "taken/judge.pt"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    how = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 60}
    assert_one_line_error(subprocess.run([sys.executable, *words], **how), "cannot write", "taken")


# Odd flags.


def test_flags_that_nobody_means(house, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    sample = ["sample.py", "-n", "1", "--gpt"]
    for words, answer in (
        ([*READERS["train_vqgan"], "--data", ""], "--data: the name is empty"),
        ([*READERS["train_gpt"], "--data", " "], "--data: the name is empty"),
        ([*READERS["evaluate"], "--data", ""], "--data: the name is empty"),
        ([*STAGE_ONE, "--out", ""], "--out: the name is empty"),
        (["evaluate.py", "--vqgan", ""], "--vqgan: the name is empty"),
        ([*sample, "none/best.pt", "--complete", ""], "--complete: the name is empty"),
        ([*sample, "none/best.pt", "--steps-gif", ""], "--steps-gif: the name is empty"),
        ([*sample, "none/best.pt", "--n\x1b[31m", "1"], "unknown flag --n?[31m"),
        ([*sample, "none/best.pt", "--out", ""], "--out: the name is empty"),
        (["evaluate.py", "--vqgan", ""], "--vqgan: the name is empty"),
        ([*EVALUATE, "--gpt", "class/best.pt", "--classifier", ""], "--classifier: the name is empty"),
        ([*sample, "none/best.pt", "--complete", ""], "--complete: the name is empty"),
        ([*STAGE_TWO, *"--cond none --out new --official-config".split(), ""], "--official-config: the name is empty"),
        ([*READERS["train_vqgan"], "--data", "~nobody-at-all/x"], "there is no user of that name"),
        ([*READERS["train_vqgan"], "--seed", str(2**64)], "--seed: 18446744073709551616 is more than"),
        ([*sample, "none/best.pt", "--seed", str(2**63)], "--seed: 9223372036854775808 is more than"),
        ([*sample, "class/best.pt", "--guidance", "1e300"], "--guidance: 1e+300 is more than"),
        ([*sample, "class/best.pt", "--classes", "²"], "there is no '²'"),
        ([*sample, "class/best.pt", "--classes", "9" * 5000], "there is no '9999"),
        ([*sample, "none/best.pt", "--size", "²x²"], "is not a size like"),
        ([*sample, "none/best.pt", "--device", "meta"], "--device meta cannot be used here"),
        ([*READERS["train_vqgan"], "--device", "meta"], "--device meta cannot be used here"),
        ([*STAGE_ONE, "--out", tmp_path / "loop"], "cannot write"),
        ([*sample, "none/best.pt", "--out", tmp_path / "loop"], "cannot write"),
        ([*READERS["train_vqgan"], "--workers", "100000"], "--workers: 100000 is more than"),
    ):
        assert_refused(house, words, answer)
    tiny = "--input lowres --image-size 2 --loss vqvae --ch-mult 1 --steps 1 --out".split()
    done = run_inside(*STAGE_ONE, *tiny, tmp_path / "tiny", cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_rate_that_breaks_the_weights_before_the_loss_is_seen(house, tmp_path):
    words = [*STAGE_ONE, *"--lr 1e30 --val-every 1 --warmup 0 --out".split(), tmp_path / "run"]
    assert_one_line_error(run_inside(*words, cwd=house), "step ", " is ", "lower --lr")
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("words", ["none/best.pt --complete", "spatial/best.pt --cond-image"])
def test_bombs_are_refused(house, tmp_path, words):
    (tmp_path / "bomb.png").write_bytes(png_that_claims(60_000, 60_000))
    assert_refused(house, ["sample.py", "--gpt", *words.split(), tmp_path / "bomb.png"], "cannot be read as an image")


# Requests beyond memory or a day.


@pytest.mark.parametrize(
    "words",
    [
        "sample.py --gpt none/best.pt -n 100000000000",
        "sample.py --gpt none/best.pt --size 900000x900000",
        "sample.py --gpt class/best.pt --classifier judge.pt --reject 1e-9",
        "sample.py --gpt class/best.pt --classifier judge.pt --reject 1e-320",
        "evaluate.py --gpt none/best.pt --perceptual none --features judge.pt -n 100000000000",
        "train_vqgan.py --image-size 100000 --out new",
        "train_vqgan.py --batch-size 1000000000 --out new",
        "train_vqgan.py --input labels --num-labels 1000000 --image-size 256 --out new",
    ],
)
def test_requests_beyond_memory(house, words):
    assert_refused(house, words.split(), "GiB of memory", "a smaller")


def test_requests_beyond_a_day(house, monkeypatch):
    """Of images that memory could hold."""
    monkeypatch.setattr("minvqgan.harness.runtime.check_memory", lambda *a: None)
    assert_refused(house, "sample.py --gpt none/best.pt -n 1000000000000".split(), "days at the least", "a smaller -n")


# Odd environments.


def test_optimized_python_and_terminals_without_letters(house, tmp_path):
    """No docstrings, and a stream that knows no ± and no é."""
    for name in ("train/café", "train/naïve", "val/café", "val/naïve"):
        make_photos(tmp_path / "photos" / name, n=4, size=(20, 20))
    odd = "export PYTHONOPTIMIZE=2 PYTHONIOENCODING=ascii"
    words = [*STAGE_TWO, "--data", tmp_path / "photos", "--out", tmp_path / "run"]
    assert run_script(*words, cwd=house, limit=f"{odd} MPLBACKEND=nonsense").returncode == 0
    gpt = ["--gpt", tmp_path / "run" / "best.pt"]
    for words in (
        ["sample.py", *gpt, "-n", "1", "--out", tmp_path / "out"],
        ["evaluate.py", *gpt, "-n", "4", "--perceptual", "none", "--features", "none", "--out", tmp_path / "e"],
        ["train_vqgan.py", "--help"],
        ["results/losses.py", "--help"],
        ["notebooks/coursework.py", "--help"],
    ):
        done = run_script(*words, cwd=house, limit=odd)
        assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"café_0000.png", "naïve_0000.png"}
    assert (tmp_path / "e" / "metrics.json").exists()


def test_a_reader_that_leaves_does_not_end_a_run(house, tmp_path):
    """train_vqgan.py 2>&1 | head -1"""
    command = [sys.executable, ROOT / STAGE_ONE[0], *STAGE_ONE[1:], "--out", tmp_path / "run", "--steps", "12"]
    how = {"env": os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, "cwd": house}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) == 0
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == 12


def test_a_script_without_an_output(house, tmp_path):
    """Started with its output closed, as some services do: Python then has no stream at all."""
    words = f"{sys.executable} {ROOT / 'sample.py'} -n 1 --gpt none/best.pt --out {tmp_path / 'new.png'} >&-"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", words], cwd=house, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert (tmp_path / "new.png").exists()


def test_evidence_that_cannot_be_made(house, tmp_path):
    """The scripts in results/."""
    (tmp_path / "made/L1_0").mkdir(parents=True)
    (tmp_path / "made/L1_0/last.pt").write_bytes((house / "rgb" / "last.pt").read_bytes())
    end = ["--data", "shapes", "--judges", "judge.pt", "--table", tmp_path / "t.csv", "--figure", tmp_path / "f.png"]
    for words, answer in (
        (["losses.py", "--images", "3"], "there is no model in runs/losses"),
        (["losses.py", "--images", "3", "--runs", tmp_path / "made"], "3 held-out images are too few"),
        (["losses.py", "--train", "--seeds", "0", "--steps", "1", "--runs", tmp_path, "--flags", "--ch 0"], "did not"),
        (["sampling.py", "--gpt", "rgb/last.pt"], "rgb/last.pt is no class-conditional"),
        (["sampling.py", "--gpt", "none/best.pt"], "none/best.pt is no class-conditional"),
        (["sampling.py", "--gpt", "class/best.pt", "--images", "5"], "fewer than the model's 6 classes"),
    ):
        done = run_script(f"results/{words[0]}", *words[1:], *end, cwd=house)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert done.stderr.splitlines()[-1].startswith("error: ") and answer in done.stderr
    assert not list(tmp_path.glob("*.csv"))
    for folder, answer in ((house, "too few to hold 500 out"), (tmp_path / "none", "has no subfolders")):
        done = run_script("results/split.py", "--data", folder, "--out", tmp_path / "split", cwd=house)
        assert done.returncode == 2 and answer in done.stderr and not (tmp_path / "split").exists()


def test_an_error_of_all_processes_is_said_once(house, tmp_path):
    done = torchrun(2, *READERS["train_vqgan"], "--data", tmp_path / "nowhere", cwd=house)
    assert done.returncode == 1 and done.stderr.count("error: --data") == 1
    done = torchrun(2, *READERS["evaluate"], cwd=house)
    assert done.returncode == 1 and done.stderr.count("error: evaluate.py runs in one process") == 1


def test_half_of_what_torchrun_sets(house):
    done = run_script("sample.py", "--gpt", "none/best.pt", cwd=house, limit="export RANK=0")
    assert_one_line_error(done, "RANK is set, but not MASTER_ADDR, MASTER_PORT, WORLD_SIZE", "unset RANK")
    whole = "export RANK=x WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=29500"
    done = run_script("sample.py", "--gpt", "none/best.pt", cwd=house, limit=whole)
    assert_one_line_error(done, "RANK=x is not a number", "unset RANK")


AUDITED = """
import os, runpy, sys
import matplotlib.pyplot, torch, torchvision  # with what they do for themselves when they are first imported
from minvqgan.harness import official, tokens
out, script, *words = sys.argv[1:]
seen = []
def hook(event, args):
    if event == "open" and isinstance(args[0], str):
        seen.append("open " + os.path.realpath(args[0]))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
        seen.append(event + " " + str(args[0]))
sys.addaudithook(hook)
sys.argv = [script, *words]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    text = "\\n".join(seen)
    open(out, "w").write(text)
"""


@pytest.mark.parametrize("script", READERS)
def test_a_hostile_folder_starts_nothing_and_opens_nothing_elsewhere(house, tmp_path, script):
    """What Python's audit hooks see of a run: only files of the data, the run, the package and Python itself."""
    for part in ("train", "val"):
        hostile_images(tmp_path / "data" / part)
    words = [*READERS[script], "--data", tmp_path / "data", "--out", tmp_path / "run"]
    command = [sys.executable, "-c", AUDITED, tmp_path / "seen", ROOT / words[0], *words[1:]]
    (tmp_path / "tmp").mkdir()  # libraries try whether they can write there
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(list(map(str, command)), cwd=house, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = (tmp_path / "seen").read_text().splitlines()
    own = [
        tmp_path / "data",
        tmp_path / "run",
        tmp_path / "tmp",
        house / "rgb",
        ROOT,
        sys.prefix,
        sys.base_prefix,
        "/dev/null",
    ]
    own += [matplotlib.get_configdir(), matplotlib.get_cachedir(), *site.getsitepackages()]
    strange = {line for line in seen if not line.startswith(tuple(f"open {os.path.realpath(path)}" for path in own))}
    assert not strange, strange
    assert sum(str(tmp_path / "data") in line for line in seen) > 10


def hostile_images(folder) -> None:
    """Good images among programs, drawings, links, bombs and broken files, all with the names of images."""
    good = make_photos(folder, n=6)[0].read_bytes()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) (r) file\nshowpage\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    mvg = b"push graphic-context\nviewbox 0 0 9 9\nimage over 0,0 0,0 'https://127.0.0.1/x'\npop graphic-context"
    contents = {
        "eps": eps,
        "svg": svg,
        "mvg": mvg,
        "sh": b"#!/bin/sh\ntouch executed\n",
        "half": good[: len(good) // 2],
    }
    contents |= {"bomb": png_that_claims(2**31 - 1, 2**31 - 1), "pickle": pickle.dumps(Bomb(folder / "executed"))}
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)
    (folder / "; touch executed;.png").write_bytes(good)
    (folder / "$(touch executed).jpg").write_bytes(eps)
    (folder / "up").symlink_to("/")
    os.mkfifo(folder / "pipe.png")


@pytest.mark.parametrize("closed", [">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_nowhere_to_write_to_does_not_end_a_run(house, tmp_path, closed):
    done = run_script(*STAGE_ONE, "--out", tmp_path / "run", cwd=house, limit=f"exec {closed}")
    assert done.returncode == 0
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == 4
