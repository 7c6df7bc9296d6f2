"""The notebooks' training loop: that of train_vqgan.py, on the device of the model."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from minvqgan import VQGAN, VQGANConfig
from minvqgan.course import fit, runs


def statements(source: str) -> list[str]:
    return [line.split("#")[0].strip() for line in source.splitlines() if line.strip()]


def test_the_loop_is_the_scripts():
    """From the batch to the revival of codes: the same statements in the same order."""
    script = (ROOT / "train_vqgan.py").read_text().replace("args.", "")
    script = statements(re.search(r"    for step in run.steps.*?return run.exit_code", script, re.S)[0])
    loop = statements(re.search(r"    for step in tqdm.*?measured = ", inspect.getsource(fit.fit_vqgan), re.S)[0])
    shared = [line for line in loop if line in script]
    assert shared == [line for line in script if line in loop]
    for line in ("opt_g.step()", "opt_g.zero_grad()", "if disc_on:", "opt_d.step()", "opt_d.zero_grad()"):
        assert line in shared
    assert len(shared) >= 7


def test_batches_go_to_the_models_device(monkeypatch):
    """The device "meta" stands for a GPU: a batch that stayed on the CPU would be noticed."""
    model = VQGAN(VQGANConfig(ch=8, ch_mult=(1, 2), z_channels=16, code_dim=4, codebook_size=8)).to("meta")
    seen = []

    def step(vqgan, disc, perceptual, x, objective, adv_fraction):
        seen.append((x.device.type, x.shape[0]))
        return {"l1": torch.zeros(())}, SimpleNamespace(indices=torch.zeros(1, dtype=torch.int64), z=None)

    monkeypatch.setattr(fit, "stage_one_step", step)
    history = fit.fit_vqgan(model, fit.shapes()[0], 2, batch_size=3, revive_every=0)
    assert seen == [("meta", 3)] * 2 and history["l1"] == [0, 0]


def test_the_first_batch_places_the_codes_and_is_trained_on(monkeypatch):
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(ch=8, ch_mult=(1, 2), z_channels=16, code_dim=4, codebook_size=8))
    seen, plain = [], fit.stage_one_step
    monkeypatch.setattr(fit, "stage_one_step", lambda v, d, p, x, *rest: seen.append(x) or plain(v, d, p, x, *rest))
    train_set = fit.shapes()[0]
    history = fit.fit_vqgan(model, train_set, 2, batch_size=4, seed=3)
    assert torch.equal(seen[0], next(fit.batches(train_set, 4, 3))["image"])
    assert history["usage"][0] > 0.5


def test_the_sick_runs_come_from_their_code(monkeypatch):
    monkeypatch.setattr(runs, "STEPS", runs.EVERY)
    (row,) = runs.train(0, **runs.TROUBLES["wrong range"])
    assert row == pytest.approx(runs.load(0)["wrong range"][0] | {"seed": 0}, abs=0.05, rel=0.05)
