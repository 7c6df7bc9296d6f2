"""Several processes are one program: one codebook, one log, one checkpoint. Their gradients: test_training.py."""

import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from helpers import (
    STAGE_ONE,
    STAGE_TWO,
    assert_same_run,
    metrics_rows,
    relative_error,
    run_inside,
    start_torchrun,
    torchrun,
)
from PIL import Image

from minvqgan import VQGAN, VQGANConfig
from minvqgan.discriminator import PatchDiscriminator
from minvqgan.harness import checkpoint
from minvqgan.objective import ObjectiveConfig, stage_one_step
from minvqgan.quantizer import VectorQuantizer


@pytest.mark.slow
def test_one_log_one_checkpoint_and_resume_with_another_number(house, tmp_path):
    """Two processes write once; one process goes on where they stopped, with the images that come next."""
    words = [*STAGE_ONE, "--data", "photos", "--steps"]
    done = torchrun(2, *words, "12", "--out", tmp_path / "run", cwd=house)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: python train_gpt.py") == 1
    again = ["train_vqgan.py", "--out", tmp_path / "run", "--resume", "--steps"]
    for run, steps in ((run_inside, 16), (lambda *words, cwd: torchrun(2, *words, cwd=cwd), 20)):
        done = run(*again, steps, cwd=house)
        assert done.returncode == 0, done.stderr[-2000:]
    assert {int(row["step"]) for row in metrics_rows(tmp_path / "run")} == {*range(2, 21, 2), *range(3, 21, 3)}
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == 20


@pytest.mark.slow
def test_processes_draw_different_numbers_and_resume_with_their_own(house, tmp_path):
    """Dropped conditions, pkeep, dropout: equal on all ranks they would be drawn once for the whole batch. Killed and
    resumed, each rank continues its own."""
    words = [*STAGE_TWO, *"--vqgan rgb/last.pt --steps 9 --drop-cond 0.3 --pkeep 0.8 --dropout 0.1 --out".split()]
    assert torchrun(2, *words, tmp_path / "whole", cwd=house).returncode == 0
    states = checkpoint.read(tmp_path / "whole" / "last.pt")["random"]
    assert len(states) == 2 and not torch.equal(states[0]["cpu"], states[1]["cpu"])
    last = tmp_path / "run" / "last.pt"
    process = start_torchrun(2, *words, tmp_path / "run", cwd=house)
    while not last.exists():
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if checkpoint.read(last)["step"] < 9:
        assert torchrun(2, "train_gpt.py", "--out", tmp_path / "run", "--resume", cwd=house).returncode == 0
    assert_same_run(tmp_path / "whole" / "last.pt", last)


def _stage_one_of(rank: int, world: int, folder: str) -> None:
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/place", rank=rank, world_size=world)
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(image_size=16, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=4, codebook_size=16)).double()
    disc = PatchDiscriminator(3, channels=8, num_layers=2).double().eval()  # BatchNorm of the batch would differ
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1
    terms, _ = stage_one_step(vqgan, disc, None, x[rank::world], ObjectiveConfig(disc_weight=0.8, max_lambda=1e4))
    grad = torch.cat([p.grad.flatten() for p in vqgan.parameters()])
    if world > 1:
        torch.distributed.all_reduce(grad)
        torch.distributed.destroy_process_group()
    torch.save((terms["lambda"], grad / world), f"{folder}/{world}_{rank}.pt")


def test_lambda_is_that_of_the_whole_batch(tmp_path):
    """Eq. 7 and G's gradient over two processes of half a batch each are those of one process with all of it."""
    _stage_one_of(0, 1, str(tmp_path))
    mp.spawn(_stage_one_of, (2, str(tmp_path)), nprocs=2)
    whole, *halves = (torch.load(tmp_path / name) for name in ("1_0.pt", "2_0.pt", "2_1.pt"))
    for lambda_, grad in halves:
        assert lambda_.item() == pytest.approx(whole[0].item(), rel=1e-9)
        assert relative_error(grad, whole[1]) < 1e-9


def _codebook_of(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4).train()
    own = torch.Generator().manual_seed(rank + 1)
    history = []
    for _ in range(3):  # begun from data, used, revived
        revived = quantizer.revive_dead_codes(torch.randn(2, 4, 4, 4, generator=own))
        for _ in range(200):  # a code that nobody chooses falls below the threshold in 150
            quantizer(3 + 0.1 * torch.randn(2, 4, 4, 4, generator=own))
        history.append((revived, quantizer.codebook.weight.detach().clone(), quantizer.recent_use.clone()))
    torch.save(history, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_processes_have_one_codebook(tmp_path):
    """Each sees other latents; initialisation, counted use and revival must agree to the bit."""
    mp.spawn(_codebook_of, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one[0][0] == 16 and one[1][0] > 0  # all at first, then those that no latent chose
    for (revived, codes, use), (other_revived, other_codes, other_use) in zip(one, two, strict=True):
        assert revived == other_revived and torch.equal(codes, other_codes) and torch.equal(use, other_use)


@pytest.mark.slow
def test_samples_are_those_of_one_process(house, tmp_path):
    words = ["sample.py", "--gpt", house / "class" / "best.pt", "-n", "3", "--classes", "one,two", "--out"]
    assert run_inside(*words, "one.png", cwd=tmp_path).returncode == 0
    done = torchrun(2, *words, "two.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "two.png"))
    assert np.abs(one - two).max() <= 1  # the decoder's batches are other ones, and round in another way
    assert done.stdout.count("6 images") == 1
