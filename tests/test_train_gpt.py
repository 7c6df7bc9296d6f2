"""train_gpt.py and sample.py as a user runs them, on models of a few thousand parameters.

What the loop of train_gpt.py does to the weights is in test_training.py; kills in test_interruption.py.
"""

import os
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    STAGE_ONE,
    STAGE_TWO,
    assert_one_line_error,
    assert_same_run,
    make_photos,
    metrics_rows,
    run_inside,
    run_interrupted,
)
from PIL import Image

import minvqgan
from minvqgan.harness import checkpoint, data, tokens
from minvqgan.harness.judges import load_classifier


@pytest.mark.parametrize("cond", ["class", "none", "coords", "spatial"])
def test_a_run_leaves_what_it_promises(house, cond):
    run = house / cond
    codes = {"codes.pt"} if cond in ("class", "none") else set()  # random crops are encoded on the fly
    promised = {*"last.pt best.pt config.json metrics.csv loss.png images".split()}
    assert {p.name for p in run.iterdir()} == promised | codes
    kinds = ("samples", "completions")
    assert {p.name for p in (run / "images").iterdir()} == {f"step_{i:07d}_{k}.png" for i in (3, 6) for k in kinds}
    assert [r["step"] for r in metrics_rows(run) if r["loss"]] == ["2", "4", "6"]


def test_the_loaded_model_knows_its_classes_and_samples(house):
    model = minvqgan.load(house / "class" / "best.pt")
    assert model.config.classes == ("one", "two") and model.null == 16 + 2
    assert model.sample(torch.tensor([0, 1])).shape == (2, 3, 16, 16)


def test_table_of_tokens_is_what_encoding_on_the_fly_gives(house, tmp_path):
    model = minvqgan.load(house / "none" / "last.pt")
    for part in ("train", "val"):
        make_photos(tmp_path / part, n=5, size=(16, 16))
    train, _ = data.open_data(str(tmp_path), 16)
    assert train.fixed and train.flip
    to_c = tokens.condition_input(model)
    s, r = tokens.table(model, train, to_c, torch.device("cpu"))
    assert s.shape == (5, 2, 64) and r.shape == (5, 2, 1)
    for i in range(5):
        x = train[i, None]["image"][None]
        assert torch.equal(s[i, 0].long(), model.image_tokens(x)[0])
        assert torch.equal(s[i, 1].long(), model.image_tokens(x.flip(-1))[0])
    stream = tokens.rows_of(s, r, data.Stream(5, seed=0), 5, torch.device("cpu"))
    first, second = next(stream)[0], next(stream)[0]
    assert {tuple(t.tolist()) for t in torch.cat([first, second])} == {tuple(t.tolist()) for t in s.flatten(0, 1)}


def test_codes_are_computed_once(house, tmp_path):
    """A resumed run finds them in its folder. Another model, or a file that was changed, makes them anew."""
    shutil.copytree(house / "class", tmp_path / "run")
    codes = checkpoint.read(house / "class" / "codes.pt")
    resume = ["train_gpt.py", "--out", tmp_path / "run", "--resume", "--steps"]
    done = run_inside(*resume, "7", cwd=house)
    assert done.returncode == 0 and "computing the codes" not in done.stdout, done.stderr
    torch.save(codes | {"identity": "of another model"}, tmp_path / "run" / "codes.pt")
    done = run_inside(*resume, "8", cwd=house)
    assert done.returncode == 0 and "computing the codes" in done.stdout, done.stderr
    assert torch.equal(checkpoint.read(tmp_path / "run" / "codes.pt")["s"], codes["s"])

    model = minvqgan.load(house / "none" / "last.pt")
    make_photos(tmp_path / "few", n=3, size=(16, 16))
    train, _ = data.open_data(str(tmp_path / "few"), 16)
    before = tokens._identity(model, train)
    assert tokens._identity(model, train) == before
    os.utime(train.paths(0)[0], (1, 1))
    touched = tokens._identity(model, train)
    with torch.no_grad():
        model.vqgan.to_code.bias += 1
    assert len({before, touched, tokens._identity(model, train)}) == 3


def test_mirrored_images_keep_the_coordinates_of_their_place(tmp_path):
    """Codes that are computed once against what a random draw of the dataset gives for the same image."""
    make_photos(tmp_path, n=2, size=(16, 16))
    train, _ = data.open_data(str(tmp_path), 16, sources=("image", "coords"))
    batch = {k: torch.as_tensor(v)[None] for k, v in train[0, None].items()}
    draws = [train[0, i] for i in range(10)]
    mirrored = next(d for d in draws if not torch.equal(d["image"], batch["image"][0]))
    ours = tokens.mirrored(batch)
    assert torch.equal(ours["image"][0], mirrored["image"]) and torch.equal(ours["coords"][0], mirrored["coords"])


def test_coordinates_follow_crop_and_flip(tmp_path):
    """A picture that holds its own coordinates, cropped and mirrored: the two must still agree, mirrored ones in the
    mirrored picture's coordinates."""
    place = np.arange(20 * 24).reshape(20, 24) % 251
    for i in range(2):
        Image.fromarray(np.repeat(place[:, :, None], 3, 2).astype(np.uint8)).save(tmp_path / f"{i}.png")
    train, _ = data.open_data(str(tmp_path), 16, resize=20, sources=("image", "coords"))
    flips = 0
    for draw in range(20):
        sample = train[0, draw]
        pixels = ((sample["image"][0] + 1) * 127.5).round().long()
        rank = (sample["coords"][0] * 480).round().long()
        rows, cols = rank // 24, rank % 24
        mirrored = bool(pixels[0, 0] > pixels[0, -1]) and bool(pixels[5, 0] > pixels[5, -1])
        flips += mirrored
        truth = rows * 24 + (23 - cols if mirrored else cols)
        assert torch.equal(pixels, truth % 251)
    assert 0 < flips < 20


@pytest.mark.parametrize(
    "flags",
    [
        "--vqgan rgb/last.pt",
        "--vqgan rgb/last.pt --data pairs --resize 20 --cond coords --coord-levels 63 --dropout 0.1 --accumulate 2",
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(house, tmp_path, flags):
    """Ctrl-C in the fourth step, then --resume: with codes from the table, and with random crops."""
    words = [*STAGE_TWO, *flags.split()]
    done = run_inside(*words, "--out", tmp_path / "whole", cwd=house)
    assert done.returncode == 0 and done.stdout.strip().endswith(f"--gpt {tmp_path / 'whole' / 'best.pt'}")
    assert run_interrupted(4, *words, "--out", tmp_path / "run", cwd=house).returncode == 130
    done = run_inside("train_gpt.py", "--out", tmp_path / "run", "--resume", cwd=house)
    assert done.returncode == 0 and "computing the codes" not in done.stdout, done.stderr
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "run" / "last.pt")


def test_mirrored_images_are_the_first_stage_s(house, tmp_path):
    """--flip or --no-flip of the first stage holds for the second, unless that says otherwise."""
    for words, more, wanted in (("", "", True), ("--no-flip", "", False), ("--no-flip", "--flip", True)):
        first, second = tmp_path / f"first{words}{more}", tmp_path / f"second{words}{more}"
        done = run_inside(*STAGE_ONE, *words.split(), "--data", "photos", "--out", first, cwd=house)
        assert done.returncode == 0, done.stderr
        flags = ["--vqgan", first / "last.pt", "--cond", "none", *more.split(), "--out", second]
        assert run_inside(*STAGE_TWO, *flags, cwd=house).returncode == 0
        assert checkpoint.read(second / "last.pt")["flags"]["flip"] is wanted


def test_train_gpt_mistakes(house, tmp_path):
    for flags, words in (
        ("--vqgan nowhere.pt --out new", ["no checkpoint at nowhere.pt"]),
        ("--vqgan class/last.pt --out new", ["holds a two_stage, not a vqgan"]),
        ("--vqgan edges/last.pt --out new", ["fewer than two classes", "--cond none"]),
        ("--vqgan rgb/last.pt --cond spatial --out new", ["--cond spatial needs --cond-vqgan"]),
        ("--vqgan rgb/last.pt --cond none --n-head 3 --out new", ["3", "16"]),
        ("--vqgan rgb/last.pt --cond none --batch-size 3 --accumulate 2 --out new", ["cannot be split"]),
        ("--vqgan rgb/last.pt --out class", ["already holds a run", "--resume"]),
        ("--out class --resume --n-layer 2", ["--n-layer was 1"]),
        ("--out class --resume --steps 99 --accumulate 3", ["--batch-size 4 cannot be split into 1 processes x 3"]),
    ):
        assert_one_line_error(run_inside(*STAGE_TWO, *flags.split(), cwd=house), *words)
    assert not (house / "new").exists()


@pytest.fixture
def sample(house, tmp_path):
    """sample.py on a model of the house, run in a folder of the test's own."""
    return lambda name, *flags: run_inside("sample.py", "--gpt", house / name / "best.pt", *flags, cwd=tmp_path)


def open_image(path) -> torch.Tensor:
    """(C, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1


def assert_shows(path, image: torch.Tensor) -> None:
    """The file holds this image, (C, H, W) in [-1, 1], to rounding."""
    assert (open_image(path) - image.clamp(-1, 1)).abs().max() < 1 / 127


def test_sample_writes_grids_files_and_animations(sample, tmp_path):
    cell = 64 + 2  # 16 pixels, enlarged four times, and a frame of 2
    done = sample("class", "-n", "3", "--classes", "two,0", "--steps-gif", "steps.gif", "--guidance", "2")
    assert done.returncode == 0 and "codes/s" in done.stdout, done.stderr
    assert Image.open(tmp_path / "samples.png").size == (3 * cell + 2, 2 * cell + 2)
    assert Image.open(tmp_path / "steps.gif").n_frames > 10
    assert sample("class", "-n", "2", "--classes", "two", "--out", "files").returncode == 0
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == ["two_0000.png", "two_0001.png"]
    assert Image.open(tmp_path / "files" / "two_0000.png").size == (16, 16)


def test_sample_is_the_same_for_any_batch_size(sample, tmp_path):
    grids = []
    for size in (1, 3, 64):
        assert sample("class", "-n", "4", "--batch-size", size, "--out", f"{size}.png").returncode == 0
        grids.append(open_image(tmp_path / f"{size}.png"))
    for other in grids[1:]:  # the same codes; the decoder's convolutions round in another way in another batch
        assert (grids[0] - other).abs().max() <= 1.01 / 127.5
    assert sample("class", "-n", "4", "--seed", "9", "--out", "other.png").returncode == 0
    assert (grids[0] - open_image(tmp_path / "other.png")).abs().max() > 0.05


def test_sample_larger_than_the_model_has_seen(sample, house, tmp_path):
    for name, flags, expected in (
        ("none", ["--size", "24x40"], (40, 24)),
        ("coords", ["--size", "20x32"], (32 * 2, 20 * 2)),
        ("spatial", ["--cond-image", house / "pairs/labels/photo_00.png"], (24 * 2 + 4, 2 * (20 * 2 + 2) + 2)),
    ):
        done = sample(name, "-n", "1", "--out", f"{name}.png", *flags)
        assert done.returncode == 0, done.stderr
        assert Image.open(tmp_path / f"{name}.png").size == expected, name
        assert ("upper part repeated" in done.stdout) == (name == "none")  # only it does not know where it is


def test_completion_keeps_the_upper_rows(sample, house, tmp_path):
    photo = house / "photos" / "one" / "photo_00.png"
    assert sample("none", "-n", "2", "--complete", photo, "--keep", "0.5", "--out", "done").returncode == 0
    model = minvqgan.load(house / "none" / "best.pt")
    given = model.vqgan.encode_indices(open_image(photo)[None]).expand(2, -1, -1)
    images = model.vqgan.decode_indices(model.sample_indices(torch.zeros(2, 1), given=given, keep=32))
    for i in range(2):
        assert_shows(tmp_path / "done" / f"000{i}.png", images[i])


def test_rejection_keeps_the_images_that_the_classifier_likes(sample, house, tmp_path):
    words = ["--classes", "two", "--reject", "0.25", "--classifier", house / "judge.pt"]
    assert sample("class", "-n", "2", *words, "--out", "kept").returncode == 0
    model, classifier = minvqgan.load(house / "class" / "best.pt"), load_classifier(house / "judge.pt")
    with torch.no_grad():
        images = model.sample(torch.full((8,), 1)).clamp(-1, 1)
        best = classifier(images).softmax(1)[:, 1].argsort(descending=True)[:2]
    for i, b in enumerate(best):
        assert_shows(tmp_path / "kept" / f"two_000{i}.png", images[b])


def test_one_channel_in_another_order(house, tmp_path):
    """Rejected by a classifier of three channels; only row order can slide."""
    words = ["--vqgan", "edges/last.pt", "--data", "photos", "--resize", "16", "--order", "spiral-out"]
    assert run_inside(*STAGE_TWO, *words, "--out", tmp_path / "gpt", cwd=house).returncode == 0
    words = ["sample.py", "--gpt", "gpt/best.pt", "-n", "1"]
    reject = ["--classes", "two", "--reject", "0.5", "--classifier", house / "judge.pt", "--out", "two.png"]
    done = run_inside(*words, *reject, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "two.png").exists(), done.stderr
    assert_one_line_error(run_inside(*words, "--size", "32x32", cwd=tmp_path), "spiral-out order")


def test_label_maps_are_drawn_by_their_largest_logit(house, tmp_path):
    """Also where several logits are above 1, the largest value of an image."""
    words = ["--vqgan", "labels/last.pt", "--cond", "none", "--out", tmp_path / "gpt"]
    assert run_inside(*STAGE_TWO, *words, cwd=house).returncode == 0
    model = minvqgan.load(tmp_path / "gpt" / "best.pt")
    with torch.no_grad():
        model.vqgan.decoder.conv_out.weight *= 1000
        model.vqgan.decoder.conv_out.bias += 5
    checkpoint.save(tmp_path / "maps.pt", "two_stage", **checkpoint.pack_two_stage(model))
    done = run_inside("sample.py", "--gpt", "maps.pt", "-n", "3", "--out", "maps", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        logits = model.sample(n=3)
    assert ((logits > 1).sum(1) > 1).any()
    colours: dict[int, set] = {0: set(), 1: set(), 2: set()}
    for i, labels in enumerate(logits.argmax(1)):
        pixels = np.array(Image.open(tmp_path / "maps" / f"000{i}.png"))
        for label, colour in zip(labels.flatten().tolist(), pixels.reshape(-1, 3).tolist(), strict=True):
            colours[label].add(tuple(colour))
    assert all(len(found) <= 1 for found in colours.values()) and len(set().union(*colours.values())) > 1


def test_sample_mistakes(sample, house, tmp_path):
    for name, flags, words in (
        ("class", ["--classes", "cat"], ["there is no 'cat'", "one, two"]),
        ("class", ["--classes", "two,1"], ["names a class twice"]),
        ("class", ["--size", "large"], ["not a size like 256x512"]),
        ("class", ["--cond-image", "x.png"], ["conditioned on class"]),
        ("class", ["--reject", "0.5"], ["--classifier"]),
        ("class", ["--top-p", "2"], ["--top-p"]),
        ("class", ["--steps-gif", "steps.mp4"], ["must end in .gif"]),
        ("class", ["--out", "one.jpg"], ["--out one.jpg", "a .png for one grid"]),
        ("none", ["--classes", "1"], ["conditioned on none"]),
        ("none", ["--guidance", "2"], ["dropped conditions"]),
        ("spatial", [], ["--cond-image"]),
    ):
        assert_one_line_error(sample(name, *flags), *words)
    assert_one_line_error(run_inside("sample.py", cwd=tmp_path), "no checkpoint at runs/gpt/best.pt")
    assert_one_line_error(run_inside("sample.py", "--gpt", house / "rgb/last.pt", cwd=tmp_path), "holds a VQGAN")
