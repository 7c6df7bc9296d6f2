"""Both training scripts, interrupted at random moments, over and over, end with the bits of the uninterrupted run.

Five interruptions each and one of two processes; `KILLS=50 pytest tests/test_interruption.py` for the long run.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, assert_same_run, run_script, start_torchrun, torchrun
from PIL import Image

from minvqgan.harness import checkpoint

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", 5))

VQGAN = (
    "train_vqgan.py --image-size 16 --ch 8 --ch-mult 1 2 --z-channels 8 --code-dim 4 --codebook-size 32 --batch-size 4 "
    "--val-images 8 --val-every 20 --log-every 5 --save-every 7 --disc-start 0.1 --disc-channels 8 --perceptual none "
    "--no-amp --steps"
).split()
GPT = (
    "train_gpt.py --vqgan first/last.pt --n-layer 1 --n-head 2 --n-embd 16 --batch-size 4 --dropout 0.1 --pkeep 0.9 "
    "--val-images 8 --val-every 20 --log-every 5 --save-every 7 --no-amp --steps"
).split()

# How a run can end: a signal, the script's exit code, and for a full disk a limit of the size of files, in kB.
WAYS = {
    "kill -9": (signal.SIGKILL, -9, None),
    "SIGTERM": (signal.SIGTERM, 143, None),
    "Ctrl-C": (signal.SIGINT, 130, None),
    "a full disk": (None, 2, 20),
}


def rows(run):
    """metrics.csv without the clock."""
    if not (run / "metrics.csv").exists():
        return []
    with open(run / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def heed_ctrl_c():
    """A shell starts background jobs with Ctrl-C ignored, and what tests start there would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(words, cwd, way: str, after: int, delay: float) -> int:
    """Start the script, end it in this way once metrics.csv shows the step `after`, and a delay; its exit code."""
    number, _, kilobytes = WAYS[way]
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    if kilobytes:
        command = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash", *command]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=cwd, env=env, preexec_fn=heed_ctrl_c, **pipes)
    if number is not None:
        began = time.time()
        while process.poll() is None and max((int(r["step"]) for r in rows(cwd / "run")), default=0) < after:
            time.sleep(0.02)
            assert time.time() - began < 120
        time.sleep(delay)
        process.send_signal(number)
    _, err = process.communicate(timeout=120)
    if not err.endswith("KeyboardInterrupt\n"):  # Python's own way, while it still imports
        assert "Traceback" not in err, err[-3000:]
    return process.returncode


@pytest.mark.parametrize("script", ["train_vqgan.py", "train_gpt.py"])
def test_any_interruption_ends_with_the_same_bits(script, tmp_path):
    steps = 40 * KILLS
    words = [*(VQGAN if script == "train_vqgan.py" else GPT), str(steps)]
    if script == "train_gpt.py":
        assert run_script(*VQGAN, "3", "--out", "first", cwd=tmp_path).returncode == 0
    done = run_script(*words, "--out", "whole", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

    last, reached, random_moment, endings = tmp_path / "run" / "last.pt", 0, random.Random(script), []
    for i in range(KILLS):
        way = list(WAYS)[i % len(WAYS)]
        before = last.read_bytes() if last.exists() else None
        # One in six while it still starts, the others some steps further on than the last.
        after = 0 if random_moment.random() < 1 / 6 else reached + random_moment.randint(1, 50)
        resume = ["--resume"] if before else []
        code = interrupted([*words, "--out", "run", *resume], tmp_path, way, after, random_moment.uniform(0, 0.3))
        # A signal that comes before the script listens ends it in Python's way; one after the end, not at all.
        number, expected, _ = WAYS[way]
        assert code in {expected, 0} | ({-number} if number else set()), (way, code)
        if way == "a full disk":
            assert before is None or last.read_bytes() == before
        step = checkpoint.read(last)["step"] if last.exists() else 0
        assert step >= reached, "a checkpoint was replaced by an older one"
        reached = step
        endings.append(f"{way} {step}")
        if reached == steps:
            break
    print("\n", script, ", ".join(endings))
    assert len(endings) > KILLS / 2
    if reached < steps:
        resume = ["--resume"] if last.exists() else []
        done = run_script(*words, "--out", "run", *resume, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "whole" / "last.pt", last)
    assert_same_run(tmp_path / "whole" / "best.pt", tmp_path / "run" / "best.pt")
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*.part")), "half files are left"


@pytest.mark.parametrize("script", ["train_vqgan.py", "train_gpt.py"])
def test_two_processes_killed_end_with_the_same_bits(script, tmp_path):
    """All processes at once, as a machine that loses its power does."""
    kills = max(1, KILLS // 5)
    words = [*(VQGAN if script == "train_vqgan.py" else GPT), str(40 * kills)]
    if script == "train_gpt.py":
        assert run_script(*VQGAN, "3", "--out", "first", cwd=tmp_path).returncode == 0
    assert torchrun(2, *words, "--out", "whole", cwd=tmp_path).returncode == 0
    last, reached, random_moment = tmp_path / "run" / "last.pt", 0, random.Random(script)
    for _ in range(kills):
        process = start_torchrun(2, *words, "--out", "run", *(["--resume"] if last.exists() else []), cwd=tmp_path)
        after, began = reached + random_moment.randint(1, 30), time.time()
        while process.poll() is None and max((int(r["step"]) for r in rows(tmp_path / "run")), default=0) < after:
            time.sleep(0.02)
            assert time.time() - began < 120
        time.sleep(random_moment.uniform(0, 0.3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), err[-3000:]  # 0: it was at its end before
        step = checkpoint.read(last)["step"] if last.exists() else 0
        assert step >= reached, "a checkpoint was replaced by an older one"
        reached = step
        if reached == 40 * kills:
            break
    if reached < 40 * kills:
        resume = ["--resume"] if last.exists() else []
        done = torchrun(2, *words, "--out", "run", *resume, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "whole" / "last.pt", last)
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")


LAUNCHES = {"two readers": [], "two processes": ["-m", "torch.distributed.run", "--nproc_per_node=2"]}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_ctrl_c_of_a_terminal(launch, tmp_path):
    """It reaches every process at once: the readers, and all that torchrun has started, to which torchrun hands it on
    once more. The step under way is saved all the same."""
    (tmp_path / "photos").mkdir()
    # Large and without pattern: slow to read, so that training waits for its readers.
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "0.png", compress_level=1)
    for i in range(1, 100):
        os.link(tmp_path / "photos" / "0.png", tmp_path / "photos" / f"{i}.png")
    more = ["--workers", "2", "--data", "photos"] if launch == "two readers" else []
    words = [str(ROOT / VQGAN[0]), *VQGAN[1:], "9999", "--out", "run", "--log-every", "1", *more]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *LAUNCHES[launch], *words],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    began = time.time()
    while not rows(tmp_path / "run"):
        time.sleep(0.02)
        assert process.poll() is None and time.time() - began < 120
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "stopped and saved at step" in out, err[-3000:]
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] >= 1
    if launch == "two readers":  # torchrun ends in a way of its own
        assert process.returncode == 130 and "Traceback" not in err, err[-3000:]
