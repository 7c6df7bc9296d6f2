"""Sampling and the stage-two step beside the official order of work, at equal architecture and batch.

The official way (taming-transformers, `mingpt.py`, `cond_transformer.py` and the sliding window of its notebooks),
written down here in plain form: three linear layers for query, key and value; attention by two matrix products, a mask
and a softmax; the cache a list of pieces that is joined again at every token; in the window every token from a forward
pass over the whole window; in training the first stage encodes each batch anew.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from timing import paired_ratio
from torch import nn

from minvqgan import VQGAN, VQGANConfig, sampler
from minvqgan.conditioning import NoCondition
from minvqgan.gpt import GPT, GPTConfig, parameter_groups
from minvqgan.sampler import Sampling
from minvqgan.two_stage import TwoStage, TwoStageConfig

K, WIDTH, LAYERS, HEADS = 1024, 256, 6, 8


class PlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.key, self.query, self.value, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attn_drop, self.resid_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.0))

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
    def __init__(self, block_size: int):
        super().__init__()
        self.token_embedding = nn.Embedding(K + 1, WIDTH)
        self.position_embedding = nn.Parameter(torch.zeros(1, block_size, WIDTH))
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList([PlainBlock() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, K, bias=False)
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
    def sample_cached(self, tokens, count):
        pasts, new = [], []
        for _ in range(count):
            logits, present = self(tokens, torch.cat(pasts, dim=-2) if pasts else None)
            pasts.append(present)
            tokens = torch.multinomial(logits[:, -1].softmax(-1), 1)
            new.append(tokens)
        return torch.cat(new, 1)

    @torch.no_grad()
    def sample_uncached(self, tokens, count):
        for _ in range(count):
            logits, _ = self(tokens)
            tokens = torch.cat([tokens, torch.multinomial(logits[:, -1].softmax(-1), 1)], 1)
        return tokens[:, 1:]

    @torch.no_grad()
    def slide(self, r, s, n):
        h, w = s.shape[1:]
        for i in range(h):
            top = 0 if i <= n // 2 else h - n if h - i < n // 2 else i - n // 2
            for j in range(w):
                left = 0 if j <= n // 2 else w - n if w - j < n // 2 else j - n // 2
                before, window = (m[:, top : top + n, left : left + n].reshape(len(s), -1) for m in (r, s))
                logits, _ = self(torch.cat([before, window], 1)[:, :-1])
                p = logits[:, n * n - 1 :][:, (i - top) * n + j - left].softmax(-1)
                s[:, i, j] = torch.multinomial(p, 1)[:, 0]
        return s


def our_gpt(block_size: int, num_cond: int = 1) -> GPT:
    return GPT(GPTConfig(K, num_cond, block_size, LAYERS, HEADS, WIDTH)).eval()


def report(benchmark, what, ours, theirs, at_least, pairs):
    median, low, high = paired_ratio(ours, theirs, pairs)
    benchmark.extra_info["ratio"] = f"{median:.2f} ({low:.2f} to {high:.2f})"
    benchmark.pedantic(ours, rounds=1)
    print(f"\n{what}: {median:.2f} x ({low:.2f} to {high:.2f}) as fast")
    assert median >= at_least


def test_256_tokens_batch_8_against_the_cached_sampler(benchmark):
    torch.manual_seed(0)
    plain, gpt = PlainGPT(256).eval(), our_gpt(256)
    start, u = torch.full((8, 1), K), torch.rand(8, 256)
    report(
        *(benchmark, "256 tokens, batch 8, both cached"),
        lambda: sampler.continue_tokens(gpt, start, start[:, :0], u, Sampling()),
        lambda: plain.sample_cached(start, 256),
        *(1.5, 5),  # 1.6 to 1.9 by machine: more than half of it are the same matrix products on both sides
    )


def test_256_tokens_batch_8_against_the_uncached_sampler(benchmark):
    torch.manual_seed(0)
    plain, gpt = PlainGPT(256).eval(), our_gpt(256)
    start, u = torch.full((8, 1), K), torch.rand(8, 256)
    report(
        *(benchmark, "256 tokens, batch 8, theirs without a cache"),
        lambda: sampler.continue_tokens(gpt, start, start[:, :0], u, Sampling()),
        lambda: plain.sample_uncached(start, 256),
        *(15, 3),
    )


@pytest.mark.parametrize("size", [(20, 24), (24, 32)])
def test_sliding_window(benchmark, size):
    torch.manual_seed(0)
    n = 16
    plain, gpt = PlainGPT(2 * n * n).eval(), our_gpt(2 * n * n, K)
    r, s, u = torch.randint(0, K, (1, *size)), torch.zeros(1, *size, dtype=torch.long), torch.rand(1, *size)
    report(
        *(benchmark, f"sliding window of 16 x 16 over {size[0]} x {size[1]}"),
        lambda: sampler.slide(gpt, r, s, u, n, Sampling()),
        lambda: plain.slide(r.clamp(max=K), s.clone(), n),
        *(2.0, 3),
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
            256,
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
def test_training_step_including_its_tokens(benchmark, name):
    """How much it saves to encode once depends on what a first stage costs beside the transformer."""
    torch.manual_seed(0)
    config, n, B, at_least = FIRST_STAGES[name]
    vqgan, plain, gpt = VQGAN(config).eval(), PlainGPT(n * n).eval(), our_gpt(n * n).train()
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

    report(benchmark, f"stage-two step with its tokens, {name}", ours, official, at_least, 5)
