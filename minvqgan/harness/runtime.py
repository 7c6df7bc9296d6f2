"""What every script needs: readable errors, a device, several processes, random states."""

import contextlib
import errno
import functools
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
        super().__init__(printable(message.rsplit(f"{__name__}.UserError: ", 1)[-1].strip()))


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def say(text: str) -> None:
    """A line on stderr, which the names of files in it cannot command."""
    print(printable(text), file=sys.stderr)


def first_line(error: Exception) -> str:
    """What an error says, without the trace of C++ that torch's own can go on with."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# Ways in which a path or a disk can refuse, which no code of ours can help.
CANNOT_WRITE = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EDQUOT}
CANNOT_WRITE |= {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.EIO}


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main: errors a user can cause end with one line and exit code 2, Ctrl-C with 130. No traceback.

    Under torchrun the line comes from the first process; torchrun itself then ends with code 1 and a trace of its own.
    """
    code: int | None = 2
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  None where it was closed (`>&-`)
        setattr(sys, name, Unbroken(stream))
    try:
        code = main()
    except UserError as error:
        _wait_for_rank_0()
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except (RuntimeError, MemoryError) as error:  # on a CPU torch has no kind of its own for it
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        help_ = "a smaller --batch-size, in training --accumulate 2 (two micro-batches), --checkpoint-grad or --amp"
        print(f"error: out of memory; try {help_}", file=sys.stderr)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        where = f" ({printable(str(error.filename))})" if error.filename else ""
        kept = "; what was saved there before is intact" if error.filename and os.path.isfile(error.filename) else ""
        verb = "find" if error.errno == errno.ENOENT else "write"
        print(f"error: cannot {verb}: {error.strerror}{where}{kept}", file=sys.stderr)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    raise SystemExit(code or 0)


def _wait_for_rank_0() -> None:
    """Most errors meet all processes. torchrun ends the others when the first one has ended; what still lives after
    some seconds has met an error of its own."""
    rank = os.environ.get("RANK", "0")
    if rank.isdecimal() and int(rank) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)


class Unbroken:
    """A stream that nothing breaks: what cannot be written any more (`| head -1`, a terminal that was closed, a log on
    a full disk, `>&-`) is dropped, and what its encoding does not have is written as an escape. A run of days must not
    end for its progress bar."""

    def __init__(self, stream):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _unbroken(self, function, *args):
        try:
            return function(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # for what is buffered, too
        return None

    def write(self, text: str):
        return self._unbroken(self._stream.write, text)

    def flush(self):
        return self._unbroken(self._stream.flush)


@contextlib.contextmanager
def written_whole(path: Path, mode: str = "xb"):
    """A file that is there whole or not at all: written beside `path` and renamed once it is on the disk.

    What stands at the temporary name is removed and never opened: it may be a link that somebody else has put there.
    """
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_outputs(outputs: list[Path], **inputs: str | None) -> None:
    """Raises UserError for an output that would replace a file that was given; inputs: by the name of their flag."""
    for name, given in inputs.items():
        for out in outputs if given and os.path.exists(given) else []:
            if os.path.exists(out) and os.path.samefile(out, given):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{out} would be written over, and it is what {flag} reads: choose another --out")


def check_memory(count: float, what: str, advice: str) -> None:
    """Raises UserError for more numbers than this machine could hold, before half of them are there.

    count: of float32, on whichever device: GPUs have less than their machines.
    """
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if 4 * count > have:
        raise UserError(f"{what} need {4 * count / 2**30:,.0f} GiB of memory, {have / 2**30:,.0f} are here; {advice}")


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU where there is one. Under torchrun each process takes its own. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):  # "meta" computes shapes and nothing else
            raise RuntimeError("there is auto, cpu, cuda, cuda:1, mps")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}") from None
    if device.type == "cuda":
        # torch takes no device without a number here, and "cuda" alone has none.
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def init_processes(device: torch.device) -> tuple[int, int]:
    """(rank, world size): (0, 1) alone, else as torchrun says."""
    if "RANK" not in os.environ:
        return 0, 1
    missing = {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise UserError(f"RANK is set, but not {', '.join(sorted(missing))}: start by torchrun, or unset RANK")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise UserError(f"{name}={printable(value)} is not a number: start by torchrun, or unset RANK")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


@functools.cache
def cpu_group():
    """The processes' group for numbers on the CPU: NCCL carries only what lies on GPUs, and makes them wait for it."""
    return dist.new_group(backend="gloo")


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
    # statistics serve nobody, for D always works with those of the batch: of this process's images, as in the
    # official code. That is the one thing in which two processes differ from one with all the images (D's gradient
    # of 16 images by 8 %, at a cosine of 0.997); SyncBatchNorm would make them equal, but exists on CUDA alone.
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


class Recorded:
    """function(*inputs) -> outputs, its kernels recorded at the first call (a CUDA graph) and replayed from then on.

    A step of a small model is a thousand short kernels, and Python needs longer to launch them than the GPU to compute.
    inputs: tensors, always of the same shapes, and numbers; a call with more or fewer of them is recorded anew. The
    outputs are overwritten by the next call.

    The function may add gradients to the parameters of `modules` and change their buffers in place; whatever Python
    does in it happens once, while it is recorded. A few calls before that choose the kernels, and are undone: in
    gradients, buffers and the random generator.
    """

    def __init__(self, function: Callable, *modules: nn.Module):
        self.function, self.modules, self.inputs = function, modules, None

    def __call__(self, *inputs):
        if self.inputs is None or len(inputs) != len(self.inputs):
            self._record(inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given) if isinstance(given, torch.Tensor) else own.fill_(given)
        # The recording adds to the gradients that were there then, and zero_grad has taken them away since.
        taken = [(p, grad) for p, grad in self.grads if p.grad is not grad]
        if taken:
            torch._foreach_zero_([grad for _, grad in taken])
        for p, grad in taken:
            p.grad = grad
        self.graph.replay()
        return self.outputs

    def _record(self, inputs) -> None:
        self.graph = self.outputs = None  # an older recording, with the memory of all its maps
        tensor = next(t for t in inputs if isinstance(t, torch.Tensor))
        buffers = [b for module in self.modules for b in module.buffers()]
        before, random = [b.clone() for b in buffers], torch.cuda.get_rng_state()
        self.inputs = [t.clone() if isinstance(t, torch.Tensor) else tensor.new_full((), t) for t in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for b, value in zip(buffers, before, strict=True):
            b.copy_(value)
        torch.cuda.set_rng_state(random)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's thread that pins memory meanwhile is none of the recording's business.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = self.function(*self.inputs)
        parameters = [p for module in self.modules for p in module.parameters() if p.grad is not None]
        self.grads = [(p, p.grad) for p in parameters]
        for p in parameters:
            p.grad = None


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier(group=cpu_group())


def says_rank_0(answer: bool) -> bool:
    """The first process's answer, in all of them: each could find something else on its disk."""
    if not dist.is_initialized():
        return answer
    told = [answer]
    dist.broadcast_object_list(told, src=0, group=cpu_group())
    return told[0]


def gathered(mine: torch.Tensor, rank: int, world: int) -> torch.Tensor | None:
    """Rows that were dealt out to the processes, row i to process i % world, in order again: on the CPU of rank 0, None
    on the others."""
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
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
