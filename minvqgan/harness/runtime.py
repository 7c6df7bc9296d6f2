"""What every script needs: readable errors, files written whole, a device, a precision."""

import collections
import contextlib
import errno
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class UserError(Exception):
    """Something the user can put right. Printed as one line with exit code 2: what is wrong, where, and what to do.

    A message can hold names from files, so line breaks and escape sequences are replaced. From a data loader's process
    it arrives inside a traceback; only its last words are kept.
    """

    def __init__(self, message: str):
        super().__init__(printable(message.rsplit(f"{__name__}.UserError: ", 1)[-1].strip()))


def printable(text: str) -> str:
    """Text without characters that would control the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def say(text: str) -> None:
    """A line on stderr, which the names of files in it cannot command."""
    print(printable(text), file=sys.stderr)


def first_line(error: Exception) -> str:
    """An error's message without the C++ trace that torch appends to some."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# Errors of a path or a disk, not of the program.
FILE_SYSTEM = "ENOSPC EACCES EPERM EROFS EFBIG EDQUOT EEXIST ENOTDIR EISDIR ENAMETOOLONG ELOOP ENOENT EIO".split()


def explained(error: Exception) -> str | None:
    """The line for an error that is not a bug of the program; None for the others, which stay tracebacks."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "out of memory; try a smaller --batch-size, in training also --accumulate 2, --checkpoint-grad or --amp"
    if "unable to allocate shared memory" in str(error):
        return "too little shared memory for the processes that read images; try --workers 0, in Docker --shm-size=2g"
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in FILE_SYSTEM:
        where = f" ({printable(str(error.filename))})" if error.filename else ""
        kept = "; the file that was there before is intact" if error.filename and os.path.isfile(error.filename) else ""
        return f"cannot {'find' if error.errno == errno.ENOENT else 'write'}: {error.strerror}{where}{kept}"
    return None


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit: with 2 and one line for an error the user can put right, with 130 for Ctrl-C.

    Under torchrun the line comes from rank 0; torchrun then stops the others and exits with 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # class names in letters that the encoding does not have
    try:
        with global_state_restored():
            code = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # all processes usually meet the same error: torchrun stops this one before it prints
        print(f"error: {line}", file=sys.stderr)
        code = 2
    raise SystemExit(code or 0)


@contextlib.contextmanager
def global_state_restored() -> Iterator[None]:
    """Undo what a script changes in its process: signal handlers, random state, threads, the group of processes.

    So `main` can be called from a notebook, a debugger or a server, several times.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, random, had_group = torch.get_num_threads(), torch.get_rng_state(), dist.is_initialized()
    try:
        yield
    except BaseException as error:
        # The variables in a traceback keep a loader alive. Python would wait forever for its workers when it exits,
        # because they ignore the SIGTERM that it sends them.
        if multiprocessing.active_children():
            traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if dist.is_initialized() and not had_group:
            dist.destroy_process_group()
        if in_main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)
        torch.set_num_threads(threads)
        torch.set_rng_state(random)


def progress_bar(rank: int, *items, **how):
    """tqdm, by rank 0 and on a terminal only: in a log file each of its updates would stay."""
    from tqdm import tqdm

    # Not `disable=False` on a terminal: an argument would win over tqdm's own variables, such as TQDM_DISABLE=1.
    hidden = {} if rank == 0 and sys.stderr.isatty() else {"disable": True}
    return tqdm(*items, dynamic_ncols=True, **how, **hidden)


def in_main_thread() -> bool:
    """Python lets only the main thread set signal handlers."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def written_whole(path: Path, mode: str = "xb"):
    """Write a file completely or not at all: to a temporary name beside `path`, renamed once it is on the disk."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        for wait in (0.1, 0.5, 2.0):  # on Windows a viewer or a virus scanner can hold the old file for a moment
            with contextlib.suppress(PermissionError):
                os.replace(part, path)
                return
            time.sleep(wait)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_outputs(outputs: list[Path], **inputs: str | None) -> None:
    """Raises UserError for an output that would replace a given file; inputs: by the name of their flag."""
    for name, given in inputs.items():
        for out in outputs if given and os.path.exists(given) else []:
            if os.path.exists(out) and os.path.samefile(out, given):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{out} would be written over, and it is what {flag} reads: choose another --out")


def pick_device(name: str) -> torch.device:
    """`auto`: a GPU if there is one. Under torchrun each process takes its own. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("choose auto, cpu, cuda, cuda:1 or mps")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}") from None
    if device.type == "cuda":
        # torch.cuda.set_device needs a number, and "cuda" alone has none.
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def pick_threads(wanted: int | None) -> int:
    """--threads, or if it was not given what is fastest just now: all cores, half of them, or one.

    Threads wait for each other after every short loop. If another program has one of the cores, all wait for the thread
    that shares it, and two threads can take five times as long as one.
    """
    most, seconds = torch.get_num_threads(), {}
    if wanted or most == 1:
        torch.set_num_threads(wanted or 1)
        return wanted or 1
    image, kernel = torch.ones(8, 32, 32, 32), torch.ones(32, 32, 3, 3)
    for threads in sorted({1, most // 2, most}):
        torch.set_num_threads(threads)
        F.conv2d(image, kernel)  # the first call prepares the kernel
        limit, began = min(seconds.values(), default=float("inf")), time.perf_counter()
        for _ in range(20):
            F.conv2d(image, kernel)
            seconds[threads] = time.perf_counter() - began
            if seconds[threads] > limit:  # slower already: do not wait for the rest
                break
    fastest = min(seconds, key=seconds.get)
    torch.set_num_threads(fastest)
    return fastest


def pick_amp(flag: bool | None, device: torch.device, width: int = 512) -> bool:
    """--amp or --no-amp; if neither was given, whether bfloat16 is faster here. Call it after
    `processes.start`: under torchrun all decide alike.

    width: of a transformer that samples. Below 256 a CPU spends its time on calls and not on arithmetic.
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
    """Time a convolution and a matrix product in both precisions, 0.05 s in all. A CPU with bfloat16 instructions needs
    half the time, one without three to ten times as long."""
    layout = {"memory_format": torch.channels_last}
    image, kernel = torch.ones(4, 32, 32, 32).to(**layout), torch.ones(32, 32, 3, 3).to(**layout)
    work = {F.conv2d: (image, kernel), torch.mm: (torch.ones(256, 256), torch.ones(256, 256))}
    seconds, threads = collections.defaultdict(list), torch.get_num_threads()
    torch.set_num_threads(1)  # threads waiting for each other would hide the difference
    for _ in range(5):  # alternating, so that a busy moment slows both
        for function, inputs in work.items():
            for dtype in (torch.float32, torch.bfloat16):
                a, b = (t.to(dtype) for t in inputs)
                began = time.perf_counter()
                function(a, b)
                seconds[function, dtype].append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return all(1.2 * min(seconds[f, torch.bfloat16]) < min(seconds[f, torch.float32]) for f in work)


def compile_modules(*modules: nn.Module) -> None:
    """torch.compile in place. D's graph is used twice, by G's loss and by its own (retain_graph): the compiler must not
    reuse its buffers after the first time. torch has no public name for that."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    for module in modules:
        module.compile()
