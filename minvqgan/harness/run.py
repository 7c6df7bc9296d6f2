"""A training run without the training: its folder, log, progress bar, signals, saving and resuming.

    for step in run.steps():                          # ends early on Ctrl-C or SIGTERM, after saving
        for x in run.micro_batches(batches, model):   # --accumulate of them; gradients are averaged once
            run.log({"loss": loss(x)})                # averaged over the interval and all processes
        ...
        if run.validates:                             # every --val-every steps
            run.validated({"loss": ...}, score=...)

It never sees a loss function or the inside of a model: what is trained, and how, stands in the script's loop.

A run folder holds `last.pt` (everything that `--resume` needs), `best.pt` (the model with the lowest held-out score),
`config.json`, `metrics.csv` (a row a logged step), `loss.png`, and `images/`.
"""

import contextlib
import csv
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import checkpoint, data, pictures, runtime
from .runtime import UserError


class Run:
    """args: the script's flags, see `flags.add_run_flags`. kind: of checkpoint. columns: of metrics.csv. panels: of
    loss.png. shown: columns that the progress bar shows. saved: the checkpoint to resume from, or None.

    state: plain values that the script wants back when it resumes. Raises UserError for flags that cannot work.
    """

    def __init__(self, args, kind: str, columns: list[str], panels: list[list[str]], shown: list[str], saved):
        self.args, self.kind, self.saved = args, kind, saved
        self.columns, self.panels, self.shown = columns, panels, shown
        self.device = runtime.pick_device(args.device)
        self.rank, self.world = runtime.init_processes(self.device)
        # Written back, so that the checkpoint's flags say what was used, and a resumed run keeps to it.
        self.amp = args.amp = runtime.pick_amp(args.amp, self.device)
        self.records = args.cuda_graph and self._can_be_recorded()
        self.workers = (0 if self.device.type == "cpu" else 8) if args.workers is None else args.workers
        self.out = Path(args.out)
        if not args.resume:
            _check_empty(self.out, vars(args).keys())
        if args.batch_size % (self.world * args.accumulate):
            raise UserError(
                f"--batch-size {args.batch_size} cannot be split into {self.world} processes x {args.accumulate} "
                "micro-batches"
            )
        self.micro_batch = args.batch_size // (self.world * args.accumulate)
        images = f"{self.micro_batch} images of --image-size {args.image_size}"
        channels = max(3, getattr(args, "num_labels", None) or 0)
        runtime.check_memory(
            self.micro_batch * channels * (args.image_size or 1) ** 2, images, "a smaller --batch-size"
        )
        self.last, self.step, self.seconds_before, self.best, self.best_step = False, 0, 0.0, math.inf, 0
        self.state: dict = {}
        self.mark: int | None = None  # a step at which loss.png has a line
        self.sums: dict[str, list] = {}  # name -> [sum, count] since the last row, of this process
        self.pending: list[tuple[int, list[str], Tensor]] = []  # logged, but still on the device
        if saved:
            self.step, self.seconds_before, self.best, self.best_step, self.state, self.sums = (
                saved[k] for k in ("step", "seconds", "best", "best_step", "state", "sums")
            )
            self.sums = {name: sums for name, sums in self.sums.items() if name in columns}
            if self.step >= args.steps:
                raise UserError(f"{self.out} is at step {self.step} of {args.steps} already; give more --steps")
        torch.manual_seed(args.seed)  # the same weights in all processes

    def _can_be_recorded(self) -> bool:
        """Is a step always the same, but for its numbers? Gumbel's temperature is a number of Python's, recomputed
        maps ask for the state of the random generator, and what is compiled or runs under torchrun has other ways."""
        others = any(getattr(self.args, name, False) for name in ("compile", "gumbel", "checkpoint_grad"))
        return self.device.type == "cuda" and not dist.is_initialized() and not others

    def start(self, trained: dict, content: Callable[[], dict], described: dict, line: str) -> None:
        """Begin writing, and on --resume fill what is trained.

        trained: modules and optimizers by their names in last.pt. content: makes the checkpoint of the model itself, in
        plain containers. described: for config.json. line: printed.
        """
        self.trained, self.content = trained, content
        if self.saved:
            checkpoint.restore(self.saved, trained, self.out / "last.pt")
        # From here on processes draw different random numbers: dropout, dropped conditions, Gumbel noise.
        if self.saved or self.rank:  # first, for what no saved state covers: another kind or number of devices
            torch.manual_seed(hash((self.args.seed, self.rank, self.step)))
        if self.saved and self.rank < len(self.saved["random"]):
            runtime.set_random_state(self.saved["random"][self.rank])
        self.saved = None  # a second copy of the weights
        if self.rank > 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = _locked(self.out)
        with runtime.written_whole(self.out / "config.json", "x") as file:  # first: it says whose folder this is
            json.dump({"flags": vars(self.args)} | described, file, indent=2)
        (self.out / "images").mkdir(exist_ok=True)
        self.metrics = MetricsFile(self.out / "metrics.csv", self.columns, self.step)
        self.board = _tensorboard(self.out / "tensorboard", self.step) if self.args.tensorboard else None
        self.announce(f"{line}; on {self.device}{', bfloat16' if self.amp else ', float32'}")

    def steps(self) -> Iterator[int]:
        """The steps that are left, from 1 on. After each: the log's row, last.pt, and the end if one was asked for."""
        self.stopper, self.began, self.row = Stopper(), time.time(), {}
        first, total = self.step + 1, self.args.steps
        how = {"initial": self.step, "total": total, "disable": self.rank > 0, "dynamic_ncols": True}
        self.bar = tqdm(range(first, total + 1), **how)
        for step in self.bar:
            self.step = step
            self.last = self.step == total
            self.logs = self.last or self.step % self.args.log_every == 0
            self.validates = self.rank == 0 and (self.last or self.step % self.args.val_every == 0)
            yield self.step
            stopping = self.stopper.stop()
            self._write_row()
            if self.last or stopping or self.step % self.args.save_every == 0:
                self._save()
            if self.rank == 0 and (self.validates or stopping):
                pictures.plot_columns(self.out / "loss.png", self.metrics.rows(), self.panels, self.mark)
            if stopping and not self.last:
                break
        self.bar.close()
        if self.rank == 0 and not self.last:
            command = f"python {Path(sys.argv[0]).name} --out {shlex.quote(str(self.out))} --resume"
            print(f"stopped and saved at step {self.step}; continue with: {command}")

    @property
    def exit_code(self) -> int:
        """0 after the last step, else as the signal that ended the run wants it."""
        return 0 if self.last else 128 + self.stopper.signal

    @property
    def seconds(self) -> float:
        """Since the start, over all resumptions."""
        return self.seconds_before + time.time() - self.began

    def batches(self, dataset) -> Iterator[dict]:
        """Endless training batches of this process, from where the run stands."""
        seen, pin = self.step * self.args.batch_size, self.device.type == "cuda"
        place = (self.workers, self.rank, self.world)
        return data.train_loader(dataset, self.micro_batch, self.args.seed, seen, *place, pin)

    def micro_batches(self, batches: Iterator, *modules: nn.Module) -> Iterator:
        """The next --accumulate batches. Gradients are averaged over the processes once, with the last one."""
        for i in range(self.args.accumulate):
            with contextlib.ExitStack() as stack:
                for module in modules:
                    if isinstance(module, DistributedDataParallel) and i < self.args.accumulate - 1:
                        stack.enter_context(module.no_sync())
                yield next(batches)

    def recorded(self, *modules: nn.Module) -> Callable:
        """A decorator for the function that adds the gradients of one micro-batch to those of `modules`: on a GPU it is
        recorded, see `runtime.Recorded`."""
        return lambda function: runtime.Recorded(function, *modules) if self.records else function

    def autocast(self):
        """bfloat16 where it is safe, with --amp. It has float32's range, so no loss scaling is needed."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def log(self, terms: dict[str, Tensor]) -> None:
        """Note scalars of one micro-batch. They stay on the device until the row is written, because each `.item()`
        would make the GPU finish first. Raises UserError for one that is not finite: on a CPU at once, before it
        reaches a weight."""
        # A copy, because a recording writes its next numbers to the same place.
        self.pending.append((self.step, list(terms), torch.stack([v.detach().float() for v in terms.values()])))
        if self.device.type == "cpu":
            self._collect()

    def write(self, **values: float) -> None:
        """Numbers of this step for its row of metrics.csv."""
        self.row |= values

    def validated(self, values: dict[str, float], score: float) -> None:
        """Held-out numbers: the columns val_*, and best.pt if `score` is the lowest so far."""
        for name, value in values.items():
            self._check_finite(self.step, f"val_{name}", value)
        self.row |= {f"val_{name}": value for name, value in values.items()}
        self.say("held out " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        if score < self.best:
            self.best, self.best_step = score, self.step
            model = self.content() | {"step": self.step, "flags": vars(self.args)}
            checkpoint.save(self.out / "best.pt", self.kind, **model)

    def images(self, rows: list[Tensor], name: str = "") -> None:
        """Save rows of images (n, 3, H, W) in [-1, 1] as one grid."""
        pictures.save_grid(self.out / "images" / f"step_{self.step:07d}{name and '_' + name}.png", rows)
        if self.board:
            grid = np.asarray(pictures.grid(rows))
            self.board.add_image(name or "images", grid, self.step, dataformats="HWC")

    def announce(self, text: str) -> None:
        """A line before the first step."""
        if self.rank == 0:
            print(text)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.rank == 0:
            tqdm.write(f"step {self.step}: {text}")

    def _collect(self) -> None:
        """Bring what was logged from the device, in one transfer, and add it up."""
        if not self.pending:
            return
        numbers = torch.cat([numbers for _, _, numbers in self.pending]).tolist()
        names = [(step, name) for step, names, _ in self.pending for name in names]
        self.pending = []
        for (step, name), number in zip(names, numbers, strict=True):
            self._check_finite(step, name, number)
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = [total + number, count + 1]

    def _check_finite(self, step: int, name: str, number: float) -> None:
        if not math.isfinite(number):
            kept = (self.out / "last.pt").exists()
            advice = f"; {self.out} keeps the last good checkpoint, add --resume" if kept else ""
            raise UserError(f"step {step}: {name} is {number}; try a lower --lr{advice}")

    def _over_processes(self) -> dict[str, list]:
        """The sums, averaged over the processes."""
        self._collect()
        if self.world == 1:
            return self.sums
        totals = torch.tensor([total for total, _ in self.sums.values()], dtype=torch.float64)
        dist.all_reduce(totals, group=runtime.cpu_group())
        pairs = zip(self.sums.items(), (totals / self.world).tolist(), strict=True)
        return {name: [total, count] for (name, (_, count)), total in pairs}

    def _write_row(self) -> None:
        if self.logs:
            self.row |= {name: total / count for name, (total, count) in self._over_processes().items()}
            self.sums = {}
        row, self.row = self.row, {}
        if self.rank > 0 or not row:
            return
        self.metrics.write(step=self.step, seconds=self.seconds, **row)
        self.bar.set_postfix({name: f"{row[name]:.3f}" for name in self.shown if name in row})
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, self.step)
            self.board.flush()

    def _save(self) -> None:
        sums, random = self._over_processes(), runtime.random_states()
        if self.rank > 0:
            return
        own = {"step": self.step, "seconds": self.seconds, "best": self.best, "best_step": self.best_step}
        own |= {"state": self.state, "sums": sums, "flags": vars(self.args), "random": random}
        states = {name: one.state_dict() for name, one in self.trained.items()}
        checkpoint.save(self.out / "last.pt", self.kind, **(self.content() | states | own))


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

    def stop(self) -> bool:
        """True once any process was asked to stop: all must leave the loop at the same step."""
        if dist.is_initialized():
            flag = torch.tensor(self.signal)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=runtime.cpu_group())  # on the CPU: the GPU need not wait
            self.signal = int(flag)
        return bool(self.signal)


def _check_empty(out: Path, flags) -> None:
    """Raises UserError where a new run would write over files that are not of an earlier attempt with these flags."""
    if (out / "last.pt").exists():
        raise UserError(f"{out} already holds a run; add --resume to continue it, or choose another --out")
    there = [n for n in ("best.pt", "config.json", "metrics.csv", "loss.png", "images") if (out / n).exists()]
    if _is_foreign(out / "codes.pt"):
        there.append("codes.pt")
    elif not there:
        return
    try:  # ended before its first save, a run leaves these; its config.json was written first
        path = out / "config.json"
        own = path.is_file() and json.loads(path.read_text())["flags"].keys() == flags
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        own = False
    if not own or "codes.pt" in there:
        raise UserError(f"--out {out} holds {', '.join(there)} of something else, which would be written over")


def _is_foreign(path: Path) -> bool:
    """Is there something that is not the codes of `tokens.kept_table`? Those alone may be made anew."""
    try:
        return path.exists() and not checkpoint.read(path, "codes")
    except UserError:
        return True


def _locked(out: Path):
    """The open file that says that this process writes here. The system takes the lock away when the process ends, in
    whatever way. Raises UserError where another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    # Open as long as the process lives. A folder from a stranger may hold a link or a pipe of this name.
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: the readers that are forked would inherit it
    except BlockingIOError:
        raise UserError(f"another process is writing to {out}; wait for it, or choose another --out") from None
    except OSError:  # a file system without locks
        pass
    return file


class MetricsFile:
    """`metrics.csv`: one row a logged step. Rows after `step`, the resumed one, are dropped and written anew."""

    def __init__(self, path: Path, columns: list[str], step: int):
        self.path, self.columns = path, columns
        rows = self.rows() if step else []
        if step and self.damaged:
            aside = path.with_name(f"{path.name}.damaged")
            os.replace(path, aside)
            print(f"{self.damaged} lines of {path} cannot be read; they are kept in {aside}")
        with runtime.written_whole(path, "x") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: r.get(k, "") for k in columns} for r in rows if int(r["step"]) <= step)

    def rows(self) -> list[dict]:
        """The rows that can be read. `damaged` counts the others."""
        self.damaged = 0
        if not self.path.is_file():
            return []
        lines = [line.split(",") for line in self.path.read_text(errors="replace").splitlines()]
        header = lines[0] if lines and {"step"} <= set(lines[0]) <= set(self.columns) else self.columns
        rows = [dict(zip(header, cells, strict=True)) for cells in lines if _is_row(cells, header)]
        self.damaged = len(lines) - len(rows) - (header in lines)
        return rows

    def write(self, **values) -> None:
        unknown = values.keys() - set(self.columns)
        if unknown:
            raise KeyError(f"no column for {sorted(unknown)}")
        text = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(text)


def _is_row(cells: list[str], header: list[str]) -> bool:
    """Numbers, or nothing, of all columns; a step among them."""
    if len(cells) != len(header) or not re.fullmatch("[0-9]{1,15}", cells[header.index("step")]):
        return False
    try:
        return bool([float(cell) for cell in cells if cell])
    except ValueError:
        return False


def _tensorboard(folder: Path, step: int):
    """A writer of event files for TensorBoard. Raises UserError where its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError('--tensorboard needs its package: pip install -e ".[tensorboard]"') from None
    return SummaryWriter(str(folder), purge_step=step + 1)  # what a killed run wrote after its last save is dropped
