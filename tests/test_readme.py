"""Every command of the README and of the help page runs, in its order, on models scaled down to seconds.

Flags are appended, and the last one counts; the words of the README stay as they are. What it says of files holds too.
"""

import dataclasses
import os
import re
import shlex
import shutil
from functools import partial
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, STAGE_ONE, STAGE_TWO, fixture, make_photos, official_files, run_inside, run_script, succeeded
from PIL import Image

import minvqgan
from minvqgan.gpt import GPTConfig
from minvqgan.objective import ObjectiveConfig
from minvqgan.two_stage import TwoStageConfig
from minvqgan.vqgan import VQGANConfig

PAGES = [ROOT / name / "README.md" for name in ("", "minvqgan", "minvqgan/harness", "results")]
README = PAGES[0].read_text()

# What stands for the sizes that nobody trains in a test.
SMALL = {
    "train_vqgan.py": " ".join(STAGE_ONE[1:]) + " --num-res-blocks 1 --disc-layers 2 --steps 2 --val-every 2",
    "train_gpt.py": " ".join(STAGE_TWO[1:]) + " --steps 2 --val-every 2",
    "sample.py": "-n 2",
    "evaluate.py": "-n 4 --images 20 --perceptual none",
    "minvqgan.harness.judges": "--steps 2 --image-size 16",
    "minvqgan.harness.official": "",
}
# Commands that need more than that: (words of theirs, flags instead of or beside the small ones).
SPECIAL = {
    "--resume": "--steps 4",
    "--size 256x512": "-n 1 --size 20x24",
    "--size 64x512": "-n 1 --size 64x72",
    "--size 512x1024": "-n 1 --size 36x36",
    "--classes 207,281": "-n 1 --classes 1,3",
    "evaluate.py --vqgan runs/vqgan/last.pt": SMALL["evaluate.py"] + " --features none",
    "evaluate.py --vqgan last.ckpt": SMALL["evaluate.py"] + " --features none",
    "evaluate.py --gpt runs/gpt/best.pt -n 5000": SMALL["evaluate.py"] + " --features none",
}
# Which official model the file last.ckpt stands for.
OFFICIAL = {"--classes 207,281": "class", "--cond-image labels.png --size": "depth"}


def commands() -> list[str]:
    """The lines of the shell blocks, without comments; not those that install, which the CI runs as they stand."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", "\n".join(p.read_text() for p in PAGES), re.S)).splitlines()
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [line for line in lines if line and "pip install" not in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures under the names that the README uses, and models that have been made before."""
    folder = tmp_path_factory.mktemp("readme")
    for kind in ("photos", "imagenet"):
        for label in ("one", "two"):
            make_photos(folder / kind / label, n=6)
    shutil.copy(folder / "photos" / "one" / "photo_00.png", folder / "photo.jpg")
    labels = np.kron(np.arange(9, dtype=np.uint8).reshape(3, 3), np.ones((8, 8), np.uint8))
    Image.fromarray(labels).save(folder / "labels.png")
    small, second = SMALL["train_vqgan.py"].split(), SMALL["train_gpt.py"].split()
    for words in (
        ["train_vqgan.py", *small],
        ["train_vqgan.py", *small, "--input", "labels", "--num-labels", "9", "--out", "labels"],
        ["train_gpt.py", *second, "--cond", "spatial", "--cond-vqgan", "labels/last.pt", "--out", "spatial"],
        ["train_gpt.py", *second, "--cond", "none", "--out", "none"],
    ):
        succeeded(run_inside(*words, cwd=folder))
    shutil.copy(folder / "runs" / "vqgan" / "last.pt", folder / "V.pt")
    shutil.copy(folder / "labels" / "last.pt", folder / "LABELS.pt")
    shutil.copytree(ROOT / "notebooks" / "checkpoints", folder / "notebooks" / "checkpoints")
    return folder


def prepare(line: str, folder) -> None:
    """The files that this line speaks of."""
    shutil.copy(folder / ("spatial" if "--cond-image" in line else "none") / "best.pt", folder / "G.pt")
    if "last.ckpt" in line:
        kind = next((kind for words, kind in OFFICIAL.items() if words in line), "none")
        official_files(fixture(f"net2net_{kind}"), folder)
        described = yaml.safe_load((folder / "project.yaml").read_text())["model"]["params"]["first_stage_config"]
        (folder / "model.yaml").write_text(yaml.safe_dump({"model": described}))
        if "model.yaml" in line:  # a first stage alone
            state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
            prefix = "first_stage_model."
            first = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            torch.save({"state_dict": first}, folder / "last.ckpt")


@pytest.mark.slow
def test_the_commands(folder):
    found = commands()
    assert len(found) > 25
    for number, line in enumerate(found):
        words = shlex.split(line)
        if words[0] not in ("python", "torchrun") or "benchmarks" in line or "notebooks/" in words[1]:
            continue
        script = next(word for word in words if word in SMALL)
        flags = next((flags for part, flags in SPECIAL.items() if part in line), SMALL[script]).split()
        if script.startswith("train_") and "--out" not in words and "--resume" not in words:
            default = folder / "runs" / script.removeprefix("train_").removesuffix(".py")
            flags += ["--out", f"runs/line_{number}"] if default.exists() else []
        prepare(line, folder)
        rest = words[words.index(script) + 1 :]
        run = partial(run_script, processes=2) if words[0] == "torchrun" else run_inside
        done = run(script, *rest, *flags, cwd=folder)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr, line


@pytest.mark.slow
def test_the_python(folder):
    """The README's Python, as it stands."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 1
    names = {}
    os.chdir(folder)
    exec(blocks[0], names)
    assert names["indices"].shape == (3, 8, 8) and names["x_hat"].shape == (3, 3, 16, 16)
    assert names["images"].shape == names["completed"].shape == (3, 3, 16, 16)
    assert names["nats"].shape[0] == 3 and names["minvqgan"] is minvqgan


def test_what_it_points_to_is_there():
    """Figures, notebooks, and every name of the table of equations."""
    for page in PAGES:
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), target
    table = PAGES[1].read_text()
    table = table[table.index("| paper | what |") :].split("\n\n")[0]
    names = [name for row in table.strip().splitlines()[2:] for name in re.findall(r"`([\w.]+)`", row.split("|")[3])]
    assert len(names) > 20
    module = ""
    for name in names:  # in a module of ours, or in that of the name before
        try:
            resolve_name(f"minvqgan.{name}")
            module = name.split(".")[0]
        except (ImportError, AttributeError):
            resolve_name(f"minvqgan.{module}.{name}")


def test_every_flag_it_names_exists():
    """Also those of the tables, which no command of the README uses."""
    sources = [ROOT / f"{name}.py" for name in ("train_vqgan", "train_gpt", "sample", "evaluate")]
    sources += [ROOT / "minvqgan" / "harness" / f"{name}.py" for name in ("flags", "judges", "official")]
    sources += [ROOT / "tests" / "benchmarks" / "report.py", ROOT / "notebooks" / "make_checkpoints.py"]
    sources += (ROOT / "results").glob("*.py")
    known = {flag for path in sources for flag in re.findall(r'"(--[a-z0-9-]+)"', path.read_text())}
    for config in (VQGANConfig, ObjectiveConfig, GPTConfig, TwoStageConfig):
        known |= {"--" + field.name.replace("_", "-") for field in dataclasses.fields(config)}
    known |= {"--no-amp", "--no-flip", "--no-l2-norm", "--no-cuda-graph", "--nproc_per_node", "--dist"}
    named = {flag for page in PAGES for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text())}
    assert len(named) > 40 and named <= known, named - known
