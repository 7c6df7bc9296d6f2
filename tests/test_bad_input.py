"""What users get wrong: one line, exit code 2, and nothing of theirs is lost. Each kind once, in the order of a run.

How single files are read is tested in test_data.py, what a checkpoint may hold in test_checkpoint.py.
"""

import os
import re
import resource
import shutil

import numpy as np
import pytest
import torch
from helpers import STAGE_ONE, STAGE_TWO, assert_one_line_error, make_photos, metrics_rows, run_inside, torchrun
from PIL import Image

from minvqgan.harness import checkpoint
from minvqgan.harness.judges import Classifier, save_classifier

VQGAN = [*STAGE_ONE, "--data", "photos", "--out", "new"]
GPT = [*STAGE_TWO, *"--vqgan rgb/last.pt --data photos --cond none --out new".split()]
SPATIAL = [*STAGE_TWO, *"--vqgan rgb/last.pt --cond spatial --cond-vqgan labels/last.pt --out new".split()]
EVALUATE = "evaluate.py --features none --perceptual none --images 8 --out new".split()


def assert_refused(house, words, *answer) -> None:
    """One line, and not even a run folder is begun."""
    assert_one_line_error(run_inside(*words, cwd=house), *answer)
    assert not (house / "new").exists()


def make_pairs(folder, top: int) -> None:
    """Eight images with label maps of 0 to `top`."""
    (folder / "labels").mkdir(parents=True)
    for photo in make_photos(folder / "images", 8, size=(24, 20)):
        labels = np.random.default_rng(0).integers(0, top + 1, (20, 24), dtype=np.uint8)
        labels[0, 0] = top
        Image.fromarray(labels).save(folder / "labels" / photo.name)


@pytest.mark.parametrize("words", [VQGAN, GPT, [*EVALUATE, "--vqgan", "rgb/last.pt"]], ids=lambda words: words[0])
def test_folders_without_images(house, tmp_path, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.png").write_text("not an image")
    make_photos(tmp_path / "single", n=1)
    for name, answer in (
        ("nowhere", ("nowhere", "no such folder")),
        ("empty", ("no readable image in", "empty")),
        ("texts", ("no readable image in", "texts")),
        ("texts/one.png", ("one.png", "no such folder")),
        ("single", ("single", "at least two")),
    ):
        assert_refused(house, [*words, "--data", tmp_path / name], *answer)


def test_broken_and_small_files_among_good_ones(house, tmp_path):
    """Broken ones are skipped, counted and named once, small ones enlarged; training goes on."""
    for part in ("train", "val"):
        folder = tmp_path / "photos" / part
        good = make_photos(folder, n=6, size=(7, 5))[0].read_bytes()
        (folder / f"text_{part}.jpg").write_text("not an image")
        (folder / f"half_{part}.png").write_bytes(good[: len(good) // 2])  # a good header, half of the pixels
    done = run_inside(*VQGAN, "--data", tmp_path / "photos", "--out", tmp_path / "run", cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("train", "val"):
        assert done.stderr.count(f"text_{part}.jpg") == 1 and done.stderr.count(f"half_{part}.png") == 1


def test_sizes_that_do_not_fit(house):
    for words, answer in (
        ([*VQGAN, "--image-size", "33"], ("not divisible by f = 2", "32 or 34")),
        ([*GPT, "--image-size", "15"], ("not divisible by f = 2", "use 14 or 16")),
        (["sample.py", "--gpt", "none/best.pt", "--size", "8x16"], ("below the 16x16",)),
        ([*EVALUATE, "--gpt", "none/best.pt", "--image-size", "20"], ("--image-size 20", "16 x 16")),
        ([*VQGAN, "--image-size", "8", "--disc-layers", "1", "--perceptual", "vgg16"], ("--perceptual small",)),
        ([*VQGAN, "--batch-size", "4", "--accumulate", "3"], ("cannot be split into 1 processes x 3",)),
    ):
        assert_refused(house, words, *answer)


def test_labels_outside_the_range_and_pairs_that_do_not_match(house, tmp_path):
    make_pairs(tmp_path / "more", top=3)
    done = run_inside(*SPATIAL, "--data", tmp_path / "more", "--out", tmp_path / "run", cwd=house)
    assert_one_line_error(done, "labels/photo_0", "holds label 3", "0 to 2")
    make_pairs(tmp_path / "lonely", top=2)
    (tmp_path / "lonely" / "labels" / "photo_03.png").unlink()
    assert_refused(house, [*SPATIAL, "--data", tmp_path / "lonely"], "photo_03.png has no partner", "labels")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# Every flag that takes a checkpoint: what is typed before the file.
TAKES_A_CHECKPOINT = {
    "train_vqgan --resume": ["train_vqgan.py", "--steps", "9", "--resume", "--out"],
    "train_vqgan --perceptual": [*VQGAN, "--perceptual"],
    "train_gpt --resume": ["train_gpt.py", "--steps", "9", "--resume", "--out"],
    "train_gpt --vqgan": [*GPT, "--vqgan"],
    "train_gpt --cond-vqgan": [*SPATIAL, "--cond-vqgan"],
    "sample --gpt": ["sample.py", "-n", "1", "--gpt"],
    "sample --classifier": "sample.py -n 1 --reject 0.5 --gpt class/best.pt --classifier".split(),
    "evaluate --vqgan": [*EVALUATE, "--vqgan"],
    "evaluate --gpt": [*EVALUATE, "-n", "2", "--gpt"],
    "evaluate --features": ["evaluate.py", "--vqgan", "rgb/last.pt", "--features"],
}


@pytest.mark.parametrize("flag", TAKES_A_CHECKPOINT)
def test_checkpoints_with_code_or_cut_off(house, tmp_path, flag):
    """One line; nothing is executed, and the file stays as it is."""
    path, mark = tmp_path / "run" / "last.pt", tmp_path / "executed"
    path.parent.mkdir()
    torch.save(checkpoint.read(house / "rgb" / "last.pt") | {"flags": Bomb(mark)}, path)
    whole = path.read_bytes()
    given = path.parent if flag.endswith("--resume") else path
    for content, answer in ((whole, "nothing in it was executed"), (whole[:5000], "last.pt is truncated")):
        path.write_bytes(content)
        assert_refused(house, [*TAKES_A_CHECKPOINT[flag], given], answer)
        assert path.read_bytes() == content and os.listdir(path.parent) == ["last.pt"] and not mark.exists()


def edited(path, target, **changes) -> None:
    """A checkpoint with other fields."""
    target.parent.mkdir(exist_ok=True)
    torch.save(checkpoint.read(path) | changes, target)


def test_class_names_of_a_checkpoint_are_no_paths(house, tmp_path):
    best = house / "class" / "best.pt"
    config = checkpoint.read(best)["config"] | {"classes": ("../../evil", f"{tmp_path}/x")}
    edited(best, tmp_path / "gpt.pt", config=config)
    done = run_inside("sample.py", "--gpt", tmp_path / "gpt.pt", "-n", "1", "--out", tmp_path / "1" / "2", cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "1" / "2").iterdir())) == 2 == len(list(tmp_path.rglob("*.png")))


def test_an_optimizer_state_of_another_shape_is_refused(house, tmp_path):
    """It would crash the process: the fused Adam writes through bare pointers."""
    opt = checkpoint.read(house / "rgb" / "last.pt")["opt_g"]
    state = opt["state"] | {0: opt["state"][0] | {"exp_avg": torch.zeros(1)}}
    edited(house / "rgb" / "last.pt", tmp_path / "run" / "last.pt", opt_g=opt | {"state": state})
    done = run_inside("train_vqgan.py", "--resume", "--steps", "9", "--out", tmp_path / "run", cwd=house)
    assert_one_line_error(done, "run/last.pt", "exp_avg of parameter 0")


def test_weights_that_cannot_be_downloaded(house, tmp_path, monkeypatch):
    """A proxy that does not exist stands for a machine without network."""
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    words = [*VQGAN, "--image-size", "32", "--perceptual", "vgg16"]
    assert_refused(house, words, "https://", str(tmp_path), "--perceptual small")
    done = run_inside("evaluate.py", *"--vqgan rgb/last.pt --images 8 --out".split(), tmp_path / "e", cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    missing = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("without ")]
    assert missing == ["without vgg16", "without inception"] and "psnr" in done.stdout


@pytest.mark.parametrize("words", [VQGAN, GPT], ids=["train_vqgan", "train_gpt"])
def test_losses_that_are_no_numbers(house, tmp_path, words):
    """The script stops, says at which step and which term, keeps last.pt from before, and goes on from it."""
    run = tmp_path / "run"
    assert run_inside(*words, "--out", run, cwd=house).returncode == 0  # six steps
    again = [words[0], "--resume", "--out", run, "--steps", "12", "--save-every", "12"]
    done = run_inside(*again, "--lr", "1e20", cwd=house)
    assert_one_line_error(done, "step ", " is ", "last good checkpoint", "--resume", "--lr")
    assert re.search(r"step ([7-9]|1[0-2]): \w+ is (nan|inf)", done.stderr)
    assert checkpoint.read(run / "last.pt")["step"] == 6
    done = run_inside(*again, "--lr", "1e-4", cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    assert checkpoint.read(run / "last.pt")["step"] == 12


@pytest.mark.parametrize("script, run", [("train_vqgan.py", "rgb"), ("train_gpt.py", "none")])
def test_a_full_disk(house, tmp_path, script, run):
    """A limit on the size of files stands for it. What was there before is intact."""
    for name in ("rgb", "none"):
        shutil.copytree(house / name, tmp_path / name)
    shutil.copytree(house / "photos", tmp_path / "photos")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        done = run_inside(script, "--resume", "--steps", "9", "--out", run, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line_error(done, "cannot write")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pt")} == before


def test_outputs_never_replace_an_input_or_a_run(house, tmp_path):
    photo = make_photos(tmp_path / "photos", n=1)[0]
    os.link(photo, tmp_path / "0000.png")
    (tmp_path / "first").mkdir()
    shutil.copy(house / "rgb" / "best.pt", tmp_path / "first")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    complete = ["sample.py", "-n", "1", "--gpt", "none/best.pt", "--complete", photo, "--out"]
    for words, answer in (
        ([*complete, photo], "would be written over"),
        ([*complete, tmp_path], "would be written over"),  # 0000.png is the same file by another name
        ([*GPT, "--vqgan", tmp_path / "first" / "best.pt", "--out", tmp_path / "first"], "already holds a run"),
        ([*VQGAN, "--out", "rgb"], "already holds a run (last.pt); add --resume"),
    ):
        assert_refused(house, words, answer)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_a_run_folder_among_the_images(house, tmp_path):
    """Resumed, the run would have trained on its own reconstructions."""
    for part in ("photos", "parted/train", "parted/val"):
        make_photos(tmp_path / part, n=4)
    for folder, out in {"photos": "photos/run", "parted": "parted/val"}.items():
        done = run_inside(*VQGAN, "--data", tmp_path / folder, "--out", tmp_path / out, cwd=house)
        assert_one_line_error(done, "lies in --data", "choose another")
        assert not (tmp_path / out / "config.json").exists()


def test_other_classes_than_the_models(house, tmp_path):
    """With a new folder among them, the numbers of all classes behind it would mean others."""
    for name in ("one", "aa", "two"):
        make_photos(tmp_path / "photos" / name, n=4, size=(20, 20))
    run = tmp_path / "run"
    flags = checkpoint.read(house / "class" / "last.pt")["flags"] | {"data": str(tmp_path / "photos")}
    edited(house / "class" / "last.pt", run / "last.pt", flags=flags)
    done = run_inside("train_gpt.py", "--resume", "--steps", "9", "--out", run, cwd=house)
    assert_one_line_error(done, "has 3 classes, the model 2 others: aa")
    save_classifier(tmp_path / "other.pt", Classifier(("two", "another")))
    sample = ["sample.py", *"-n 1 --gpt class/best.pt --reject 0.5 --classifier".split(), tmp_path / "other.pt"]
    assert_refused(house, sample, "does not know the class 'one'")


def test_a_cut_off_row_of_metrics_is_dropped(house, tmp_path):
    """What a kill in the middle of a row leaves. Another damage is one line."""
    shutil.copytree(house / "rgb", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.csv"
    before = metrics_rows(tmp_path / "run")
    metrics.write_text(metrics.read_text() + "6,0.")
    again = ["train_vqgan.py", "--resume", "--out", tmp_path / "run", "--steps"]
    assert run_inside(*again, "7", cwd=house).returncode == 0
    assert metrics_rows(tmp_path / "run")[:-1] == before
    metrics.write_text(metrics.read_text().replace(",", ";"))
    assert_one_line_error(run_inside(*again, "8", cwd=house), "metrics.csv", "rename it")


def test_flags_that_nobody_means(house, tmp_path):
    (tmp_path / "taken").write_text("mine")
    sample = ["sample.py", "-n", "1", "--gpt"]
    for words, answer in (
        ([*VQGAN, "--data", ""], "--data: the name is empty"),
        ([*VQGAN, "--out", " "], "--out: the name is empty"),
        (["evaluate.py", "--vqgan", ""], "--vqgan: the name is empty"),
        ([*sample, "none/best.pt", "--n\x1b[31m", "1"], "unknown flag --n?[31m"),
        ([*VQGAN, "--data", "~nobody-at-all/x"], "no such folder"),
        ([*VQGAN, "--seed", str(2**64)], "--seed: 18446744073709551616 is not a whole number from 0 to"),
        ([*sample, "class/best.pt", "--classes", "²"], "there is no '²'"),
        ([*sample, "none/best.pt", "--device", "meta"], "--device meta cannot be used here"),
        ([*VQGAN, "--out", tmp_path / "taken"], "cannot write"),
        ([*sample, "none/best.pt", "--out", tmp_path / "taken" / "x.png"], "cannot write"),
    ):
        assert_refused(house, words, answer)


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(house, tmp_path):
    done = torchrun(2, *VQGAN, "--data", tmp_path / "nowhere", cwd=house)
    assert done.returncode == 1 and done.stderr.count("error: --data") == 1
