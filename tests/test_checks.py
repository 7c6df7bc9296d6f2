"""The marking of the exercises is itself tested by mutation: the solutions pass with any seed, a typical wrong answer
fails, and the message says what is wrong with it."""

import json
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch import Tensor

from minvqgan.course import checks

# For each exercise: (what stands in the solution, what a student wrote instead, words of the message).
MUTATIONS = {
    "to_model_range": [
        ("pixels.movedim(-1, -3).float()", "pixels.float()", "channels belong before the rows"),
        ("/ 127.5 - 1", "/ 255", "black"),
        ("/ 127.5 - 1", "/ 128 - 1", "white"),
        ("/ 127.5 - 1", "// 127.5 - 1", "between black and white"),
        (".float() / 127.5", ".double() / 127.5", "float32"),
    ],
    "bits_per_pixel": [
        ("(H // f) * (W // f) *", "H * W *", "16 x 16 codes"),
        ("math.log2(K)", "K", "log2"),
        ("math.log2(K)", "math.log(K)", "log2"),
        ("(H // f) * (W // f) * math.log2(K)", "(H // f) * (H // f) * math.log2(K)", "expected"),
    ],
    "latent_size": [
        ("(len(ch_mult) - 1)", "len(ch_mult)", "four halvings"),
        ("return H // f, W // f", "return W // f, H // f", "mind H before W"),
        ("if H % f or W % f:", "if False:", "ValueError"),
    ],
    "receptive_field": [
        ("(kernel - 1) * step", "(kernel - 1)", "multiplied by all strides"),
        ("(kernel - 1) * step", "kernel * step", "sees 3 pixels"),
        ("step *= stride", "step += stride", "5 pixels"),
    ],
    "nearest_code": [
        (".argmin(1)", ".argmax(1)", "argmin, not argmax"),
        ("codebook.square().sum(1) - 2", "-2", "|e|^2 is missing"),
        ("- 2 * z", "- z", "nearest code"),
        (".argmin(1)", ".argmin(0)", "one index a row"),
        (
            "return (codebook.square().sum(1) - 2 * z @ codebook.T).argmin(1)",
            "return (z[:, None] - codebook[None]).square().sum(2).argmin(1)",
            "N x K x D block",
        ),
        (
            "return (codebook.square().sum(1) - 2 * z @ codebook.T).argmin(1)",
            "return torch.stack([(row - codebook).square().sum(1).argmin() for row in z])",
            "Python loop",
        ),
    ],
    "straight_through": [
        ("z + (z_q - z).detach()", "z_q", "straight-through"),
        ("z + (z_q - z).detach()", "z", "value must be z_q"),
        ("(z_q - z).detach()", "(z_q - z)", "unchanged"),
        ("z + (z_q - z).detach()", "z + z_q - z.detach()", "codes must learn from the codebook loss"),
        ("z + (z_q - z).detach()", "z_q.detach()", "no gradient reaches z"),
    ],
    "codebook_loss": [
        ("(z_q - z.detach()).square().mean() + beta *", "beta * (z_q - z.detach()).square().mean() +", "beta stands"),
        (".detach()", "", "stop-gradients"),
        ("z_q.detach()", "z_q.detach() * 1.5", "1 + beta"),
        (" + beta * (z_q.detach() - z).square().mean()", "", "1 + beta"),
        ("(z_q.detach() - z)", "(z_q - z).detach()", "z gets no gradient"),
        ("(z_q - z.detach())", "(z_q.detach() - z)", "never move to the latents"),
        (".mean()", ".sum()", "1 + beta"),
    ],
    "normalize_features": [
        ("dim=1", "dim=(2, 3)", "over the channels"),
        ("f.norm(dim=1, keepdim=True)", "f.abs().sum(1, keepdim=True)", "L1 norm"),
        (".clamp_min(1e-10)", "", "guard the norm"),
        ("f / f.norm(dim=1, keepdim=True).clamp_min(1e-10)", "f / f.norm()", "length over the channels"),
    ],
    "layer_distance": [
        (".sum(1)", ".mean(1)", "channels are summed"),
        (".mean((1, 2))", ".sum((1, 2))", "positions are averaged"),
        (".mean((1, 2))", ".mean()", "one distance a picture"),
        (".square()", ".abs()", "w_c"),
    ],
    "hinge_loss": [
        ("1 - logits_real", "1 + logits_real", "sign"),
        ("0.5 * ", "", "halved"),
        ("torch.relu(1 - logits_real)", "(1 - logits_real)", "clamp at 0"),
        ("1 + logits_fake", "1 - logits_fake", "sign"),
    ],
    "adaptive_weight": [
        (
            "return (rec / (gan + 1e-6)).clamp(0, 1e4).detach()",
            "return ((rec_loss / gan_loss).abs() * 0 + rec / (gan + 1e-6)).clamp(0, 1e4)",
            "not detached",
        ),
        ("rec / (gan + 1e-6)", "gan / (rec + 1e-6)", "upside down"),
        (" + 1e-6", "", "delta"),
        (".clamp(0, 1e4)", "", "clamp"),
    ],
    "causal_mask": [
        (".tril()", ".tril(-1)", "may see itself"),
        (".tril()", ".tril(1)", "has to predict"),
        (".tril()", ".triu()", "predict"),
        (".tril()", "", "predict"),
    ],
    "sentence_loss": [
        ("logits[:, -s.shape[1] :]", "logits[:, : s.shape[1]]", "must not count the condition"),
        ("s.flatten())", 's.flatten(), reduction="sum") / len(s)', "not their sum"),
        ("s.flatten())", 's.flatten(), reduction="none")', "one number"),
    ],
    "top_p": [
        ("q.cumsum(0) - q < p", "q.cumsum(0) < p", "crosses p"),
        ("q / q.sum()", "q", "renormalised"),
        ("scatter(0, order, q / q.sum())", "scatter(0, torch.arange(len(q)), q / q.sum())", "0.5"),
    ],
    "cached_attention": [
        ("torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)", "past[0], past[1]", "the cache must hold 2 keys"),
        ("torch.cat([past[1], v], 1)", "torch.cat([v, past[1]], 1)", "unlike the full pass"),
        (" / math.sqrt(q.shape[-1])", "", "unlike the full pass"),
    ],
    "sentence": [
        ("[c + K, s]", "[s, c + K]", "condition comes first"),
        ("c + K", "c", "start"),
        ("[c + K, s]", "[c, s + 5]", "same number"),
        ("[c + K, s]", "[c + K + 1, s]", "K + index"),
    ],
    "guided": [
        ("without_c + scale", "with_c + scale", "scale 1"),
        ("(with_c - without_c)", "(without_c - with_c)", "scale 1"),
        ("without_c + scale * (with_c - without_c)", "scale * with_c", "scale 0"),
    ],
    "window_start": [
        ("max(i - n // 2, 0)", "(i - n // 2)", "upper border"),
        ("min(max(i - n // 2, 0), size - n)", "max(i - n // 2, 0)", "lower border"),
        ("i - n // 2", "i - n + 1", "middle"),
        ("i - n // 2", "i - (n - 1) // 2", "middle"),
    ],
    "context_of": [
        ("< (i, j)]", "<= (i, j)]", "itself"),
        (" if (a, b) < (i, j)", " if (a, b) != (i, j)", "later in reading order"),
        ("max(j - n // 2, 0)", "max(j - n + 1, 0)", "expected"),
        ("for a in range(top, top + n) for b in range(left, left + n)", "for b in range(left, left + n) for a in "
         "range(top, top + n)", "reading order"),
    ],
    "causal_kernel": [
        (" + sees_itself", "", "middle is wrong"),
        (" + sees_itself", " + 1", "middle is wrong"),
        ("mask[: k // 2] = 1", "mask[: k // 2, : k // 2 + 1] = 1", "also to the right"),
        ("mask[: k // 2] = 1", "mask[k // 2 :] = 1", "wrong"),
    ],
    "accepted": [
        ("descending=True", "descending=False", "worst"),
        ("max(1, round(rate * len(scores)))", "round(rate * len(scores))", "keeps 1"),
        ("round(rate * len(scores))", "round((1 - rate) * len(scores))", "keeps 10"),
    ],
}  # fmt: skip


def solution_cells() -> dict[str, str]:
    """The solutions as they stand in the notebooks, by exercise."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["metadata"].get("nbgrader", {}).get("solution"):
                found[cell["metadata"]["nbgrader"]["grade_id"]] = "".join(cell["source"])
    return found


SOLUTIONS = solution_cells()


def function(name: str, source: str):
    namespace = {"torch": torch, "F": F, "math": math, "Tensor": Tensor, "Sequence": Sequence}
    exec(source, namespace)
    return namespace[name]


def test_every_exercise_has_a_check_and_mutations():
    assert SOLUTIONS.keys() == MUTATIONS.keys() and SOLUTIONS.keys() <= checks.ALL.keys()


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_solution_is_right_with_any_seed(name, capsys):
    for seed in (0, 1, 2, 3, 20201217):
        checks.ALL[name](function(name, SOLUTIONS[name]), seed=seed)
    assert capsys.readouterr().out.count(f"right: {name}") == 5


@pytest.mark.parametrize(
    ("name", "old", "new", "word"), [(name, *m) for name, mutations in MUTATIONS.items() for m in mutations]
)
def test_a_wrong_answer_is_told_what_is_wrong(name, old, new, word):
    source = SOLUTIONS[name]
    assert old in source, f"{name}: the solution has no {old!r}"
    body = source.split("### BEGIN SOLUTION")
    wrong = body[0] + body[1].replace(old, new)
    for seed in (0, 5):
        with pytest.raises(AssertionError) as said:
            checks.ALL[name](function(name, wrong), seed=seed)
        assert word in str(said.value), str(said.value)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_stub_is_explained(name):
    """Typed, with a docstring that gives shapes, and the same for everyone who generates it."""
    head = SOLUTIONS[name].split("### BEGIN SOLUTION")[0]
    stub = function(name, head + "raise NotImplementedError")
    assert stub.__doc__ and len(stub.__doc__) > 20 and stub.__annotations__
    with pytest.raises(NotImplementedError):
        checks.ALL[name](stub)
