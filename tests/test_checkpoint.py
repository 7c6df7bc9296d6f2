"""Checkpoints: whole or not at all, plain tensors only, and one line for every file that does not fit."""

import io
import os
import signal

import pytest
import torch
from helpers import ROOT, assert_one_line_error, run_inside, same_bits, succeeded

import minvqgan
from minvqgan import VQGAN, VQGANConfig
from minvqgan.harness import checkpoint
from minvqgan.harness.runtime import UserError

CONFIG = VQGANConfig(image_size=16, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=4, codebook_size=16)
SHIPPED = ROOT / "notebooks" / "checkpoints" / "cifar_gpt.pt"


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    vqgan = VQGAN(CONFIG)
    checkpoint.save_model(tmp_path / "last.pt", vqgan)
    return tmp_path / "last.pt", vqgan


def test_load_gives_the_model_back_in_eval_mode(saved, tmp_path):
    """From a path or an open file; also where it was saved inside a wrapper."""
    path, vqgan = saved
    x = torch.randn(1, 3, 16, 16)
    checkpoint.save_model(tmp_path / "wrapped.pt", torch.nn.DataParallel(torch.compile(vqgan)))
    for file in (path, str(path), io.BytesIO(path.read_bytes()), tmp_path / "wrapped.pt"):
        loaded = minvqgan.load(file)
        assert not loaded.training and loaded.config == CONFIG
        assert torch.equal(loaded(x)[0], vqgan.eval()(x)[0])


def test_a_config_field_that_the_file_lacks_takes_its_default(tmp_path):
    """A file from before the field existed; one that this version does not know is named."""
    content = torch.load(SHIPPED, weights_only=True)
    assert content["vqgan"]["config"].pop("rotation") is False
    torch.save(content, tmp_path / "old.pt")
    old, new = minvqgan.load(tmp_path / "old.pt"), minvqgan.load(SHIPPED)
    assert old.vqgan.config == new.vqgan.config and same_bits(old.state_dict(), new.state_dict())
    content["vqgan"]["config"]["colour"] = 1
    torch.save(content, tmp_path / "newer.pt")
    with pytest.raises(UserError, match=r"newer\.pt does not fit: VQGANConfig.* argument 'colour'"):
        minvqgan.load(tmp_path / "newer.pt")


class Bomb:
    """Unpickled by an ordinary loader, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_executed(tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "bomb.pt"
    torch.save({"format": "minvqgan 1", "kind": "vqgan", "model": Bomb(mark)}, path)
    with pytest.raises(UserError, match="other than tensors; nothing in it was executed"):
        minvqgan.load(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the bomb works


def test_files_that_do_not_fit(saved, tmp_path):
    path, vqgan = saved
    content, state = checkpoint.read(path), vqgan.state_dict()

    def refused(match, **changes):
        torch.save(content | changes, tmp_path / "odd.pt")
        with pytest.raises(UserError, match=match) as error:
            minvqgan.load(tmp_path / "odd.pt")
        assert str(error.value).startswith(str(tmp_path / "odd.pt")) and str(error.value).isprintable()

    refused("is not a minvqgan checkpoint", format="another 1")
    refused("holds a sandwich, not a vqgan or two_stage", kind="sandwich")
    refused("--norm-groups 3 does not divide", config=vars(CONFIG) | {"norm_groups": 3})
    refused("does not fit", config=vars(CONFIG) | {"ch": "many"})
    refused('Missing key.*"to_code.bias"', model={k: v for k, v in state.items() if k != "to_code.bias"})
    refused('Unexpected key.*"surprise"', model=state | {"surprise": torch.zeros(1)})
    refused(r"size mismatch for to_code.bias: .*\[99\]", model=state | {"to_code.bias": torch.zeros(99)})
    with pytest.raises(UserError, match="no checkpoint at"):
        minvqgan.load(tmp_path / "nowhere.pt")


def test_errors_of_the_program_stay_tracebacks(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "fill", lambda module, state: undefined)  # noqa: F821
    with pytest.raises(NameError):
        minvqgan.load(saved[0])


@pytest.mark.parametrize("fraction", [0, 0.001, 0.5, 0.999])
def test_truncated_anywhere(saved, fraction):
    saved[0].write_bytes(saved[0].read_bytes()[: int(fraction * saved[0].stat().st_size)])
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        minvqgan.load(saved[0])


def test_weights_that_are_not_finite_replace_nothing(saved):
    path, vqgan = saved
    before = path.read_bytes()
    bias = {"decoder": {"bias": torch.tensor([0.0, float("nan"), 0.0])}}
    for content, name in ((bias, "decoder.bias"), ({"opt_g": {0: torch.tensor(float("inf"))}}, "opt_g.0")):
        with pytest.raises(UserError, match=f"{name} is no longer finite"):
            checkpoint.save(path, "vqgan", model=vqgan.state_dict(), **content)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_kill_9_in_the_middle_of_a_save_leaves_the_old_file(saved, monkeypatch):
    path, vqgan = saved
    before, ours = path.read_bytes(), os.getpid()

    def half(content, file):
        file.write(before[:1000])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(torch, "save", half)
    if os.fork() == 0:
        checkpoint.save_model(path, vqgan)
    assert os.getpid() == ours and os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2  # the half file lies beside it, under another name


def test_optimizer_states_fit_their_parameters():
    """Fused Adam writes through raw pointers: another shape is refused, another memory layout changed."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    opt = torch.optim.Adam([weight], 0.1, fused=True)
    weight.grad = torch.ones_like(weight)
    opt.step()
    saved, truth = opt.state_dict(), torch.arange(48.0).view(4, 3, 2, 2)

    def restore(**changes):
        states = {0: saved["state"][0] | changes}
        content = {"opt": {"state": states, "param_groups": [{"betas": (0.5, 0.5)}]}}
        checkpoint.restore(content, {"opt": opt}, "last.pt")

    with pytest.raises(UserError, match=r"exp_avg of parameter 0 is \(1,\)"):
        restore(exp_avg=torch.zeros(1))
    with pytest.raises(UserError, match=r"exp_avg_sq of parameter 0 is \(3, 4, 2, 2\)"):
        restore(exp_avg_sq=torch.zeros(3, 4, 2, 2))
    restore(exp_avg=truth)
    loaded = opt.state[weight]["exp_avg"]
    assert torch.equal(loaded, truth) and loaded.stride() == weight.stride()
    assert opt.param_groups[0]["betas"] == (0.9, 0.999)  # rates and betas are the script's


def test_a_run_of_another_version_resumes(house, tmp_path):
    """Flags that are gone are ignored, new ones take the default of the run's preset; a new counter begins at 0."""
    content = checkpoint.read(house / "rgb" / "last.pt")
    del content["counts"]
    content["flags"] = {k: v for k, v in content["flags"].items() if k != "delta"} | {"colour": "blue"}
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "last.pt")
    words = ["train_vqgan.py", "--resume", "--out", "run", "--steps", "9", "--data", house / "photos"]  # data may move
    succeeded(run_inside(*words, cwd=tmp_path))
    flags = checkpoint.read(tmp_path / "run" / "last.pt")["flags"]
    assert flags["delta"] == 1e-6 and "colour" not in flags


def test_a_model_alone_cannot_be_resumed(house, tmp_path):
    (tmp_path / "run").mkdir()
    checkpoint.save_model(tmp_path / "run" / "last.pt", minvqgan.load(house / "rgb" / "last.pt"))
    done = run_inside("train_vqgan.py", "--resume", "--out", "run", cwd=tmp_path)
    assert_one_line_error(done, "run/last.pt does not fit: flags is missing")
