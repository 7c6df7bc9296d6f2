"""Both steps and the sampler beside the official order of work, at equal architecture and batch.

    pytest tests/benchmarks -s               on a quiet machine; OMP_NUM_THREADS=1 for one core

The official order (taming-transformers) is written down here in plain form. Stage one: the autoencoder and LPIPS run
forward for G's step and again for D's, lambda takes two gradients through the decoder's last layer, and `backward` of
the sum then runs LPIPS and D backward a second time. Stage two: every batch is encoded anew; three linear layers for
query, key and value, two matrix products, a mask and a softmax; a cache that is joined again at every token; in the
sliding window every token from a forward pass over the whole window. Default memory format, plain Adam, no bfloat16.
VGG16's weights are random on both sides, which takes the same time.
"""

import copy
import math
import statistics
import time
from functools import partial
from unittest import mock

import lpips
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from minvqgan import VQGAN, VQGANConfig, sampler
from minvqgan.conditioning import NoCondition
from minvqgan.discriminator import PatchDiscriminator
from minvqgan.gpt import GPT, GPTConfig, parameter_groups
from minvqgan.harness import judges, runtime
from minvqgan.objective import ObjectiveConfig, stage_one_step
from minvqgan.perceptual import LPIPS, VGG16Features
from minvqgan.sampler import Sampling
from minvqgan.two_stage import TwoStage, TwoStageConfig

K, HEADS = 1024, 8
HAS_BFLOAT16 = runtime.pick_amp(None, torch.device("cpu"))  # its targets hold where --amp would choose it


def seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def compare(what: str, theirs, ours: dict, at_least: dict[str, float], scale: float = 1, turns: int = 5) -> None:
    """Asserts how many times as long `theirs` takes as each of `ours`: the median over turns in which all run once,
    after a call to warm up. Every second turn runs backwards, so that a slow drift of the machine hits all alike.
    scale: how much more work ours does than theirs."""
    functions = {"": theirs} | {name: ours[name] for name in ours if HAS_BFLOAT16 or "bfloat16" not in name}
    turn = {name: [] for name in functions}
    for i in range(turns + 1):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            spent = seconds(functions[name])
            if i:
                turn[name].append(spent)
    for name in list(functions)[1:]:
        ratios = [scale * a / b for a, b in zip(turn[""], turn[name], strict=True)]
        median = statistics.median(ratios)
        print(f"\n{what}, {name}: {median:.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})", end="")
        assert median >= at_least.get(name, 0), (what, name, ratios)


class Networks:
    """VQGAN, D and their optimizers, in the official layout or in ours, and a batch."""

    def __init__(self, side: int, batch: int, fused: bool):
        torch.manual_seed(0)
        shared = {"ch": 32, "ch_mult": (1, 2, 4), "norm_groups": 32, "z_channels": 64}
        config = VQGANConfig(image_size=side, codebook_size=512, code_dim=64, **shared)
        layout = torch.channels_last if fused else torch.contiguous_format
        self.vqgan = VQGAN(config).to(memory_format=layout)
        self.disc = PatchDiscriminator(3, 64, 3).to(memory_format=layout)
        self.x = (torch.rand(batch, 3, side, side) * 2 - 1).contiguous(memory_format=layout)
        adam = partial(torch.optim.Adam, lr=1e-5, betas=(0.5, 0.9), fused=fused)
        self.opt_g, self.opt_d = adam(self.vqgan.parameters()), adam(self.disc.parameters())

    def ours(self, perceptual, amp: bool) -> None:
        config = ObjectiveConfig(disc_weight=0.8, max_lambda=1e4, delta=1e-4)
        stage_one_step(self.vqgan, self.disc, perceptual, self.x, config, 1.0, amp)
        for opt in (self.opt_g, self.opt_d):
            opt.step()
            opt.zero_grad()

    @mock.patch("torch.nn.functional.silu", lambda x, inplace=False: x * torch.sigmoid(x))
    def official(self, perceptual) -> None:
        def loss_of(x_hat):
            l1 = (self.x - x_hat).abs().mean()
            return l1 + perceptual(self.x, x_hat).mean() if perceptual else l1

        x_hat, quantized = self.vqgan(self.x)
        rec_loss, gen_loss = loss_of(x_hat), -self.disc(x_hat).mean()
        last = self.vqgan.decoder.conv_out.weight
        (rec,) = torch.autograd.grad(rec_loss, last, retain_graph=True)
        (gan,) = torch.autograd.grad(gen_loss, last, retain_graph=True)
        lambda_ = (rec.norm() / (gan.norm() + 1e-4)).clamp(0, 1e4).detach()
        self.opt_g.zero_grad()
        (rec_loss + 0.8 * lambda_ * gen_loss + quantized.loss).backward()
        self.opt_g.step()

        x_hat, _ = self.vqgan(self.x)
        loss_of(x_hat)  # computed at the head of the loss's `forward` and not used in this half of the step
        self.opt_d.zero_grad()
        real, fake = self.disc(self.x), self.disc(x_hat.detach())
        (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        self.opt_d.step()


@pytest.mark.parametrize("side, batch", [(32, 64), (64, 16)])
@pytest.mark.parametrize("with_lpips, float32, bfloat16", [(True, 1.6, 2.4), (False, 1.25, 1.85)])
def test_step_of_stage_one(side, batch, with_lpips, float32, bfloat16):
    official, own, theirs, ours = Networks(side, batch, False), Networks(side, batch, True), None, None
    if with_lpips:
        theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
        ours = LPIPS(VGG16Features(torchvision.models.vgg16(weights=None).features), judges.lpips_weights())
        ours.to(memory_format=torch.channels_last)
    compare(
        f"step of stage one, {side} px, batch {batch}, {'with' if with_lpips else 'without'} LPIPS",
        lambda: official.official(theirs),
        {"float32": lambda: own.ours(ours, False), "bfloat16": lambda: own.ours(ours, True)},
        {"float32": float32, "bfloat16": bfloat16},
    )


class PlainBlock(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.key, self.query, self.value, self.proj = (nn.Linear(C, C) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x, past, mask):
        B, T, C = x.shape
        h = self.norm1(x)
        k, q, v = (f(h).view(B, T, HEADS, C // HEADS).transpose(1, 2) for f in (self.key, self.query, self.value))
        present = torch.stack([k, v])
        if past is not None:
            k, v = torch.cat([past[0], k], -2), torch.cat([past[1], v], -2)
        weights = q @ k.transpose(-2, -1) / math.sqrt(C // HEADS)
        if past is None:
            weights = weights.masked_fill(mask[:T, :T] == 0, float("-inf"))
        x = x + self.proj((weights.softmax(-1) @ v).transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp(self.norm2(x)), present


class PlainGPT(nn.Module):
    def __init__(self, block_size: int, layers: int, C: int):
        super().__init__()
        self.token_embedding = nn.Embedding(2 * K, C)
        self.position_embedding = nn.Parameter(torch.zeros(1, block_size, C))
        self.blocks = nn.ModuleList([PlainBlock(C) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, K, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, tokens, past=None):
        first = 0 if past is None else past.shape[-2]
        x = self.token_embedding(tokens) + self.position_embedding[:, first : first + tokens.shape[1]]
        presents = []
        for i, block in enumerate(self.blocks):
            x, present = block(x, None if past is None else past[i], self.mask)
            presents.append(present)
        return self.head(self.norm(x)), torch.stack(presents)

    @torch.no_grad()
    def sample(self, tokens, count, how, cached):
        pasts = []
        for _ in range(count):
            logits, present = self(tokens, torch.cat(pasts, dim=-2) if pasts else None)
            new = torch.multinomial(plain_filter(logits[:, -1], how).softmax(-1), 1)
            pasts += [present] if cached else []
            tokens = new if cached else torch.cat([tokens, new], 1)

    @torch.no_grad()
    def slide(self, r, s, n, count):
        """The first `count` codes: each costs the same, wherever it lies."""
        h, w = s.shape[1:]
        for i, j in [divmod(t, w) for t in range(count)]:
            top = 0 if i <= n // 2 else h - n if h - i < n // 2 else i - n // 2
            left = 0 if j <= n // 2 else w - n if w - j < n // 2 else j - n // 2
            before, window = (m[:, top : top + n, left : left + n].reshape(len(s), -1) for m in (r, s))
            logits, _ = self(torch.cat([before, window], 1)[:, :-1])
            p = logits[:, n * n - 1 :][:, (i - top) * n + j - left].softmax(-1)
            s[:, i, j] = torch.multinomial(p, 1)[:, 0]


def plain_filter(logits, how):
    if how.top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[:, [-1]], float("-inf"))
    if how.top_p is not None:
        ordered, index = logits.sort(descending=True)
        remove = ordered.softmax(-1).cumsum(-1) > how.top_p
        remove = torch.cat([torch.zeros_like(remove[:, :1]), remove[:, :-1]], 1)
        logits = logits.masked_fill(remove.scatter(1, index, remove), float("-inf"))
    return logits


def both(block_size: int, layers: int, C: int):
    """(the plain transformer, ours by precision)."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(K, K, block_size, layers, HEADS, C)).eval()
    return PlainGPT(block_size, layers, C).eval(), {"float32": gpt, "bfloat16": copy.deepcopy(gpt).bfloat16()}


PLAIN, FILTERS = Sampling(), Sampling(top_k=100, top_p=0.95)


@pytest.mark.parametrize(
    "B, how, cached, float32, bfloat16",
    [(1, FILTERS, True, 0.9, 1.0), (8, FILTERS, True, 1.3, 2.0), (32, PLAIN, True, 1.1, 1.5)]
    + [(8, PLAIN, False, 15, 15)],
)
def test_256_codes(B, how, cached, float32, bfloat16):
    """Alone, in float32, both wait for the same weights to be read."""
    plain, gpts = both(257, *((8, 512) if cached else (6, 256)))
    start, u = torch.full((B, 1), K), torch.rand(B, 256)
    what = f"256 codes, batch {B}, {'top-k and top-p' if how.top_k else 'no filter'}"
    compare(
        f"{what}, theirs {'with' if cached else 'without'} a cache",
        lambda: plain.sample(start, 256, how, cached),
        {name: lambda gpt=gpt: sampler.continue_tokens(gpt, start, start[:, :0], u, how) for name, gpt in gpts.items()},
        {"float32": float32, "bfloat16": bfloat16},
    )


@pytest.mark.parametrize("size, exact", [((24, 24), 4.0), ((24, 64), 2.0), ((64, 64), 1.5)])
def test_sliding_window(size, exact):
    n, count = 16, 24
    plain, gpts = both(2 * n * n, 6, 256)
    r, s, u = torch.randint(0, K, (1, *size)), torch.zeros(1, *size, dtype=torch.long), torch.rand(1, *size)
    ours = {
        f"{name}, stride {N}": lambda gpt=gpt, N=N: sampler.slide(gpt, r, s, u, n, Sampling(stride=N))
        for name, gpt in gpts.items()
        for N in (1, 4)
    }
    at_least = {"float32, stride 1": exact, "float32, stride 4": 6.0 if size == (24, 64) else 0}
    what = f"sliding window of 16 x 16 over {size[0]} x {size[1]}"
    compare(what, lambda: plain.slide(r, s.clone(), n, count), ours, at_least, s.numel() / count, turns=3)


@pytest.mark.parametrize(
    "side, ch, ch_mult, batch, at_least", [(64, 32, (1, 2, 4, 4), 16, 1.2), (256, 128, (1, 1, 2, 2, 4), 1, 3)]
)
def test_step_of_stage_two_with_its_codes(side, ch, ch_mult, batch, at_least):
    """How much it saves to encode once depends on what the first stage costs beside the transformer: a small one at
    f = 8, and the paper's at f = 16."""
    torch.manual_seed(0)
    config = VQGANConfig(image_size=side, ch=ch, ch_mult=ch_mult, num_res_blocks=2, norm_groups=32, codebook_size=K)
    vqgan, n = VQGAN(config).eval(), side // config.f
    plain, gpt = PlainGPT(n * n, 6, 256), GPT(GPTConfig(K, 1, n * n, 6, HEADS, 256))
    model = TwoStage(vqgan, NoCondition(), gpt, TwoStageConfig(n)).train()
    x, s = torch.rand(batch, 3, side, side) * 2 - 1, torch.randint(0, K, (batch, n * n))
    start = torch.full((batch, 1), K)
    opt_plain = torch.optim.AdamW(plain.parameters(), 1e-4)
    opt_ours = torch.optim.AdamW(parameter_groups(gpt, 0.01), 1e-4, fused=True)

    def official():
        codes = vqgan.encode_indices(x).flatten(1)
        logits, _ = plain(torch.cat([start, codes], 1)[:, :-1])
        F.cross_entropy(logits.reshape(-1, K), codes.reshape(-1)).backward()
        opt_plain.step()
        opt_plain.zero_grad()

    def ours():
        model(s, start).mean().backward()
        opt_ours.step()
        opt_ours.zero_grad()

    what = f"step of stage two with its codes, first stage of {side} px at f = {config.f}"
    compare(what, official, {"float32": ours}, {"float32": at_least})
