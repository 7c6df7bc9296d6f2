"""Makes the folder that the tables call cifar10_split: equally many held-out images of each class.

    python results/split.py --data cifar10 --out cifar10_split

--data holds a subfolder of images for each class, such as CIFAR-10's 50,000 training images saved as files. 500 of each
class, drawn with a fixed seed, go to OUT/val, the others to OUT/train. No training sees the former: neither those of
first-stage models, nor of the perceptual network, nor of the judges.
"""

import argparse
import random
import shutil
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
p.add_argument("--data", type=Path, required=True, help="folder with a subfolder of images for each class")
p.add_argument("--out", type=Path, required=True, help="folder to make")
p.add_argument("--held-out", type=int, default=500, help="images of each class")
args = p.parse_args()
drawn = random.Random(0)
for folder in sorted(folder for folder in args.data.iterdir() if folder.is_dir()):
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    held_out = set(drawn.sample(paths, args.held_out))
    for path in paths:
        to = args.out / ("val" if path in held_out else "train") / folder.name
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
