"""The marking of the exercises is itself tested by mutation: the solutions pass with any seed, a typical wrong answer
fails, and the message says what is wrong with it."""

import ast
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

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
        ("pixels.movedim(-1, -3).float()", "pixels.float()", "before the rows"),
        ("/ 127.5 - 1", "/ 255", "black"),
        ("/ 127.5 - 1", "/ 128 - 1", "white"),
        ("/ 127.5 - 1", "// 127.5 - 1", "between black and white"),
        (".float() / 127.5", ".double() / 127.5", "float32"),
        ("pixels.movedim(-1, -3)", "pixels.permute(0, 3, 1, 2)", "any number of leading dimensions"),
    ],
    "bits_per_pixel": [
        ("return (H // f)", "(H // f)", "the function returned None"),
        ("(H // f) * (W // f) *", "H * W *", "f x f pixels"),
        ("math.log2(K)", "K", "log2"),
        ("math.log2(K)", "math.log(K)", "log2"),
        ("math.log2(K)", "round(math.log2(K))", "is rounded"),
        ("math.log2(K)", "(K - 1).bit_length()", "is rounded"),
        ("(H // f) * (W // f) * math.log2(K)", "(H // f) * (H // f) * math.log2(K)", "expected"),
    ],
    "latent_size": [
        ("if H % f or W % f:", "if (H + W) % f:", "100 x 92"),
        ("raise ValueError(", "raise AssertionError(", "but gave AssertionError"),
        ("return H // f, W // f", "return H // f + 1, W // f", "ch_mult"),
        ("return H // f, W // f", "return H / f, W / f", "expected an integer"),
        ("(len(ch_mult) - 1)", "len(ch_mult)", "halvings between"),
        ("return H // f, W // f", "return W // f, H // f", "the height comes first"),
        ("if H % f or W % f:", "if False:", "ValueError"),
        ("if H % f or W % f:", "if H % f:", "96 x 100"),
        ("if H % f or W % f:", "if W % f:", "100 x 96"),
    ],
    "receptive_field": [
        ("(kernel - 1) * step", "(kernel - 1)", "multiplied by all strides"),
        ("(kernel - 1) * step", "kernel * step", "spans 3 pixels"),
        ("step *= stride", "step += stride", "5 pixels"),
    ],
    "side_seen": [
        ("torch.randn(1, 1, size", "torch.zeros(1, 1, size", "An image of zeros"),
        ("int(rows.max() - rows.min()) + 1", "len(rows)", "depends on"),
        ("out.shape[2] // 2", "0", "depends on"),
        ("grad[0, 0].abs().sum(1).nonzero()", "torch.arange(size)[:, None]", "every pixel was counted"),
        ("- rows.min()) + 1", "- rows.min())", "off by one"),
        ("out[0, :, ", "out[0, 0, ", "All channels"),
        (
            "(grad,) = torch.autograd.grad(middle.square().sum(), image)",
            "middle.square().sum().backward(); grad = image.grad",
            "left in the network's weights",
        ),
    ],
    "ResDown": [
        ("self.down = ", "self.extra = nn.Linear(3, 3)\n        self.down = ", "parameters, expected"),
        ("F.silu", "F.relu", "must be SiLU"),
        ("nn.GroupNorm(1, c_out)", "nn.GroupNorm(c_out, c_out)", "self.norm2 must be"),
        (
            "self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)",
            "self.conv1 = nn.Conv2d(c_in, c_out, 1)",
            "self.conv1 must be",
        ),
        (
            "nn.Conv2d(c_out, c_out, 3, stride=2)",
            "nn.Conv2d(c_out, c_out, 3, stride=2, groups=c_out)",
            "self.down must be",
        ),
        ("self.skip(x) + h", "self.skip(x) * h", "skip(x) + conv2"),
        (
            "F.pad(self.skip(x) + h, (0, 1, 0, 1))",
            "F.pad(self.skip(x) + h, (1, 0, 1, 0))",
            "the right and the bottom only",
        ),
        (
            "self.down(F.pad(self.skip(x) + h, (0, 1, 0, 1)))",
            "F.conv2d(self.skip(x) + h, self.down.weight, self.down.bias, 2, 1)",
            "the right and the bottom only",
        ),
        ("self.skip(x) + h", "h", "adds to its input"),
        ("nn.Identity() if c_in == c_out else ", "", "must be Identity"),
        ("nn.Conv2d(c_in, c_out, 1)", "nn.Conv2d(c_in, c_out, 3, padding=1)", "kernel_size=(1, 1)"),
        ("self.conv1(F.silu(self.norm1(x)))", "F.silu(self.norm2(self.conv1(x)))", "conv2(silu(norm2"),
        ("F.pad(self.skip(x) + h, (0, 1, 0, 1))", "self.skip(x) + h", "instead of 4 x 3"),
        ("h = self.conv2", "x.mul_(0.9)\n        h = self.conv2", "changed in place"),
    ],
    "nearest_in_chunks": [
        ("    best = ", "    return torch.cdist(z, codebook).argmax(1)\n    best = ", "farthest away"),
        ("torch.where(value < best, index + first, indices)", "index + first", "only the last chunk counts"),
        (
            "    best = ",
            "    return torch.cat([torch.cdist(rows, codebook).argmin(1) for rows in z.split(chunk)])\n    best = ",
            "cut the codebook, not z",
        ),
        (".min(1)", ".max(1)", "chunk"),
        ("part.square().sum(1) - 2", "-2", "|e|^2 is missing"),
        ("- 2 * z", "- z", "the factor 2"),
        ("index + first", "index", "add where the chunk begins"),
        ("range(0, len(codebook), chunk)", "range(0, len(codebook) - chunk + 1, chunk)", "the last code was left out"),
        ("value < best", "value <= best", "only a *smaller* distance"),
        ("torch.minimum(value, best)", "value", "nearest code"),
        ("range(0, len(codebook), chunk)", "[0]", "below the chunk's size"),
        ("for first in", "chunk = len(codebook)\n    for first in", "N x K distances"),
        (
            "(part.square().sum(1) - 2 * z @ part.T).min(1)",
            "(z[:, None] - part[None]).square().sum(2).min(1)",
            "a block of N x chunk x D",
        ),
        (
            "(part.square().sum(1) - 2 * z @ part.T).min(1)",
            "torch.stack([(row - part).square().sum(1) for row in z]).min(1)",
            "a loop over the rows",
        ),
        ("    best = torch.full", "    z -= z.mean(0)\n    best = torch.full", "changed in place"),
    ],
    "straight_through": [
        ("z + (z_q - z).detach()", "0.5 * z + (z_q - 0.5 * z).detach()", "the one at the output"),
        ("z + (z_q - z).detach()", "z_q", "no gradient reaches z"),
        ("z + (z_q - z).detach()", "z", "must be that of z_q"),
        ("(z_q - z).detach()", "(z_q - z)", "no gradient reaches z"),
        ("z + (z_q - z).detach()", "z + z_q - z.detach()", "codes must learn from the codebook loss"),
        ("z + (z_q - z).detach()", "z_q.detach()", "no gradient reaches z"),
        ("    return z +", "    z.data.copy_(z_q.data)\n    return z +", "changed in place"),
    ],
    "codebook_loss": [
        (
            "(z_q - z.detach()).square().mean() + beta * (z_q.detach() - z).square().mean()",
            "(1 + beta) / 2 * ((z_q - z.detach()).square().mean() + (z_q.detach() - z).square().mean())",
            "has weight 1",
        ),
        ("z.detach()", "z", "has weight beta"),
        (
            "(z_q - z.detach()).square().mean() + beta *",
            "beta * (z_q - z.detach()).square().mean() +",
            "beta weighs the wrong term",
        ),
        (".detach()", "", "stop-gradients"),
        ("z_q.detach()", "z_q.detach() * 1.5", "1 + beta"),
        (" + beta * (z_q.detach() - z).square().mean()", "", "one of the two terms"),
        ("(z_q.detach() - z)", "(z_q - z).detach()", "z gets no gradient"),
        ("(z_q - z.detach())", "(z_q.detach() - z)", "never move to the latents"),
        (".mean()", ".sum()", "not the sum"),
        ("beta *", "0.25 *", "use the argument"),
    ],
    "Quantizer": [
        ("code_dim), beta", "code_dim), nn.Parameter(torch.tensor(beta))", "not a parameter"),
        (
            "nn.Embedding(codebook_size, code_dim), beta",
            "nn.Parameter(torch.randn(codebook_size, code_dim)), beta",
            "must be an nn.Embedding",
        ),
        (
            "nn.Embedding(codebook_size, code_dim), beta",
            "nn.Embedding(codebook_size, code_dim), beta\n        nn.init.zeros_(self.codebook.weight)",
            "equal at the start",
        ),
        ("return z_q, indices.view(B, h, w), loss", "return z_q, loss", "return three things"),
        ("straight_through(rows, z_q)", "straight_through(rows, 2 * z_q)", "holds the code"),
        ("straight_through(rows, z_q)", "(0.5 * rows + (z_q - 0.5 * rows).detach())", "must be the one at z_q"),
        (
            "codebook_loss(rows, z_q, self.beta)",
            "(1 + self.beta) * (rows - z_q).square().mean()",
            "gradient at the codebook",
        ),
        (
            "codebook_loss(rows, z_q, self.beta)",
            "(rows - z_q).square().mean() + self.beta * (rows - z_q.detach()).square().mean()",
            "gradient at z",
        ),
        ("z.permute(0, 2, 3, 1).reshape(-1, D)", "z.reshape(-1, D)", "view and reshape do not move an axis"),
        (".view(B, h, w, D).permute(0, 3, 1, 2)", ".view(z.shape)", "D must move back"),
        ("straight_through(rows, z_q)", "z_q", "no gradient of z_q reaches z"),
        ("straight_through(rows, z_q)", "(rows + z_q - rows.detach())", "learn from the loss only"),
        ("codebook_loss(rows, z_q, self.beta)", "codebook_loss(z_q, rows, self.beta)", "beta weighs the commitment"),
        ("codebook_loss(rows, z_q, self.beta)", "codebook_loss(rows, z_q, 0.25)", "(1 + beta) times"),
        ("codebook_loss(rows, z_q, self.beta)", "codebook_loss(rows, z_q.detach(), self.beta)", "two terms"),
        ("indices.view(B, h, w), loss", "indices, loss", "(B, h, w)"),
        ("nn.Embedding(codebook_size, code_dim)", "nn.Embedding(code_dim, codebook_size)", "K codes of D numbers"),
        ("B, D, h, w = z.shape", "z.data.mul_(1.1)\n        B, D, h, w = z.shape", "changed in place"),
    ],
    "revive": [
        ("return codebook", "return codebook[:-1]", "shape must stay"),
        ("[: len(unused)]", "[: len(unused) - 1]", "6 codes moved"),
        (
            "    drawn = ",
            "    if len(latents) < len(unused):\n        return codebook.clone()\n    drawn = ",
            "with fewer latents",
        ),
        (
            "torch.randperm(len(latents))[: len(unused)]",
            "torch.randperm(min(len(latents), len(unused)))",
            "only some latents",
        ),
        ("counts == 0", "counts <= 1", "must stay as they are"),
        ("(counts == 0)", "(counts >= 0)", "must stay as they are"),
        ("torch.randperm(len(latents))[: len(unused)]", "torch.zeros(len(unused)).long()", "onto one latent"),
        ("torch.randperm(len(latents))", "torch.arange(len(latents))", "the same latents were taken"),
        ("latents[drawn]", "latents.mean(0)", "exactly onto one"),
        ("    codebook = codebook.clone()\n", "", "changed in place"),
        ("    codebook[unused[: len(drawn)]] = latents[drawn]\n", "", "no unused code moved"),
    ],
    "normalize_features": [
        (" + 1e-8", " + 1e-3", "is the guard too large"),
        (").rsqrt()", ") ** -1.0", "the root is missing"),
        (".sum(1, keepdim=True)", ".sum((2, 3), keepdim=True)", "over the channels"),
        ("(f.square().sum(1, keepdim=True) + 1e-8).rsqrt()", "1 / (f.abs().sum(1, keepdim=True) + 1e-8)", "L1 norm"),
        (" + 1e-8", "", "guard the norm"),
        ("f * (f.square().sum(1, keepdim=True) + 1e-8).rsqrt()", "f / f.norm()", "length over the channels"),
        (
            "f * (f.square().sum(1, keepdim=True) + 1e-8).rsqrt()",
            "f / f.norm(dim=1, keepdim=True).clamp_min(1e-10)",
            "1e+10",
        ),
        (
            "f * (f.square().sum(1, keepdim=True) + 1e-8).rsqrt()",
            "f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10)",
            "NaN",
        ),
        ("return f *", "f.data.mul_(1.0001)\n    return f *", "changed in place"),
    ],
    "layer_distance": [
        ("w[:, None, None] * ", "", "weights w are missing"),
        ("w[:, None, None]", "w.sqrt()[:, None, None]", "sum over channels of w_c"),
        (".sum(1)", ".mean(1)", "the channels are summed"),
        (".mean((1, 2))", ".sum((1, 2))", "the positions are averaged"),
        (".mean((1, 2))", ".mean()", "one distance for each image"),
        (".square()", ".abs()", "not the absolute"),
    ],
    "hinge_loss": [
        (
            "torch.relu(1 - logits_real).mean() + torch.relu(1 + logits_fake)",
            "torch.relu(1 + logits_real).mean() + torch.relu(1 - logits_fake)",
            "both signs",
        ),
        ("torch.relu", "", "clamp at 0 is missing"),
        ("1 - logits_real).mean() + torch.relu(1 + ", "-logits_real).mean() + torch.relu(", "the margin is missing"),
        ("logits_fake).mean())", "logits_fake).mean()).item()", "expected a tensor"),
        ("1 - logits_real", "1 + logits_real", "sign"),
        ("0.5 * ", "", "halved"),
        ("torch.relu(1 - logits_real)", "(1 - logits_real)", "mean max(0, 1 - D(x))"),
        ("1 + logits_fake", "1 - logits_fake", "sign"),
    ],
    "adaptive_weight": [
        ("retain_graph=True", "retain_graph=loss is rec_loss", "use retain_graph=True"),
        (".clamp(0, 1e4)", ".clamp(1, 1e4)", "clamped from below"),
        ("1e-6", "1e-4", "delta is 1e-4"),
        (
            "torch.autograd.grad(loss, last_weight, retain_graph=True)[0].norm() for loss in losses",
            "loss for loss in losses",
            "ratio of the losses",
        ),
        ("[0].norm()", "[0].abs().sum()", "lambda = |grad rec_loss|"),
        (
            "retain_graph=True)[0].norm() for loss in losses)\n    return (rec / (gan + 1e-6)).clamp(0, 1e4).detach()",
            "create_graph=True)[0].norm() for loss in losses)\n    return (rec / (gan + 1e-6)).clamp(0, 1e4)",
            "a detached tensor",
        ),
        ("rec / (gan + 1e-6)", "gan / (rec + 1e-6)", "upside down"),
        (" + 1e-6", "", "delta"),
        (".clamp(0, 1e4)", "", "clamp"),
        ("    losses = ", "    gan_loss.backward(retain_graph=True)\n    losses = ", "left in .grad"),
    ],
    "stage_one": [
        ("x_hat.detach()", "x_hat", "D must be shown x_hat.detach()"),
        ("(x - x_hat).abs().mean()", "(x - x_hat).square().mean()", "G must move along"),
        ("return l1.item(), lambda_.item()", "return 2 * l1.item(), lambda_.item()", "l1 is"),
        ("    opt_d.zero_grad()\n    hinge", "    hinge", "teaches D to call fakes real"),
        (
            ".backward()\n    opt_d.zero_grad()\n    hinge_loss(disc(x), disc(x_hat.detach()))",
            ".backward(retain_graph=True)\n    opt_d.zero_grad()\n    hinge_loss(disc(x), disc(x_hat))",
            "D's loss moves G",
        ),
        ("disc_weight * lambda_ * gan_loss", "disc_weight * gan_loss", "not weighted by lambda"),
        ("disc_weight * lambda_ * gan_loss", "lambda_ * gan_loss", "disc_weight is missing"),
        (" + quantized.loss", "", "codebook loss"),
        ("    opt_g.zero_grad()\n", "", "first one's gradients"),
        ("-disc(x_hat).mean()", "disc(x_hat).mean()", "L_GAN = -mean"),
        (
            "hinge_loss(disc(x), disc(x_hat.detach()))",
            "hinge_loss(disc(x_hat.detach()), disc(x))",
            "along the hinge loss",
        ),
        ("    opt_d.step()\n", "", "both networks must move"),
        ("return l1.item(), lambda_.item()", "return l1.item()", "two numbers"),
        ("disc(x_hat.detach())", "disc(vqgan(x)[0].detach() * 0.9)", "the x_hat G learned from"),
    ],
    "causal_mask": [
        ("torch.ones(T, T, ", "torch.ones(5, 5, ", "True on and below"),
        ("dtype=torch.bool", "dtype=torch.float32", "got dtype float32"),
        (".tril()", ".tril() if T < 13 else torch.ones(T, T, dtype=torch.bool)", "every token sees all others"),
        (".tril()", ".tril(-1)", "may see itself"),
        (".tril()", ".tril(1)", "has to predict"),
        (".tril()", ".triu()", "transposed"),
        (".tril()", "", "predict"),
    ],
    "sequence_loss": [
        ("s.flatten())", 's.flatten(), reduction="sum")', "not their sum"),
        ("s.flatten())", "s.flatten()) / 2", "-log p(s | r), mean"),
        ("logits[:, -s.shape[1] :]", "logits[:, : s.shape[1]]", "must not count the condition"),
        ("s.flatten())", 's.flatten(), reduction="sum") / len(s)', "the sum over T"),
        ("s.flatten())", 's.flatten(), reduction="none")', "one number"),
    ],
    "top_p": [
        ("q.cumsum(0) - q < p", "q.cumsum(0) - q <= p", "one code too many"),
        ("q / q.sum()", "q.softmax(0)", "the most likely codes that reach"),
        (
            "    q = torch",
            "    q = probabilities * (probabilities >= q[(q.cumsum(0) - q < p).sum() - 1])\n"
            "    return q / q.sum()\n    q = torch",
            "cut by rank",
        ),
        ("q.cumsum(0) - q < p", "q.cumsum(0) < p", "crosses p"),
        ("q / q.sum()", "q", "renormalised"),
        ("scatter(0, order, q / q.sum())", "scatter(0, torch.arange(len(q)), q / q.sum())", "sorted order"),
        ("torch.zeros_like(probabilities).scatter(0, order, q / q.sum())", "q / q.sum()", "sorted order"),
        (
            "q, order = probabilities.sort(descending=True)",
            "q, order = probabilities.sort(descending=True)\n    probabilities.mul_(0.5)",
            "changed in place",
        ),
    ],
    "cached_attention": [
        ("return weights @ v, (k, v)", "return (weights @ v,)", "not of the form in the docstring"),
        ("math.sqrt(q.shape[-1])", "q.shape[-1]", "not by D"),
        ("return weights @ v", "return 2 * weights @ v", "differs from the full pass"),
        ("(k, v)", "(v, k)", "the cached keys after"),
        (
            "torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)",
            "torch.cat([k, past[0]], 1), torch.cat([v, past[1]], 1)",
            "in front of the cached keys",
        ),
        ("torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)", "past[0], past[1]", "the cache must hold 2 keys"),
        ("torch.cat([past[1], v], 1)", "torch.cat([v, past[1]], 1)", "it comes last"),
        (" / math.sqrt(q.shape[-1])", "", "not divided by sqrt(D)"),
    ],
    "PrefixBlock": [
        ("nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))", "nn.Linear(C, C)", "two nn.Linear"),
        ("nn.GELU(), ", "", "no activation"),
        ("nn.GELU()", "nn.ReLU()", "not ReLU"),
        ("nn.GELU()", "nn.SiLU()", "not SiLU"),
        ("nn.GELU()", "nn.Sigmoid()", "not a sigmoid"),
        (" / math.sqrt(C // self.heads)", "", "not divided by the root"),
        ("self.qkv(self.norm1(x))", "self.qkv(x)", "norm1 is missing"),
        ("masked_fill(~mask", "masked_fill(mask", "is finite"),
        ("nn.LayerNorm(C), nn.LayerNorm(C)", "nn.LayerNorm(C), nn.LayerNorm(C, eps=0.1)", "self.norm2 must be"),
        ("        mask[:R, :R] = True\n", "", "in both directions"),
        (".tril()", "", "lies in its future"),
        (".tril()", ".tril(-1)", "a token must see itself"),
        ("math.sqrt(C // self.heads)", "math.sqrt(C)", "C / heads"),
        ("x = x + self.proj", "x = self.proj", "x + proj"),
        ("x + self.mlp(self.norm2(x))", "x + self.mlp(x)", "norm2 is missing"),
        (
            ".view(B, N, 3, self.heads, C // self.heads)",
            ".view(B, N, self.heads, C // self.heads, 3).permute(0, 1, 4, 2, 3)",
            "q, k, v",
        ),
        (
            "nn.Linear(C, 3 * C), nn.Linear(C, C)",
            "nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)",
            "self.qkv must be",
        ),
        ("x = x + self.proj(", "x = self.norm1(x) + self.proj(", "x + proj"),
    ],
    "generate": [
        ("tokens = code[:, None]", "tokens = torch.cat([tokens, code[:, None]], 1)", "tokens instead of R + T - 1"),
        (" / temperature", "", "temperature has no effect"),
        ("logits[:, -1]", "logits[:, 0]", "the first code at which"),
        (".values[:, -1:]", ".values[:, :1]", "most likely code was taken"),
        ("cumulative > u[:, i : i + 1]", "cumulative > u[:, :1]", "a u of its own"),
        ("    return torch.stack", "    step(tokens, state)\n    return torch.stack", "not needed"),
        ("code = (cumulative", "code = logits.argmax(1) if i else (cumulative", "the first code at which"),
    ],
    "sequence": [
        ("[c + K, s]", "[c, s + K]", "must keep their numbers"),
        ("[c + K, s]", "[s, c + K]", "condition comes first"),
        ("c + K", "c", "cannot tell them apart"),
        ("[c + K, s]", "[c, s + 5]", "[K + c | s]"),
        ("[c + K, s]", "[c + K + 1, s]", "token K + i"),
    ],
    "guided": [
        ("without_c + scale", "with_c + scale", "scale 1"),
        ("(with_c - without_c)", "(without_c - with_c)", "direction is wrong"),
        ("without_c + scale * (with_c - without_c)", "scale * with_c", "scale 0"),
    ],
    "learn": [
        (
            "logits.flatten(0, 1), s[rows].flatten()",
            "logits[:, 1:].flatten(0, 1), s[rows, 1:].flatten()",
            "the first code costs",
        ),
        ("torch.randint(len(s), (32,))", "torch.arange(32)", "were ever read"),
        ("K + c[rows, None], s[rows, :-1]", "K + c[rows, None], s[rows]", "without the last code"),
        ("        opt.step()\n", "", "a held-out code costs"),
        ("K + c[rows, None]", "K + 0 * c[rows, None]", "were ever read"),
        ("s[rows].flatten())", "s.roll(1, 1)[rows].flatten())", "a held-out code costs"),
        ("s[rows].flatten())", 's[rows].flatten(), reduction="sum")', "mean over all codes"),
        ("        losses.append(loss.item())\n", "", "one loss for each"),
    ],
    "window_start": [
        ("i - n // 2", "i + 1", "inside its window"),
        ("max(i - n // 2, 0)", "(i - n // 2)", "upper border"),
        ("min(max(i - n // 2, 0), size - n)", "max(i - n // 2, 0)", "lower border"),
        ("i - n // 2", "i - n + 1", "middle"),
        ("i - n // 2", "i - (n - 1) // 2", "middle"),
    ],
    "context_of": [
        ("< (i, j)]", "<= (i, j)]", "itself"),
        (" if (a, b) < (i, j)", " if (a, b) != (i, j)", "later in reading order"),
        ("max(j - n // 2, 0)", "max(j - n + 1, 0)", "expected"),
        (
            "for a in range(top, top + n) for b in range(left, left + n)",
            "for b in range(left, left + n) for a in range(top, top + n)",
            "reading order",
        ),
    ],
    "slide": [
        ("p.cumsum(0) > u", "p.cumsum(0) >= u", "exceeds u[i, j]"),
        ("window[: (i - top)", "window[None, : (i - top)", "as one row"),
        (
            "            p = predict(",
            "            predict(window[:0])\n            p = predict(",
            "one call for each code",
        ),
        ("codes[i, j] = ", "codes[i + 1, j] = ", "IndexError"),
        ("(i - top) * n + j - left", "(i - top) * n + j", "its window has"),
        ("(i - top) * n + j - left", "i * w + j", "its window has"),
        ("max(i - n // 2, 0)", "max(i - n + 1, 0)", "its window has"),
        (
            "codes[top : top + n, left : left + n].flatten()",
            "codes[top:top+n, left:left+n].T.flatten()",
            "its window holds",
        ),
        ("codes[top : top + n, left : left + n]", "codes[:n, :n]", "its window holds"),
        ("u[i, j]", "u[j % h, i % w]", "exceeds u[i, j]"),
        ("> u[i, j]).byte().argmax()", "> u[i, j]).sum()", "exceeds u[i, j]"),
        ("return codes", "return codes.float()", "float32"),
    ],
    "causal_kernel": [
        ("torch.zeros(k, k)", "torch.zeros(5, 5)", "of shape (3, 3)"),
        ("    return mask", "    mask[-1] = 1\n    return mask", "lies the future"),
        (" + sees_itself", "", "middle is wrong"),
        (" + sees_itself", " + 1", "middle is wrong"),
        ("mask[: k // 2] = 1", "mask[: k // 2, : k // 2 + 1] = 1", "also to the right"),
        ("mask[: k // 2] = 1", "mask[k // 2 :] = 1", "wrong"),
    ],
    "accepted": [
        ("round(rate", "math.ceil(rate", "= 8, not 9"),
        ("scores.argsort(descending=True)", "scores.sort(descending=True).values", "return their indices"),
        ("[: max(1, round(rate * len(scores)))]", "[: max(1, round(rate * len(scores)))].sort().values", "best first"),
        ("round(rate * len(scores))", "int(rate * len(scores))", "= 29, not 28"),
        ("descending=True", "descending=False", "worst"),
        ("max(1, round(rate * len(scores)))", "round(rate * len(scores))", "= 1, not 0"),
        ("round(rate * len(scores))", "round((1 - rate) * len(scores))", "= 10, not 30"),
    ],
}


def solution_cells() -> dict[str, str]:
    """The solutions as they stand in the notebooks, by exercise."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code" and cell["metadata"].get("nbgrader", {}).get("solution"):
                found[cell["metadata"]["nbgrader"]["grade_id"]] = "".join(cell["source"])
    return found


SOLUTIONS = solution_cells()


def function(name: str, source: str):
    """The student's function or class, as a cell of the notebook defines it. Exercises that it builds on are stubs."""
    names = {
        "torch": torch,
        "nn": nn,
        "F": F,
        "math": math,
        "Tensor": Tensor,
        "Sequence": Sequence,
        "Callable": Callable,
    }
    exec(source, names)
    return names[name]


def mutated(name: str, old: str, new: str) -> str:
    head, begin, body = SOLUTIONS[name].partition(BEGIN)
    assert old in body, f"{name}: the solution has no {old!r}"
    return head + begin + body.replace(old, new)


@functools.cache
def said(name: str, old: str, new: str, seed: int) -> str:
    with pytest.raises(AssertionError) as error:
        checks.ALL[name](function(name, mutated(name, old, new)), seed=seed)
    return str(error.value)


# Other right answers: (exercise, what stands in the solution, what is as good).
ALSO_RIGHT = [
    ("ResDown", "3, padding=1", '3, padding="same"'),
    ("PrefixBlock", "nn.GELU()", 'nn.GELU("tanh")'),
    ("stage_one", "hinge_loss(disc(x), disc(x_hat.detach())).backward()",
     "(0.5 * (1 - disc(x)).relu().mean() + 0.5 * (1 + disc(x_hat.detach())).relu().mean()).backward()"),
    ("nearest_in_chunks", "part.square().sum(1) - 2 * z @ part.T", "torch.cdist(z, part)"),
    ("revive", "torch.randperm(len(latents))", "torch.multinomial(torch.ones(len(latents)), len(latents))"),
    ("learn", "torch.randint(len(s), (32,))", "torch.arange(len(s))"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new"), ALSO_RIGHT)
def test_other_right_answers_are_right(name, old, new):
    for seed in (0, 5):
        checks.ALL[name](function(name, mutated(name, old, new)), seed=seed)


def test_every_exercise_has_a_check_and_mutations():
    assert SOLUTIONS.keys() == MUTATIONS.keys() == checks.ALL.keys()


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_solution_is_right_with_any_seed(name, capsys):
    seeds = (0, 1, 20201217) if name in ("stage_one", "learn") else range(10)
    for seed in seeds:
        checks.ALL[name](function(name, SOLUTIONS[name]), seed=seed)
    assert capsys.readouterr().out.count(f"right: {name}") == len(seeds)


@pytest.mark.parametrize(
    ("name", "old", "new", "word"), [(name, *m) for name, mutations in MUTATIONS.items() for m in mutations]
)
def test_a_wrong_answer_is_told_what_is_wrong(name, old, new, word):
    for seed in (0, 5):
        assert word in said(name, old, new, seed)


def sentences() -> list[str]:
    """Patterns of all sentences that the checks can say: their strings that are longer than a name."""
    found = []

    class Strings(ast.NodeVisitor):
        def visit_Expr(self, node):
            if not isinstance(node.value, ast.Constant):  # not a docstring
                self.generic_visit(node)

        def visit_JoinedStr(self, node):
            found.append("".join(re.escape(p.value) if isinstance(p, ast.Constant) else ".*" for p in node.values))

        def visit_Constant(self, node):
            if isinstance(node.value, str):
                found.append(re.escape(node.value))

    Strings().visit(ast.parse(Path(checks.__file__).read_text()))
    return [pattern for pattern in found if pattern.count(" ") > 3]


def test_every_sentence_has_a_wrong_answer():
    messages = [said(name, *m[:2], 0) for name, mutations in MUTATIONS.items() for m in mutations]
    unheard = [p for p in sentences() if not any(re.search(p, message, re.S) for message in messages)]
    assert len(sentences()) > 150 and not unheard, "\n".join(unheard)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_stub_is_explained(name):
    """Typed, with a docstring that gives shapes, and failing with the sentence of what to do."""
    stub = function(name, without(SOLUTIONS[name], BEGIN, END, 'raise NotImplementedError("still to be written")'))
    typed = stub.forward if isinstance(stub, type) else stub
    assert stub.__doc__ and len(stub.__doc__) > 20 and typed.__annotations__
    with pytest.raises(NotImplementedError, match="still to be written"):
        checks.ALL[name](stub)
