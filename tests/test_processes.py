"""Several processes under torchrun are one program: one log, one checkpoint, random numbers of their own.

Their gradients and their codebook are in test_training.py.
"""

import os
import signal
import time

import numpy as np
import pytest
import torch
from helpers import (
    STAGE_ONE,
    STAGE_TWO,
    assert_same_run,
    metrics_rows,
    run_inside,
    start_torchrun,
    torchrun,
)
from PIL import Image

from minvqgan.harness import checkpoint

pytestmark = pytest.mark.slow


def test_one_log_one_checkpoint_and_resume_with_another_number(house, tmp_path):
    """Two processes write once; one process goes on where they stopped, with the images that come next."""
    words = [*STAGE_ONE, "--data", "photos", "--steps"]
    done = torchrun(2, *words, "12", "--out", tmp_path / "run", cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: python train_gpt.py") == 1
    again = ["train_vqgan.py", "--out", tmp_path / "run", "--resume", "--steps"]
    for run, steps in ((run_inside, 16), (lambda *words, cwd: torchrun(2, *words, cwd=cwd), 20)):
        done = run(*again, steps, cwd=house)
        assert done.returncode == 0, done.stderr[-2000:]
    assert {int(row["step"]) for row in metrics_rows(tmp_path / "run")} == {*range(2, 21, 2), *range(3, 21, 3)}
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == 20


def test_processes_draw_different_numbers_and_resume_with_their_own(house, tmp_path):
    """Dropped conditions, pkeep, dropout: equal on all ranks they would be drawn once for the whole batch. Killed and
    resumed, each rank continues its own."""
    words = [*STAGE_TWO, *"--vqgan rgb/last.pt --steps 9 --drop-cond 0.3 --pkeep 0.8 --dropout 0.1 --out".split()]
    assert torchrun(2, *words, tmp_path / "whole", cwd=house).returncode == 0
    states = checkpoint.read(tmp_path / "whole" / "last.pt")["random"]
    assert len(states) == 2 and not torch.equal(states[0]["cpu"], states[1]["cpu"])
    last = tmp_path / "run" / "last.pt"
    process = start_torchrun(2, *words, tmp_path / "run", cwd=house)
    while not last.exists():
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if checkpoint.read(last)["step"] < 9:
        assert torchrun(2, "train_gpt.py", "--out", tmp_path / "run", "--resume", cwd=house).returncode == 0
    assert_same_run(tmp_path / "whole" / "last.pt", last)


def test_samples_are_those_of_one_process(house, tmp_path):
    words = ["sample.py", "--gpt", house / "class" / "best.pt", "-n", "3", "--classes", "one,two", "--out"]
    assert run_inside(*words, "one.png", cwd=tmp_path).returncode == 0
    done = torchrun(2, *words, "two.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "two.png"))
    assert np.abs(one - two).max() <= 1  # the decoder's batches are other ones, and round in another way
    assert done.stdout.count("6 images") == 1
