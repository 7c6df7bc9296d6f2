"""Files as the paper's authors publish them: old pickles, yaml beside them, and back into that layout."""

import collections
import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    ROOT,
    assert_one_line_error,
    fixture,
    make_photos,
    official_files,
    relative_error,
    run_inside,
)
from PIL import Image

import minvqgan
from minvqgan.harness import checkpoint, official
from minvqgan.harness.runtime import UserError

LIGHTNING = ROOT / "tests" / "fixtures" / "lightning_style.ckpt"


def vqgan_yaml(path: Path) -> Path:
    """The configuration of lightning_style.ckpt, which is that of the net2net fixtures' first stages."""
    node = {"target": "taming.models.vqgan.VQModel", "params": fixture("net2net_none")["first_stage"]}
    path.write_text(yaml.safe_dump({"model": node}))
    return path


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k].to(a[k].dtype)) for k in a)


def floats(state: dict) -> dict:
    return {k: t.float() if t.is_floating_point() else t for k, t in state.items()}


def test_a_lightning_file_is_read_without_lightning(tmp_path):
    model = official.load(LIGHTNING, vqgan_yaml(tmp_path / "project.yaml"))
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)
    state, _ = official.export_vqgan(model)
    with torch.serialization.safe_globals(
        [(official.Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"), types.SimpleNamespace]
    ):
        truth = torch.load(LIGHTNING, weights_only=True)["state_dict"]
    assert same(state, floats(truth))
    assert model(torch.zeros(1, 3, 32, 32))[0].shape == (1, 3, 32, 32)


class Touch:
    """Unpickled by an ordinary loader, it leaves a file behind."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def of_package(path, **content):
    """A class as another package's, without that package."""
    module, _, name = path.rpartition(".")
    cls = type(name, (content.pop("base", object),), {"__module__": module})
    parent = ""
    for part in module.split("."):
        parent = f"{parent}.{part}".strip(".")
        sys.modules.setdefault(parent, types.ModuleType(parent))
    setattr(sys.modules[module], name, cls)
    return cls


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_not_executed(tmp_path):
    """The weights are read, what the file calls beside them is not, or the file is refused."""
    state, marker = {"weight": torch.zeros(2)}, tmp_path / "executed"
    calls = [
        (os.system, f"touch {marker}"),
        (eval, f"open({str(marker)!r}, 'w')"),
        (exec, f"open({str(marker)!r}, 'w')"),
        (subprocess.check_call, ["touch", str(marker)]),
        (os.mkdir, str(marker)),
        (Path.touch, marker),
        (getattr, "text", "upper"),
        (torch.hub.load_state_dict_from_url, "file:///etc/passwd"),
        (collections.namedtuple, "A", "b"),
    ]
    for call in calls:
        for protocol in (2, 4):
            content = {"state_dict": state, "callbacks": Touch(*call)}
            torch.save(content, tmp_path / "evil.ckpt", pickle_protocol=protocol)
            with contextlib.suppress(UserError):
                assert same(official.read(tmp_path / "evil.ckpt"), state)
            assert not marker.exists(), call


def test_objects_of_frameworks_are_inert(tmp_path):
    called = []
    names = [
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "omegaconf.dictconfig.DictConfig",
        "main.SetupCallback",
    ]
    classes = [of_package(names[0], base=dict)] + [of_package(name) for name in names[1:]]
    for cls in classes:
        cls.__setstate__ = lambda self, state: called.append(state)
    odd = [classes[0](lr=1), classes[1](), types.SimpleNamespace(lr=2), collections.defaultdict(int, a=1)]
    odd[1].content = {"a": 1}
    torch.save({"state_dict": {"w": torch.ones(3)}, "hyper": odd, "callbacks": {classes[2]: {}}}, tmp_path / "a.ckpt")
    for name in [n for n in sys.modules if n.split(".")[0] in ("pytorch_lightning", "omegaconf", "main")]:
        del sys.modules[name]
    state = official.read(tmp_path / "a.ckpt")
    assert same(state, {"w": torch.ones(3)}) and not called


def test_broken_files_give_one_line(tmp_path):
    (tmp_path / "cut.ckpt").write_bytes(LIGHTNING.read_bytes()[:100_000])
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "numbers.ckpt")
    torch.save([torch.zeros(1)], tmp_path / "list.ckpt")
    for name in ("cut", "text", "numbers", "list", "absent"):
        with pytest.raises(UserError, match=f"{name}.ckpt"):
            official.read(tmp_path / f"{name}.ckpt")
    good = vqgan_yaml(tmp_path / "good.yaml")
    for name, text in (("a", "model: ["), ("b", "data: 1"), ("c", "model: {target: x.VQModel, params: {n_embed: 3}}")):
        (tmp_path / f"{name}.yaml").write_text(text)
        with pytest.raises(UserError, match=f"{name}.yaml"):
            official.load(LIGHTNING, tmp_path / f"{name}.yaml")
    with pytest.raises(UserError, match=r"absent\.yaml"):
        official.load(LIGHTNING, tmp_path / "absent.yaml")
    (tmp_path / "other.yaml").write_text(good.read_text().replace("n_embed: 64", "n_embed: 65"))
    with pytest.raises(UserError, match=r"quantizer\.codebook\.weight is \(64, 16\) in the file, \(65, 16\)"):
        official.load(LIGHTNING, tmp_path / "other.yaml")
    with pytest.raises(UserError, match="--official-config"):
        minvqgan.load(LIGHTNING)


def test_unneeded_keys_pass_and_unknown_ones_are_named(tmp_path):
    fx = fixture("vqgan")
    unneeded = {"loss.discriminator.main.0.weight": torch.zeros(1), "colorize": torch.zeros(3, 5, 1, 1)}
    config = official.first_stage_config({"target": "x.VQModel", "params": fx["config"]})
    official.load_vqgan(fx["state_dict"] | unneeded, config)
    with pytest.raises(ValueError, match=r"quantize\.surprise"):
        official.load_vqgan(fx["state_dict"] | {"quantize.surprise": torch.zeros(1)}, config)
    fx = fixture("net2net_none")
    for odd in ("cond_stage_model.a", "surprise", "permuter.b", "transformer.blocks.0.attn.c"):
        fx["state_dict"][odd] = torch.zeros(1)
        with pytest.raises(UserError, match=odd.removeprefix("transformer.")):
            official.load(*official_files(fx, tmp_path))
        del fx["state_dict"][odd]


def test_kinds_of_first_stages(tmp_path):
    """What a model reads follows from its class and image_key; the segmentation models have random colours on board."""
    fx = fixture("vqgan")
    dd = fx["config"]["ddconfig"]
    for name, more, channels, kind in (
        ("VQModel", {}, 3, "rgb"),
        ("VQModel", {"image_key": "depth"}, 1, "depth"),
        ("VQModel", {}, 1, "gray"),
        ("VQModel", {"image_key": "segmentation", "colorize_nlabels": 12}, 12, "labels"),
        ("VQSegmentationModel", {"n_labels": 12}, 12, "labels"),
        ("GumbelVQ", {"kl_weight": 1e-8, "temperature_scheduler_config": {}}, 3, "rgb"),
    ):
        sizes = {"ddconfig": dd | {"in_channels": channels, "out_ch": channels}, "n_embed": 64, "embed_dim": 16}
        node = {"target": f"taming.models.vqgan.{name}", "params": sizes | more}
        config = official.first_stage_config(node)
        assert (config.input_kind, config.in_channels, config.gumbel) == (kind, channels, name == "GumbelVQ")
        model = minvqgan.VQGAN(config).eval()
        state, described = official.export_vqgan(model)
        assert ("quantize.embed.weight" in state) == (name == "GumbelVQ")
        assert (
            official.first_stage_config(described).input_kind == ("rgb" if kind == "gray" else kind) or kind == "gray"
        )
        back = official.load_vqgan(state | {"colorize": torch.zeros(3, channels, 1, 1)}, config)
        x = torch.randn(1, channels, 16, 16)
        assert torch.equal(model(x)[0], back(x)[0])
    with pytest.raises(ValueError, match="KLModel"):
        official.first_stage_config({"target": "ldm.KLModel", "params": {}})


def test_back_in_the_official_layout(tmp_path):
    fx = fixture("net2net_none")
    model = official.load(*official_files(fx, tmp_path))
    prefix = "first_stage_model."
    truth = {k.removeprefix(prefix): t for k, t in fx["state_dict"].items() if k.startswith(prefix)}
    assert same(official.export_vqgan(model.vqgan)[0], floats(truth))
    official.export(model.vqgan, tmp_path / "back.ckpt", tmp_path / "back.yaml")
    again = official.load(tmp_path / "back.ckpt", tmp_path / "back.yaml")
    assert again.config == model.vqgan.config and same(again.state_dict(), model.vqgan.state_dict())
    with pytest.raises(UserError, match="only first stages"):
        official.export(model, tmp_path / "a.ckpt", tmp_path / "a.yaml")


def test_orders_of_the_permuters(tmp_path):
    fx = fixture("net2net_none")
    for name, ours in official.ORDER_NAMES.items():
        path, config = official_files(fx, tmp_path)
        content = yaml.safe_load(config.read_text())
        node = {"target": f"taming.modules.transformer.permuter.{name}", "params": {"H": 16, "W": 16}}
        content["model"]["params"]["permuter_config"] = node
        config.write_text(yaml.safe_dump(content))
        model = official.load(path, config)
        assert model.config.order == ours
        if ours == "row":
            continue
        back = {"permuter.backward_shuffle_idx": model.order.argsort()}
        for forward, fits in ((model.order, True), (model.order.flip(0), False)):
            torch.save({"state_dict": fx["state_dict"] | back | {"permuter.forward_shuffle_idx": forward}}, path)
            if fits:
                assert torch.equal(official.load(path, config).order, model.order)
            else:
                with pytest.raises(UserError, match="is not the order of"):
                    official.load(path, config)


def test_convert_on_the_command_line(tmp_path, monkeypatch):
    fx = fixture("net2net_class")
    official_files(fx, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert official.main(["last.ckpt", "project.yaml", "ours.pt"]) == 0
    model = minvqgan.load("ours.pt")
    assert torch.equal(model.image_tokens(fx["x"]), fx["z_indices"])
    assert relative_error(model.nll(fx["x"], fx["c"]).mean(), fx["loss"]) < 1e-5
    checkpoint.save_model("first.pt", model.vqgan)
    assert official.main(["--export", "first.pt", "back.ckpt", "back.yaml"]) == 0
    assert same(official.load("back.ckpt", "back.yaml").state_dict(), model.vqgan.state_dict())
    checkpoint.save_model("small.pt", minvqgan.VQGAN(minvqgan.VQGANConfig()))
    for words, answer in (
        (["last.ckpt", "project.yaml", "ours.pt"], "ours.pt exists"),
        (["--export", "first.pt", "new.ckpt", "back.yaml"], "back.yaml exists"),
        (["--export", "ours.pt", "x.ckpt", "x.yaml"], "only first stages"),
        (["--export", "small.pt", "x.ckpt", "x.yaml"], "32 norm groups"),
    ):
        with pytest.raises(UserError, match=answer):
            official.main(words)
    assert not list(tmp_path.glob("x.*")) + list(tmp_path.glob("new.*"))


# Parameters that are mapped from the file count only once they are touched, so all of them are.
MEASURE = """
from minvqgan.harness import official
def memory(name):  # kB
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
official.load("small/last.ckpt", "small/project.yaml")  # now all that torch imports lazily is there
before = memory("VmRSS")
model = official.load("last.ckpt", "project.yaml")
touched = sum(p.sum() for p in model.parameters())
print((memory("VmHWM") - before) * 1024, sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_the_large_class_conditional_model(tmp_path):
    """The 1.4 B parameter layout (48 layers of width 1536) at 2 layers: loading takes no second copy."""
    fx = fixture("net2net_class")
    (tmp_path / "small").mkdir()
    official_files(fx, tmp_path / "small")
    fx["transformer"] = {"vocab_size": 16384, "block_size": 257, "n_layer": 2, "n_head": 24, "n_embd": 1536}
    fx["cond_stage"]["params"]["n_classes"] = 1001
    state = {k: t for k, t in fx["state_dict"].items() if not k.startswith("transformer.blocks")}
    for key, tensor in fx["state_dict"].items():  # the same layers at the large sizes
        _, _, inner = key.partition("blocks.0.")
        if key.startswith("transformer.") and (inner or "blocks" not in key):
            small, large = fixture("net2net_class")["transformer"]["n_embd"], 1536
            ends = {"pos_emb": (1, 257, large), "tok_emb.weight": (16384, large), "head.weight": (16384, large)}
            shape = ends.get(key.removeprefix("transformer."), [n // small * large for n in tensor.shape])
            for layer in range(2) if inner else [0]:
                state[key.replace("blocks.0.", f"blocks.{layer}.")] = torch.randn(shape) / 50
    fx["state_dict"] = state
    official_files(fx, tmp_path)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, parameters = map(int, done.stdout.split())
    assert parameters > 100e6
    assert peak < 1.3 * (tmp_path / "last.ckpt").stat().st_size
    print(f"{parameters / 1e6:.0f} M parameters: peak {peak / 4 / parameters:.2f} x their size")


def test_the_scripts_take_official_files(tmp_path):
    """Sampled, completed, slid over a larger picture, and a transformer of one's own trained on the codes."""
    official_files(fixture("net2net_class"), tmp_path)
    gpt = ("sample.py", "--gpt", "last.ckpt", "--official-config", "project.yaml", "-n", "2")
    done = run_inside(*gpt, "--classes", "1,3", "--out", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "a.png").size == (2 * 66 + 2, 2 * 66 + 2)  # 32 pixels doubled, and lines
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    done = run_inside(*gpt, "--classes", "1", "--complete", "photo.png", "--out", "b.png", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "b.png").exists(), done.stderr
    assert_one_line_error(run_inside(*gpt, "--classes", "1000", cwd=tmp_path), "there is no '1000'")

    (tmp_path / "coord").mkdir()
    official_files(fixture("net2net_coord"), tmp_path / "coord")
    done = run_inside(*gpt, "--size", "36x40", "--out", "c.png", cwd=tmp_path / "coord")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "coord" / "c.png").size == (2 * 42 + 2, 40)

    words = "train_gpt.py --vqgan last.ckpt --official-config project.yaml --data shapes --n-layer 1 --n-head 2 "
    words += "--n-embd 16 --batch-size 2 --steps 2 --val-images 4 --image-size 16 --data photos --cond none --out gpt"
    make_photos(tmp_path / "photos", n=6, size=(24, 20))
    done = run_inside(*words.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mine = minvqgan.load(tmp_path / "gpt" / "last.pt")
    theirs = official.load(tmp_path / "last.ckpt", tmp_path / "project.yaml")
    assert same(mine.vqgan.state_dict(), theirs.vqgan.state_dict()) and mine.gpt.config.num_codes == 64
