"""Quality against variety (Sec. 4.4): what top-k, top-p, guidance and rejection do to class-conditional samples.

    python results/sampling.py --gpt notebooks/checkpoints/cifar_gpt.pt --data cifar10_split --judges C.pt R.pt

As many new images for each setting as there are held-out images, with the same seeds. Rejection keeps the images that
a classifier is surest of which is none of the judges (judging.py): the package's small network, or --rejector.
"""

import matplotlib.pyplot as plt
import torch
from judging import Judges, in_parts, parser
from torch import Tensor

from minvqgan import Sampling, TwoStage
from minvqgan.harness import checkpoint, runtime
from minvqgan.harness.judges import SMALL, load_classifier, match_classes
from minvqgan.harness.run import write_csv
from minvqgan.sampler import reject

FAMILIES = {  # name: {label: (sampling, fraction that is kept)}
    "as it is": {"": (Sampling(), 1)},
    "top-k": {f"{k}": (Sampling(top_k=k), 1) for k in (200, 100, 50, 20, 10)},
    "top-p": {f"{p}": (Sampling(top_p=p), 1) for p in (0.98, 0.95, 0.9, 0.8, 0.7)},
    "temperature": {f"{t}": (Sampling(temperature=t), 1) for t in (1.1, 0.95, 0.9, 0.8)},
    "guidance": {f"{g}": (Sampling(guidance=g), 1) for g in (1.25, 1.5, 2, 3)},
    "guidance, top-p 0.9": {f"{g}": (Sampling(guidance=g, top_p=0.9), 1) for g in (1.25, 1.5, 2, 2.5)},
    "rejection, kept": {f"{rate}": (Sampling(), rate) for rate in (0.5, 0.25, 0.1)},
}


def draw(model: TwoStage, sampling: Sampling, keep: float, n: int, rejector, device) -> tuple[Tensor, Tensor]:
    """n images of the model's classes in turn, the surest `keep` of n / keep -> (n, 3, S, S), classes (n,)."""
    images, classes, per_class = [], [], n // model.condition.num_tokens
    for c, name in enumerate(model.config.classes):
        asked = torch.full((round(per_class / keep),), c, device=device)
        x = model.sample(asked, seed=c, sampling=sampling).clamp(-1, 1).cpu()
        if keep < 1:
            number = rejector.classes.index(name)
            scores = in_parts(lambda part, i=number: rejector(part).softmax(1)[:, i], x, device)
            x = x[reject(scores, keep)[:per_class]]
        images.append(x)
        classes += [c] * len(x)
    return torch.cat(images), torch.tensor(classes)


def figure(rows: list[dict], names: list[str], path) -> None:
    """For each judge: Fréchet distance over class accuracy, and recall over precision; a curve for each family."""
    pairs = [("class accuracy", f"Fréchet ({name})") for name in names]
    pairs += [(f"precision ({name})", f"recall ({name})") for name in names]
    fig, axes = plt.subplots(1, len(pairs), figsize=(4 * len(pairs), 3.4), layout="constrained")
    plain = next(row for row in rows if row["sampling"] == "as it is")
    for axis, (across, up) in zip(axes, pairs, strict=True):
        for family in dict.fromkeys(row["sampling"] for row in rows if row["sampling"] in list(FAMILIES)[1:]):
            points = [plain] + [row for row in rows if row["sampling"] == family]
            axis.plot([q[across] for q in points], [q[up] for q in points], "o-", ms=3, label=family)
        axis.plot(plain[across], plain[up], "ko", label="as it is")
        axis.set(xlabel=across, ylabel=up)
    axes[0].legend(fontsize=7)
    fig.savefig(path, dpi=110)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__, "sampling", images=1000)
    p.add_argument("--gpt", required=True, help="a class-conditional transformer")
    p.add_argument("--only", nargs="+", default=list(FAMILIES), choices=FAMILIES, help="settings to measure")
    p.add_argument("--rejector", default=SMALL, help="classifier for rejection, none of the judges")
    args = p.parse_args(argv)
    device = runtime.pick_device(args.device)
    model, rejector = checkpoint.load(args.gpt, "two_stage").to(device), load_classifier(args.rejector).to(device)
    if "rejection, kept" in args.only:
        match_classes(rejector.classes, model.config.classes)  # raises for one that it does not know
    judges = Judges(args, device, model.config.n * model.vqgan.config.f)
    # The best that any transformer could reach: the held-out images themselves through the first stage.
    x_hat = in_parts(lambda x: model.vqgan(x)[0], judges.x, device)
    rows = [{"sampling": "real images", **judges.floor()}]
    rows.append({"sampling": "reconstructions", **judges.measure(x_hat, judges.c)})
    for family in args.only:
        for label, (sampling, keep) in FAMILIES[family].items():
            images, classes = draw(model, sampling, keep, args.images, rejector, device)
            rows.append({"sampling": family, "at": label, **judges.measure(images, classes)})
            print(rows[-1], flush=True)
    write_csv(args.table, rows)
    figure(rows, [judge.name for judge in judges.judges], args.figure)
    return 0


if __name__ == "__main__":
    runtime.run(main)
