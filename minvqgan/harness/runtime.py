"""What a script needs around its loop: devices, processes, signals, readable errors, the metrics file."""

import contextlib
import csv
import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class UserError(Exception):
    """Something the user can put right, printed as one line, exit code 2: what is wrong, where, and what to do.

    Messages hold names from strangers' files, and no line break or escape sequence of theirs may reach the terminal.
    From a loader's worker process a message arrives wrapped in a traceback, of which the last words are ours.
    """

    def __init__(self, message: str):
        message = message.rsplit(f"{__name__}.UserError: ", 1)[-1].strip()
        super().__init__("".join(c if c.isprintable() else "?" for c in message))


def first_line(error: Exception) -> str:
    """What an error says, without the trace of C++ that torch's own can go on with."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# Ways in which a path or a disk can refuse, which no code of ours can help.
CANNOT_WRITE = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EDQUOT}
CANNOT_WRITE |= {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main: errors a user can cause end with one line and exit code 2, Ctrl-C with 130. No traceback."""
    code: int | None = 2
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except (RuntimeError, MemoryError) as error:  # on a CPU torch has no kind of its own for it
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        help_ = "a smaller --batch-size, in training --accumulate 2 (the same in two parts), --checkpoint-grad or --amp"
        print(f"error: out of memory; try {help_}", file=sys.stderr)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: cannot write: {error.strerror}{where}; checkpoints saved before are intact", file=sys.stderr)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    raise SystemExit(code or 0)


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU where there is one. Under torchrun each process takes its own. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    return device


def init_processes(device: torch.device) -> tuple[int, int]:
    """(rank, world size): (0, 1) alone, else as torchrun says."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def autocast(device: torch.device, amp: bool):
    """bfloat16 where it is safe, if `amp`. bfloat16 has float32's range, so no loss scaling is needed."""
    return torch.autocast(device.type, torch.bfloat16) if amp else contextlib.nullcontext()


def pick_amp(flag: bool | None, device: torch.device, width: int = 512) -> bool:
    """--amp or --no-amp, and where neither was given: is bfloat16 faster here?

    width: of a transformer that samples. On a CPU one below 256 multiplies so little at each token that the calls cost
    more than the numbers. Under torchrun all processes decide alike, so call it after `init_processes`.
    """
    if flag is not None:
        return flag
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    faster = device.type == "cpu" and width >= 256 and bfloat16_is_faster()
    if dist.is_initialized():
        vote = torch.tensor(int(faster), device=device)
        dist.all_reduce(vote, dist.ReduceOp.MIN)
        faster = bool(vote)
    return faster


def bfloat16_is_faster() -> bool:
    """A convolution and a matrix product on this CPU, timed both ways: 0.05 s in all.

    A processor with instructions for bfloat16 takes half the time, one without three to ten times as long. With one
    thread, because threads that wait for each other on a busy machine hide the difference.
    """
    image, kernel, matrix = torch.ones(4, 32, 32, 32), torch.ones(32, 32, 3, 3), torch.ones(256, 256)
    image, kernel = (t.contiguous(memory_format=torch.channels_last) for t in (image, kernel))
    best: dict[tuple, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(5):  # in turn, so that a busy moment hits both; the first call of each prepares its kernel
        for function, a, b in ((F.conv2d, image, kernel), (torch.mm, matrix, matrix)):
            for dtype in (torch.float32, torch.bfloat16):
                a, b = a.to(dtype), b.to(dtype)
                began = time.perf_counter()
                function(a, b)
                spent = time.perf_counter() - began
                best[function, dtype] = min(spent, best.get((function, dtype), spent))
    torch.set_num_threads(threads)
    return all(1.2 * best[f, torch.bfloat16] < best[f, torch.float32] for f in (F.conv2d, torch.mm))


def distributed(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, under torchrun wrapped so that its gradients are averaged over the processes."""
    if not dist.is_initialized():
        return module
    # Buffers stay as they are: the codebook's use is summed over the processes already, and BatchNorm's running
    # statistics serve nobody, for D always judges with those of the batch: of this process's pictures, as in the
    # official code. That is the one thing in which two processes differ from one with all the pictures (D's gradient
    # of 16 pictures by 8 %, at a cosine of 0.997); SyncBatchNorm would make them equal, but exists on CUDA alone.
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


@contextlib.contextmanager
def averaged(*modules: nn.Module, last_part: bool):
    """Around one part of a batch: gradients are averaged over the processes once a step, with the last part."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel) and not last_part:
                stack.enter_context(module.no_sync())
        yield


def mean_of(parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Means of named scalars over the parts of a batch. One transfer for all: every `.item()` makes a GPU wait."""
    names = list(parts[0])
    table = torch.stack([torch.stack([part[name].detach().float() for name in names]) for part in parts])
    return dict(zip(names, table.mean(0).tolist(), strict=True))


def check_finite(losses: dict[str, float], step: int, out: Path) -> None:
    """Raises UserError for a loss that is not a number: which term, at which step, and how to go on."""
    for name, value in losses.items():
        if not math.isfinite(value):
            go_on = f"; {out} keeps the last good checkpoint, add --resume" if (out / "last.pt").exists() else ""
            raise UserError(f"step {step}: {name} is {value}; try a lower --lr{go_on}")


def gathered(mine: torch.Tensor, rank: int, world: int) -> torch.Tensor | None:
    """Rows that were dealt out to the processes, row i to process i % world, in order again: on the CPU of rank 0, None
    on the others."""
    if world == 1:
        return mine.cpu()
    parts: list | None = [None] * world if rank == 0 else None
    dist.gather_object(mine.cpu(), parts)
    if parts is None:
        return None
    rows = mine.new_empty(sum(map(len, parts)), *mine.shape[1:], device="cpu")
    for i, part in enumerate(parts):
        rows[i::world] = part
    return rows


class Stopper:
    """Turns Ctrl-C and SIGTERM into a flag, so that the step under way is saved. A second Ctrl-C ends at once.

    What follows within two seconds is still the first: torchrun hands on to its processes what the terminal has sent to
    each of them already.
    """

    def __init__(self):
        self.signal, self.since = 0, math.inf
        signal.signal(signal.SIGINT, self._note)
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.signal and now - self.since > 2:
            raise KeyboardInterrupt
        self.signal, self.since = number, now

    def stop(self, device: torch.device) -> bool:
        """True once any process was asked to stop: all must leave the loop at the same step."""
        if not dist.is_initialized():
            return bool(self.signal)
        flag = torch.tensor(self.signal, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.signal = int(flag)
        return bool(self.signal)

    @property
    def exit_code(self) -> int:
        return 128 + self.signal


def random_state() -> dict:
    """State of torch's generators. (Crops and data order are functions of the seed alone: see data.Stream.)"""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class MetricsFile:
    """`metrics.csv`: one row a logged step. Rows after `step`, the resumed one, are dropped and written anew."""

    def __init__(self, path: Path, columns: list[str], step: int):
        self.path, self.columns = path, columns
        rows = self.rows() if step else []
        part = path.with_name(f".{path.name}.part")  # a kill on the way must not cost the rows there were
        with open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({k: r.get(k, "") for k in columns} for r in rows if int(r["step"]) <= step)
        os.replace(part, path)

    def rows(self) -> list[dict]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]

    def write(self, **values) -> None:
        unknown = values.keys() - set(self.columns)
        if unknown:
            raise KeyError(f"no column for {sorted(unknown)}")
        text = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(text)
