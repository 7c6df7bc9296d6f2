"""The quantizer against brute force and against autograd by the definition."""

import pytest
import torch

from minvqgan import quantizer as Q
from minvqgan.quantizer import GumbelQuantizer, VectorQuantizer, codebook_stats, nearest_code, rotation_trick


def random_quantizer(K=20, D=5, **flags):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(K, D, **flags)
    torch.nn.init.normal_(quantizer.codebook.weight)
    return quantizer


def test_nearest_code_by_brute_force(monkeypatch):
    torch.manual_seed(0)
    z, codebook = torch.randn(300, 5), torch.randn(20, 5)
    truth = torch.tensor([min(range(20), key=lambda k: (z[n] - codebook[k]).square().sum().item()) for n in range(300)])
    assert torch.equal(nearest_code(z, codebook), truth)
    monkeypatch.setattr(Q, "MAX_DISTANCES", 100)  # five rows at a time
    assert torch.equal(nearest_code(z, codebook), truth)


def test_l2_norm_compares_directions():
    quantizer = random_quantizer(l2_norm=True)
    z = torch.randn(2, 5, 4, 4)
    codes = quantizer.codebook.weight / quantizer.codebook.weight.norm(dim=1, keepdim=True)
    cosine = torch.einsum("bdhw,kd->bkhw", z / z.norm(dim=1, keepdim=True), codes)
    quantized = quantizer(z)
    assert torch.equal(quantized.indices, cosine.argmax(1))
    assert torch.allclose(quantized.z_q.norm(dim=1), torch.ones(2, 4, 4), atol=1e-6)
    assert torch.equal(quantizer(100 * z).indices, quantized.indices)
    assert torch.allclose(quantizer.embed(quantized.indices), quantized.z_q, atol=1e-6)


def test_straight_through_is_the_identity_for_gradients():
    quantizer = random_quantizer()
    z = torch.randn(2, 5, 4, 4, requires_grad=True)
    g = torch.randn(2, 5, 4, 4)
    quantized = quantizer(z)
    z_grad, code_grad = torch.autograd.grad(quantized.z_q, (z, quantizer.codebook.weight), g, allow_unused=True)
    assert torch.equal(z_grad, g)
    assert code_grad is None  # the decoder's loss does not move the codes
    assert torch.allclose(quantized.z_q, quantizer.embed(quantized.indices), atol=1e-6)


@pytest.mark.parametrize("legacy", [False, True])
def test_beta_weighs_the_commitment_side_only(legacy):
    """Derivatives of Eq. 4 written down by hand: the mean of n squares has the derivative 2 (a - b) / n."""
    quantizer = random_quantizer(beta=0.25, legacy=legacy).double()
    z = torch.randn(2, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    quantized = quantizer(z)
    quantized.loss.backward()
    codes = quantizer.embed(quantized.indices).detach()
    on_latents, on_codes = (1.0, 0.25) if legacy else (0.25, 1.0)
    slope = 2 * (z.detach() - codes) / z.numel()
    assert torch.allclose(z.grad, on_latents * slope)
    truth = torch.zeros(20, 5, dtype=torch.float64)
    truth.index_add_(0, quantized.indices.flatten(), -on_codes * slope.permute(0, 2, 3, 1).reshape(-1, 5))
    assert torch.allclose(quantizer.codebook.weight.grad, truth)


def test_rotation_trick_is_a_rotation_and_a_scaling():
    """Its value is z_q, and its Jacobian is (|z_q| / |z|) R with R orthogonal and R z/|z| = z_q/|z_q|."""
    torch.manual_seed(0)
    z, z_q = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    assert torch.allclose(rotation_trick(z, z_q), z_q)
    assert rotation_trick(0 * z, z_q).isfinite().all()
    for n in range(6):
        J = torch.autograd.functional.jacobian(lambda row, n=n: rotation_trick(row[None], z_q[n : n + 1])[0], z[n])
        R = J * z[n].norm() / z_q[n].norm()
        assert torch.allclose(R @ R.T, torch.eye(5, dtype=torch.float64))
        assert torch.allclose(torch.linalg.det(R), torch.ones((), dtype=torch.float64))
        assert torch.allclose(R @ z[n] / z[n].norm(), z_q[n] / z_q[n].norm())


def test_autocast_does_not_reach_the_quantizer():
    quantizer = random_quantizer(K=200)
    z = torch.randn(2, 5, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(z)
    assert torch.equal(quantized.indices, quantizer(z).indices)
    assert quantized.loss.dtype == quantized.z_q.dtype == torch.float32


@pytest.mark.parametrize("make", [lambda: random_quantizer(), lambda: GumbelQuantizer(20, 5, in_channels=5)])
def test_counts_are_of_training_passes_and_move_with_the_model(make):
    quantizer = make()
    z = torch.randn(2, 5, 4, 4)
    quantizer.eval()(z)
    assert quantizer.counts.sum() == 0, "passes that do not train, such as the first one for the codebook, do not count"
    counts = quantizer.counts
    truth = sum(torch.bincount(quantizer.train()(z).indices.flatten(), minlength=20) for _ in range(3))
    assert quantizer.counts is counts and torch.equal(counts, truth.int()), "in place, for CUDA graphs"
    assert "counts" not in quantizer.state_dict()
    assert quantizer.to("meta").counts.device.type == "meta"


def test_usage_and_perplexity_by_hand():
    assert codebook_stats(torch.tensor([5, 5, 0, 0])) == (0.5, pytest.approx(2.0))
    assert codebook_stats(torch.tensor([1, 0, 0, 0])) == (0.25, pytest.approx(1.0))
    assert codebook_stats(torch.tensor([2, 1, 1, 0])) == (0.75, pytest.approx(2**1.5))  # an entropy of 1.5 bits


@pytest.mark.parametrize("side", [2, 4])
def test_first_revival_places_every_code_on_a_latent(side):
    """Each on one of its own, or where there are fewer latents than codes, all latents have one."""
    quantizer = random_quantizer(K=30)
    z = torch.randn(4, 5, side, side)
    assert quantizer.revive_dead_codes(z) == 30
    latents = z.permute(0, 2, 3, 1).reshape(-1, 5)
    for code in quantizer.codebook.weight:
        assert (latents == code).all(1).any()
    assert len(quantizer.codebook.weight.unique(dim=0)) == min(30, len(latents))
    assert torch.isin(quantizer.codebook.weight, z[-1]).any(), "not those of the first images alone"


def test_use_is_a_running_mean_and_a_code_is_dead_below_a_twentieth_of_its_part():
    """Each batch counts 2 %. With 8 codes a fair part is 1/8; the revived code starts from there."""
    quantizer = random_quantizer(K=8)
    z = torch.randn(2, 5, 4, 4)
    chosen = torch.bincount(quantizer(z).indices.flatten(), minlength=8) / 32
    assert torch.allclose(quantizer.recent_use, 0.02 * chosen)
    quantizer(z)
    assert torch.allclose(quantizer.recent_use, (0.02 * 0.98 + 0.02) * chosen)
    quantizer.recent_use = torch.tensor([0.051, 0.049, 0.5, 1, 1, 1, 1, 3]) / 8
    before = quantizer.codebook.weight.detach().clone()
    assert quantizer.revive_dead_codes(z) == 1
    assert (quantizer.codebook.weight != before).any(1).nonzero().tolist() == [[1]]
    assert quantizer.recent_use[1] == 1 / 8 and quantizer.recent_use[7] == 3 / 8


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_gumbel_gradient_is_that_of_the_softmax_at_its_temperature(temperature):
    """With the same noise, by the definition: softmax((logits + noise) / temperature)."""
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(4, 3, in_channels=2)
    quantizer.temperature = temperature
    z, weight = torch.randn(1, 2, 3, 3), torch.randn(1, 3, 3, 3)
    torch.manual_seed(1)
    (quantizer(z).z_q * weight).sum().backward()
    ours = quantizer.proj.weight.grad.clone()
    quantizer.zero_grad()
    torch.manual_seed(1)
    noise = -torch.empty(1, 4, 3, 3).exponential_().log()
    soft = ((quantizer.proj(z) + noise) / temperature).softmax(1)
    (torch.einsum("bkhw,kd->bdhw", soft, quantizer.codebook.weight) * weight).sum().backward()
    assert torch.allclose(ours, quantizer.proj.weight.grad, atol=1e-6)


def test_gumbel_training_draws_codes_from_its_softmax():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(4, 3, in_channels=2)
    z = torch.randn(1, 2, 1, 1).expand(20_000, -1, -1, -1)
    frequency = torch.bincount(quantizer(z).indices.flatten(), minlength=4) / 20_000
    assert torch.allclose(frequency, quantizer.proj(z[:1]).softmax(1).flatten(), atol=0.015)


def test_gumbel_loss_is_the_divergence_from_uniform():
    quantizer = GumbelQuantizer(4, 3, in_channels=2, kl_weight=0.5)
    z = torch.randn(2, 2, 3, 3)
    p = quantizer.proj(z).softmax(1)
    divergence = (p * (p / 0.25).log()).sum(1).mean()
    assert torch.allclose(quantizer(z).loss, 0.5 * divergence)
