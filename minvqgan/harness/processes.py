"""Several processes, started by torchrun: one program with the batch split among them."""

import functools
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def start(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes): (0, 1) alone, else what torchrun has set."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


@functools.cache
def _gloo(world):
    """All processes, for objects on the CPU: NCCL carries only tensors on GPUs, and makes the GPUs wait."""
    return dist.new_group(backend="gloo")


def gather(mine) -> list:
    """One object of each process, in order of their ranks: the same list in all of them."""
    if not dist.is_initialized():
        return [mine]
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine, group=_gloo(dist.group.WORLD))
    return found


def wait() -> None:
    """Until all processes are here."""
    gather(None)


def gathered(mine: Tensor) -> Tensor:
    """Rows that were dealt out, row i to process i % world, in order again, on the CPU."""
    parts = gather(mine.cpu())
    rows = mine.new_empty(sum(map(len, parts)), *mine.shape[1:], device="cpu")
    for i, part in enumerate(parts):
        rows[i :: len(parts)] = part
    return rows


def distributed(module: nn.Module, device: torch.device) -> nn.Module:
    """The module; under torchrun wrapped, so that its gradients are averaged over the processes."""
    if not dist.is_initialized():
        return module
    wrapped = DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)
    # Buffers are not copied from rank 0 at every step. The codebook's use is summed over all processes already, and D
    # always normalises by its own batch: with two processes by the half batch of each, as in the official code. Only
    # there do two processes differ from one (D's gradient by 8 % for 16 images); SyncBatchNorm exists on CUDA alone.
    wrapped.broadcast_buffers = False  # as an argument it is deprecated from torch 2.13 on, its successor is new there
    return wrapped


def random_state() -> dict:
    """Of torch's generators in this process. (Crops and data order are functions of the seed: see `data.Stream`.)"""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict) -> None:
    """Restore what `random_state` has returned."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
