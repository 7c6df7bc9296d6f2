"""Files as the paper's authors publish them: old pickles with a yaml beside them."""

import shutil
import sys
import types

import pytest
import torch
import yaml
from helpers import ROOT, fixture, make_photos, official_files, relative_error, run_inside, succeeded
from PIL import Image

import minvqgan
from minvqgan.harness import checkpoint, official
from minvqgan.harness.runtime import UserError

LIGHTNING = ROOT / "tests" / "fixtures" / "lightning_style.ckpt"


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k].to(a[k].dtype)) for k in a)


def floats(state: dict) -> dict:
    return {k: t.float() if t.is_floating_point() else t for k, t in state.items()}


def in_their_words(model) -> dict:
    """The weights of our VQGAN under the official names."""
    state = model.state_dict()
    return {theirs: state[ours] for ours, theirs in official.names(model).items()}


@pytest.fixture
def config(tmp_path):
    """The yaml of lightning_style.ckpt, which is that of the net2net fixtures' first stages."""
    node = {"target": "taming.models.vqgan.VQModel", "params": fixture("net2net_none")["first_stage"]}
    (tmp_path / "good.yaml").write_text(yaml.safe_dump({"model": node}))
    return tmp_path / "good.yaml"


def test_a_lightning_file_is_read_without_lightning(config):
    model = official.load(LIGHTNING, config)
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)
    with torch.serialization.safe_globals(
        [(checkpoint.Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"), types.SimpleNamespace]
    ):
        truth = torch.load(LIGHTNING, weights_only=True)["state_dict"]
    assert same(in_their_words(model), floats(truth))
    assert model(torch.zeros(1, 3, 32, 32))[0].shape == (1, 3, 32, 32)


class Copy:
    """Unpickled by an ordinary loader, it copies a file."""

    def __init__(self, to):
        self.to = to

    def __reduce__(self):
        return shutil.copyfile, (str(LIGHTNING), str(self.to))


def test_nothing_in_a_file_is_executed(tmp_path):
    mark, state = tmp_path / "executed", {"w": torch.ones(3)}
    torch.save({"state_dict": state, "hparams": Copy(mark), "callbacks": {Copy: 1}}, tmp_path / "a.ckpt")
    assert same(official.read(tmp_path / "a.ckpt"), state) and not mark.exists()


def test_broken_files_give_one_line(config, tmp_path):
    (tmp_path / "cut.ckpt").write_bytes(LIGHTNING.read_bytes()[:100_000])
    torch.save({"state_dict": {"a": 1}}, tmp_path / "numbers.ckpt")
    torch.save([torch.zeros(1)], tmp_path / "list.ckpt")
    for name in ("cut", "numbers", "list"):
        with pytest.raises(UserError, match=f"{name}.ckpt"):
            official.read(tmp_path / f"{name}.ckpt")
    (tmp_path / "a.yaml").write_text("model: [")
    (tmp_path / "b.yaml").write_text("data: 1")
    (tmp_path / "other.yaml").write_text(config.read_text().replace("n_embed: 64", "n_embed: 65"))
    answers = {"a": r"a\.yaml", "b": r"b\.yaml", "other": r"size mismatch for quantizer\.codebook\.weight"}
    for name, answer in answers.items():
        with pytest.raises(UserError, match=answer):
            official.load(LIGHTNING, tmp_path / f"{name}.yaml")
    with pytest.raises(UserError, match="--official-config"):
        minvqgan.load(LIGHTNING)


def test_unneeded_keys_pass_and_unknown_ones_are_named(tmp_path):
    fx = fixture("vqgan")
    unneeded = {"loss.discriminator.main.0.weight": torch.zeros(1), "colorize": torch.zeros(3, 5, 1, 1)}
    config = official.first_stage_config({"target": "x.VQModel", "params": fx["config"]})
    official.load_vqgan(fx["state_dict"] | unneeded, config)
    for odd in ("quantize.surprise", "encoder.surprise"):
        with pytest.raises(RuntimeError, match=odd):
            official.load_vqgan(fx["state_dict"] | {odd: torch.zeros(1)}, config)
    with pytest.raises(RuntimeError, match=r"Missing .*to_code\.bias"):
        official.load_vqgan({k: v for k, v in fx["state_dict"].items() if k != "quant_conv.bias"}, config)
    fx = fixture("net2net_none")
    for odd in ("cond_stage_model.a", "surprise", "permuter.b", "transformer.blocks.0.attn.c"):
        fx["state_dict"][odd] = torch.zeros(1)
        with pytest.raises(UserError, match=odd.removeprefix("transformer.")):
            official.load(*official_files(fx, tmp_path))
        del fx["state_dict"][odd]


@pytest.mark.parametrize(
    "name, more, channels, kind",
    [
        ("VQModel", {}, 3, "rgb"),
        ("VQModel", {"image_key": "depth"}, 1, "depth"),
        ("VQModel", {}, 1, "gray"),
        ("VQModel", {"image_key": "segmentation", "colorize_nlabels": 12}, 12, "labels"),
        ("VQSegmentationModel", {"n_labels": 12}, 12, "labels"),
        ("GumbelVQ", {"kl_weight": 1e-8, "temperature_scheduler_config": {}}, 3, "rgb"),
    ],
)
def test_kinds_of_first_stages(name, more, channels, kind):
    """What a model reads follows from its class and image_key; the segmentation models have random colours on board."""
    dd = fixture("vqgan")["config"]["ddconfig"] | {"in_channels": channels, "out_ch": channels}
    node = {"target": f"taming.models.vqgan.{name}", "params": {"ddconfig": dd, "n_embed": 64, "embed_dim": 16} | more}
    config = official.first_stage_config(node)
    assert (config.input_kind, config.in_channels, config.gumbel) == (kind, channels, name == "GumbelVQ")
    model = minvqgan.VQGAN(config).eval()
    state = in_their_words(model)
    assert ("quantize.embed.weight" in state) == (name == "GumbelVQ")
    back = official.load_vqgan(state | {"colorize": torch.zeros(3, channels, 1, 1)}, config)
    x = torch.randn(1, channels, 16, 16)
    assert torch.equal(model(x)[0], back(x)[0])


def test_orders_of_the_permuters(tmp_path):
    """A permuter saves its order and the inverse; they must be those of the class in the yaml."""
    fx = fixture("net2net_none")
    params = official.read_config(official_files(fx, tmp_path)[1])["params"]
    for name, ours in official.ORDER_NAMES.items():
        params["permuter_config"] = {"target": f"taming.modules.transformer.permuter.{name}"}
        model = official.load_two_stage(fx["state_dict"], params)
        assert model.config.order == ours
        order, key = model.order, "permuter.forward_shuffle_idx"
        state = fx["state_dict"] | {key: order, "permuter.backward_shuffle_idx": order.argsort()}
        assert torch.equal(official.load_two_stage(state, params).order, order)
        with pytest.raises(ValueError, match="is not the order of"):
            official.load_two_stage(state | {key: order.flip(0)}, params)


def test_options_that_are_not_supported_are_refused(tmp_path):
    """They would load without complaint, and draw other images."""
    fx = fixture("net2net_none")
    params = official.read_config(official_files(fx, tmp_path)[1])["params"]
    transformer = params["transformer_config"]
    unmasked = transformer | {"params": transformer["params"] | {"n_unmasked": 4}}
    for odd, answer in (
        ({"transformer_config": unmasked}, "n_unmasked"),
        ({"unconditional": True, "sos_token": 3}, "sos_token is 3"),
        ({"cond_stage_config": "__is_first_stage__", "downsample_cond_size": 8}, "downsample_cond_size"),
    ):
        with pytest.raises(ValueError, match=answer):
            official.load_two_stage(fx["state_dict"], params | odd)


def test_convert_on_the_command_line(tmp_path, monkeypatch):
    fx = fixture("net2net_class")
    official_files(fx, tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["last.ckpt", "project.yaml", "ours.pt"]
    assert official.main(words) == 0
    model = minvqgan.load("ours.pt")
    assert torch.equal(model.image_tokens(fx["x"]), fx["z_indices"])
    assert relative_error(model.nll(fx["x"], fx["c"]).mean(), fx["loss"]) < 1e-5
    before = (tmp_path / "ours.pt").read_bytes()
    with pytest.raises(UserError, match=r"ours\.pt exists"):
        official.main(words)
    assert (tmp_path / "ours.pt").read_bytes() == before


def test_large_models_are_not_copied(tmp_path):
    """The model takes over the file's tensors: the transformer of 1.4 B parameters needs 5.6 GB, not 11."""
    fx = fixture("vqgan")
    torch.save(floats(fx["state_dict"]), tmp_path / "bare.ckpt")
    state = official.read(tmp_path / "bare.ckpt")
    model = official.load_vqgan(state, official.first_stage_config({"target": "x.VQModel", "params": fx["config"]}))
    assert model.from_code.weight.data_ptr() == state["post_quant_conv.weight"].data_ptr()


def test_the_scripts_take_official_files(tmp_path):
    """Sampled, slid over a larger image, and a transformer of one's own trained on the codes."""
    (tmp_path / "coord").mkdir()
    official_files(fixture("net2net_class"), tmp_path)
    official_files(fixture("net2net_coord"), tmp_path / "coord")
    make_photos(tmp_path / "photos", n=6, size=(24, 20))
    gpt = ("sample.py", "--gpt", "last.ckpt", "--official-config", "project.yaml", "-n", "2")
    for folder, flags, size in (
        (tmp_path, "--classes 1,3 --out a.png", (2 * 66 + 2, 2 * 66 + 2)),  # 32 pixels doubled, and lines
        (tmp_path / "coord", "--size 36x40 --out c.png", (2 * 42 + 2, 40)),
    ):
        succeeded(run_inside(*gpt, *flags.split(), cwd=folder))
        assert Image.open(folder / flags.split()[-1]).size == size

    words = "train_gpt.py --vqgan last.ckpt --official-config project.yaml --data photos --n-layer 1 --n-head 2 "
    words += "--n-embd 16 --batch-size 2 --steps 2 --val-images 4 --image-size 16 --cond none --out gpt"
    succeeded(run_inside(*words.split(), cwd=tmp_path))
    mine = minvqgan.load(tmp_path / "gpt" / "last.pt")
    theirs = official.load(tmp_path / "last.ckpt", tmp_path / "project.yaml")
    assert same(mine.vqgan.state_dict(), theirs.vqgan.state_dict()) and mine.gpt.config.num_codes == 64
