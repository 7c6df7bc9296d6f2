"""What several test files need: the official numbers, a distance, and a way to run a script as a user."""

import contextlib
import csv
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minvqgan import VQGAN
from minvqgan.discriminator import PatchDiscriminator
from minvqgan.harness import checkpoint, official

ROOT = Path(__file__).resolve().parent.parent

# Models of a few thousand parameters, D in after a third of the steps. Flags that follow win over these.
STAGE_ONE = (
    "train_vqgan.py --image-size 16 --ch 8 --ch-mult 1 2 --norm-groups 1 --z-channels 8 --code-dim 4 "
    "--codebook-size 16 --batch-size 4 --steps 6 --val-images 8 --val-every 3 --log-every 2 --save-every 3 "
    "--disc-start 0.3 --disc-channels 8 --perceptual none --no-amp"
).split()
STAGE_TWO = (
    "train_gpt.py --n-layer 1 --n-head 2 --n-embd 16 --batch-size 4 --steps 6 --val-images 8 --val-every 3 "
    "--log-every 2 --save-every 3 --no-amp"
).split()


def fixture(name: str) -> dict:
    """Random weights, inputs and outputs of the official implementation; `what` says which part."""
    return torch.load(ROOT / "tests" / "fixtures" / f"{name}.pt", weights_only=True)


def official_models(fx: dict, legacy: bool) -> tuple[VQGAN, PatchDiscriminator]:
    """VQGAN (in eval mode) and D (in train mode) of the fixture "vqgan", with the official weights."""
    c = fx["config"]
    config = official.vqgan_config(c["ddconfig"], c["n_embed"], c["embed_dim"], c["beta"], legacy=legacy)
    disc = PatchDiscriminator(3, c["disc_ndf"], c["disc_num_layers"])
    return official.load_vqgan(fx["state_dict"], config), official.fill(disc, fx["discriminator"]).train()


def official_files(fx: dict, folder: Path) -> tuple[Path, Path]:
    """A net2net fixture as its authors publish a model: last.ckpt and project.yaml."""
    target = "taming.models.vqgan.VQModel"
    key = {"Labelator": "class_label", "CoordStage": "coord", "VQModel": "depth"}
    cond = fx["cond_stage"]
    params = {
        "first_stage_key": "image",
        "cond_stage_key": "image" if isinstance(cond, str) else key[cond["target"].rsplit(".", 1)[-1]],
        "first_stage_config": {"target": target, "params": fx["first_stage"]},
        "cond_stage_config": cond,
        "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": fx["transformer"]},
        "sos_token": fx["sos_token"],
    }
    model = {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}
    (folder / "project.yaml").write_text(yaml.safe_dump({"model": model}))
    torch.save({"state_dict": fx["state_dict"], "epoch": 3}, folder / "last.ckpt")
    return folder / "last.ckpt", folder / "project.yaml"


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference, as a fraction of the largest true number. Shapes must agree: broadcasting hides errors."""
    assert ours.shape == truth.shape, f"{tuple(ours.shape)} is not {tuple(truth.shape)}"
    return ((ours.double() - truth.double()).abs().max() / truth.double().abs().max()).item()


class NoFloat64(TorchDispatchMode):
    """Within it no operation may give float64, which Apple's GPUs do not have. Operations are those of any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)), func
        return out


def start(*words, cwd: Path, processes: int = 1) -> subprocess.Popen:
    """`python SCRIPT ...` in a process group of its own, or by torchrun.

    One thread: on few cores several torch processes slow each other down many times over.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    # A shell starts background jobs with Ctrl-C ignored, and what tests start there would inherit that.
    command = ["env", "--default-signal=INT", sys.executable, *launch, str(ROOT / str(words[0])), *map(str, words[1:])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=cwd, env=env, **how)


def run_script(*words, cwd: Path, processes: int = 1) -> subprocess.CompletedProcess:
    """`start` to its end."""
    process = start(*words, cwd=cwd, processes=processes)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def same_bits(a, b) -> bool:
    """Equal tensors, bit for bit, in equal containers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def assert_same_run(one: Path, other: Path) -> None:
    """Two run folders hold the same bits and rows in everything but the clock and the name of the folder."""
    a, b = (checkpoint.read(folder / "last.pt") for folder in (one, other))
    for name in (a.keys() | b.keys()) - {"seconds", "flags", "rows"}:
        assert same_bits(a[name], b[name]), name
    rows, others = ([row | {"seconds": ""} for row in metrics_rows(folder)] for folder in (one, other))
    assert rows == others


def run_inside(*words, cwd: Path) -> subprocess.CompletedProcess:
    """The same in this process: a script, or a module by its name, runs as `__main__` and ends by SystemExit. Saves the
    seconds that importing torch takes, where dozens of mistakes are tried."""
    out, err, name = io.StringIO(), io.StringIO(), str(words[0])
    run, name = (runpy.run_path, str(ROOT / name)) if name.endswith(".py") else (runpy.run_module, name)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [str(word) for word in words])
        patch.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(name, run_name="__main__")
    return subprocess.CompletedProcess(words, ended.value.code, out.getvalue(), err.getvalue())


def succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """The same, without an error."""
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_interrupted(step: int, *words, cwd: Path, number: int = signal.SIGINT) -> subprocess.CompletedProcess:
    """`run_inside`, with a signal in the middle of a training step, counted by the first optimizer."""
    seen: list = []

    def count(optimizer, *_):
        seen.append(optimizer)
        if optimizer is seen[0] and seen.count(optimizer) == step:
            signal.raise_signal(number)

    hook = register_optimizer_step_pre_hook(count)
    try:
        return run_inside(*words, cwd=cwd)
    finally:
        hook.remove()


def metrics_rows(run: Path) -> list[dict]:
    with open(run / "metrics.csv") as file:
        return list(csv.DictReader(file))


def assert_one_line_error(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2, no traceback, and a last line that begins with `error:` and holds all the words."""
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr[-2000:]
    for word in words:
        assert word in last, f"{word!r} is not in {last!r}"


def make_photos(folder: Path, n: int = 8, size: tuple[int, int] = (40, 36), seed: int = 0) -> list[Path]:
    """n smooth random RGB images of (width, height) as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        path = folder / f"photo_{i:02d}.png"
        coarse.resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths
