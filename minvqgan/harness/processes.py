"""Several processes, started by torchrun: one program with the batch split among them."""

import functools
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .runtime import UserError, first_line


def start(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes): (0, 1) alone, else what torchrun has set."""
    if "RANK" not in os.environ:
        return 0, 1
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:
        raise UserError(f"RANK is set, but not all of torchrun's variables ({first_line(error)}): unset RANK") from None
    return dist.get_rank(), dist.get_world_size()


def cpu_group():
    """All processes, for tensors on the CPU: NCCL carries only those on GPUs, and makes the GPUs wait."""
    return _gloo(dist.group.WORLD)


@functools.cache
def _gloo(world):
    return dist.new_group(backend="gloo")


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


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier(group=cpu_group())


def says_rank_0(answer: bool) -> bool:
    """Rank 0's answer, in all processes."""
    told = [answer]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0, group=cpu_group())
    return told[0]


def gathered(mine: torch.Tensor, rank: int, world: int) -> torch.Tensor | None:
    """Rows that were dealt out, row i to process i % world, in order again: on the CPU of rank 0, None elsewhere."""
    if world == 1:
        return mine.cpu()
    parts: list | None = [None] * world if rank == 0 else None
    dist.gather_object(mine.cpu(), parts, group=cpu_group())
    if parts is None:
        return None
    rows = mine.new_empty(sum(map(len, parts)), *mine.shape[1:], device="cpu")
    for i, part in enumerate(parts):
        rows[i::world] = part
    return rows


def random_states() -> list[dict]:
    """State of torch's generators in each process, by rank; on ranks above 0 their own alone. (Crops and data order are
    functions of the seed: see `data.Stream`.)"""
    own = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    if not dist.is_initialized():
        return [own]
    states: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, states, group=cpu_group())
    return states or [own]


def set_random_state(state: dict) -> None:
    """Undo with what `random_states` has returned for this rank."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
