"""Encoder, decoder and VQGAN: shapes, sizes, number types, the codes of an image and back, and what is refused."""

import copy
import re
import warnings

import pytest
import torch

from minvqgan import VQGAN, VQGANConfig
from minvqgan.harness.runtime import seeded
from minvqgan.layers import SelfAttention2d
from minvqgan.quantizer import VectorQuantizer

SMALL = VQGANConfig(image_size=16, ch=8, ch_mult=(1, 2, 2), z_channels=8, code_dim=4, codebook_size=32)


@pytest.fixture(scope="module")
def vqgan():
    torch.manual_seed(0)
    return VQGAN(SMALL).eval()


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (4, 4)])
def test_any_size_divisible_by_f_to_indices_and_back(vqgan, size):
    x = torch.randn(2, 3, *size)
    x_hat, quantized = vqgan(x)
    assert x_hat.shape == x.shape
    assert quantized.indices.shape == (2, size[0] // 4, size[1] // 4) and quantized.indices.dtype == torch.int64
    assert quantized.z_q.shape == (2, 4, size[0] // 4, size[1] // 4)
    assert torch.equal(vqgan.encode_indices(x), quantized.indices)
    assert torch.allclose(vqgan.decode_indices(quantized.indices), x_hat, atol=1e-5)


def test_what_is_no_image_and_no_indices(vqgan):
    for x, answer in (
        (torch.randn(1, 3, 18, 15), r"not divisible by f = 4; nearest sizes that work: \(16, 12\), \(20, 16\)"),
        (torch.randn(1, 1, 16, 16), r"expected images \(B, 3, H, W\)"),
    ):
        with pytest.raises(ValueError, match=answer):
            vqgan(x)
    for wrong in (torch.zeros(1, 16), torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"expected integer indices \(B, h, w\), got \(1, "):
            vqgan.decode_indices(wrong)
    for number, dtype in ((-1, torch.int8), (200, torch.uint8), (32, torch.int64)):
        with pytest.raises(ValueError, match=rf"indices must lie in \[0, 32\), got {number} to {number}"):
            vqgan.decode_indices(torch.full((1, 4, 4), number, dtype=dtype))
    x = torch.rand(2, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"these images are in \[0, 1\]"):
        vqgan.encode_indices(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vqgan.encode_indices(2 * x - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("extra", [{}, {"l2_norm": True}, {"rotation": True}, {"gumbel": True}], ids=str)
def test_a_model_of_another_precision_is_that_of_float32_rounded(extra, dtype):
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(**vars(SMALL) | extra)).eval()
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    model.quantizer.codebook.weight.data = torch.randn(32, 4)
    truth, x_hat = model.encode_indices(x), model.decode_indices(torch.arange(32).view(2, 4, 4))
    other = copy.deepcopy(model).to(dtype)
    indices = other.encode_indices(x.to(dtype))
    same = (indices == truth).float().mean()
    assert indices.dtype == torch.int64 and same > (0.999 if dtype == torch.float64 else 0.9)
    decoded = other.decode_indices(torch.arange(32).view(2, 4, 4))
    assert decoded.dtype == dtype and (decoded - x_hat).norm() < 0.03 * x_hat.norm()
    x_hat, quantized = other.train()(x.to(dtype))
    assert x_hat.dtype == quantized.z_q.dtype == dtype
    assert quantized.loss.dtype == torch.promote_types(dtype, torch.float32)


def test_codes_are_searched_in_float32_in_a_model_of_half_precision():
    """Two codes that bfloat16 cannot tell apart by their distances: 256 and 257 times the same direction."""
    quantizer = VectorQuantizer(2, 1).bfloat16()
    quantizer.codebook.weight.data = torch.tensor([[256.0], [258.0]], dtype=torch.bfloat16)
    z = torch.tensor([256.0, 258.0], dtype=torch.bfloat16).view(2, 1, 1, 1)
    assert quantizer(z).indices.flatten().tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32])
def test_indices_of_any_integer_type(dtype):
    """256 codes in uint8: the number of codes, 256, is 0 in that type."""
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(**vars(SMALL) | {"codebook_size": 256})).eval()
    largest = 127 if dtype == torch.int8 else 255
    indices = torch.arange(2 * 4 * 4).view(2, 4, 4) * largest // 31
    assert torch.equal(model.decode_indices(indices.to(dtype)), model.decode_indices(indices))


def test_initial_weights_depend_on_the_seed_alone():
    def weights(seed: int) -> dict:
        with seeded(seed, "vqgan"):
            return VQGAN(SMALL).state_dict()

    state, first = torch.get_rng_state(), weights(0)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    again, other = weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["to_code.weight"], other["to_code.weight"])


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"ch": 16, "norm_groups": 3}, "--norm-groups 3 does not divide a layer's 16 channels"),
        ({"ch_mult": [1, 0]}, "--ch-mult is 0, not a whole number from 1"),
        ({"image_size": 33}, "--image-size 33 is not divisible by f = 4; use 32 or 36"),
        ({"image_size": 2}, "--image-size 2 is not divisible by f = 4; use 4"),
        ({"dropout": float("nan")}, "--dropout is nan, not a number from 0 to 1"),
        ({"beta": float("inf")}, "--beta is inf, not a number"),
        ({"ch": 2**21}, "--ch is 2097152, not a whole number from 1 to 1048576"),
        ({"input_kind": "smell"}, "input_kind is 'smell', not one of rgb, gray"),
    ],
)
def test_configs_that_no_model_can_have(wrong, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        VQGANConfig(**wrong)


def test_every_parameter_learns():
    """A parameter without a gradient is a wire that leads nowhere."""
    torch.manual_seed(0)
    for extra in ({}, {"attn_resolutions": (8,), "num_res_blocks": 2}, {"l2_norm": True}, {"rotation": True}):
        vqgan = VQGAN(VQGANConfig(**vars(SMALL) | extra))
        x = torch.randn(4, 3, 16, 16)
        x_hat, quantized = vqgan(x)
        ((x - x_hat).square().mean() + quantized.loss).backward()
        for name, p in vqgan.named_parameters():
            # Softmax ignores a constant added to all scores: the gradient of k.bias is exactly 0.
            assert name.endswith("k.bias") or p.grad.abs().max() > 0, name


def test_every_block_has_the_dropout_of_the_config():
    modules = VQGAN(VQGANConfig(**vars(SMALL) | {"dropout": 0.3})).modules()
    assert {module.p for module in modules if isinstance(module, torch.nn.Dropout)} == {0.3}


def test_attention_by_the_definition():
    torch.manual_seed(0)
    layer = SelfAttention2d(8, 2).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    h = layer.norm(x)
    q, k, v = (conv(h).flatten(2) for conv in (layer.q, layer.k, layer.v))  # (B, C, N)
    out = torch.zeros_like(v)
    for b in range(2):
        for i in range(15):
            weights = torch.softmax(torch.stack([q[b, :, i] @ k[b, :, j] for j in range(15)]) / 8**0.5, 0)
            out[b, :, i] = sum(w * v[b, :, j] for j, w in enumerate(weights))
    assert torch.allclose(layer(x), x + layer.proj(out.view(2, 8, 3, 5)), atol=1e-12)


def test_checkpointed_gradients_are_the_same_and_keep_less():
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(ch=16, ch_mult=(1, 1, 2))).train()
    x, found = torch.randn(2, 3, 32, 32), []
    for checkpoint_grad in (False, True):
        model.decoder.checkpoint_grad, kept = checkpoint_grad, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            x_hat, quantized = model(x)
        loss = (x_hat - x).square().mean() + quantized.loss
        found.append((sum(kept), x_hat.detach(), torch.autograd.grad(loss, list(model.parameters()))))
    (kept, x_hat, grads), (less, again, grads_again) = found
    assert less < 0.7 * kept
    assert torch.equal(x_hat, again)
    for a, b in zip(grads, grads_again, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
