"""Train the models that the notebooks load. The transformer of CIFAR-10 wants a GPU: 8 minutes.

    python notebooks/make_checkpoints.py                        -> notebooks/checkpoints/gpt.pt, spatial.pt
    python notebooks/make_checkpoints.py --cifar cifar10_split  -> cifar_vqvae.pt, cifar_vqgan.pt, cifar_gpt.pt too

gpt.pt      shapes of 32 pixels: a VQGAN (f = 4, 256 codes) and a class-conditional transformer on its codes
spatial.pt  32-pixel crops of 64-pixel shapes: a VQGAN, a second one for their label maps, and a transformer that turns
            the codes of the second into those of the first
cifar_*.pt  CIFAR-10: the default VQGAN, a VQ-VAE of the same size and steps, a class-conditional transformer on the
            codes of the first. The folder holds train/ and val/ with a subfolder a class.
"""

import argparse
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.serialization import config as serialization

from minvqgan import VQGAN
from minvqgan.harness import checkpoint

ROOT = Path(__file__).resolve().parents[1]
MADE = ROOT / "notebooks" / "checkpoints"
SMALL = "--ch 12 --z-channels 32"
CROPS = "--resize 64"

SHAPES = {
    "vqgan": f"train_vqgan.py {SMALL}",
    "gpt": "train_gpt.py --vqgan vqgan/last.pt",
    "crops": f"train_vqgan.py {SMALL} {CROPS}",
    "labels": f"train_vqgan.py {CROPS} --ch 8 --z-channels 32 --input labels --num-labels 9 --steps 1200",
    "spatial": "train_gpt.py --vqgan crops/last.pt --cond spatial --cond-vqgan labels/last.pt --n-layer 3 --n-embd 96 "
    "--steps 1500",
}
CIFAR = {
    "cifar_vqvae": "train_vqgan.py --loss vqvae",
    "cifar_vqgan": "train_vqgan.py",
    "cifar_gpt": "train_gpt.py --vqgan cifar_vqgan/last.pt --n-layer 6 --n-head 6 --n-embd 192 --dropout 0.1 "
    "--batch-size 128 --steps 25000 --lr 1.5e-3",
}


def half(content):
    """The same containers with 16-bit numbers."""
    if isinstance(content, dict):
        return {key: half(value) for key, value in content.items()}
    return content.half() if isinstance(content, torch.Tensor) and content.is_floating_point() else content


def export(run: Path, name: str) -> None:
    """The best transformer of a run, or the last first-stage model, as notebooks/checkpoints/NAME.pt in 16 bits."""
    kind = checkpoint.read(run / "last.pt")["kind"]
    model = checkpoint.load(run / ("best.pt" if kind == "two_stage" else "last.pt"))
    if isinstance(model, VQGAN):
        content = {"config": asdict(model.config), "model": model.state_dict()}
    else:
        content = checkpoint.pack_two_stage(model)
    # torch begins every tensor at a multiple of 64 bytes: 58 kB in all, and together they must stay below 15 MB.
    serialization.save.storage_alignment = 2
    checkpoint.save(MADE / f"{name}.pt", kind, **half(content))
    print(f"{MADE / name}.pt: {(MADE / f'{name}.pt').stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10; without it only the models of shapes are made")
    cifar = parser.parse_args().cifar
    runs = ROOT / "runs" / "notebooks"
    runs.mkdir(parents=True, exist_ok=True)
    MADE.mkdir(exist_ok=True)
    trainings = SHAPES | ({k: f"{v} --data {cifar.resolve()}" for k, v in CIFAR.items()} if cifar else {})
    for name, words in trainings.items():
        if not (runs / name / "last.pt").exists():
            script, *flags = words.split()
            subprocess.run([sys.executable, ROOT / script, *flags, "--out", name], cwd=runs, check=True)
    for name in ["gpt", "spatial", *(CIFAR if cifar else ())]:
        export(runs / name, name)


if __name__ == "__main__":
    main()
