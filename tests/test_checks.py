"""The marking of the exercises is itself tested by mutation: the solutions pass with any seed, a typical wrong answer
fails, and the message says what is wrong with it."""

import json
import math
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch import Tensor, nn

from minvqgan.course import checks

sys.path.insert(0, str(ROOT / "notebooks"))
from coursework import BEGIN, END, without

# For each exercise: (what stands in the solution, what a student wrote instead, words of the message).
MUTATIONS = {
    "to_model_range": [
        ("pixels.movedim(-1, -3).float()", "pixels.float()", "channels belong before the rows"),
        ("/ 127.5 - 1", "/ 255", "black"),
        ("/ 127.5 - 1", "/ 128 - 1", "white"),
        ("/ 127.5 - 1", "// 127.5 - 1", "between black and white"),
        (".float() / 127.5", ".double() / 127.5", "float32"),
        ("pixels.movedim(-1, -3)", "pixels.permute(0, 3, 1, 2)", "any number of dimensions"),
    ],
    "bits_per_pixel": [
        ("(H // f) * (W // f) *", "H * W *", "16 x 16 codes"),
        ("math.log2(K)", "K", "log2"),
        ("math.log2(K)", "math.log(K)", "log2"),
        ("math.log2(K)", "round(math.log2(K))", "do not round"),
        ("math.log2(K)", "(K - 1).bit_length()", "do not round"),
        ("(H // f) * (W // f) * math.log2(K)", "(H // f) * (H // f) * math.log2(K)", "expected"),
    ],
    "latent_size": [
        ("(len(ch_mult) - 1)", "len(ch_mult)", "four halvings"),
        ("return H // f, W // f", "return W // f, H // f", "mind H before W"),
        ("if H % f or W % f:", "if False:", "ValueError"),
        ("if H % f or W % f:", "if H % f:", "96 x 100"),
        ("if H % f or W % f:", "if W % f:", "100 x 96"),
    ],
    "receptive_field": [
        ("(kernel - 1) * step", "(kernel - 1)", "multiplied by all strides"),
        ("(kernel - 1) * step", "kernel * step", "sees 3 pixels"),
        ("step *= stride", "step += stride", "5 pixels"),
    ],
    "side_seen": [
        ("grad[0, 0].abs().sum(1).nonzero()", "torch.arange(size)[:, None]", "every pixel was counted"),
        ("- rows.min()) + 1", "- rows.min())", "depends on"),
        ("out[0, :, ", "out[0, 0, ", "all channels"),
        (
            "(grad,) = torch.autograd.grad(middle.square().sum(), image)",
            "middle.square().sum().backward(); grad = image.grad",
            "left in the network's weights",
        ),
    ],
    "ResDown": [
        ("F.pad(self.skip(x) + h, (0, 1, 0, 1))", "F.pad(self.skip(x) + h, (1, 0, 1, 0))", "shifted by a pixel"),
        (
            "self.down(F.pad(self.skip(x) + h, (0, 1, 0, 1)))",
            "F.conv2d(self.skip(x) + h, self.down.weight, self.down.bias, 2, 1)",
            "shifted by a pixel",
        ),
        ("self.skip(x) + h", "h", "the block *adds*"),
        ("nn.Identity() if c_in == c_out else ", "", "nn.Identity"),
        ("nn.Conv2d(c_in, c_out, 1)", "nn.Conv2d(c_in, c_out, 3, padding=1)", "1 x 1"),
        ("self.conv1(F.silu(self.norm1(x)))", "F.silu(self.norm2(self.conv1(x)))", "conv2(silu(norm2"),
        ("F.pad(self.skip(x) + h, (0, 1, 0, 1))", "self.skip(x) + h", "must become 4 x 3"),
        ("h = self.conv2", "x.mul_(0.9)\n        h = self.conv2", "changed in place"),
    ],
    "nearest_in_chunks": [
        (".min(1)", ".max(1)", "chunk"),
        ("part.square().sum(1) - 2", "-2", "|e|^2 is missing"),
        ("- 2 * z", "- z", "nearest code"),
        ("index + first", "index", "add where the chunk begins"),
        ("range(0, len(codebook), chunk)", "range(0, len(codebook) - chunk + 1, chunk)", "the last chunk"),
        ("value < best", "value <= best", "only a *smaller* distance"),
        ("torch.minimum(value, best)", "value", "nearest code"),
        ("range(0, len(codebook), chunk)", "[0]", "below the chunk's size"),
        ("for first in", "chunk = len(codebook)\n    for first in", "N x K distances"),
        (
            "(part.square().sum(1) - 2 * z @ part.T).min(1)",
            "(z[:, None] - part[None]).square().sum(2).min(1)",
            "N x chunk x D block",
        ),
        (
            "(part.square().sum(1) - 2 * z @ part.T).min(1)",
            "torch.stack([(row - part).square().sum(1) for row in z]).min(1)",
            "Python loop",
        ),
        ("    best = torch.full", "    z -= z.mean(0)\n    best = torch.full", "changed in place"),
    ],
    "straight_through": [
        ("z + (z_q - z).detach()", "z_q", "straight-through"),
        ("z + (z_q - z).detach()", "z", "value must be z_q"),
        ("(z_q - z).detach()", "(z_q - z)", "unchanged"),
        ("z + (z_q - z).detach()", "z + z_q - z.detach()", "codes must learn from the codebook loss"),
        ("z + (z_q - z).detach()", "z_q.detach()", "no gradient reaches z"),
        ("    return z +", "    z.data.copy_(z_q.data)\n    return z +", "changed in place"),
    ],
    "codebook_loss": [
        ("(z_q - z.detach()).square().mean() + beta *", "beta * (z_q - z.detach()).square().mean() +", "beta stands"),
        (".detach()", "", "stop-gradients"),
        ("z_q.detach()", "z_q.detach() * 1.5", "1 + beta"),
        (" + beta * (z_q.detach() - z).square().mean()", "", "1 + beta"),
        ("(z_q.detach() - z)", "(z_q - z).detach()", "z gets no gradient"),
        ("(z_q - z.detach())", "(z_q.detach() - z)", "never move to the latents"),
        (".mean()", ".sum()", "1 + beta"),
        ("beta *", "0.25 *", "use the argument"),
    ],
    "Quantizer": [
        ("z.permute(0, 2, 3, 1).reshape(-1, D)", "z.reshape(-1, D)", "view and reshape do not move an axis"),
        (".view(B, h, w, D).permute(0, 3, 1, 2)", ".view(z.shape)", "axis D moved back"),
        ("straight_through(rows, z_q)", "z_q", "no gradient of z_q reaches z"),
        ("straight_through(rows, z_q)", "(rows + z_q - rows.detach())", "learn from the loss alone"),
        ("codebook_loss(rows, z_q, self.beta)", "codebook_loss(z_q, rows, self.beta)", "beta weighs the commitment"),
        ("codebook_loss(rows, z_q, self.beta)", "codebook_loss(rows, z_q, 0.25)", "the loss"),
        ("codebook_loss(rows, z_q, self.beta)", "codebook_loss(rows, z_q.detach(), self.beta)", "two terms"),
        ("indices.view(B, h, w), loss", "indices, loss", "(B, h, w)"),
        ("nn.Embedding(codebook_size, code_dim)", "nn.Embedding(code_dim, codebook_size)", "K codes of D dimensions"),
        ("B, D, h, w = z.shape", "z.data.mul_(1.1)\n        B, D, h, w = z.shape", "changed in place"),
    ],
    "revive": [
        ("(counts == 0)", "(counts >= 0)", "must stay as they are"),
        ("torch.randperm(len(latents))[: len(unused)]", "torch.zeros(len(unused)).long()", "the same latent"),
        ("torch.randperm(len(latents))", "torch.arange(len(latents))", "same latents every time"),
        ("latents[drawn]", "latents.mean(0)", "moved onto latents"),
        ("    codebook = codebook.clone()\n", "", "changed in place"),
        ("    codebook[unused[: len(drawn)]] = latents[drawn]\n", "", "moved onto latents"),
    ],
    "normalize_features": [
        (".sum(1, keepdim=True)", ".sum((2, 3), keepdim=True)", "over the channels"),
        ("(f.square().sum(1, keepdim=True) + 1e-8).rsqrt()", "1 / (f.abs().sum(1, keepdim=True) + 1e-8)", "L1 norm"),
        (" + 1e-8", "", "guard the norm"),
        ("f * (f.square().sum(1, keepdim=True) + 1e-8).rsqrt()", "f / f.norm()", "length over the channels"),
        ("f * (f.square().sum(1, keepdim=True) + 1e-8).rsqrt()",
         "f / f.norm(dim=1, keepdim=True).clamp_min(1e-10)", "1e+10"),
        ("f * (f.square().sum(1, keepdim=True) + 1e-8).rsqrt()",
         "f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10)", "NaN"),
        ("return f *", "f.data.mul_(1.0001)\n    return f *", "changed in place"),
    ],
    "layer_distance": [
        (".sum(1)", ".mean(1)", "channels are summed"),
        (".mean((1, 2))", ".sum((1, 2))", "positions are averaged"),
        (".mean((1, 2))", ".mean()", "one distance an image"),
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
            "retain_graph=True)[0].norm() for loss in losses)\n    return (rec / (gan + 1e-6)).clamp(0, 1e4).detach()",
            "create_graph=True)[0].norm() for loss in losses)\n    return (rec / (gan + 1e-6)).clamp(0, 1e4)",
            "not detached",
        ),
        ("rec / (gan + 1e-6)", "gan / (rec + 1e-6)", "upside down"),
        (" + 1e-6", "", "delta"),
        (".clamp(0, 1e4)", "", "clamp"),
        ("    losses = ", "    gan_loss.backward(retain_graph=True)\n    losses = ", "left in .grad"),
    ],
    "stage_one": [
        ("    opt_d.zero_grad()\n    hinge", "    hinge", "now learns to call fakes real"),
        (
            ".backward()\n    opt_d.zero_grad()\n    hinge_loss(disc(x), disc(x_hat.detach()))",
            ".backward(retain_graph=True)\n    opt_d.zero_grad()\n    hinge_loss(disc(x), disc(x_hat))",
            "D's loss moved G",
        ),
        ("disc_weight * lambda_ * gan_loss", "disc_weight * gan_loss", "not weighted by lambda"),
        ("disc_weight * lambda_ * gan_loss", "lambda_ * gan_loss", "disc_weight is missing"),
        (" + quantized.loss", "", "codebook loss"),
        ("    opt_g.zero_grad()\n", "", "first one's gradients"),
        ("-disc(x_hat).mean()", "disc(x_hat).mean()", "L_GAN = -mean"),
        ("hinge_loss(disc(x), disc(x_hat.detach()))", "hinge_loss(disc(x_hat.detach()), disc(x))", "halved hinge loss"),
        ("    opt_d.step()\n", "", "both networks must have moved"),
        ("return l1.item(), lambda_.item()", "return l1.item()", "two numbers"),
        ("disc(x_hat.detach())", "disc(vqgan(x)[0].detach() * 0.9)", "same x_hat"),
    ],
    "causal_mask": [
        (".tril()", ".tril(-1)", "may see itself"),
        (".tril()", ".tril(1)", "has to predict"),
        (".tril()", ".triu()", "transposed"),
        (".tril()", "", "predict"),
    ],
    "sequence_loss": [
        ("logits[:, -s.shape[1] :]", "logits[:, : s.shape[1]]", "must not count the condition"),
        ("s.flatten())", 's.flatten(), reduction="sum") / len(s)', "not their sum"),
        ("s.flatten())", 's.flatten(), reduction="none")', "one number"),
    ],
    "top_p": [
        ("q.cumsum(0) - q < p", "q.cumsum(0) < p", "crosses p"),
        ("q / q.sum()", "q", "renormalised"),
        ("scatter(0, order, q / q.sum())", "scatter(0, torch.arange(len(q)), q / q.sum())", "sorted order"),
        ("torch.zeros_like(probabilities).scatter(0, order, q / q.sum())", "q / q.sum()", "sorted order"),
        ("q, order = probabilities.sort(descending=True)",
         "q, order = probabilities.sort(descending=True)\n    probabilities.mul_(0.5)", "changed in place"),
    ],
    "cached_attention": [
        ("torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)", "past[0], past[1]", "the cache must hold 2 keys"),
        ("torch.cat([past[1], v], 1)", "torch.cat([v, past[1]], 1)", "unlike the full pass"),
        (" / math.sqrt(q.shape[-1])", "", "unlike the full pass"),
    ],
    "PrefixBlock": [
        ("        mask[:R, :R] = True\n", "", "in both directions"),
        (".tril()", "", "lies in its future"),
        (".tril()", ".tril(-1)", "does not see"),
        ("math.sqrt(C // self.heads)", "math.sqrt(C)", "C / heads"),
        ("x = x + self.proj", "x = self.proj", "unlike the definition"),
        ("x + self.mlp(self.norm2(x))", "x + self.mlp(x)", "unlike the definition"),
        (
            ".view(B, N, 3, self.heads, C // self.heads)",
            ".view(B, N, self.heads, C // self.heads, 3).permute(0, 1, 4, 2, 3)",
            "q, k, v",
        ),
        ("nn.Linear(C, 3 * C), nn.Linear(C, C)", "nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)", "parameters"),
        ("x = x + self.proj(", "x = self.norm1(x) + self.proj(", "unlike the definition"),
    ],
    "generate": [
        ("tokens = code[:, None]", "tokens = torch.cat([tokens, code[:, None]], 1)", "tokens for R + T - 1"),
        (" / temperature", "", "temperature 0.5"),
        ("logits[:, -1]", "logits[:, 0]", "first codes"),
        (".values[:, -1:]", ".values[:, :1]", "top_k 2"),
        ("cumulative > u[:, i : i + 1]", "cumulative > u[:, :1]", "its own position"),
        ("    return torch.stack", "    step(tokens, state)\n    return torch.stack", "not needed"),
        ("code = (cumulative", "code = logits.argmax(1) if i else (cumulative", "right at first"),
    ],
    "sequence": [
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
    "learn": [
        ("K + c[rows, None], s[rows, :-1]", "K + c[rows, None], s[rows]", "never read"),
        ("        opt.step()\n", "", "a held-out code costs"),
        ("K + c[rows, None]", "K + 0 * c[rows, None]", "a held-out code costs"),
        ("s[rows].flatten())", "s.roll(1, 1)[rows].flatten())", "a held-out code costs"),
        ("s[rows].flatten())", 's[rows].flatten(), reduction="sum")', "mean over all codes"),
        ("        losses.append(loss.item())\n", "", "one loss for each"),
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
    "slide": [
        ("(i - top) * n + j - left", "(i - top) * n + j", "its window has"),
        ("(i - top) * n + j - left", "i * w + j", "its window has"),
        ("max(i - n // 2, 0)", "max(i - n + 1, 0)", "its window has"),
        ("codes[top : top + n, left : left + n].flatten()", "codes[top:top+n, left:left+n].T.flatten()", "plain"),
        ("codes[top : top + n, left : left + n]", "codes[:n, :n]", "the right ones"),
        ("u[i, j]", "u[j % h, i % w]", "plain sampling"),
        ("> u[i, j]).byte().argmax()", "> u[i, j]).sum()", "plain sampling"),
        ("return codes", "return codes.float()", "float32"),
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
            if cell["cell_type"] == "code" and cell["metadata"].get("nbgrader", {}).get("solution"):
                found[cell["metadata"]["nbgrader"]["grade_id"]] = "".join(cell["source"])
    return found


SOLUTIONS = solution_cells()


# An exercise may build on those before it in the same notebook.
NEEDS = {
    "Quantizer": ("nearest_in_chunks", "codebook_loss", "straight_through"),
    "stage_one": ("hinge_loss", "adaptive_weight"),
}


def function(name: str, source: str):
    names = {
        "torch": torch,
        "nn": nn,
        "F": F,
        "math": math,
        "Tensor": Tensor,
        "Sequence": Sequence,
        "Callable": Callable,
    }
    for needed in NEEDS.get(name, ()):
        exec(SOLUTIONS[needed], names)
    exec(source, names)
    return names[name]


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
    head, begin, body = source.partition(BEGIN)
    assert old in body, f"{name}: the solution has no {old!r}"
    for seed in (0, 5):
        with pytest.raises(AssertionError) as said:
            checks.ALL[name](function(name, head + begin + body.replace(old, new)), seed=seed)
        assert word in str(said.value), str(said.value)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_stub_is_explained(name):
    """Typed, with a docstring that gives shapes, and failing with the sentence of what to do."""
    stub = function(name, without(SOLUTIONS[name], BEGIN, END, 'raise NotImplementedError("still to be written")'))
    typed = stub.forward if isinstance(stub, type) else stub
    assert stub.__doc__ and len(stub.__doc__) > 20 and typed.__annotations__
    with pytest.raises(NotImplementedError, match="still to be written"):
        checks.ALL[name](stub)
