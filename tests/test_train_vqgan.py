"""train_vqgan.py as a user runs it: what it leaves behind, resuming, and one line for each mistake.

What its loop does to the weights is in test_training.py; kills and signals from outside in test_interruption.py.
"""

import dataclasses
import json
import re
import runpy

import numpy as np
import pytest
from helpers import (
    ROOT,
    STAGE_ONE,
    assert_one_line_error,
    assert_same_run,
    metrics_rows,
    run_inside,
    run_interrupted,
)
from PIL import Image

import minvqgan
from minvqgan.gpt import GPTConfig
from minvqgan.harness import checkpoint, flags
from minvqgan.harness.data import open_data
from minvqgan.harness.run import Run
from minvqgan.objective import ObjectiveConfig
from minvqgan.two_stage import TwoStageConfig
from minvqgan.vqgan import VQGANConfig

TINY = [*STAGE_ONE, *"--steps 12 --val-every 6".split()]


def train(tmp_path, *flags):
    return run_inside(*TINY, "--out", "run", *flags, cwd=tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run, that several tests look at."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_leaves_what_it_promises(whole):
    folder, done = whole
    run = folder / "run"
    names = {"last.pt", "best.pt", "config.json", "metrics.csv", "loss.png", "images"}
    assert {p.name for p in run.iterdir()} == names
    assert [p.name for p in sorted((run / "images").iterdir())] == ["step_0000006.png", "step_0000012.png"]
    assert json.loads((run / "config.json").read_text())["flags"]["codebook_size"] == 16
    vqgan = minvqgan.load(run / "best.pt")
    assert vqgan.config.codebook_size == 16 and vqgan.config.f == 2

    table = metrics_rows(run)
    assert [int(r["step"]) for r in table] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in table if r["val_psnr"]] == ["6", "12"]
    assert all(float(r["seconds"]) > 0 for r in table)
    assert "held out l1" in done.stderr or "held out l1" in done.stdout
    last = done.stdout.strip().splitlines()
    assert "done in" in last[-2] and "run/images" in last[-2]
    assert last[-1] == "next: python train_gpt.py --vqgan run/last.pt"


def test_the_grid_shows_originals_reconstructions_and_codes(whole):
    image = Image.open(whole[0] / "run" / "images" / "step_0000012.png")
    scale = 64 // 16
    assert image.size == (8 * (16 * scale + 2) + 2, 3 * (16 * scale + 2) + 2)
    _, val = open_data("shapes", 16)
    pixels = np.asarray(image)[2::scale, 2::scale][:16, :16]
    truth = ((val[0, None]["image"] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, truth)


@pytest.mark.parametrize("step", [3, 7])
def test_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path, step):
    """Ctrl-C in a step before D learns and in one after, then --resume: the same bits, and the same rows."""
    stopped = run_interrupted(step, *TINY, "--out", "run", cwd=tmp_path)
    assert stopped.returncode == 130 and f"saved at step {step}" in stopped.stdout and "--resume" in stopped.stdout
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == step
    done = run_inside("train_vqgan.py", "--out", "run", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(whole[0] / "run" / "last.pt", tmp_path / "run" / "last.pt")
    one, other = ([row | {"seconds": ""} for row in metrics_rows(folder / "run")] for folder in (whole[0], tmp_path))
    assert one == other


def test_label_maps_are_resumed(tmp_path):
    assert train(tmp_path, *"--input labels --num-labels 9 --steps 2".split()).returncode == 0
    done = run_inside("train_vqgan.py", "--out", "run", "--resume", "--steps", "3", cwd=tmp_path)
    assert done.returncode == 0 and checkpoint.read(tmp_path / "run" / "last.pt")["step"] == 3, done.stderr


@pytest.mark.parametrize("ramp, best", [(0, 9), (0.25, 12)])
def test_the_best_model_has_met_the_discriminator(tmp_path, monkeypatch, ramp, best):
    """Scores rise from 1 to 4 at steps 3, 6, 9, 12; D has its full weight after step 6, or with a ramp after step 9."""
    plain, scores = Run.save_best, iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(Run, "save_best", lambda self, values, score, **how: plain(self, values, next(scores), **how))
    done = train(tmp_path, *f"--disc-start 0.5 --disc-warmup 0 --disc-ramp {ramp} --val-every 3".split())
    assert done.returncode == 0, done.stderr
    assert checkpoint.read(tmp_path / "run" / "best.pt")["step"] == best


def test_resume_mistakes(whole, tmp_path):
    run = whole[0] / "run"
    assert_one_line_error(run_inside(*TINY, "--out", run, cwd=tmp_path), "already holds a run", "--resume")
    again = ("train_vqgan.py", "--out", run, "--resume")
    assert_one_line_error(run_inside(*again, cwd=tmp_path), "is at step 12 of 12 already", "--steps")
    assert_one_line_error(run_inside(*again, "--ch", "16", cwd=tmp_path), "--ch was 8", "another --out")
    done = run_inside(*again, "--preset", "small", "--steps", "20", cwd=tmp_path)
    assert_one_line_error(done, "--preset was tiny")
    before = (run / "last.pt").read_bytes()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "last.pt").write_bytes(before[:5000])
    done = run_inside("train_vqgan.py", "--out", "broken", "--resume", cwd=tmp_path)
    assert_one_line_error(done, "broken/last.pt is truncated")
    assert (tmp_path / "broken" / "last.pt").read_bytes() == before[:5000]
    (tmp_path / "broken" / "last.pt").write_bytes((run / "best.pt").read_bytes())
    done = run_inside("train_vqgan.py", "--out", "broken", "--resume", "--steps", "20", cwd=tmp_path)
    assert_one_line_error(done, "has no ", "training cannot resume")
    assert_one_line_error(run_inside("train_vqgan.py", "--resume", cwd=tmp_path), "no checkpoint at runs/vqgan/last.pt")


def test_flags_that_cannot_work(tmp_path):
    for mistake, words in (
        (["--image-sise", "32"], ["unknown flag --image-sise", "did you mean --image-size"]),
        (["--batch-size", "4", "--accumulate", "3"], ["cannot be split"]),
        (["--norm-groups", "3"], ["--norm-groups 3 does not divide"]),
        (["--image-size", "4096", "--ch-mult", *["1"] * 13], ["--ch-mult has 13 levels"]),
        (["--image-size", "8"], ["--disc-layers 2 needs images of 16 pixels"]),
        (["--device", "cuda:7"], ["--device cuda:7 cannot be used here"]),
        (["--input", "labels"], ["needs --num-labels"]),
        (["--disc-start", "2"], ["--disc-start"]),
        (["--disc-lr", "0"], ["--disc-lr: 0.0 is not a"]),
        (["--num-res-blocks", "0"], ["--num-res-blocks is 0, not a whole number from 1"]),
        (["--dropout", "1.5"], ["--dropout is 1.5, not a number from 0 to 1"]),
        (["--lr", "nan"], ["--lr: nan is not a number above 0"]),
        (["--beta", "inf"], ["--beta is inf, not a number"]),
        (["--seed", "-1"], ["--seed: -1 is not a whole number from 0"]),
        (["--perceptual", "nowhere.pt"], ["no checkpoint at nowhere.pt"]),
    ):
        assert_one_line_error(train(tmp_path, *mistake), *words)
        assert not (tmp_path / "run").exists(), "nothing may be written before the flags are known to work"


def test_a_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    assert_one_line_error(train(tmp_path), "cannot write", "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_more_memory_than_there_is(tmp_path):
    done = train(tmp_path, "--device", "cpu", "--codebook-size", "1000000", "--code-dim", "1000000")
    assert_one_line_error(done, "out of memory", "--batch-size")


def test_label_maps_are_learned_with_cross_entropy(tmp_path):
    done = train(tmp_path, "--input", "labels", "--num-labels", "9", "--steps", "40", "--val-every", "20")
    assert done.returncode == 0, done.stderr
    values = [
        (float(r["val_cross_entropy"]), float(r["val_pixel_accuracy"]))
        for r in metrics_rows(tmp_path / "run")
        if r["val_usage"]
    ]
    assert values[-1][0] < values[0][0] and values[-1][1] > 0.4
    assert not any(r["disc_loss"] for r in metrics_rows(tmp_path / "run"))


@pytest.mark.parametrize(
    "flags",
    [
        "--loss vqvae --legacy --rotation --l2-norm",
        "--gumbel --input gray --disc-loss log --dropout 0.1",
        "--accumulate 2 --input edges --amp --workers 1 --no-flip",
        "--preset small --perceptual none --steps 2 --revive-every 0 --attn-resolutions 8 --input lowres",
    ],
)
def test_variants_run(tmp_path, flags):
    done = train(tmp_path, *flags.split())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["train_vqgan.py", "train_gpt.py"])
def test_every_flag_is_read_and_explained(script):
    """A flag that nothing reads is worse than none: it is set and believed. Those of the dataclasses are read as their
    fields, the others as `args.NAME` in the script or in what any run needs."""
    words = runpy.run_path(str(ROOT / script))
    configs = (VQGANConfig, ObjectiveConfig, GPTConfig, TwoStageConfig)
    fields = {field.name for config in configs for field in dataclasses.fields(config)}
    core = "".join(path.read_text() for path in (ROOT / "minvqgan").glob("*.py"))
    harness = ROOT / "minvqgan" / "harness"
    read = "".join(path.read_text() for path in (ROOT / script, harness / "run.py", harness / "tokens.py"))
    parsers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "parse", lambda p, *_: parsers.append(p))
        words["parse_flags"]()
    actions = [action for action in parsers[0]._actions if action.dest != "help"]
    assert len(actions) > 30
    for action in actions:
        name = action.dest
        in_core = name in fields and re.search(rf"[.]{name}\b", core)
        by_name = name in ("preset", "resume")  # these two are read in flags.parse
        assert in_core or by_name or re.search(rf"args[.]{name}\b", read), f"--{name} is read nowhere"
        assert action.help and len(action.help) > 2, f"--{name} has no help"


@pytest.mark.parametrize("script", ["train_vqgan.py", "train_gpt.py"])
def test_presets_are_complete(script):
    """Each names the same flags: nothing is inherited in silence. Learning rates may be given an image instead."""
    presets = runpy.run_path(str(ROOT / script))["PRESETS"]
    named = [set(re.findall(r"--(?:no-)?([a-z-]+)", text)) for text in presets.values()]
    rates = {"lr", "disc-lr", "base-lr"}
    assert len(named) == 3 and all(names - rates == named[0] - rates and names & rates for names in named)


def test_the_paper_preset_scales_its_learning_rate_with_the_batch(tmp_path):
    """4.5e-6 for each image of the whole batch, as in the official configuration."""
    small = "--preset paper --perceptual none --steps 2 --batch-size 6 --accumulate 3 --disc-layers 2".split()
    done = train(tmp_path, *small)
    assert done.returncode == 0, done.stderr
    assert [float(r["lr"]) for r in metrics_rows(tmp_path / "run")] == [pytest.approx(6 * 4.5e-6)]


def test_tensorboard_has_the_numbers_of_metrics_csv(tmp_path):
    """Written by torch, read back by TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(tmp_path, "--tensorboard").returncode == 0
    board = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in board.Images("images")] == [6, 12]
    for name in ("rec_loss", "disc_loss", "val_psnr", "usage"):
        written = [(int(r["step"]), float(r[name])) for r in metrics_rows(tmp_path / "run") if r[name]]
        seen = [(event.step, event.value) for event in board.Scalars(name)]
        assert seen == [(step, pytest.approx(value, rel=1e-4)) for step, value in written] and seen


def test_rows_are_means_over_their_interval(whole, tmp_path):
    """A row every 2 steps against the mean of the rows of a run that writes one each step."""
    assert train(tmp_path, "--log-every", "1").returncode == 0
    single = {int(r["step"]): r for r in metrics_rows(tmp_path / "run")}
    for row in metrics_rows(whole[0] / "run"):
        step = int(row["step"])
        for name in ("rec_loss", "codebook_loss"):
            mean = (float(single[step - 1][name]) + float(single[step][name])) / 2
            assert float(row[name]) == pytest.approx(mean, rel=1e-4)
