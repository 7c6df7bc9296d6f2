"""What every script needs: errors of one line, files written whole, a device, a precision."""

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import time
import timeit
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class UserError(Exception):
    """Something the user can put right. Printed as one line with exit code 2: what is wrong, where, and what to do.

    From a data loader's process it arrives inside a traceback; only its last words are kept.
    """

    def __init__(self, message: str):
        super().__init__(printable(message.rsplit(f"{__name__}.UserError: ", 1)[-1].strip()))


def printable(text: str) -> str:
    """Text on one line, without characters that control the terminal: names of files may hold some."""
    return "".join(c if c.isprintable() else "?" for c in text)


def say(text: str) -> None:
    """A line on stderr."""
    print(printable(text), file=sys.stderr)


def first_line(error: Exception) -> str:
    """An error's message without the C++ trace that torch appends to some."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def explained(error: Exception) -> str | None:
    """The line for an error that is not a bug of the program; None for the others, which stay tracebacks."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "out of memory; try a smaller --batch-size, in training also --accumulate 2, --checkpoint-grad or --amp"
    if "unable to allocate shared memory" in str(error):
        return "too little shared memory for the processes that read images; try --workers 0, in Docker --shm-size=2g"
    if isinstance(error, OSError) and error.strerror:
        return printable(f"cannot read or write {error.filename or 'a file'}: {error.strerror}")
    if isinstance(error, ModuleNotFoundError):
        return f'the package {error.name} is not installed; all that evaluation needs: pip install -e ".[eval]"'
    return None


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit: with 2 and one line for an error the user can put right, with 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Class names can be in letters that the encoding does not have. In a log file lines keep their order.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        with global_state_restored():
            code = main()
    except KeyboardInterrupt:
        say("interrupted")
        code = 130
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # let rank 0 print first; torchrun then kills the others
        say(f"error: {line}")
        code = 2
    raise SystemExit(code or 0)


@contextlib.contextmanager
def global_state_restored() -> Iterator[None]:
    """Undo what a script changes in its process, so that a notebook can call `main` several times."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, random, had_group = torch.get_num_threads(), torch.get_rng_state(), dist.is_initialized()
    try:
        yield
    except BaseException as error:
        # The traceback's variables keep a data loader alive, and Python would wait forever for its workers at the exit:
        # they ignore the SIGTERM that it sends them.
        if multiprocessing.active_children():
            traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if dist.is_initialized() and not had_group:
            dist.destroy_process_group()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        torch.set_rng_state(random)


@contextlib.contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """`with seeded(0, "vqgan"): model = VQGAN(config)`: initial weights depend on seed and name alone, not on what was
    built or drawn before. torch's random state is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        yield


def progress_bar(rank: int, *items, **how):
    """tqdm, by rank 0 and on a terminal only: in a log file each of its updates would stay."""
    from tqdm import tqdm

    # Not `disable=False` on a terminal: an argument would win over tqdm's own variables, such as TQDM_DISABLE=1.
    hidden = {} if rank == 0 and sys.stderr.isatty() else {"disable": True}
    return tqdm(*items, dynamic_ncols=True, **how, **hidden)


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
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk's error names no file
        raise
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
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def seconds(function: Callable, *inputs: torch.Tensor, threads: int = 1) -> list[float]:
    """Times of ten calls on a CPU, after a first one that prepares the kernel."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times = timeit.repeat(lambda: function(*inputs), number=1, repeat=11)[1:]
    torch.set_num_threads(before)
    return times


def fastest_threads() -> int:
    """The number of threads that is fastest just now: all cores, half of them, or one.

    Threads wait for each other after every short loop. If another program has one of the cores, all wait for the thread
    that shares it, and two threads can take five times as long as one.
    """
    most, work = torch.get_num_threads(), (F.conv2d, torch.ones(8, 32, 32, 32), torch.ones(32, 32, 3, 3))
    return min({1, (most + 1) // 2, most}, key=lambda threads: sum(seconds(*work, threads=threads)))


def bfloat16_is_faster() -> bool:
    """Time a convolution and a matrix product in both precisions. A CPU with bfloat16 instructions needs half the time,
    one without three to ten times as long."""
    work = {F.conv2d: [(4, 32, 32, 32), (32, 32, 3, 3)], torch.mm: [(256, 256), (256, 256)]}

    def fastest(function, dtype) -> float:
        return min(seconds(function, *(torch.ones(shape, dtype=dtype) for shape in work[function])))

    return all(1.2 * fastest(f, torch.bfloat16) < fastest(f, torch.float32) for f in work)


def pick_amp(flag: bool | None, device: torch.device, width: int = 512) -> bool:
    """--amp or --no-amp; if neither was given, whether bfloat16 is faster here.

    width: of a transformer that samples. Below 256 a CPU spends its time on calls and not on arithmetic.
    """
    if flag is not None:
        return flag
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not under torchrun, where processes could decide differently.
    return device.type == "cpu" and width >= 256 and not dist.is_initialized() and bfloat16_is_faster()


def compile_modules(*modules: nn.Module) -> None:
    """torch.compile in place. D's graph is used twice, by G's loss and by its own (retain_graph): the compiler must not
    reuse its buffers after the first time. torch has no public name for that."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    for module in modules:
        module.compile()
