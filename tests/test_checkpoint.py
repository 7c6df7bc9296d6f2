"""Checkpoints: whole or not at all, plain tensors only, and one line for every file that does not fit."""

import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from helpers import ROOT

import minvqgan
from minvqgan import VQGAN, VQGANConfig
from minvqgan.harness import checkpoint
from minvqgan.harness.runtime import UserError

CONFIG = VQGANConfig(image_size=16, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=4, codebook_size=16)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    vqgan = VQGAN(CONFIG)
    checkpoint.save(tmp_path / "last.pt", "vqgan", config=vars(CONFIG), model=vqgan.state_dict())
    return tmp_path / "last.pt", vqgan


def test_load_gives_the_model_back_in_eval_mode(saved):
    path, vqgan = saved
    loaded = minvqgan.load(path)
    assert not loaded.training and loaded.config == CONFIG
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(x)[0], vqgan.eval()(x)[0])


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_file_is_not_executed(tmp_path, protocol):
    mark, path = tmp_path / "executed", tmp_path / "bomb.pt"
    torch.save({"format": "minvqgan 1", "kind": "vqgan", "model": Bomb(mark)}, path, pickle_protocol=protocol)
    with pytest.raises(UserError, match="other than tensors; nothing in it was executed"):
        minvqgan.load(path)
    path.write_bytes(pickle.dumps(Bomb(mark), protocol=protocol))
    with pytest.raises(UserError):
        minvqgan.load(path)
    assert not mark.exists()


def test_files_that_do_not_fit(saved, tmp_path):
    path, vqgan = saved
    content = checkpoint.read(path)

    def refused(match, **changes):
        torch.save(content | changes, tmp_path / "odd.pt")
        with pytest.raises(UserError, match=match):
            minvqgan.load(tmp_path / "odd.pt")

    state = vqgan.state_dict()
    refused("is not a minvqgan checkpoint", format="another 1")
    refused("holds a sandwich, which this version does not know", kind="sandwich")
    refused("classes is missing", kind="classifier")
    refused(r"config does not fit this version \(colour\)", config=vars(CONFIG) | {"colour": 1})
    refused("decoder.layers.0.weight has another shape", config=vars(CONFIG) | {"z_channels": 16})
    refused("--norm-groups 3 does not divide", config=vars(CONFIG) | {"norm_groups": 3})
    refused("config.ch is 'many', not a whole number from 1", config=vars(CONFIG) | {"ch": "many"})
    refused(r"config.ch_mult\[1\] is 0, not a whole", config=vars(CONFIG) | {"ch_mult": [1, 0]})
    refused("config.dropout is nan, not a number from 0 to 1", config=vars(CONFIG) | {"dropout": float("nan")})
    refused("config.legacy is 'no', not true or false", config=vars(CONFIG) | {"legacy": "no"})
    refused("config.input_kind is 'smell', not one of rgb, ", config=vars(CONFIG) | {"input_kind": "smell"})
    refused("decoder.conv_out.bias is missing", model={k: v for k, v in state.items() if k != "decoder.conv_out.bias"})
    refused("surprise is unknown", model=state | {"surprise": torch.zeros(1)})
    refused("has another shape", model=state | {"to_code.bias": torch.zeros(99)})
    refused("model.to_code.bias is 3.0, not a tensor", model=state | {"to_code.bias": 3.0})
    refused("model.to_code.bias overlaps itself", model=state | {"to_code.bias": torch.zeros(1).expand(4)})
    refused("model.to_code.bias is no plain tensor", model=state | {"to_code.bias": torch.zeros(4).to_sparse()})
    refused("model.to_code.bias is no plain tensor", model=state | {"to_code.bias": torch.zeros(4, device="meta")})
    for dtype in (torch.float8_e4m3fn, torch.uint16, torch.complex64):  # torch cannot compare with some of them
        refused("model.to_code.bias is no plain tensor", model=state | {"to_code.bias": torch.zeros(4).to(dtype)})
    refused("model.to_code.bias holds numbers that are", model=state | {"to_code.bias": torch.full((4,), torch.inf)})
    refused("not a dict of names", model=[1, 2])
    with pytest.raises(UserError, match="no checkpoint at"):
        minvqgan.load(tmp_path / "nowhere.pt")


def test_truncated_anywhere(saved, tmp_path):
    whole = saved[0].read_bytes()
    for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999):
        (tmp_path / "part.pt").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match="truncated or not a checkpoint"):
            minvqgan.load(tmp_path / "part.pt")


def test_a_full_disk_leaves_the_old_file(saved, monkeypatch):
    path, vqgan = saved
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half of it")
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk is full"):
        checkpoint.save(path, "vqgan", model=vqgan.state_dict())
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_weights_that_are_not_finite_replace_nothing(saved):
    path, vqgan = saved
    before = path.read_bytes()
    state = vqgan.state_dict() | {"decoder.conv_out.bias": torch.tensor([0.0, float("nan"), 0.0])}
    with pytest.raises(UserError, match=r"model\.decoder\.conv_out\.bias is not finite"):
        checkpoint.save(path, "vqgan", model=state, opt_g={"state": [torch.tensor(float("inf"))]})
    with pytest.raises(UserError, match=r"opt_g\.state\.0 is not finite"):
        checkpoint.save(path, "vqgan", model=vqgan.state_dict(), opt_g={"state": [torch.tensor(float("inf"))]})
    assert path.read_bytes() == before
    for target, kept in ((path, True), (path.with_name("first.pt"), False)):
        with pytest.raises(UserError) as error:
            checkpoint.save(target, "vqgan", model=state)
        assert ("keeps the last good state" in str(error.value)) == kept  # where there is one


def test_kill_9_in_the_middle_of_a_save_leaves_the_old_file(saved):
    path, _ = saved
    before = path.read_bytes()
    program = f"""
import os, signal, torch
from minvqgan.harness import checkpoint
whole = torch.save
def half(content, file):
    whole(content, file)
    file.seek(1000); file.truncate(); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
checkpoint.save({str(path)!r}, "vqgan", model={{"a": torch.zeros(1000)}})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert done.returncode == -9
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2  # the half file lies beside it, under another name


def test_a_packed_file_is_not_unpacked(saved, tmp_path):
    """torch stores; a compressed archive of zeros would take a thousand times its size."""
    with zipfile.ZipFile(saved[0]) as good, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as odd:
        for name in good.namelist():
            odd.writestr(name, good.read(name))
    for door in (minvqgan.load, checkpoint.read_foreign):
        with pytest.raises(UserError, match="not a checkpoint"):
            door(tmp_path / "packed.pt")


def adam(parameters, **how):
    """An optimizer after one step, so that it has a state."""
    opt = torch.optim.Adam(parameters, 0.1, fused=True, **how)
    for p in parameters:
        p.grad = torch.ones_like(p)
    opt.step()
    return opt


def test_optimizer_states_are_compared_with_their_parameters():
    """The fused Adam writes through bare pointers: what does not fit would corrupt memory."""
    parameters = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(2))]
    opt = adam(parameters)

    def refused(match, **changes):
        state = opt.state_dict()
        state["state"] = state["state"] | {0: state["state"][0] | changes}
        with pytest.raises(UserError, match=match):
            checkpoint.restore({"opt": state}, {"opt": opt}, "last.pt")

    refused(r"exp_avg of parameter 0 is \(1,\)", exp_avg=torch.zeros(1))
    refused(r"exp_avg_sq of parameter 0 is \(4, 3\)", exp_avg_sq=torch.zeros(4, 3))
    refused("exp_avg of parameter 0 is .*int64", exp_avg=torch.zeros(3, 4, dtype=torch.long))
    refused("exp_avg_sq of parameter 0", exp_avg_sq=-torch.ones(3, 4))
    refused(r"step of parameter 0 is \(5,\)", step=torch.zeros(5))
    refused("not Adam's", momentum_buffer=torch.zeros(3, 4))
    for changes in ({"state": {7: opt.state_dict()["state"][0]}}, {"param_groups": []}):
        with pytest.raises(UserError, match="opt does not fit"):
            checkpoint.restore({"opt": opt.state_dict() | changes}, {"opt": opt}, "last.pt")


def test_optimizer_states_take_the_layout_of_their_parameters():
    """channels_last and overlapping states have the right numbers in the right places, in memory of their own."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    opt = adam([weight])
    state = opt.state_dict()
    truth = torch.arange(48.0).view(4, 3, 2, 2)
    state["state"][0] |= {"exp_avg": truth.clone(), "exp_avg_sq": torch.ones(1).expand(4, 3, 2, 2)}
    state["param_groups"][0] |= {"amsgrad": True, "betas": (7, "no")}  # rates and betas are the script's
    checkpoint.restore({"opt": state}, {"opt": opt}, "last.pt")
    loaded = opt.state[weight]
    assert torch.equal(loaded["exp_avg"], truth) and loaded["exp_avg"].stride() == weight.stride()
    assert loaded["exp_avg_sq"].stride() == weight.stride() and opt.param_groups[0]["betas"] == (0.9, 0.999)
    opt.step()
