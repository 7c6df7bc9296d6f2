"""Makes the folder that the tables call cifar10_split: equally many held-out images of each class.

    python results/split.py --data cifar10 --out cifar10_split

--data holds a subfolder of images for each class, such as CIFAR-10's 50,000 training images saved as files. 500 of each
class, drawn with a fixed seed, go to OUT/val, the others to OUT/train. No training sees the former: neither those of
first-stage models, nor of the perceptual network, nor of the judges.
"""

import random
import shutil
from pathlib import Path

from minvqgan.harness import flags, runtime
from minvqgan.harness.runtime import UserError


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(description=__doc__)
    p.add_argument("--data", type=Path, required=True, help="folder with a subfolder of images for each class")
    p.add_argument("--out", type=Path, required=True, help="folder to make")
    p.add_argument("--held-out", type=flags.positive, default=500, help="images of each class")
    args = p.parse_args(argv)
    if args.out.exists():
        raise UserError(f"{args.out} is there already; choose another --out")
    drawn, copies = random.Random(0), []
    for folder in sorted(folder for folder in args.data.glob("*") if folder.is_dir()):
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        if len(paths) <= args.held_out:
            raise UserError(f"{folder} has {len(paths)} images, too few to hold {args.held_out} out")
        held_out = set(drawn.sample(paths, args.held_out))
        copies += [(path, args.out / ("val" if path in held_out else "train") / folder.name) for path in paths]
    if not copies:
        raise UserError(f"{args.data} has no subfolders, one for each class")
    for path, folder in copies:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return 0


if __name__ == "__main__":
    runtime.run(main)
