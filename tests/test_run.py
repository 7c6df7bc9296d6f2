"""Both training scripts as a user runs them: what a run leaves behind, resuming, signals, refused files, flags.

What the loops compute is in test_training.py, mistakes are in test_bad_input.py, real kills in test_interruption.py.
"""

import dataclasses
import io
import json
import multiprocessing
import os
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import (
    ROOT,
    STAGE_ONE,
    STAGE_TWO,
    assert_same_run,
    metrics_rows,
    run_inside,
    run_interrupted,
    succeeded,
)
from PIL import Image

import minvqgan
from minvqgan.gpt import GPTConfig
from minvqgan.harness import checkpoint, data, flags, pictures, processes, run, runtime
from minvqgan.objective import ObjectiveConfig
from minvqgan.two_stage import TwoStageConfig
from minvqgan.vqgan import VQGANConfig

PHOTOS = [*STAGE_ONE, "--data", "photos"]
SCRIPTS = ["train_vqgan.py", "train_gpt.py"]


@pytest.fixture
def folder(house, tmp_path, monkeypatch):
    """An empty current folder with the images and models of `house` in reach."""
    for path in house.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(*words, out: str = "run") -> subprocess.CompletedProcess:
    """The script, run in the current folder without an error."""
    return succeeded(run_inside(*words, "--out", out, cwd=os.getcwd()))


@pytest.mark.parametrize("name", ["rgb", "labels", "class", "none", "coords", "spatial"])
def test_a_run_leaves_what_it_promises(house, name):
    second = name in ("class", "none", "coords", "spatial")
    codes = {"codes.pt"} if name in ("class", "none") else set()  # random crops are encoded on the fly
    promised = {*"last.pt best.pt config.json metrics.csv loss.png images".split()}
    assert {p.name for p in (house / name).iterdir()} == promised | codes
    kinds = ("_samples", "_completions") if second else ("",)
    images = {f"step_{i:07d}{kind}.png" for i in (3, 6) for kind in kinds}
    assert {p.name for p in (house / name / "images").iterdir()} == images
    rows = metrics_rows(house / name)
    assert [row["step"] for row in rows] == ["2", "3", "4", "6"] and float(rows[0]["seconds"]) > 0
    assert [row["step"] for row in rows if row["lr"]] == ["2", "4", "6"]
    assert any(row.get("disc_loss") for row in rows) == (name == "rgb"), "no D for label maps"
    assert [row["step"] for row in rows if row["val_nats" if second else "val_usage"]] == ["3", "6"]
    assert json.loads((house / name / "config.json").read_text())["flags"]["steps"] == 6
    model = minvqgan.load(house / name / "best.pt")
    assert getattr(model, "vqgan", model).config.codebook_size == 16


def test_the_grid_shows_originals_reconstructions_and_codes(house):
    image = Image.open(house / "rgb" / "images" / "step_0000006.png")
    _, val = data.open_data(str(house / "photos"), 16)
    assert image.size == (len(val) * (64 + 2) + 2, 3 * (64 + 2) + 2)  # enlarged four times
    pixels = np.asarray(image)[2::4, 2::4][:16, :16]
    assert np.array_equal(pixels, ((val[0, None]["image"] + 1) * 127.5).round().permute(1, 2, 0).numpy())


def test_a_row_is_the_mean_over_its_interval(folder):
    """A row every 2 steps against the rows of a run that writes one each step."""
    trained(*PHOTOS, "--log-every", "1")
    single = {int(row["step"]): row for row in metrics_rows(folder / "run")}
    for row in metrics_rows(folder / "rgb")[::2]:
        step, name = int(row["step"]), "rec_loss"
        if row[name]:
            mean = (float(single[step - 1][name]) + float(single[step][name])) / 2
            assert float(row[name]) == pytest.approx(mean, rel=1e-4)


def follow(done, words: str) -> None:
    """Run the command that a script has printed behind `words`."""
    command = shlex.split(next(line for line in done.stdout.splitlines() if words in line).split(words)[1])
    more = STAGE_TWO[1:] if command[1] == "train_gpt.py" and "--resume" not in command else []
    done = run_inside(*command[1:], *more, cwd=os.getcwd())
    assert command[0] == "python" and done.returncode == 0, done.stderr[-2000:]


CROPS = [*STAGE_TWO, *"--vqgan rgb/last.pt --data pairs --resize 20 --cond coords --dropout 0.1 --accumulate 2".split()]
RESUMED = {
    "before D": (PHOTOS, 2, signal.SIGINT),
    "after D has begun": (PHOTOS, 5, signal.SIGTERM),
    "label maps": ([*STAGE_ONE, *"--input labels --num-labels 9".split()], 3, signal.SIGINT),
    "codes of a table": ([*STAGE_TWO, "--vqgan", "rgb/last.pt"], 4, signal.SIGINT),
    "codes of random crops": (CROPS, 4, signal.SIGINT),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_equals_uninterrupted_bit_for_bit(folder, name):
    """By the command that the script prints after a signal; in a folder with a space in its name."""
    words, step, number = RESUMED[name]
    trained(*words, out="whole")
    stopped = run_interrupted(step, *words, "--out", "my run", cwd=folder, number=number)
    assert stopped.returncode == 128 + number and f"stopped and saved at step {step}" in stopped.stdout
    assert checkpoint.read("my run/last.pt")["step"] == step
    table = folder / "my run" / "codes.pt"
    made = table.exists() and table.stat().st_mtime_ns
    follow(stopped, "continue with: ")
    assert bool(made) == ("table" in name) and (not made or table.stat().st_mtime_ns == made), "computed once"
    assert_same_run(folder / "whole", folder / "my run")


def test_a_run_of_an_older_version_keeps_its_rows(folder):
    trained(*PHOTOS)
    rows, content = metrics_rows(folder / "run"), torch.load("run/last.pt", weights_only=True)
    for name in ("threads", "rows", "values"):
        del content[name]
    content["seconds"] = 1000.0
    torch.save(content, "run/last.pt")
    with open("run/metrics.csv", "a") as file:  # after its last save
        file.write("7,9.9\n")
    trained("train_vqgan.py", "--resume", "--steps", "30")
    resumed = metrics_rows(folder / "run")
    assert resumed[: len(rows)] == [row | {"revived": ""} for row in rows]  # a column that they did not have
    assert resumed[-1]["step"] == "30"
    new = resumed[len(rows) :]
    assert all(1000 <= float(row["seconds"]) < 1600 for row in new)
    # D began at 0.3 of the 6 steps that were planned, and stays; at 0.3 of 30 it would pause.
    assert all(row["disc_loss"] for row in new if row["lr"])


def test_the_next_command_runs(folder):
    follow(trained(*PHOTOS), "next: ")
    assert checkpoint.read("runs/gpt/last.pt")["step"] == 6
    assert "--cond spatial --cond-vqgan gray/last.pt" in trained(*PHOTOS, "--input", "gray", out="gray").stdout


def test_main_is_a_function_that_leaves_its_process_as_it_was(folder, monkeypatch):
    """Called twice and with a mistake, as a notebook and results/ do."""

    def state() -> list:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return [*handlers, torch.get_rng_state().tolist(), torch.get_num_threads(), dist.is_initialized()]

    monkeypatch.syspath_prepend(str(ROOT))
    import train_gpt
    import train_vqgan

    before = state()
    for main, words in ((train_vqgan.main, PHOTOS[1:]), (train_gpt.main, [*STAGE_TWO[1:], "--vqgan", "run/last.pt"])):
        out = ["--out", "run" if main is train_vqgan.main else "gpt"]
        assert main([*words, *out]) == main([*out, "--resume", "--steps", "8"]) == 0
        with pytest.raises(runtime.UserError, match="at step 8 of 8 already"):
            main([*out, "--resume"])
        assert state() == before


def test_a_signal_during_the_exchange_of_signals_is_not_lost(folder, monkeypatch):
    """It must not end this step, which the other processes go on from, but the next."""
    calls = []

    def gather(mine):
        calls.append(mine)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)  # after this process's number was sent
        return [mine]

    monkeypatch.setattr(processes, "gather", gather)
    done = run_inside(*PHOTOS, "--out", "run", cwd=folder)
    assert done.returncode == 143 and checkpoint.read("run/last.pt")["step"] == 2


def refuse(path, *_):
    raise PermissionError(13, "Permission denied", str(path))


def test_files_that_another_program_has_open_do_not_end_a_run(folder, monkeypatch):
    """metrics.csv, loss.png and a grid are refused; a resumed run writes the missing rows."""
    trained(*PHOTOS, out="plain")
    with monkeypatch.context() as patch:
        for module, name in ((run, "write_csv"), (pictures, "plot_columns"), (pictures, "save_grid")):
            patch.setattr(module, name, refuse)
        said = trained(*PHOTOS, out="refused").stdout
    for name in ("metrics.csv", "loss.png", "images/step_0000006.png"):
        assert f"cannot write refused/{name} (Permission denied)" in said
    assert not (folder / "refused" / "metrics.csv").exists()
    for out in ("refused", "plain"):
        trained("train_vqgan.py", "--resume", "--steps", "9", out=out)
    assert_same_run(folder / "refused", folder / "plain")


def test_a_refused_rename_is_tried_again(tmp_path, monkeypatch):
    replace, waits, refusals = os.replace, [], [1, 1]

    def refused_twice(*paths):
        refuse(paths[1]) if refusals and refusals.pop() else replace(*paths)

    monkeypatch.setattr(os, "replace", refused_twice)
    monkeypatch.setattr(time, "sleep", waits.append)
    checkpoint.save(tmp_path / "a.pt", "codes", s=torch.ones(2))
    assert checkpoint.read(tmp_path / "a.pt")["s"].tolist() == [1, 1] and len(waits) == 2
    refusals += [1] * 9
    with pytest.raises(PermissionError):
        checkpoint.save(tmp_path / "a.pt", "codes", s=torch.zeros(2))
    assert checkpoint.read(tmp_path / "a.pt")["s"].tolist() == [1, 1] and os.listdir(tmp_path) == ["a.pt"]


def test_codes_out_of_use_are_said(folder):
    for every, few in (("20", False), ("0", True)):  # without revival few codes win every comparison
        said = trained(*PHOTOS, *"--steps 1 --revive-every".split(), every, out=every).stdout
        assert (float(metrics_rows(folder / every)[-1]["val_usage"]) < 0.5) == few
        assert ("less than half of the codes in use" in said) == few


def test_a_log_file_gets_a_line_every_log_interval(folder):
    err = trained(*PHOTOS).stderr
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 2/6", "step 4/6", "step 6/6"] and "\r" not in err
    assert "rec_loss" in lines[1] and "disc_loss" in lines[1]


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert not runtime.progress_bar(0, total=1).disable and runtime.progress_bar(1, total=1).disable


# Nothing moves: what a run ends with is what it began with.
STILL = "--steps 1 --lr 1e-12 --disc-lr 1e-12 --revive-every 0".split()


def assert_same_weights(one: str, other: str, parts: tuple[str, ...]) -> None:
    a, b = (checkpoint.read(f"{name}/last.pt") for name in (one, other))
    for part in parts:
        assert all(torch.allclose(a[part][key], b[part][key], atol=1e-6) for key in a[part] if "recent_use" not in key)


def test_initial_weights_do_not_depend_on_the_perceptual_network(folder):
    for name in ("small", "none"):
        trained(*PHOTOS, *STILL, "--perceptual", name, out=f"with_{name}")
    assert_same_weights("with_small", "with_none", ("model", "discriminator"))


def test_a_run_begins_with_given_weights(folder):
    assert "weights from rgb/last.pt" in trained(*PHOTOS, *STILL, "--init", "rgb/last.pt", out="same").stdout
    assert_same_weights("rgb", "same", ("model",))
    words = "--vqgan rgb/last.pt --cond none --steps 1 --lr 1e-12 --init none/last.pt"
    trained(*STAGE_TWO, *words.split(), out="gpt")
    assert_same_weights("none", "gpt", ("gpt",))


@pytest.mark.parametrize("slow, fastest", [(lambda n: n > 1, 1), (lambda n: n == 1, 2)])
def test_as_many_threads_as_are_fastest(monkeypatch, slow, fastest):
    """A busy machine, where two threads wait for each other, and an idle one."""
    with runtime.global_state_restored():
        torch.set_num_threads(2)
        monkeypatch.setattr(F, "conv2d", lambda *_: time.sleep(0.002 if slow(torch.get_num_threads()) else 0))
        assert runtime.fastest_threads() == fastest and torch.get_num_threads() == 2


def test_an_error_ends_the_loader_processes():
    """Python waited for them forever at its exit: they ignore SIGTERM, and the traceback kept the loader alive."""

    @runtime.global_state_restored()
    def main():
        batches = data.train_loader(data.open_data("shapes", 16)[0], 1, seed=0, start=0, workers=1)
        assert next(batches) and multiprocessing.active_children()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as kept:
        main()
    assert kept.tb and not multiprocessing.active_children()


def test_errors_that_are_no_bugs_are_one_line(capsys):
    """Everything else stays a traceback."""
    for error, line in (
        (OSError(28, "No space left on device", "last.pt"), "cannot read or write last.pt: No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory; try a smaller --batch-size"),
        (RuntimeError("unable to allocate shared memory(shm) for file </t>"), "too little shared memory"),
    ):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit, match="2"):
            runtime.run(main)
        assert capsys.readouterr().err.startswith(f"error: {line}")
    with pytest.raises(ZeroDivisionError):
        runtime.run(lambda: 1 / 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[ROOT / name, "--help"] for name in (*SCRIPTS, "sample.py")] + [["-c", "import minvqgan"]]
)
def test_help_comes_as_soon_as_torch_is_there(words):
    def cpu_seconds(*words) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *words], env=env, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    torch_alone = min(cpu_seconds("-c", "import torch") for _ in range(3))
    assert min(cpu_seconds(*words) for _ in range(3)) < 1.3 * torch_alone


@pytest.mark.parametrize(
    "flags",
    [
        "--loss vqvae --legacy --rotation --l2-norm",
        "--gumbel --input gray --disc-loss log --dropout 0.1",
        "--accumulate 2 --input edges --amp --workers 1 --no-flip --checkpoint-grad",
        "--preset small --perceptual none --steps 2 --revive-every 0 --attn-resolutions 8 --input lowres",
    ],
)
def test_variants_run(folder, flags):
    trained(*STAGE_ONE, *flags.split())


@pytest.mark.parametrize("script", SCRIPTS)
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_presets_are_complete(script):
    """Each names the same flags: nothing is inherited in silence. Learning rates may be given an image instead."""
    presets = runpy.run_path(str(ROOT / script))["PRESETS"]
    named = [set(re.findall(r"--(?:no-)?([a-z-]+)", text)) for text in presets.values()]
    rates = {"lr", "disc-lr", "base-lr"}
    assert len(named) == 3 and all(names - rates == named[0] - rates and names & rates for names in named)


def test_the_paper_preset_scales_its_learning_rate_with_the_batch(folder):
    """4.5e-6 for each image of the whole batch, as in the official configuration."""
    trained(
        *STAGE_ONE, *"--preset paper --perceptual none --steps 2 --batch-size 6 --accumulate 3 --disc-layers 2".split()
    )
    assert [float(row["lr"]) for row in metrics_rows(folder / "run")] == [pytest.approx(6 * 4.5e-6)]
