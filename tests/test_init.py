"""--init (`checkpoint.init_from`): a new model begins with what fits of an old one's weights, ours or official."""

import pytest
import torch
from helpers import ROOT, fixture, relative_error, same_bits

from minvqgan import VQGAN, TwoStage, VQGANConfig
from minvqgan.conditioning import ClassCondition, NoCondition
from minvqgan.discriminator import PatchDiscriminator
from minvqgan.gpt import GPT, GPTConfig
from minvqgan.harness import checkpoint, official
from minvqgan.harness.runtime import UserError
from minvqgan.two_stage import TwoStageConfig

CIFAR_GPT = ROOT / "notebooks" / "checkpoints" / "cifar_gpt.pt"
SMALL = {"image_size": 16, "ch": 8, "ch_mult": (1, 2), "z_channels": 8, "code_dim": 4, "codebook_size": 16}


def vqgan(**changes) -> VQGAN:
    return VQGAN(VQGANConfig(**SMALL | changes))


@pytest.fixture
def old(tmp_path):
    """A checkpoint as a run writes it, its model and its D."""
    model, disc = vqgan(), PatchDiscriminator(3, 8, 2)
    model.quantizer.recent_use.uniform_()
    for buffer in disc.buffers():
        buffer += 3
    states = {"model": model.state_dict(), "discriminator": disc.state_dict()}
    checkpoint.save(tmp_path / "old.pt", "vqgan", config=vars(model.config), **states)
    return tmp_path / "old.pt", model, disc


def test_an_equal_model_becomes_the_old_one(old):
    path, model, disc = old
    new, new_disc = vqgan(), PatchDiscriminator(3, 8, 2)
    parameters = list(new.parameters())
    line = checkpoint.init_from(path, new, discriminator=new_disc)
    assert same_bits(new.state_dict(), model.state_dict()) and same_bits(new_disc.state_dict(), disc.state_dict())
    assert all(a is b for a, b in zip(parameters, new.parameters(), strict=True))  # an optimizer may hold them
    n, m = len(new.state_dict()), len(new_disc.state_dict())
    assert line == f"weights from {path}; vqgan: {n} of {n} tensors; discriminator: {m} of {m} tensors"


@pytest.mark.parametrize("K", [12, 20])
def test_another_codebook_size_takes_the_first_codes(old, K):
    path, model, _ = old
    new, rows = vqgan(codebook_size=K), min(K, 16)
    fresh = new.quantizer.codebook.weight.detach().clone()
    checkpoint.init_from(path, new)
    codes = new.quantizer.codebook.weight
    assert torch.equal(codes[:rows], model.quantizer.codebook.weight[:rows])
    assert torch.equal(codes[rows:], fresh[rows:])
    assert torch.equal(new.quantizer.recent_use[:rows], model.quantizer.recent_use[:rows])
    assert not new.quantizer.recent_use[rows:].any()  # dead: the first revival moves these


def test_what_does_not_fit_is_named_and_stays(old):
    """A layer is found by its place, not by its number: with one more block a level, and one more level."""
    path, model, _ = old
    new = vqgan(num_res_blocks=2, ch_mult=(1, 2, 2), in_channels=1)
    fresh = {key: t.clone() for key, t in new.state_dict().items()}
    line = checkpoint.init_from(path, new)
    # Our number of a layer -> its number in the old model, or None.
    encoder = {1: 1, 2: None, 3: 2, 4: 3, 5: None, 7: None, 9: 4, 10: 5, 11: 6}
    decoder = {0: 0, 1: 1, 2: 2, 3: 3, 4: None, 7: None, 8: 4, 9: 5, 10: None, 11: 6, 12: 7, 13: 8, 14: None, 15: 9}
    for part, numbers in (("encoder", encoder), ("decoder", decoder)):
        for here, there in numbers.items():
            for key, tensor in getattr(new, part).layers[here].state_dict().items():
                source = fresh[f"{part}.layers.{here}.{key}"]
                if there is not None:
                    source = model.state_dict()[f"{part}.layers.{there}.{key}"]
                assert torch.equal(tensor, source)
    assert "not in it or of another shape: encoder.layers.0.weight, encoder.layers.2." in line
    with pytest.raises(UserError, match=r"old\.pt does not fit: none of its weights has a place"):
        checkpoint.init_from(path, two_stage(16, 0))


def test_a_first_stage_from_a_stage_two_file():
    model = checkpoint.load(CIFAR_GPT)
    new, disc = VQGAN(model.vqgan.config), PatchDiscriminator(3, 8, 2)
    line = checkpoint.init_from(CIFAR_GPT, new, discriminator=disc)
    assert same_bits(new.state_dict(), model.vqgan.state_dict())
    assert line.endswith(f"vqgan: {len(new.state_dict())} of {len(new.state_dict())} tensors")  # it has no D


def test_an_official_first_stage(tmp_path):
    """Without its yaml: the new model says which layers there are."""
    fx = fixture("vqgan")
    c = fx["config"]
    disc = {f"loss.discriminator.{key}": t for key, t in fx["discriminator"].items()}
    torch.save({"state_dict": fx["state_dict"] | disc | {"loss.perceptual_loss.a": torch.ones(1)}}, tmp_path / "a.ckpt")
    config = official.vqgan_config(c["ddconfig"], c["n_embed"], c["embed_dim"])
    new, new_disc = VQGAN(config).eval(), PatchDiscriminator(3, c["disc_ndf"], c["disc_num_layers"])
    checkpoint.init_from(tmp_path / "a.ckpt", new, discriminator=new_disc)
    assert torch.equal(new.encode_indices(fx["x"]), fx["indices"])
    assert relative_error(new.decode_indices(fx["indices"]), fx["x_rec"]) < 1e-5
    assert relative_error(new_disc(fx["x"]), fx["logits_real"]) < 1e-5
    assert new.quantizer.revive_dead_codes(torch.randn(2, c["embed_dim"], 8, 8)) == 0  # its codes stay


def two_stage(K: int, classes: int) -> TwoStage:
    condition = ClassCondition(classes) if classes else NoCondition()
    gpt = GPT(GPTConfig(K, condition.num_tokens + (classes > 0), 64, n_layer=1, n_head=2, n_embd=8))
    return TwoStage(vqgan(codebook_size=K), condition, gpt, TwoStageConfig(8, guided=classes > 0))


@pytest.mark.parametrize("K, classes", [(16, 3), (12, 3), (16, 5)])
def test_a_transformer(tmp_path, K, classes):
    """Its first stage stays; of the rows of codes and condition tokens, the first are copied."""
    model, new = two_stage(16, 3), two_stage(K, classes)
    checkpoint.save_model(tmp_path / "gpt.pt", model)
    first_stage = {key: t.clone() for key, t in new.vqgan.state_dict().items()}
    checkpoint.init_from(tmp_path / "gpt.pt", new)
    assert same_bits(new.vqgan.state_dict(), first_stage)
    if (K, classes) == (16, 3):
        assert same_bits(new.gpt.state_dict(), model.gpt.state_dict())
    for name in ("token_embedding", "head"):
        ours, theirs = (getattr(gpt, name).weight for gpt in (new.gpt, model.gpt))
        rows = min(len(ours), len(theirs))
        assert torch.equal(ours[:rows], theirs[:rows])
    assert torch.equal(new.gpt.blocks[0].attention.qkv.weight, model.gpt.blocks[0].attention.qkv.weight)
