"""Train the models that the notebooks load: about 25 minutes on two CPU cores, 4 MB in all.

    python notebooks/make_checkpoints.py        -> notebooks/checkpoints/gpt.pt, spatial.pt

gpt.pt      shapes of 32 pixels: a VQGAN (f = 4, 256 codes) and a class-conditional transformer on its codes
spatial.pt  32-pixel crops of 64-pixel shapes: a VQGAN, a second one for their label maps, and a transformer that turns
            the codes of the second into those of the first
"""

import subprocess
import sys
from pathlib import Path

import torch

from minvqgan.harness import checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--ch 12 --z-channels 32"
CROPS = "--resize 64"

RUNS = {
    "vqgan": f"train_vqgan.py {SMALL}",
    "gpt": "train_gpt.py --vqgan vqgan/last.pt",
    "crops": f"train_vqgan.py {SMALL} {CROPS}",
    "labels": f"train_vqgan.py {CROPS} --ch 8 --z-channels 32 --input labels --num-labels 9 --steps 1200",
    "spatial": "train_gpt.py --vqgan crops/last.pt --cond spatial --cond-vqgan labels/last.pt --n-layer 3 --n-embd 96 "
    "--steps 1500",
}


def half(content):
    """The same containers with 16-bit numbers."""
    if isinstance(content, dict):
        return {key: half(value) for key, value in content.items()}
    return content.half() if isinstance(content, torch.Tensor) and content.is_floating_point() else content


def main() -> None:
    runs, made = ROOT / "runs" / "notebooks", ROOT / "notebooks" / "checkpoints"
    runs.mkdir(parents=True, exist_ok=True)
    made.mkdir(exist_ok=True)
    for name, words in RUNS.items():
        if not (runs / name / "last.pt").exists():
            script, *flags = words.split()
            subprocess.run([sys.executable, ROOT / script, *flags, "--out", name], cwd=runs, check=True)
    for name in ("gpt", "spatial"):
        model = checkpoint.load(runs / name / "best.pt")
        checkpoint.save(made / f"{name}.pt", "two_stage", **half(checkpoint.pack_two_stage(model)))
        print(f"{made / name}.pt: {(made / f'{name}.pt').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
