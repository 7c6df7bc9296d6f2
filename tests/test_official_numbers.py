"""Our stage one against numbers of the official implementation, to 1e-5 relative: same weights, same batch."""

import pytest
import torch
from helpers import fixture, official_models, relative_error

from minvqgan.harness import official
from minvqgan.objective import ObjectiveConfig, generator_loss, hinge_loss, log_loss, stage_one_step
from minvqgan.quantizer import GumbelQuantizer

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def fx():
    return fixture("vqgan")


def test_encoder_quantizer_and_decoder(fx):
    vqgan, _ = official_models(fx, legacy=True)
    quantized = vqgan.encode(fx["x"])
    assert torch.equal(quantized.indices, fx["indices"])
    for ours, name in (
        (vqgan.latents(fx["x"]), "latent"),
        (quantized.z_q, "quant"),
        (quantized.loss, "vq_loss"),
        (vqgan.decode(quantized.z_q), "x_rec"),
        (vqgan.decode_indices(fx["indices"]), "x_rec"),
    ):
        assert relative_error(ours, fx[name]) < TOLERANCE, name


@pytest.mark.parametrize("variant", ["paper", "legacy"])
def test_both_codebook_losses_move_the_same_side_as_the_official_ones(fx, variant):
    vqgan, _ = official_models(fx, legacy=variant == "legacy")
    z = fx["latent"].clone().requires_grad_()
    vqgan.quantizer(z).loss.backward()
    assert relative_error(z.grad, fx["vq_loss_grads"][variant]["latent"]) < TOLERANCE
    assert relative_error(vqgan.quantizer.codebook.weight.grad, fx["vq_loss_grads"][variant]["codebook"]) < TOLERANCE


def test_discriminator_and_its_losses(fx):
    _, disc = official_models(fx, legacy=True)
    # BatchNorm judges with the statistics of the batch, there as here.
    real, fake = disc(fx["x"]), disc(fx["x_rec"])
    assert relative_error(real, fx["logits_real"]) < TOLERANCE
    assert relative_error(fake, fx["logits_fake"]) < TOLERANCE
    assert relative_error(generator_loss(fake), fx["g_loss"]) < TOLERANCE
    assert relative_error(hinge_loss(real, fake), fx["d_loss_hinge"]) < TOLERANCE
    assert relative_error(log_loss(real, fake), fx["d_loss_vanilla"]) < TOLERANCE


def test_one_pass_step_gives_the_official_lambda_and_gradients(fx):
    vqgan, disc = official_models(fx, legacy=False)
    x, config = fx["x"], ObjectiveConfig(disc_weight=fx["config"]["disc_weight"], max_lambda=1e4, delta=1e-4)
    terms, _ = stage_one_step(vqgan, disc, None, x, config)

    weight = config.disc_weight * terms["lambda"]
    assert relative_error(terms["l1"], fx["l1"]) < TOLERANCE
    assert relative_error(weight, fx["adaptive_weight"]) < TOLERANCE
    total = terms["rec_loss"] + weight * terms["gen_loss"] + terms["codebook_loss"]
    assert relative_error(total, fx["total_loss"]) < TOLERANCE
    ours = {
        "encoder.conv_in.weight": vqgan.encoder.layers[0].weight,
        "decoder.conv_out.weight": vqgan.decoder.conv_out.weight,
        "quantize.embedding.weight": vqgan.quantizer.codebook.weight,
        "quant_conv.weight": vqgan.to_code.weight,
    }
    assert ours.keys() == fx["grads"].keys()
    for name, parameter in ours.items():
        assert relative_error(parameter.grad, fx["grads"][name]) < TOLERANCE, name


def test_gumbel_quantizer():
    fx = fixture("gumbel")
    state = {key.replace("embed", "codebook"): t for key, t in fx["state_dict"].items()}
    K, D = state["codebook.weight"].shape
    quantizer = GumbelQuantizer(K, D, state["proj.weight"].shape[1]).eval()
    quantizer.load_state_dict(state)
    quantized = quantizer(fx["z"])
    assert relative_error(quantizer.proj(fx["z"]), fx["logits"]) < TOLERANCE
    assert torch.equal(quantized.indices, fx["argmax"])
    assert relative_error(quantized.z_q, fx["quant_of_argmax"]) < TOLERANCE


def test_every_official_configuration_has_our_architecture():
    """Per-resolution attention, several blocks a level, six levels: each official layer name is met exactly once."""
    dd = {"double_z": False, "z_channels": 16, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32}
    dd |= {"ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [4, 16], "dropout": 0.0}
    config = official.vqgan_config(dd, n_embed=32, embed_dim=8)
    names, up = official.layers(config)
    attention = "down.2.attn.0 down.2.attn.1 down.4.attn.0 down.4.attn.1 mid.attn_1".split()
    assert [n for n in names if "attn" in n] == attention
    assert len([n for n in names if ".block." in n]) == 5 * 2 and len([n for n in up if ".block." in n]) == 5 * 3
