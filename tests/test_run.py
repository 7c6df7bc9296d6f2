"""A run as a part of other programs and other weather: called as a function, told to stop, refused a file, begun from
given weights. What the loops compute is in test_training.py, real kills are in test_interruption.py.
"""

import contextlib
import fcntl
import importlib.util
import multiprocessing
import os
import pty
import resource
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import matplotlib
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import (
    ROOT,
    STAGE_ONE,
    STAGE_TWO,
    assert_one_line_error,
    assert_same_run,
    fixture,
    metrics_rows,
    relative_error,
    run_inside,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

from minvqgan.harness import checkpoint, data, pictures, processes, run, runtime

PHOTOS = [*STAGE_ONE, "--data", "photos"]


@pytest.fixture
def folder(house, tmp_path, monkeypatch):
    """An empty current folder with the images and models of `house` in reach."""
    for name in ("photos", "rgb", "none"):
        (tmp_path / name).symlink_to(house / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(script: str):
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def global_state() -> list:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    streams, backend = [sys.stdout, sys.stderr, sys.argv], [matplotlib.get_backend(), os.environ.get("MPLBACKEND")]
    random = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]
    return [*handlers, *streams, *backend, *random, torch.get_num_threads(), dist.is_initialized(), os.getcwd()]


def test_main_is_a_function_that_leaves_its_process_as_it_was(folder):
    """Called twice, in a thread, and with a mistake, as a notebook, a debugger and a server do."""
    before = global_state()
    for script, words in ((PHOTOS, []), (STAGE_TWO, ["--vqgan", "one/last.pt", "--cond", "none"])):
        main, out = imported(script[0]).main, "one" if script is PHOTOS else "two"
        assert main([*script[1:], *words, "--out", out]) == 0
        codes = []
        argv = ["--out", out, "--resume", "--steps", "8"]
        thread = threading.Thread(target=lambda main=main, argv=argv, codes=codes: codes.append(main(argv)))
        thread.start()
        thread.join()
        assert codes == [0] and checkpoint.read(f"{out}/last.pt")["step"] == 8
        with pytest.raises(runtime.UserError, match="at step 8 of 8 already"):
            main(["--out", out, "--resume"])
        assert global_state() == before


@contextlib.contextmanager
def signal_at_step(step: int, number: int):
    """The signal comes in the middle of a step, counted by G's optimizer."""
    seen = []

    def note(optimizer, *_):
        seen.append(optimizer)
        if seen.count(seen[0]) == step:
            signal.raise_signal(number)

    hook = register_optimizer_step_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_printed_commands_run(folder, number, code):
    """The one to continue after a signal, and the next one; in a folder with a space in its name."""

    def follow(done, words: str):
        command = shlex.split(next(line for line in done.stdout.splitlines() if words in line).split(words)[1])
        assert command[0] == "python"
        more = STAGE_TWO[1:] if command[1] == "train_gpt.py" else []
        return run_inside(*command[1:], *more, cwd=folder)

    whole = run_inside(*PHOTOS, "--out", "whole", cwd=folder)
    with signal_at_step(3, number):
        stopped = run_inside(*PHOTOS, "--out", "my run", cwd=folder)
    assert stopped.returncode == code and "stopped and saved at step 3" in stopped.stdout
    done = follow(stopped, "continue with: ")
    assert whole.returncode == done.returncode == 0
    assert_same_run(folder / "whole" / "last.pt", folder / "my run" / "last.pt")
    done = follow(done, "next: ")
    assert done.returncode == 0, done.stderr
    assert checkpoint.read(folder / "runs" / "gpt" / "last.pt")["step"] == 6


def test_other_images_can_be_modelled_themselves_or_be_a_condition(folder):
    done = run_inside(*PHOTOS, "--input", "gray", "--out", "gray", cwd=folder)
    last = done.stdout.strip().splitlines()[-2:]
    assert last[0] == "next: python train_gpt.py --vqgan gray/last.pt"
    assert last[1].endswith("python train_gpt.py --vqgan RGB.pt --cond spatial --cond-vqgan gray/last.pt")


def test_a_signal_during_the_all_reduce_is_not_lost(monkeypatch):
    """It must not end this step, which the other processes go on from, but the next."""

    def all_reduce(flag, **_):
        if not stopper.signal:
            signal.raise_signal(signal.SIGTERM)  # after this process's number was copied: the others hear of it later

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(processes, "cpu_group", lambda: None)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        stopper = run.Stopper()
        assert not stopper.stop()
        assert stopper.stop() and stopper.agreed == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])


def refuse(path, *_):
    raise PermissionError(13, "Permission denied", str(path))


def test_files_that_another_program_has_open_do_not_end_a_run(folder, monkeypatch):
    """metrics.csv, loss.png and a grid are refused, which is said once each; a resumed run writes the missing rows."""
    plain = run_inside(*PHOTOS, "--out", "plain", cwd=folder)
    with monkeypatch.context() as patch:
        patch.setattr(run.MetricsFile, "write", refuse)
        patch.setattr(pictures, "plot_columns", refuse)
        patch.setattr(pictures, "save_grid", refuse)
        done = run_inside(*PHOTOS, "--out", "refused", cwd=folder)
    assert done.returncode == plain.returncode == 0, done.stderr
    for name in ("metrics.csv", "loss.png"):
        assert done.stdout.count(f"cannot write refused/{name} (Permission denied)") == 1
    assert metrics_rows(folder / "refused") == []
    for out in ("refused", "plain"):
        run_inside("train_vqgan.py", "--out", out, "--resume", "--steps", "9", cwd=folder)
    for ours, truth in zip(*(metrics_rows(folder / out) for out in ("refused", "plain")), strict=True):
        assert ours | {"seconds": 0} == truth | {"seconds": 0}


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


def test_a_log_file_gets_a_line_every_log_interval(folder, monkeypatch):
    done = run_inside(*PHOTOS, "--out", "run", cwd=folder)
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2/6", "step 4/6", "step 6/6"] and "\r" not in done.stderr
    assert "rec_loss" in lines[1] and "disc_loss" in lines[1] and "minutes left" in lines[1]
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert "step " not in run_inside(*PHOTOS, "--out", "quiet", cwd=folder).stderr


@pytest.mark.slow
@pytest.mark.parametrize("disable", ["", "1"])
def test_a_terminal_gets_a_bar_and_tqdm_variables_hold(folder, disable):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))  # a new one has no columns, nor a bar
    env = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": disable}
    command = [sys.executable, str(ROOT / PHOTOS[0]), *PHOTOS[1:], "--out", "run"]
    assert subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=theirs, timeout=120).returncode == 0
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that nobody writes any more
        while part := os.read(ours, 1000):
            shown += part
    os.close(ours)
    assert (b"it/s" in shown and b"rec_loss=" in shown) != bool(disable)


def weights(path) -> dict:
    return checkpoint.read(path)["model"]


# Nothing moves: what a run ends with is what it began with.
STILL = "--steps 1 --lr 1e-12 --disc-lr 1e-12 --revive-every 0".split()


def test_initial_weights_do_not_depend_on_the_perceptual_network(folder):
    for name in ("small", "none"):
        assert run_inside(*PHOTOS, *STILL, "--perceptual", name, "--out", f"with_{name}", cwd=folder).returncode == 0
    for part in ("model", "discriminator"):
        one, other = (checkpoint.read(f"with_{name}/last.pt")[part] for name in ("small", "none"))
        assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one if "recent_use" not in key)


def test_a_run_begins_with_given_weights(folder):
    old = weights("rgb/last.pt")
    done = run_inside(*PHOTOS, *STILL, "--init", "rgb/last.pt", "--out", "same", cwd=folder)
    assert done.returncode == 0 and "weights from rgb/last.pt" in done.stdout, done.stderr
    new = weights("same/last.pt")
    assert all(torch.allclose(new[key], old[key], atol=1e-6) for key in old if "recent_use" not in key)

    words = ["--init", "rgb/last.pt", "--codebook-size", "32", "--out", "more"]
    done = run_inside(*PHOTOS, *STILL, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(weights("more/last.pt")["quantizer.codebook.weight"][:16], old["quantizer.codebook.weight"])

    gpt = [*STAGE_TWO, *"--vqgan rgb/last.pt --cond none --steps 1 --lr 1e-12 --init none/last.pt --out gpt".split()]
    assert run_inside(*gpt, cwd=folder).returncode == 0
    old, new = (checkpoint.read(f"{name}/last.pt")["gpt"] for name in ("none", "gpt"))
    assert all(torch.allclose(new[key], old[key], atol=1e-6) for key in old)

    done = run_inside(*PHOTOS, "--init", "photos/one/photo_00.png", "--out", "odd", cwd=folder)
    assert_one_line_error(done, "photo_00.png")


def test_a_run_begins_with_official_weights(folder):
    fx = fixture("vqgan")
    torch.save({"state_dict": fx["state_dict"]}, "official.ckpt")
    flags = (
        "--ch 32 --ch-mult 1 2 --attn-resolutions 8 --norm-groups 32 --z-channels 32 --codebook-size 64 --code-dim 16"
    )
    done = run_inside(*PHOTOS, *STILL, *flags.split(), "--init", "official.ckpt", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    model = checkpoint.load_vqgan("run/last.pt")
    assert relative_error(model.decode_indices(fx["indices"]), fx["x_rec"]) < 1e-4


@pytest.mark.parametrize("slow, fastest", [(lambda n: n > 1, 1), (lambda n: n == 1, 2)])
def test_as_many_threads_as_are_fastest(monkeypatch, slow, fastest):
    """A busy machine, where two threads wait for each other, and an idle one."""
    with runtime.global_state_restored():
        torch.set_num_threads(2)
        monkeypatch.setattr(F, "conv2d", lambda *_: time.sleep(0.002 if slow(torch.get_num_threads()) else 0))
        assert runtime.pick_threads(None) == fastest == torch.get_num_threads()
        assert runtime.pick_threads(2) == 2 == torch.get_num_threads()


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
        (OSError(28, "No space left on device", "last.pt"), "error: cannot write: No space left on device (last.pt)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "error: out of memory; try a smaller --batch-size"),
        (RuntimeError("unable to allocate shared memory(shm) for file </t>"), "error: too little shared memory"),
    ):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit, match="2"):
            runtime.run(main)
        assert capsys.readouterr().err.startswith(line)
    with pytest.raises(ZeroDivisionError):
        runtime.run(lambda: 1 / 0)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_vqgan.py", "train_gpt.py", "sample.py"])
def test_help_comes_as_soon_as_torch_is_there(script):
    def cpu_seconds(*words) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *words], env=env, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    torch_alone = min(cpu_seconds("-c", "import torch") for _ in range(3))
    assert min(cpu_seconds(ROOT / script, "--help") for _ in range(3)) < 1.3 * torch_alone


def test_a_resumed_run_remembers_its_rows_and_its_best_score(tmp_path):
    """With a score that no model reaches, best.pt stays as it was; metrics.csv keeps the row of the step before."""
    done = run_inside(*STAGE_ONE, "--loss", "vqvae", "--steps", "4", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    torch.save(torch.load(run / "last.pt", weights_only=True) | {"best": -1.0}, run / "last.pt")
    best = (run / "best.pt").read_bytes()
    done = run_inside("train_vqgan.py", "--out", "run", "--resume", "--steps", "6", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (run / "best.pt").read_bytes() == best
    assert [int(row["step"]) for row in metrics_rows(run)] == [2, 3, 4, 6]  # 3 has held-out numbers
