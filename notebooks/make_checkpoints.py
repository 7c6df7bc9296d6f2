"""Train the models in notebooks/checkpoints/: three groups, each made if its data is given.

    python notebooks/make_checkpoints.py                        -> gpt.pt, spatial.pt
    python notebooks/make_checkpoints.py --cifar cifar10_split  -> cifar_gpt.pt too
    python notebooks/make_checkpoints.py --scenes scenes_64     -> scenes.pt too

gpt.pt        shapes of 32 pixels: a VQGAN (f = 4, 256 codes) and a class-conditional transformer on its codes
spatial.pt    32-pixel crops of 64-pixel shapes: a VQGAN, a second one for their label maps, and a transformer that
              predicts the codes of the first from those of the second
cifar_gpt.pt  CIFAR-10: the default VQGAN and a class-conditional transformer on its codes (8 minutes on a GPU)
scenes.pt     photographs of landscapes, 64 pixels: a VQGAN and a class-conditional transformer on its codes

--cifar and --scenes are folders with one subfolder per class, also inside train/ and val/. Runs go to runs/notebooks; a
run that is there is not repeated.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from torch.utils.serialization import config as serialization

from minvqgan.harness import checkpoint

ROOT = Path(__file__).resolve().parents[1]
MADE = ROOT / "notebooks" / "checkpoints"
SMALL = "--ch 12 --z-channels 32"
CROPS = "--resize 64"

# Run -> command. The best transformer of a run of train_gpt.py is exported under the name of the run.
SHAPES = {
    "vqgan": f"train_vqgan.py {SMALL}",
    "gpt": "train_gpt.py --vqgan vqgan/last.pt --n-layer 3 --n-embd 96",
    "crops": f"train_vqgan.py {SMALL} {CROPS}",
    "labels": f"train_vqgan.py {CROPS} --ch 8 --z-channels 32 --input labels --num-labels 9 --steps 1200",
    "spatial": "train_gpt.py --vqgan crops/last.pt --cond spatial --cond-vqgan labels/last.pt --n-layer 3 --n-embd 96 "
    "--steps 1500",
}
CIFAR = {
    "cifar_vqgan": "train_vqgan.py",
    "cifar_gpt": "train_gpt.py --vqgan cifar_vqgan/last.pt --n-layer 6 --n-head 6 --n-embd 192 --dropout 0.1 "
    "--batch-size 128 --steps 25000 --lr 1.5e-3",
}
SCENES = {
    "scenes_vqgan": "train_vqgan.py --preset small --ch-mult 1 2 2 2 --z-channels 64 --batch-size 64 --steps 4000 "
    "--lr 6e-4 --disc-lr 1.2e-4",
    "scenes": "train_gpt.py --vqgan scenes_vqgan/last.pt --preset small --n-layer 6 --n-head 6 --n-embd 192 "
    "--dropout 0.1 --lr 2e-3 --steps 6000",
}


def export(run: Path) -> None:
    """Write a run's best transformer with its first-stage models, in 16 bits."""
    path = MADE / f"{run.name}.pt"
    model = checkpoint.load(run / "best.pt")
    serialization.save.storage_alignment = 2  # torch's default, 64 bytes per tensor, adds 58 kB in all
    checkpoint.save_model(path, model.half())
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cifar", type=os.path.abspath, help="folder of CIFAR-10's images, for cifar_gpt.pt")
    parser.add_argument("--scenes", type=os.path.abspath, help="folder of photographs of scenes, for scenes.pt")
    args = parser.parse_args()
    runs = ROOT / "runs" / "notebooks"
    runs.mkdir(parents=True, exist_ok=True)
    for commands, data in ((SHAPES, "shapes"), (CIFAR, args.cifar), (SCENES, args.scenes)):
        for name, command in commands.items() if data else ():
            if not (runs / name / "last.pt").exists():
                script, *flags = command.split()
                words = [sys.executable, ROOT / script, *flags, "--data", data, "--out", name]
                subprocess.run(words, cwd=runs, check=True)
            if command.startswith("train_gpt.py"):
                export(runs / name)


if __name__ == "__main__":
    main()
