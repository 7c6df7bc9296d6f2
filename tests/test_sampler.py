"""Choosing a token, against slow definitions."""

import math
import zlib

import pytest
import torch
from helpers import NoFloat64

from minvqgan import sampler
from minvqgan.gpt import GPT, GPTConfig
from minvqgan.sampler import Sampling, choose


def slow_top_p(p: dict[int, float], top_p: float) -> set[int]:
    """The smallest set of likeliest codes that reaches top_p."""
    kept, total = set(), 0.0
    for code in sorted(p, key=lambda k: -p[k]):
        kept.add(code)
        total += p[code]
        if total >= top_p:
            break
    return kept


def slow_choice(logits: list[float], u: float, temperature: float, top_k: int | None, top_p: float | None) -> int:
    """The code at which the cumulative distribution passes u; of equal logits the first code counts as likelier."""
    p = {k: math.exp((x - max(logits)) / temperature) for k, x in enumerate(logits)}
    if top_k is not None:
        p = {k: p[k] for k in sorted(p, key=lambda k: -p[k])[:top_k]}
    p = {k: x / sum(p.values()) for k, x in p.items()}
    kept = sorted(p if top_p is None else slow_top_p(p, top_p))
    u *= sum(p[k] for k in kept)
    for k in kept:
        u -= p[k]
        if u < 0:
            return k
    raise AssertionError("u is above 1")


@pytest.mark.parametrize("top_p", [None, 1e-300, 0.01, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 7, 11, 12, 50])
def test_choice_by_the_slow_definition(top_k, top_p):
    """Logits all different, and of five values, so that many are equal, at the filters' borders too."""
    torch.manual_seed(0)
    logits = torch.cat([torch.randn(200, 12) * 2, torch.randint(0, 5, (200, 12)).float()])
    u = torch.rand(400)
    for temperature in (1.0, 0.3):
        codes = choose(logits, u, Sampling(temperature, top_k, top_p)).tolist()
        rows = zip(logits.tolist(), u.tolist(), strict=True)
        assert codes == [slow_choice(*row, temperature, top_k, top_p) for row in rows]


def test_forbidden_codes_are_never_chosen_and_the_ends_of_u_are_safe():
    logits = torch.tensor([[0.0, 5, 1, 4, 2]])
    for u in (0.0, 1 - 1e-7, 1 - 2**-24):
        code = choose(logits, torch.tensor([u]), Sampling(top_k=2)).item()
        assert code in (1, 3)
    for temperature in (0, 1e-320, 1e-30, 1e-6):
        assert choose(1e4 * logits, torch.tensor([0.99]), Sampling(temperature)).item() == 1


def test_nothing_is_float64_while_sampling():
    """MPS does not have it. Every operation is watched, on the CPU, for it is the same on every device."""
    gpt = GPT(GPTConfig(num_codes=8, num_cond=1, block_size=9, n_layer=1, n_head=1, n_embd=4)).eval()
    r, s, u = torch.full((2, 1), 8), torch.zeros(2, 4, 4, dtype=torch.long), torch.rand(2, 4, 4)
    for how in (Sampling(), Sampling(0.7, top_k=3, top_p=0.9, guidance=2.0), Sampling(temperature=0)):
        with NoFloat64():
            sampler.slide(gpt, r, s, u, 3, how, null=8)
    with NoFloat64(), pytest.raises(AssertionError):
        torch.zeros(1).double()


def test_a_stride_of_4_has_about_a_quarter_of_the_segments_and_the_wave_half_of_the_batches():
    counts = {N: sum(map(len, sampler.schedule(64, 64, 16, stride=N))) for N in (1, 4)}
    assert 3.5 < counts[1] / counts[4] < 4.5
    one_by_one, wave = (len(list(sampler.schedule(32, 32, 8, wave=wave))) for wave in (False, True))
    assert wave < one_by_one / 2


def test_rejection_keeps_the_best():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7])
    for rate, kept in ((0.5, [1, 3]), (0.05, [1]), (1.0, [1, 3, 2, 0])):
        assert sampler.reject(scores, rate).tolist() == kept


def test_each_image_of_each_seed_has_random_numbers_of_its_own():
    """An image's numbers depend on its seed and its number alone, and no image of one seed comes back in another."""
    u = sampler.uniforms(3, [7, 0, 12], 5)
    assert u.shape == (3, 5)
    assert torch.equal(u[2], torch.rand(5, generator=torch.Generator().manual_seed(zlib.crc32(b"3 12"))))
    rows = torch.cat([sampler.uniforms(seed, range(50), 5) for seed in range(50)])
    assert len({tuple(row.tolist()) for row in rows}) == 2500


def test_settings_that_make_no_sense():
    wrongs = [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"stride": 0}]
    for wrong in [*wrongs, {"temperature": math.nan}, {"guidance": math.nan}]:
        with pytest.raises(ValueError):
            Sampling(**wrong)
