"""Both stages as one model of images: p(x | c) through p(s | r), s = codes of x, r = tokens of c (Sec. 3.2).

    x -> s    the frozen first-stage model, q(E(x)), read in an order    c -> r    the condition's tokens
    loss      -log p(s | r), the mean over s alone: [r | s] is read, but r is never predicted            (Eq. 9, 10)
    sample    r, then one code after another, then G

Condition tokens are numbered after the image codes: K + index. Official checkpoints have one range for both, and the
start token is also code 0; `shared_range` reads those.

Letters: B batch, C x H x W image, n x n its latents at the training size, h x w at any size, T = n*n, R tokens of c.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import sampler
from .conditioning import Condition, coordinates
from .gpt import GPT
from .options import check, option
from .orders import ORDERS
from .sampler import Sampling
from .vqgan import VQGAN


@dataclass
class TwoStageConfig:
    n: int  # side of the latent map that the transformer was trained on
    order: str = option("row", "in which the codes are read", choices=tuple(ORDERS))
    guided: bool = False  # trained with dropped conditions: one more condition token means "no condition"
    shared_range: bool = False  # condition tokens share the image codes' numbers, as in official checkpoints
    classes: tuple[str, ...] = ()  # names, by number

    def __post_init__(self):
        check(self)


def condition_length(condition: Condition, n: int) -> int:
    """R, the number of tokens that precede those of an n x n image."""
    return n * n if condition.is_map else 1


def sequence_length(condition: Condition, n: int) -> int:
    """Tokens that the transformer reads for an n x n image: all but the last code, which it only predicts."""
    return condition_length(condition, n) + n * n - 1


class TwoStage(nn.Module):
    """vqgan: the frozen first-stage model. condition: see `conditioning`. gpt: its num_codes is the codebook's K."""

    order: Tensor  # (T,), see `orders`

    def __init__(self, vqgan: VQGAN, condition: Condition, gpt: GPT, config: TwoStageConfig):
        super().__init__()
        self.vqgan = vqgan.eval().requires_grad_(False)
        self.condition, self.gpt, self.config = condition, gpt, config
        self.offset = 0 if config.shared_range else gpt.config.num_codes
        self.null = self.offset + condition.num_tokens if config.guided else None  # the token of a dropped condition
        self._check_parts()
        self.register_buffer("order", ORDERS[config.order](config.n), persistent=False)

    def _check_parts(self) -> None:
        """Raises ValueError for parts that were not made for each other."""
        gpt, condition, K = self.gpt.config, self.condition, self.vqgan.config.codebook_size
        length, f = sequence_length(condition, self.config.n), self.vqgan.config.f
        if length > gpt.block_size:
            raise ValueError(f"a sequence of {length} tokens does not fit the transformer's {gpt.block_size}")
        need = self.offset + condition.num_tokens + self.config.guided
        if need > gpt.num_codes + gpt.num_cond or gpt.num_codes < K:
            have = f"{gpt.num_codes} codes and {gpt.num_cond} condition tokens"
            raise ValueError(f"the transformer has {have}; this model needs {K} codes and {need} tokens in all")
        if condition.is_map and condition.f != f:
            raise ValueError(f"the condition is downsampled by {condition.f}, the image by {f}; they must agree")

    def train(self, mode: bool = True) -> "TwoStage":
        """Only the transformer trains."""
        super().train(False)
        self.gpt.train(mode)
        return self

    def image_tokens(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) at the training size -> s (B, T) in this model's order."""
        indices = self.vqgan.encode_indices(x).flatten(1)  # (B, T)
        have, T = indices.shape[1], len(self.order)
        if have != T:
            raise ValueError(f"{have} latents, but the transformer reads {T}; images of another size?")
        return indices[:, self.order]

    def condition_tokens(self, c: Tensor) -> Tensor:
        """c as its condition takes it -> r: (B, h, w) for maps, (B, 1) for the others."""
        return self.condition(c) + self.offset

    def forward(self, s: Tensor, r: Tensor, pkeep: float = 1.0, drop_cond: float = 0.0) -> Tensor:
        """-log p(s | r) in nats, (B, T); its mean is the loss of stage two (Eq. 9, 10). s (B, T); r (B, R) or a map.

        pkeep: fraction of the codes that are read as they are. The others are replaced by random ones, because when
            sampling the model will read its own mistakes.
        drop_cond: fraction of the sequences read without c, so that the model also learns p(s), which guidance needs.
            DEPARTURE: the paper has no guidance (Ho & Salimans 2022, arXiv:2207.12598).
        """
        s, r = s.long(), r.flatten(1).long()  # (B, T), (B, R)
        s_in = s  # what is read
        if pkeep < 1:
            wrong = torch.rand(s.shape, device=s.device) >= pkeep
            s_in = torch.where(wrong, torch.randint_like(s, self.vqgan.config.codebook_size), s)
        if drop_cond > 0:
            if self.null is None:
                raise ValueError("this model has no token for a dropped condition")
            dropped = torch.rand(len(r), 1, device=r.device) < drop_cond
            r = torch.where(dropped, self.null, r)
        logits = self.gpt(torch.cat([r, s_in[:, :-1]], 1))  # (B, R + T - 1, K); the last code is predicted, never read
        logits = logits[:, r.shape[1] - 1 :].flatten(0, 1)  # (B * T, K): s_1 is predicted at the last token of r
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(dtype), s.flatten(), reduction="none").view(s.shape)

    @torch.no_grad()
    def nll(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """-log p(s | c) of images x (B, C, H, W), in nats per token, (B,)."""
        c = self.default_condition(len(x)) if c is None else c
        return self(self.image_tokens(x), self.condition_tokens(c)).mean(1)

    def to_map(self, s: Tensor) -> Tensor:
        """s (B, T) in this model's order -> indices (B, n, n)."""
        raster = torch.empty_like(s)
        raster[:, self.order] = s
        return raster.view(-1, self.config.n, self.config.n)

    @torch.no_grad()
    def sample_indices(
        self,
        c: Tensor,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        sampling: Sampling | None = None,
        given: Tensor | None = None,
        keep: int = 0,
    ) -> Tensor:
        """New codes (B, h, w) for c.

        seed, numbers: of `sampler.uniforms`, by default images 0 to B - 1. size: (h, w), by default that of c's map or
        the training size; larger ones need row order. given (B, h, w): codes of which the first `keep` in the model's
        order stay. Raises ValueError.
        """
        n, sampling = self.config.n, sampling or Sampling()
        r = self.condition_tokens(c)
        h, w = size or (tuple(r.shape[1:]) if r.ndim == 3 else (n, n))
        if r.ndim == 3 and tuple(r.shape[1:]) != (h, w):
            raise ValueError(f"the condition covers {r.shape[1]} x {r.shape[2]} latents, the image has {h} x {w}")
        given = r.new_zeros(len(c), h, w) if given is None else given.long()
        if tuple(given.shape) != (len(c), h, w):
            raise ValueError(f"given codes are {tuple(given.shape)}, not {(len(c), h, w)}")
        u = sampler.uniforms(seed, range(len(c)) if numbers is None else numbers, h * w).to(r.device)  # (B, h * w)
        if (h, w) == (n, n):
            s = given.flatten(1)[:, self.order[:keep]]
            new = sampler.continue_tokens(self.gpt, r.flatten(1), s, u[:, keep:], sampling, self.null)
            return self.to_map(torch.cat([s, new], 1))
        if self.config.order != "row":
            raise ValueError(f"the {self.config.order} order has {n} x {n} latents; only row order slides")
        return sampler.slide(self.gpt, r, given, u.view(-1, h, w), n, sampling, keep, self.null)

    def sample(self, c: Tensor | None = None, n: int = 1, seed: int = 0, **how) -> Tensor:
        """New images (B, C, H, W), near [-1, 1].

        c: what the model is conditioned on, one row an image. None: `n` images of a model that needs no condition, or
        only coordinates. how: `numbers`, `size`, `sampling` of `sample_indices`.
        """
        c = self.default_condition(n, how.get("size")) if c is None else c
        return self.vqgan.decode_indices(self.sample_indices(c, seed, **how))

    def complete(self, x: Tensor, fraction: float, c: Tensor | None = None, seed: int = 0, **how) -> Tensor:
        """x (B, C, H, W) with the first `fraction` of its rows of codes kept, the rest sampled. Raises ValueError for
        a model of another order than row."""
        if self.config.order != "row":
            raise ValueError(f"completing rows needs row order; this model reads in {self.config.order}")
        given = self.vqgan.encode_indices(x)  # (B, h, w)
        h, w = given.shape[1:]
        c = self.default_condition(len(x), (h, w)) if c is None else c
        how |= {"size": (h, w), "given": given, "keep": round(fraction * h) * w}
        return self.vqgan.decode_indices(self.sample_indices(c, seed, **how))

    def default_condition(self, count: int, size: tuple[int, int] | None = None) -> Tensor:
        """c for `count` images of `size` latents, if it needs no choice: nothing, or the coordinates of all pixels."""
        device = self.order.device
        if self.condition.kind == "none":
            return torch.zeros(count, 1, device=device)
        if self.condition.kind != "coords":
            raise ValueError(f"this model needs a condition ({self.condition.kind})")
        h, w = size or (self.config.n, self.config.n)
        return coordinates(h * self.vqgan.config.f, w * self.vqgan.config.f).to(device).expand(count, -1, -1, -1)
