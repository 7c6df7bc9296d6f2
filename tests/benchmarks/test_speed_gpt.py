"""Sampling and the stage-two step beside the official order of work, at equal architecture and batch.

    pytest tests/benchmarks/test_speed_gpt.py -s                 all; OMP_NUM_THREADS=1 for one core
    pytest tests/benchmarks/test_speed_gpt.py -s -k "batch"      the sampler alone

The official way (taming-transformers, `mingpt.py`, `cond_transformer.py` and the sliding window of its notebooks),
written down here in plain form: three linear layers for query, key and value; attention by two matrix products, a mask
and a softmax; the cache a list of pieces that is joined again at every token; in the window every token from a forward
pass over the whole window; in training the first stage encodes each batch anew. It has no bfloat16.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from timing import paired_ratios, peak_memory, seconds
from torch import nn

from minvqgan import VQGAN, VQGANConfig, sampler
from minvqgan.conditioning import NoCondition
from minvqgan.gpt import GPT, GPTConfig, parameter_groups
from minvqgan.harness import runtime
from minvqgan.sampler import Sampling
from minvqgan.two_stage import TwoStage, TwoStageConfig

K, HEADS = 1024, 8
PLAIN, FILTERED = Sampling(), Sampling(top_k=100, top_p=0.95)
# bfloat16's targets hold where `--amp` would choose it by itself.
HAS_BFLOAT16 = runtime.pick_amp(None, torch.device("cpu"))


class PlainBlock(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.key, self.query, self.value, self.proj = (nn.Linear(C, C) for _ in range(4))
        self.attn_drop, self.resid_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C), nn.Dropout(0.0))

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
        y = (self.attn_drop(weights.softmax(-1)) @ v).transpose(1, 2).contiguous().view(B, T, C)
        x = x + self.resid_drop(self.proj(y))
        return x + self.mlp(self.norm2(x)), present


class PlainGPT(nn.Module):
    def __init__(self, block_size: int, layers: int, C: int):
        super().__init__()
        self.token_embedding = nn.Embedding(2 * K, C)
        self.position_embedding = nn.Parameter(torch.zeros(1, block_size, C))
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList([PlainBlock(C) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, K, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, tokens, past=None):
        first = 0 if past is None else past.shape[-2]
        x = self.drop(self.token_embedding(tokens) + self.position_embedding[:, first : first + tokens.shape[1]])
        presents = []
        for i, block in enumerate(self.blocks):
            x, present = block(x, None if past is None else past[i], self.mask)
            presents.append(present)
        return self.head(self.norm(x)), torch.stack(presents)

    @torch.no_grad()
    def sample_cached(self, tokens, count, how):
        pasts, new = [], []
        for _ in range(count):
            logits, present = self(tokens, torch.cat(pasts, dim=-2) if pasts else None)
            pasts.append(present)
            tokens = torch.multinomial(plain_filter(logits[:, -1], how).softmax(-1), 1)
            new.append(tokens)
        return torch.cat(new, 1)

    @torch.no_grad()
    def sample_uncached(self, tokens, count, how):
        for _ in range(count):
            logits, _ = self(tokens)
            tokens = torch.cat([tokens, torch.multinomial(plain_filter(logits[:, -1], how).softmax(-1), 1)], 1)
        return tokens[:, 1:]

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


def report(what: str, theirs, ours: dict, at_least: dict[str, float], pairs: int = 5) -> None:
    """Prints ratios and peak memory; functions in `ours` are called without arguments, `theirs` gives its seconds."""
    timed = {name: (lambda f=f: seconds(f)) for name, f in ours.items()}
    ratios = paired_ratios(theirs, timed, pairs)
    for name, (median, low, high) in ratios.items():
        memory = peak_memory(ours[name])
        print(f"\n{what}, {name}: {median:.2f} times as fast ({low:.2f} to {high:.2f}), {memory:.0f} MiB", end="")
    print(f"; official order {peak_memory(theirs):.0f} MiB")
    for name, wanted in at_least.items():
        assert HAS_BFLOAT16 or "bfloat16" not in name, name
        assert ratios[name][0] >= wanted, (what, name, ratios[name])


@pytest.mark.parametrize("how", [PLAIN, FILTERED], ids=["plain", "filters"])
@pytest.mark.parametrize("B, float32, bfloat16", [(1, 0.9, 1.0), (8, 1.3, 2.0), (32, 1.1, 1.5)])
def test_256_tokens_in_a_batch_against_the_cached_sampler(B, float32, bfloat16, how):
    plain, gpts = both(257, 8, 512)
    start, u = torch.full((B, 1), K), torch.rand(B, 256)
    report(
        f"256 codes, batch {B}, {'top-k and top-p' if how is FILTERED else 'no filter'}",
        lambda: seconds(lambda: plain.sample_cached(start, 256, how)),
        {name: lambda gpt=gpt: sampler.continue_tokens(gpt, start, start[:, :0], u, how) for name, gpt in gpts.items()},
        # Alone, in float32, both wait for the same weights to be read.
        {"float32": float32} | ({"bfloat16": bfloat16} if HAS_BFLOAT16 else {}),
    )


def test_256_tokens_against_the_uncached_sampler():
    plain, gpts = both(257, 6, 256)
    start, u = torch.full((8, 1), K), torch.rand(8, 256)
    report(
        "256 codes, batch 8, theirs without a cache",
        lambda: seconds(lambda: plain.sample_uncached(start, 256, PLAIN)),
        {"float32": lambda: sampler.continue_tokens(gpts["float32"], start, start[:, :0], u, PLAIN)},
        {"float32": 15},
        pairs=3,
    )


@pytest.mark.parametrize("size, exact", [((24, 24), 4.0), ((24, 64), 2.0), ((64, 64), 1.5)])
def test_sliding_window(size, exact):
    n, stride = 16, 4
    plain, gpts = both(2 * n * n, 6, 256)
    r, s, u = torch.randint(0, K, (1, *size)), torch.zeros(1, *size, dtype=torch.long), torch.rand(1, *size)

    def official() -> float:
        return seconds(lambda: plain.slide(r, s.clone(), n, 24)) * s.numel() / 24

    report(
        f"sliding window of 16 x 16 over {size[0]} x {size[1]}",
        official,
        {
            f"{name}, stride {N}": lambda gpt=gpt, N=N: sampler.slide(gpt, r, s, u, n, Sampling(stride=N))
            for name, gpt in gpts.items()
            for N in (1, stride)
        },
        {"float32, stride 1": exact} | ({"float32, stride 4": 6.0} if size == (24, 64) else {}),
        pairs=3,
    )


FIRST_STAGES = {  # config, side of the latent map, batch, at least
    "a small first stage (64 px, f = 8)": (
        VQGANConfig(image_size=64, ch=32, ch_mult=(1, 2, 4, 4), num_res_blocks=2, norm_groups=32),
        8,
        16,
        1.2,
    ),
    "the paper's first stage (256 px, f = 16)": (
        VQGANConfig(
            image_size=256,
            ch=128,
            ch_mult=(1, 1, 2, 2, 4),
            num_res_blocks=2,
            attn_resolutions=(16,),
            norm_groups=32,
            z_channels=256,
            code_dim=256,
            codebook_size=K,
        ),
        16,
        1,
        3.0,
    ),
}


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_training_step_including_its_tokens(name):
    """How much it saves to encode once depends on what a first stage costs beside the transformer."""
    torch.manual_seed(0)
    config, n, B, at_least = FIRST_STAGES[name]
    vqgan, plain = VQGAN(config).eval(), PlainGPT(n * n, 6, 256).eval()
    gpt = GPT(GPTConfig(K, 1, n * n, 6, HEADS, 256)).train()
    model = TwoStage(vqgan, NoCondition(), gpt, TwoStageConfig(n)).train()
    x = torch.rand(B, 3, config.image_size, config.image_size) * 2 - 1
    s, start = torch.randint(0, config.codebook_size, (B, n * n)), torch.full((B, 1), K)
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

    what = f"stage-two step with its codes, {name}"
    report(what, lambda: seconds(official), {"float32": ours}, {"float32": at_least})
