"""sample.py as a user runs it, on the models of `house`; and the tokens that train_gpt.py learns from."""

import runpy
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT, STAGE_TWO, assert_one_line_error, make_photos, run_inside
from PIL import Image

import minvqgan
from minvqgan.harness import checkpoint, data, runtime, tokens
from minvqgan.harness.judges import load_classifier
from minvqgan.orders import ORDERS
from minvqgan.two_stage import TwoStage


def test_table_of_tokens_is_what_encoding_on_the_fly_gives(house, tmp_path):
    model = minvqgan.load(house / "none" / "last.pt")
    for part in ("train", "val"):
        make_photos(tmp_path / part, n=5, size=(16, 16))
    train, _ = data.open_data(str(tmp_path), 16)
    assert train.fixed and train.flip
    s, r = tokens.table(model, train, tokens.condition_input(model), torch.device("cpu"))
    assert s.shape == (5, 2, 64) and r.shape == (5, 2, 1)
    for i in range(5):
        x = train[i, None]["image"][None]
        assert torch.equal(s[i].long(), model.image_tokens(torch.cat([x, x.flip(-1)])))
    stream = tokens.rows_of(s[:4], r[:4], data.Stream(4, seed=0), 4, torch.device("cpu"))
    two_epochs = torch.cat([next(stream)[0], next(stream)[0]])
    assert {tuple(t.tolist()) for t in two_epochs} == {tuple(t.tolist()) for t in s[:4].flatten(0, 1)}


def test_codes_are_computed_anew_for_other_images_and_in_place_of_a_broken_file(house, tmp_path):
    def trained(*words):
        return run_inside("train_gpt.py", *words, "--out", "run", cwd=tmp_path).stdout

    make_photos(tmp_path / "photos", n=6, size=(16, 16))
    first = [*STAGE_TWO[1:], "--vqgan", house / "rgb/last.pt", "--cond", "none", "--data", "photos"]
    assert "computing the codes" in trained(*first)
    assert "computing the codes" not in trained("--resume", "--steps", "7")
    make_photos(tmp_path / "photos", n=9, size=(16, 16))
    assert "computing the codes" in trained("--resume", "--steps", "8")
    make_photos(tmp_path / "others", n=9, size=(16, 16))
    assert "computing the codes" in trained("--resume", "--steps", "9", "--data", "others")
    (tmp_path / "run" / "codes.pt").write_bytes(b"")
    assert "computing the codes" in trained("--resume", "--steps", "10")
    assert len(checkpoint.read(tmp_path / "run" / "codes.pt")["s"]) == len(data.open_data(f"{tmp_path}/others", 16)[0])


def test_mirrored_images_keep_the_coordinates_of_their_place(tmp_path):
    """Codes that are computed once against what a random draw of the dataset gives for the same image."""
    make_photos(tmp_path, n=2, size=(16, 16))
    train, _ = data.open_data(str(tmp_path), 16, sources=("image", "coords"))
    batch = {k: torch.as_tensor(v)[None] for k, v in train[0, None].items()}
    mirrored = next(d for i in range(10) if not torch.equal((d := train[0, i])["image"], batch["image"][0]))
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


def test_sample_writes_grids_files_and_animations(sample, house, tmp_path):
    """Images of several classes may share a batch; each is that of its class and number."""
    done = sample("class", "-n", "3", "--classes", "two,0,1", "--batch-size", "2", "--out", "files")
    assert done.returncode == 0 and "codes/s" in done.stdout, done.stderr
    images = minvqgan.load(house / "class" / "best.pt").sample(torch.tensor([1, 1, 1, 0, 0, 0]))
    names = [f"{name}_000{i}.png" for name in ("two", "one") for i in range(3)]
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == sorted(names)
    for name, image in zip(names, images, strict=True):
        assert_shows(tmp_path / "files" / name, image)
    cell = 64 + 2  # 16 pixels, enlarged four times, and a frame of 2
    assert sample("class", "-n", "3", "--guidance", "2", "--steps-gif", "steps.gif").returncode == 0
    assert Image.open(tmp_path / "samples.png").size == (3 * cell + 2, 2 * cell + 2)
    assert Image.open(tmp_path / "steps.gif").n_frames > 10


def test_sample_is_the_same_for_any_batch_size(sample, tmp_path):
    grids = []
    for size in (1, 3, 64):
        assert sample("class", "-n", "4", "--batch-size", size, "--out", f"{size}.png").returncode == 0
        grids.append(open_image(tmp_path / f"{size}.png"))
    for other in grids[1:]:  # the same codes; the decoder's convolutions round in another way in another batch
        assert (grids[0] - other).abs().max() <= 1.01 / 127.5
    assert sample("class", "-n", "4", "--seed", "9", "--out", "other.png").returncode == 0
    assert (grids[0] - open_image(tmp_path / "other.png")).abs().max() > 0.05


@pytest.mark.parametrize(
    "out, answer",
    [
        ("/proc/samples.png", "cannot read or write /proc/"),
        ("file/samples.png", "cannot read or write file"),
        ("file/folder", "cannot read or write file/folder"),
        ("folder.png", "folder.png is a folder"),
        ("", "--out: is empty"),
    ],
)
def test_what_cannot_be_written_is_found_before_the_sampling(sample, tmp_path, monkeypatch, out, answer):
    """/proc stands for a folder without write permission, which an administrator has everywhere else."""
    monkeypatch.setattr(TwoStage, "sample_indices", None)  # an error, if it were called
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert_one_line_error(sample("class", "--out", out), answer)


@pytest.mark.parametrize("words", ["sample.py -n 1", "evaluate.py --features none --images 2"])
def test_threads_are_chosen_unless_the_user_has(house, tmp_path, monkeypatch, words):
    """Other programs on the same cores make many threads up to ten times slower than one."""
    fastest = mock.Mock(return_value=1)
    monkeypatch.setattr(runtime, "fastest_threads", fastest)
    for calls in (0, 1):
        words += f" --gpt none/best.pt --out {tmp_path / str(calls)}"
        done = run_inside(*words.split(), cwd=house)
        assert (done.returncode, fastest.call_count) == (0, calls), done.stderr
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


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


def test_the_middle_of_an_image_is_cut_out_and_an_animation_follows_the_order(tmp_path):
    """White images of 4 x 4 codes, read from the middle outwards; the fifth frame shows the first four."""
    script = runpy.run_path(str(ROOT / "sample.py"))
    x = torch.arange(80.0).view(1, 1, 8, 10)
    assert torch.equal(script["cover"](x, 4, 6, shrink=False), x[:, :, 2:6, 2:8])
    order = ORDERS["spiral-out"](4)
    model = SimpleNamespace(order=order, vqgan=SimpleNamespace(config=SimpleNamespace(f=2)))
    script["save_steps"](tmp_path / "a.gif", model, script["Plan"]((4, 4), c=None), [torch.ones(1, 3, 8, 8)])
    with Image.open(tmp_path / "a.gif") as gif:
        gif.seek(4)
        shown = np.asarray(gif.convert("L"))[2:66, 2:66][8::16, 8::16] > 200
    assert set(np.flatnonzero(shown)) == set(order[:4].tolist())


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
