"""Several processes are one program: the gradients of one, one codebook, one log, one checkpoint."""

import csv
import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from helpers import assert_same_run, relative_error, run_inside, run_script, start_torchrun, torchrun
from PIL import Image

from minvqgan import VQGAN, VQGANConfig
from minvqgan.discriminator import PatchDiscriminator
from minvqgan.harness import checkpoint
from minvqgan.objective import ObjectiveConfig, stage_one_step
from minvqgan.quantizer import VectorQuantizer

TINY = (
    "train_vqgan.py --image-size 16 --ch 8 --ch-mult 1 2 --z-channels 8 --code-dim 4 --codebook-size 32 --batch-size 8 "
    "--val-images 8 --val-every 6 --log-every 2 --save-every 3 --disc-channels 8 --disc-start 0.3 "
    "--perceptual none --no-amp"
).split()
GPT = (
    "train_gpt.py --vqgan one/last.pt --n-layer 1 --n-head 2 --n-embd 16 --batch-size 8 --drop-cond 0 --val-images 8 "
    "--val-every 6 --log-every 2 --save-every 3 --no-amp"
).split()


def gradients(path, opt: str) -> dict[int, torch.Tensor]:
    """What the first step's gradients were: Adam's first moment after one step is (1 - beta1) times them."""
    saved = checkpoint.read(path)
    beta1 = saved[opt]["param_groups"][0]["betas"][0]
    return {i: state["exp_avg"] / (1 - beta1) for i, state in saved[opt]["state"].items()}


def assert_equal_gradients(one: dict, two: dict) -> None:
    """To rounding, relative to the largest: some are 0 by theory and rounding alone in fact."""
    assert one.keys() == two.keys() and len(one) > 5
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (one, two)]
    assert relative_error(flat[1], flat[0]) < 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def test_gradients_of_stage_one_are_those_of_the_whole_batch(folder):
    words = [*TINY, "--steps", "1", "--loss", "vqvae", "--lr", "1e-4"]
    for out, run in (("one", run_script), ("two", lambda *w, cwd: torchrun(2, *w, cwd=cwd))):
        done = run(*words, "--revive-every", "0", "--out", out, cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (gradients(folder / out / "last.pt", "opt_g") for out in ("one", "two"))
    assert_equal_gradients(one, two)


def test_gradients_of_stage_two_are_those_of_the_whole_batch(folder):
    words = [*GPT, "--steps", "1"]
    assert run_script(*words, "--out", "gpt_one", cwd=folder).returncode == 0
    done = torchrun(2, *words, "--out", "gpt_two", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (gradients(folder / out / "last.pt", "opt") for out in ("gpt_one", "gpt_two"))
    assert_equal_gradients(one, two)


def test_one_log_one_checkpoint_and_resume_with_another_number(folder):
    """Two processes write once; one process goes on where they stopped, with the pictures that come next."""
    done = torchrun(2, *TINY, "--steps", "12", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: python train_gpt.py") == 1
    done = run_script("train_vqgan.py", "--out", "run", "--resume", "--steps", "16", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    done = torchrun(2, "train_vqgan.py", "--out", "run", "--resume", "--steps", "20", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(folder / "run" / "metrics.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(2, 21, 2))
    assert checkpoint.read(folder / "run" / "last.pt")["step"] == 20


def test_processes_draw_different_numbers_and_resume_with_their_own(folder):
    """Dropped conditions, pkeep, dropout: equal on all ranks they would be drawn once for the whole batch. Killed and
    resumed, each rank continues its own."""
    words = [*GPT, "--steps", "9", "--drop-cond", "0.3", "--pkeep", "0.8", "--dropout", "0.1"]
    if not (folder / "one").exists():
        assert run_script(*TINY, "--steps", "1", "--out", "one", cwd=folder).returncode == 0
    assert torchrun(2, *words, "--out", "random_whole", cwd=folder).returncode == 0
    states = checkpoint.read(folder / "random_whole" / "last.pt")["random"]
    assert len(states) == 2 and not torch.equal(states[0]["cpu"], states[1]["cpu"])
    last = folder / "random_run" / "last.pt"
    process = start_torchrun(2, *words, "--out", "random_run", cwd=folder)
    while not last.exists():
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if checkpoint.read(last)["step"] < 9:
        assert torchrun(2, "train_gpt.py", "--out", "random_run", "--resume", cwd=folder).returncode == 0
    assert_same_run(folder / "random_whole" / "last.pt", last)


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


def test_samples_are_those_of_one_process(folder):
    words = ["sample.py", "--gpt", "gpt_one/best.pt", "-n", "3", "--classes", "star,ring", "--out"]
    assert run_inside(*words, "one.png", cwd=folder).returncode == 0
    done = torchrun(2, *words, "two.png", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (np.asarray(Image.open(folder / name)).astype(int) for name in ("one.png", "two.png"))
    assert np.abs(one - two).max() <= 1  # the decoder's batches are other ones, and round in another way
    assert done.stdout.count("6 images") == 1
