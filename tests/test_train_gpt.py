"""train_gpt.py and sample.py as a user runs them, on a first stage of a few thousand parameters."""

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_one_line_error, assert_same_run, make_photos, run_inside, run_script
from PIL import Image

import minvqgan
from minvqgan.harness import checkpoint, data, tokens
from minvqgan.harness.judges import Classifier, load_classifier, save_classifier

STAGE_ONE = (
    "train_vqgan.py --image-size 16 --ch 8 --ch-mult 1 2 --z-channels 8 --code-dim 4 --codebook-size 16 --batch-size 4 "
    "--steps 4 --val-images 8 --val-every 4 --disc-channels 8 --perceptual none --no-amp"
).split()
STAGE_TWO = (
    "train_gpt.py --n-layer 1 --n-head 2 --n-embd 16 --batch-size 4 --steps 8 --val-images 8 --val-every 4 "
    "--log-every 2 --save-every 3 --no-amp"
).split()


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    """First stages of pictures, of their label maps and of their edges, on 16-pixel crops; and one of shapes."""
    folder = tmp_path_factory.mktemp("two")
    rng = np.random.default_rng(0)
    make_photos(folder / "pairs" / "images", n=12, size=(24, 20))
    (folder / "pairs" / "labels").mkdir()
    for photo in (folder / "pairs" / "images").iterdir():
        coarse = Image.fromarray(rng.integers(0, 3, (5, 6), dtype=np.uint8))
        coarse.resize((24, 20), Image.Resampling.NEAREST).save(folder / "pairs" / "labels" / photo.name)
    for name, flags in (("rgb", ""), ("labels", "--input labels --num-labels 3"), ("edges", "--input edges")):
        done = run_inside(*STAGE_ONE, "--data", "pairs", "--resize", "20", "--out", name, *flags.split(), cwd=folder)
        assert done.returncode == 0, done.stderr
    for name, flags in (("shapes", ""), ("gray", "--input gray")):
        done = run_inside(*STAGE_ONE, "--out", name, *flags.split(), cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def stage_two(stage_one):
    """A transformer of each condition."""
    for out, flags in (
        ("class", "--vqgan shapes/last.pt"),
        ("gray", "--vqgan gray/last.pt"),
        ("maps", "--vqgan labels/last.pt --cond none"),
        ("none", "--vqgan rgb/last.pt --cond none --pkeep 0.9 --dropout 0.1"),
        ("coords", "--vqgan rgb/last.pt --cond coords --coord-levels 63"),
        ("spatial", "--vqgan rgb/last.pt --cond spatial --cond-vqgan labels/last.pt"),
        ("sketch", "--vqgan rgb/last.pt --cond spatial --cond-vqgan edges/last.pt --accumulate 2"),
        ("spiral", "--vqgan shapes/last.pt --cond none --order spiral-out --drop-cond 0"),
    ):
        done = run_inside(*STAGE_TWO, "--out", f"gpt_{out}", *flags.split(), cwd=stage_one)
        assert done.returncode == 0, done.stderr[-3000:]
        more = " --cond-image IMAGE" if "spatial" in flags else ""
        assert done.stdout.strip().endswith(f"next: python sample.py --gpt gpt_{out}/best.pt{more}")
    return stage_one


def test_a_run_leaves_what_it_promises(stage_two):
    run = stage_two / "gpt_class"
    assert {p.name for p in run.iterdir()} == {
        *"last.pt best.pt codes.pt config.json metrics.csv loss.png images .lock".split()
    }
    assert "step_0000008_samples.png" in {p.name for p in (run / "images").iterdir()}
    assert "step_0000008_completions.png" in {p.name for p in (run / "images").iterdir()}
    with open(run / "metrics.csv") as file:
        table = list(csv.DictReader(file))
    assert [r["step"] for r in table] == ["2", "4", "6", "8"]
    nats, bits = float(table[-1]["val_nats"]), float(table[-1]["val_bits_per_pixel"])
    assert bits == pytest.approx(nats * 64 / np.log(2) / 16**2, rel=1e-4)
    model = minvqgan.load(run / "best.pt")
    assert model.config.classes == ("disc", "square", "triangle", "star", "ring", "cross") and model.null == 16 + 6
    assert model.sample(torch.tensor([1, 2])).shape == (2, 3, 16, 16)


def test_held_out_nats_are_those_of_the_model(stage_two):
    """The number in metrics.csv against `nll` of the loaded model on the same pictures."""
    model = minvqgan.load(stage_two / "gpt_class" / "last.pt")
    _, val = data.open_data("shapes", 16)
    batch = next(data.held_out_batches(val, 8, 8))
    with open(stage_two / "gpt_class" / "metrics.csv") as file:
        written = float(list(csv.DictReader(file))[-1]["val_nats"])
    assert model.nll(batch["image"], batch["class"]).mean().item() == pytest.approx(written, rel=1e-4)


def test_table_of_tokens_is_what_encoding_on_the_fly_gives(stage_two, tmp_path):
    model = minvqgan.load(stage_two / "gpt_none" / "last.pt")
    make_photos(tmp_path, n=6, size=(16, 16))
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


def test_codes_are_computed_once(stage_two, monkeypatch):
    """A resumed run finds them in its folder. Another model, or a file that was changed, makes them anew."""
    resume = ["train_gpt.py", "--out", "gpt_class", "--resume", "--steps", "9"]
    done = run_inside(*resume, cwd=stage_two)
    assert done.returncode == 0 and "computing the codes" not in done.stdout, done.stderr
    codes = checkpoint.read(stage_two / "gpt_class" / "codes.pt")
    torch.save(codes | {"s": codes["s"] + 10**6}, stage_two / "gpt_class" / "codes.pt")  # no codes of this model
    done = run_inside(*resume[:-1], "10", cwd=stage_two)
    assert done.returncode == 0 and "computing the codes" in done.stdout, done.stderr
    model = minvqgan.load(stage_two / "gpt_none" / "last.pt")
    make_photos(stage_two / "few", n=3, size=(16, 16))
    train, _ = data.open_data(str(stage_two / "few"), 16)
    before = tokens._identity(model, train)
    assert tokens._identity(model, train) == before
    os.utime(next(iter(train.files[0].values())), (1, 1))
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


@pytest.mark.parametrize("out", ["class", "coords"])
def test_resumed_equals_uninterrupted_bit_for_bit(stage_two, tmp_path, out):
    flags = checkpoint.read(stage_two / f"gpt_{out}" / "last.pt")["flags"]
    words = [*STAGE_TWO, "--vqgan", flags["vqgan"], "--cond", flags["cond"], "--coord-levels", flags["coord_levels"]]
    # In a process of its own too: another number of threads adds up in another order.
    assert run_script(*words, "--out", tmp_path / "whole", cwd=stage_two).returncode == 0
    command = [sys.executable, str(ROOT / words[0]), *map(str, words[1:]), "--out", str(tmp_path / "run")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=stage_two, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while (
        not (tmp_path / "run" / "metrics.csv").exists() or "\n2," not in (tmp_path / "run" / "metrics.csv").read_text()
    ):
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been faster than the signal
        assert process.returncode == 143, err
        done = run_script("train_gpt.py", "--out", tmp_path / "run", "--resume", cwd=stage_two)
        assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "run" / "last.pt")


def test_train_gpt_mistakes(stage_two):
    for flags, words in (
        ("--vqgan nowhere.pt --out new", ["no checkpoint at nowhere.pt"]),
        ("--vqgan gpt_class/last.pt --out new", ["holds a two_stage, not a vqgan"]),
        ("--vqgan rgb/last.pt --out new", ["has no classes", "--cond none"]),
        ("--vqgan rgb/last.pt --cond spatial --out new", ["--cond spatial needs --cond-vqgan"]),
        ("--vqgan rgb/last.pt --cond none --n-head 3 --out new", ["--n-head 3 does not divide --n-embd 16"]),
        ("--vqgan rgb/last.pt --cond none --batch-size 3 --accumulate 2 --out new", ["cannot be split"]),
        ("--vqgan shapes/last.pt --out gpt_class", ["already holds a run", "--resume"]),
        ("--out gpt_class --resume --n-layer 2", ["--n-layer was 1"]),
        ("--out gpt_class --resume --steps 99 --accumulate 3", ["--batch-size 4 cannot be split into 1 processes x 3"]),
    ):
        assert_one_line_error(run_inside(*STAGE_TWO, *flags.split(), cwd=stage_two), *words)
    assert not (stage_two / "new").exists()


def sample(folder, out, *flags):
    return run_inside("sample.py", "--gpt", f"gpt_{out}/best.pt", *flags, cwd=folder)


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_sample_writes_grids_files_and_animations(stage_two):
    cell = 64 + 2  # 16 pixels, enlarged four times, and a frame of 2
    done = sample(stage_two, "class", "-n", "3", "--classes", "star,0", "--steps-gif", "steps.gif", "--guidance", "2")
    assert done.returncode == 0, done.stderr
    assert size_of(stage_two / "samples.png") == (3 * cell + 2, 2 * cell + 2)
    assert Image.open(stage_two / "steps.gif").n_frames > 10
    assert "codes/s" in done.stdout
    done = sample(stage_two, "class", "-n", "2", "--classes", "ring", "--out", "files")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (stage_two / "files").iterdir()) == ["ring_0000.png", "ring_0001.png"]
    assert size_of(stage_two / "files" / "ring_0000.png") == (16, 16)


def test_sample_is_the_same_for_any_batch_size(stage_two):
    grids = []
    for size in (1, 3, 64):
        out = f"batch_{size}.png"
        assert sample(stage_two, "class", "-n", "4", "--batch-size", size, "--out", out).returncode == 0
        grids.append(np.asarray(Image.open(stage_two / out)).astype(int))
    for other in grids[1:]:  # the same codes; the decoder's convolutions round in another way in another batch
        assert np.abs(grids[0] - other).max() <= 1
    assert sample(stage_two, "class", "-n", "4", "--seed", "9", "--out", "other.png").returncode == 0
    assert np.abs(grids[0] - np.asarray(Image.open(stage_two / "other.png"))).max() > 5


def test_sample_larger_than_the_model_has_seen(stage_two):
    for out, flags, expected in (
        ("none", ["-n", "1", "--size", "24x40"], (40, 24)),
        ("coords", ["-n", "1", "--size", "20x32"], (32 * 2, 20 * 2)),
        ("spatial", ["-n", "1", "--cond-image", "pairs/labels/photo_00.png"], (24 * 2 + 4, 2 * (20 * 2 + 2) + 2)),
        ("sketch", ["-n", "1", "--cond-image", "pairs/images/photo_00.png"], (24 * 2 + 4, 2 * (20 * 2 + 2) + 2)),
    ):
        done = sample(stage_two, out, "--out", f"large_{out}.png", *flags)
        assert done.returncode == 0, done.stderr
        assert size_of(stage_two / f"large_{out}.png") == expected, out


def test_completion_keeps_the_upper_rows(stage_two):
    make_photos(stage_two / "one", n=1, size=(16, 16))
    model = minvqgan.load(stage_two / "gpt_none" / "best.pt")
    done = sample(stage_two, "none", "-n", "2", "--complete", "one/photo_00.png", "--keep", "0.5", "--out", "done")
    assert done.returncode == 0, done.stderr
    x = torch.from_numpy(np.array(Image.open(stage_two / "one" / "photo_00.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    indices = model.vqgan.encode_indices(x)
    again = model.sample_indices(torch.zeros(2, 1), given=indices.expand(2, -1, -1), keep=32)
    truth = model.vqgan.decode_indices(again).clamp(-1, 1)
    for i in range(2):
        pixels = np.array(Image.open(stage_two / "done" / f"000{i}.png"))
        assert np.abs(pixels - ((truth[i] + 1) * 127.5).permute(1, 2, 0).numpy()).max() < 1


def test_rejection_keeps_the_images_that_the_classifier_likes(stage_two):
    torch.manual_seed(0)
    names = data.open_data("shapes", 16)[0].classes
    save_classifier(stage_two / "classifier.pt", Classifier(names))
    classifier = load_classifier(stage_two / "classifier.pt")
    done = sample(
        *(stage_two, "class", "-n", "2", "--classes", "star", "--reject", "0.25", "--classifier", "classifier.pt"),
        *("--out", "kept"),
    )
    assert done.returncode == 0, done.stderr
    model = minvqgan.load(stage_two / "gpt_class" / "best.pt")
    with torch.no_grad():
        images = model.sample(torch.full((8,), 3)).clamp(-1, 1)
        best = classifier(images).softmax(1)[:, 3].argsort(descending=True)[:2]
    for i, b in enumerate(best):
        pixels = np.array(Image.open(stage_two / "kept" / f"star_000{i}.png"))
        assert np.abs(pixels - ((images[b] + 1) * 127.5).permute(1, 2, 0).numpy()).max() < 1


def test_label_maps_are_drawn_by_their_largest_logit(stage_two, tmp_path):
    """Also where several logits are above 1, the largest value of an image."""
    model = minvqgan.load(stage_two / "gpt_maps" / "best.pt")
    with torch.no_grad():
        model.vqgan.decoder.conv_out.weight *= 1000
        model.vqgan.decoder.conv_out.bias += 5
    checkpoint.save(tmp_path / "maps.pt", "two_stage", **checkpoint.pack_two_stage(model))
    done = run_inside("sample.py", "--gpt", tmp_path / "maps.pt", "-n", "3", "--out", tmp_path / "maps", cwd=tmp_path)
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


def test_rejection_of_gray_images(stage_two):
    save_classifier(stage_two / "gray.pt", Classifier(data.open_data("shapes", 16)[0].classes))
    done = sample(stage_two, "gray", *"-n 1 --classes star --reject 0.5 --classifier gray.pt --out gray.png".split())
    assert done.returncode == 0 and (stage_two / "gray.png").exists(), done.stderr


def test_mirrored_images_are_the_first_stage_s(stage_one, tmp_path):
    """--flip or --no-flip of the first stage holds for the second, unless that says otherwise."""
    for words, expected in (("", True), ("--no-flip", False)):
        first = tmp_path / f"first{words}"
        done = run_inside(*STAGE_ONE, *words.split(), "--data", "pairs", "--out", first, cwd=stage_one)
        assert done.returncode == 0, done.stderr
        for more, wanted in (("", expected), ("--flip", True)):
            out = tmp_path / f"second{words}{more}"
            flags = ["--vqgan", first / "last.pt", "--cond", "none", *more.split(), "--out", out]
            done = run_inside(*STAGE_TWO, *flags, cwd=stage_one)
            assert done.returncode == 0, done.stderr
            assert checkpoint.read(out / "last.pt")["flags"]["flip"] is wanted


def test_sample_mistakes(stage_two):
    for out, flags, words in (
        ("class", ["--classes", "cat"], ["there is no 'cat'", "disc, square"]),
        ("class", ["--classes", "star,3"], ["names a class twice"]),
        ("class", ["--size", "large"], ["not a size like 256x512"]),
        ("class", ["--cond-image", "x.png"], ["conditioned on class"]),
        ("class", ["--reject", "0.5"], ["--classifier"]),
        ("class", ["--top-p", "2"], ["--top-p: 2.0 is more than 1"]),
        ("class", ["--steps-gif", "steps.mp4"], ["must end in .gif"]),
        ("none", ["--classes", "1"], ["conditioned on none"]),
        ("none", ["--guidance", "2"], ["dropped conditions"]),
        ("spatial", [], ["--cond-image"]),
        ("spiral", ["--size", "32x32"], ["spiral-out order"]),
    ):
        assert_one_line_error(sample(stage_two, out, *flags), *words)
    assert_one_line_error(run_inside("sample.py", cwd=stage_two), "no checkpoint at runs/gpt/best.pt")
    done = run_inside("sample.py", "--gpt", "gpt_class/best.pt", "--out", "one.jpg", cwd=stage_two)
    assert_one_line_error(done, "--out one.jpg", "a .png for one grid")
    assert_one_line_error(
        run_inside("sample.py", "--gpt", "rgb/last.pt", cwd=stage_two), "holds a VQGAN", "train_gpt.py"
    )
