"""Runs in processes of their own: interrupted at random moments, over and over, they end with the bits of the
uninterrupted run; and several of them, started by torchrun, are one program.

Five interruptions each and one of two processes; `KILLS=50 pytest -m slow tests/test_interruption.py` for the long run.
What the gradients and the codebook of several processes are is in test_training.py.
"""

import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from helpers import STAGE_ONE, STAGE_TWO, assert_same_run, metrics_rows, run_script, start, succeeded
from PIL import Image

from minvqgan.harness import checkpoint

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", 5))
EVERY = "--val-every 20 --log-every 5 --save-every 7".split()
STAGES = {
    "train_vqgan.py": [*STAGE_ONE, *EVERY, "--data", "photos"],
    "train_gpt.py": [*STAGE_TWO, *EVERY, *"--vqgan rgb/last.pt --dropout 0.1 --pkeep 0.9 --drop-cond 0.3".split()],
}
WAYS = [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]  # and the script's exit code


def last_row(run) -> int:
    rows = metrics_rows(run) if (run / "metrics.csv").exists() else []
    return int(rows[-1]["step"]) if rows else 0


def end(process, run, number: int, after: int, delay: float) -> int:
    """Send the signal once metrics.csv shows the step `after`, and a delay; the exit code."""
    began = time.time()
    while process.poll() is None and last_row(run) < after:
        time.sleep(0.02)
        assert time.time() - began < 120
    time.sleep(delay)
    if process.poll() is None:
        os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    # While it still imports, Ctrl-C ends Python in its own way.
    assert "Traceback" not in err or err.endswith("KeyboardInterrupt\n"), err[-3000:]
    return process.returncode


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", STAGES)
def test_any_interruption_ends_with_the_same_bits(house, tmp_path, script, processes):
    """Two processes are killed all at once, as a machine that loses its power does."""
    kills = KILLS if processes == 1 else max(1, KILLS // 5)
    words, run, moment = [*STAGES[script], "--steps", 40 * kills], tmp_path / "run", random.Random(script)
    succeeded(run_script(*words, "--out", tmp_path / "whole", cwd=house, processes=processes))

    def saved() -> int:
        return checkpoint.read(run / "last.pt")["step"] if (run / "last.pt").exists() else 0

    def resumed() -> list:
        return [*words, "--out", run, *["--resume"] * bool(saved())]

    for i in range(kills):
        (number, expected), reached = WAYS[i % len(WAYS)], saved()
        if reached == 40 * kills:
            break
        # Some steps further on than the last; about one in six while it still starts.
        after = max(0, reached + moment.randint(-9, 50))
        process = start(*resumed(), cwd=house, processes=processes)
        code = end(process, run, number, after, moment.uniform(0, 0.3))
        # A signal that comes before the script listens ends it in Python's way; one after the end, not at all.
        assert code in (0, expected, -number) and saved() >= reached, (number, code)
    if saved() < 40 * kills:
        succeeded(run_script(*resumed(), cwd=house, processes=processes))
    assert_same_run(tmp_path / "whole", run)
    assert not list(run.glob(".*.part")), "half files are left"


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_of_a_terminal(tmp_path, processes):
    """It reaches every process at once: the readers, and all that torchrun has started, to which torchrun hands it on
    once more. The step under way is saved all the same."""
    (tmp_path / "photos").mkdir()
    # Large and without pattern: slow to read, so that training waits for its readers.
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "0.png", compress_level=1)
    for i in range(1, 100):
        os.link(tmp_path / "photos" / "0.png", tmp_path / "photos" / f"{i}.png")
    more = ["--workers", "2", "--data", "photos"] if processes == 1 else []
    words = [*STAGE_ONE, "--steps", "9999", "--log-every", "1", *more, "--out", "run"]
    process, began = start(*words, cwd=tmp_path, processes=processes), time.time()
    while not last_row(tmp_path / "run"):
        time.sleep(0.02)
        assert process.poll() is None and time.time() - began < 120
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "stopped and saved at step" in out, err[-3000:]
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] >= 1
    if processes == 1:  # torchrun ends in a way of its own
        assert process.returncode == 130 and "Traceback" not in err, err[-3000:]


def test_one_log_one_checkpoint_and_resume_with_another_number(house, tmp_path):
    """Two processes write once; one process continues where they stopped, with the images that come next."""
    words = [*STAGE_ONE, "--data", "photos", "--steps", "12", "--out", tmp_path / "run"]
    done = run_script(*words, cwd=house, processes=2)
    assert done.returncode == 0 and done.stdout.count("next: python train_gpt.py") == 1, done.stderr[-2000:]
    one, two = checkpoint.read(tmp_path / "run" / "last.pt")["random"]
    assert not torch.equal(one["cpu"], two["cpu"]), "dropout would be drawn once for the whole batch"
    for processes, steps in ((1, 16), (2, 20)):
        words = ["train_vqgan.py", "--out", tmp_path / "run", "--resume", "--steps", steps]
        succeeded(run_script(*words, cwd=house, processes=processes))
    steps = [int(row["step"]) for row in metrics_rows(tmp_path / "run")]
    assert steps == sorted({*range(2, 21, 2), *range(3, 21, 3)})


def test_samples_are_those_of_one_process(house, tmp_path):
    words = ["sample.py", "--gpt", house / "class" / "best.pt", "-n", "3", "--classes", "one,two", "--out"]
    succeeded(run_script(*words, "one.png", cwd=tmp_path))
    done = run_script(*words, "two.png", cwd=tmp_path, processes=2)
    assert done.returncode == 0 and done.stdout.count("6 images in") == 1, done.stderr[-2000:]
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "two.png"))
    assert np.abs(one - two).max() <= 1  # the decoder's batches are other ones, and round in another way
    done = run_script(*words[:3], "-n", "1", "--classes", "one", "--out", "1.png", cwd=tmp_path, processes=2)
    assert "1 images are fewer than the 2 processes" in done.stderr
