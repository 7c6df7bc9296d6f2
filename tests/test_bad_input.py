"""What users get wrong: one line, exit code 2, and nothing of theirs is lost.

How single files are read is tested in test_data.py, what a checkpoint may hold in test_checkpoint.py.
"""

import os
import re
import resource
import runpy
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, STAGE_ONE, STAGE_TWO, assert_one_line_error, make_photos, run_inside, run_script, succeeded
from PIL import Image

from minvqgan.harness import checkpoint, processes
from minvqgan.harness.judges import Classifier, save_classifier

VQGAN = [*STAGE_ONE, "--data", "photos", "--out", "new"]
GPT = [*STAGE_TWO, *"--vqgan rgb/last.pt --data photos --cond none --out new".split()]
SPATIAL = [*STAGE_TWO, *"--vqgan rgb/last.pt --cond spatial --cond-vqgan labels/last.pt --out new".split()]
EVALUATE = "evaluate.py --features none --perceptual none --images 8 --out new".split()
SAMPLE = "sample.py -n 1 --out new.png --gpt".split()
RESUME_VQGAN, RESUME_GPT = (["train_vqgan.py", "--resume", "--out"], ["train_gpt.py", "--resume", "--out"])

# Beginning of a command; what follows => words of the answer.
MISTAKES = {
    "VQGAN": """
        --image-sise 32 => unknown flag --image-sise; did you mean --image-size?
        --batch-size 4 --accumulate 3 => cannot be split into 1 processes x 3
        --norm-groups 3 => --norm-groups 3 does not divide
        --resize 8 => --resize 8 is smaller than --image-size 16
        --image-size 33 => not divisible by f = 2; use 32 or 34
        --image-size 8 => --disc-layers 2 needs images of 16 pixels
        --device cuda:7 => --device cuda:7 cannot be used here
        --input labels => needs --num-labels
        --loss labels => needs --input labels
        --loss vqvae --input labels --num-labels 3 => --loss vqvae compares pixels
        --out= => --out: is empty
        --disc-start 2 => --disc-start: 2.0 is not a number from 0 to 1
        --dropout 1.5 => --dropout is 1.5, not a number from 0 to 1
        --lr nan => --lr: nan is not a number above 0
        --init photos/one/photo_00.png => photo_00.png is truncated or not a checkpoint
        --data nowhere => --data nowhere: no such folder
        --codebook-size 1000000 --code-dim 1000000 => out of memory; try a smaller --batch-size
        --out rgb => rgb already holds a run (last.pt); add --resume
        --out judge.pt => cannot read or write judge.pt
        --out photos/run => lies in --data
        --resume => no checkpoint at new/last.pt""",
    "RESUME_VQGAN": """
        rgb => is at step 6 of 6 already; give more --steps
        rgb --ch 16 => --ch was 8 in rgb; a resumed run keeps it, so choose another --out
        rgb --seed 1 => --seed was 0 in rgb
        rgb --batch-size 2 => --batch-size was 4 in rgb
        class => class/last.pt holds a two_stage, not a vqgan""",
    "GPT": """
        --vqgan nowhere.pt => no checkpoint at nowhere.pt
        --vqgan class/last.pt => holds a two_stage, not a vqgan
        --vqgan edges/last.pt --cond class --data pairs => fewer than two classes (subfolders with images)
        --cond spatial => --cond spatial needs --cond-vqgan
        --image-size 15 => not divisible by f = 2; use 14 or 16
        --n-head 3 => --n-head 3 does not divide --n-embd 16""",
    "RESUME_GPT": "class --n-layer 2 => --n-layer was 1",
    "SAMPLE": """
        class/best.pt --classes cat => there is no 'cat'; there are one, two
        class/best.pt --size large => not a size like 256x512
        class/best.pt --cond-image x.png => conditioned on class
        class/best.pt --steps-gif steps.mp4 => must end in .gif
        class/best.pt --reject 0.5 => --classifier
        class/best.pt --top-p 2 => --top-p
        class/best.pt --out one.jpg => --out one.jpg
        none/best.pt --classes 1 => conditioned on none
        none/best.pt --guidance 2 => dropped conditions
        none/best.pt --size 8x17 => multiples of f = 2, and at least 16; 16x16 works
        none/best.pt --\x1b[31m => unknown flag --?[31m
        spatial/best.pt => --cond-image
        photos/one/photo_00.png => photo_00.png is truncated or not a checkpoint
        rgb/last.pt => holds a VQGAN""",
    "EVALUATE": "--gpt none/best.pt --image-size 20 => --image-size 20",
}


def test_a_rank_that_torchrun_has_not_set_means_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # some clusters leave it in every shell
    assert processes.start(torch.device("cpu")) == (0, 1)


def assert_refused(house, words, *answer) -> None:
    """One line, and not even a run folder is begun."""
    assert_one_line_error(run_inside(*words, cwd=house), *answer)
    assert not (house / "new").exists()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(house, name):
    for line in MISTAKES[name].strip().splitlines():
        more, answer = line.split(" => ")
        assert_refused(house, [*globals()[name], *more.split()], answer)
    assert (house / "judge.pt").is_file()


def test_folders_without_images(house, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.png").write_text("not an image")
    make_photos(tmp_path / "single", n=1)
    for name, words, answer in (
        ("empty", VQGAN, "no readable image in"),
        ("texts", GPT, "no readable image in"),
        ("single", [*EVALUATE, "--vqgan", "rgb/last.pt"], "at least two"),
    ):
        assert_refused(house, [*words, "--data", tmp_path / name], name, answer)


def test_broken_and_small_files_among_good_ones(house, tmp_path):
    """Broken ones are skipped, counted and named once, small ones enlarged; training goes on."""
    for part in ("train", "val"):
        folder = tmp_path / "photos" / part
        good = make_photos(folder, n=6, size=(7, 5))[0].read_bytes()
        (folder / f"text_{part}.jpg").write_text("not an image")
        (folder / f"half_{part}.png").write_bytes(good[: len(good) // 2])  # a good header, half of the pixels
    done = succeeded(run_inside(*VQGAN, "--data", tmp_path / "photos", "--out", tmp_path / "run", cwd=house))
    for part in ("train", "val"):
        assert done.stderr.count(f"text_{part}.jpg") == 1 and done.stderr.count(f"half_{part}.png") == 1


def test_labels_outside_the_range_and_pairs_that_do_not_match(house, tmp_path):
    pairs = shutil.copytree(house / "pairs", tmp_path / "pairs")
    Image.fromarray(np.full((20, 24), 3, np.uint8)).save(pairs / "labels" / "photo_05.png")
    done = run_inside(*SPATIAL, "--data", pairs, "--out", tmp_path / "run", cwd=house)
    assert_one_line_error(done, "labels/photo_05.png", "holds label 3", "0 to 2")
    (pairs / "labels" / "photo_03.png").unlink()
    assert_refused(house, [*SPATIAL, "--data", pairs], "photo_03.png has no partner", "labels")


ODD_NAMES = ("../../x", "/etc/x", "a\\b", ".", "..", "", "CON", "a", "A", "é" * 60, "\x00", "x" * 300, "0_a")


def test_class_names_of_a_checkpoint_are_no_paths(house, tmp_path):
    names = runpy.run_path(str(ROOT / "sample.py"))["file_names"](ODD_NAMES)
    assert len({name.casefold() for name in names}) == len(ODD_NAMES)
    assert all(re.fullmatch(r"[\w -]+", name) and len(os.fsencode(name)) < 200 for name in names)
    content = checkpoint.read(house / "class" / "best.pt")
    content["config"] |= {"classes": ("../../evil", f"{tmp_path}/x")}
    torch.save(content, tmp_path / "gpt.pt")
    out = tmp_path / "1" / "2"
    succeeded(run_inside("sample.py", "--gpt", tmp_path / "gpt.pt", "-n", "1", "--out", out, cwd=house))
    assert len(list(out.iterdir())) == 2 == len(list(tmp_path.rglob("*.png")))


def test_weights_that_cannot_be_downloaded(house, tmp_path, monkeypatch):
    """A proxy that does not exist stands for a machine without network."""
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    words = [*VQGAN, "--image-size", "32", "--perceptual", "vgg16"]
    assert_refused(house, words, "https://", str(tmp_path), "--perceptual small")
    words = "evaluate.py --vqgan rgb/last.pt --images 8 --out".split()
    done = succeeded(run_inside(*words, tmp_path / "e", cwd=house))
    missing = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("without ")]
    assert sorted(missing) == ["without inception", "without vgg16"] and "psnr" in done.stdout


@pytest.mark.parametrize("words", [VQGAN, GPT], ids=["train_vqgan", "train_gpt"])
def test_losses_that_are_no_numbers(house, tmp_path, words):
    """The script stops, says at which step and which term, keeps last.pt from before, and goes on from it."""
    run = tmp_path / "run"
    succeeded(run_inside(*words, "--out", run, cwd=house))  # six steps
    again = [words[0], "--resume", "--out", run, "--steps", "12", "--save-every", "12"]
    done = run_inside(*again, "--lr", "1e20", cwd=house)
    assert_one_line_error(done, "step ", " is ", "last good checkpoint", "--resume", "--lr")
    assert re.search(r"step ([7-9]|1[0-2]): \w+ is (nan|inf)", done.stderr)
    assert checkpoint.read(run / "last.pt")["step"] == 6
    succeeded(run_inside(*again, "--lr", "1e-4", cwd=house))
    assert checkpoint.read(run / "last.pt")["step"] == 12


@pytest.mark.parametrize("script, run", [("train_vqgan.py", "rgb"), ("train_gpt.py", "none")])
def test_a_full_disk(house, tmp_path, script, run):
    """A limit on the size of files stands for it. What was there before is intact."""
    for name in ("rgb", "none", "photos"):
        shutil.copytree(house / name, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        done = run_inside(script, "--resume", "--steps", "9", "--out", run, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line_error(done, "cannot read or write", ".pt: ")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pt")} == before


def test_outputs_never_replace_an_input(house, tmp_path):
    photo = make_photos(tmp_path / "photos", n=1)[0]
    os.link(photo, tmp_path / "0000.png")
    before = photo.read_bytes()
    for out in (photo, tmp_path):  # 0000.png is the same file by another name
        words = ["sample.py", "-n", "1", "--gpt", "none/best.pt", "--complete", photo, "--out", out]
        assert_refused(house, words, "would be written over")
    assert photo.read_bytes() == before


def test_other_classes_than_the_models(house, tmp_path):
    """With a new folder among them, the numbers of all classes behind it would mean others."""
    for name in ("one", "aa", "two"):
        make_photos(tmp_path / "photos" / name, n=4, size=(20, 20))
    shutil.copytree(house / "class", tmp_path / "run")
    words = ["train_gpt.py", "--resume", "--steps", "9", "--out", tmp_path / "run", "--data", tmp_path / "photos"]
    assert_one_line_error(run_inside(*words, cwd=house), "has 3 classes, the model 2 others: aa")
    save_classifier(tmp_path / "other.pt", Classifier(("two", "another")))
    words = [*SAMPLE, *"class/best.pt --reject 0.5 --classifier".split(), tmp_path / "other.pt"]
    assert_refused(house, words, "does not know the class 'one'")


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(house, tmp_path):
    done = run_script(*VQGAN, "--data", tmp_path / "nowhere", cwd=house, processes=2)
    assert done.returncode == 1 and done.stderr.count("error: --data") == 1
