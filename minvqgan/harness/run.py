"""A training run without the training: its folder, log, progress bar, signals, saving and resuming.

    for step in run.steps():                          # ends early on Ctrl-C or SIGTERM, after saving
        for x in run.micro_batches(batches, model):   # --accumulate of them; gradients are averaged once
            run.add({"loss": loss(x)})                # metrics.csv gets the mean since its last row
        if run.is_log_step:                           # every --log-every steps
            run.note(lr=...)                          # numbers of this step, for its row
        if run.is_val_step:                           # every --val-every steps, on rank 0
            run.save_best({"loss": ...}, score=...)   # held-out numbers, and best.pt if the score is the lowest so far

What is trained, and how, is in the script's loop; nothing here knows a loss function or a model.

A run folder holds `last.pt` (everything that `--resume` needs), `best.pt` (the model with the lowest score),
`config.json`, `metrics.csv` (a row a logged step), `loss.png`, and `images/`.
"""

import csv
import json
import math
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import checkpoint, data, pictures, processes, runtime
from .cuda_graph import CudaGraph
from .runtime import UserError

SCRIPTS = {"vqgan": "train_vqgan.py", "two_stage": "train_gpt.py"}  # by the kind of checkpoint they write
SAVED = ("step", "best", "best_step", "planned_steps", "threads", "rows")  # attributes of a Run, in last.pt


class Run:
    """args: the script's flags, see `flags.add_run_flags`. kind: of checkpoint. panels: columns in each panel of
    loss.png. shown: columns in the progress bar. saved: the checkpoint to resume from, or None.

    Raises UserError for flags that cannot work.
    """

    def __init__(self, args, kind: str, panels: list[list[str]], shown: list[str], saved: dict | None):
        self.args, self.kind, self.panels, self.shown, self.saved = args, kind, panels, shown, saved
        self.out = Path(args.out)
        held = [name for name in ("last.pt", "best.pt") if (self.out / name).exists()]
        if held and not args.resume:
            raise UserError(f"{self.out} already holds a run ({held[0]}); add --resume, or choose another --out")
        self.device = runtime.pick_device(args.device)
        self.rank, self.world = processes.start(self.device)
        self.amp = args.amp = runtime.pick_amp(args.amp, self.device)  # saved with the flags: a resumed run keeps it
        self.workers = (0 if self.device.type == "cpu" else 8) if args.workers is None else args.workers
        self.micro_batch, rest = divmod(args.batch_size, self.world * args.accumulate)
        if rest:
            parts = f"{self.world} processes x {args.accumulate} micro-batches"
            raise UserError(f"--batch-size {args.batch_size} cannot be split into {parts}")
        self.is_last_step, self.step, self.seconds_before, self.best, self.best_step = False, 0, 0.0, math.inf, 0
        self.threads = 0  # chosen below
        self.planned_steps = args.steps  # --steps when the run began; --resume may give more
        self.pending: list[tuple[int, list[str], Tensor]] = []  # added, but still on the device
        self.values: dict[str, list[float]] = {}  # added since the last row, by this process
        self.row: dict[str, float] = {}  # of this step
        self.rows: list[dict[str, float]] = []  # of metrics.csv
        if saved:
            with checkpoint.door(self.out / "last.pt"):
                for name in SAVED:
                    setattr(self, name, saved.get(name, getattr(self, name)))
                if "threads" not in saved:  # a run of an older version, whose rows are in metrics.csv alone
                    self.rows = [row for row in read_csv(self.out / "metrics.csv") if row["step"] <= self.step]
                self.seconds_before, values = saved["seconds"], saved.get("values", [])
                if self.rank < len(values):  # a run may be resumed with more processes
                    self.values = values[self.rank]
            if self.step >= args.steps:
                raise UserError(f"{self.out} is at step {self.step} of {args.steps} already; give more --steps")
        self.threads = self.threads or runtime.fastest_threads()
        torch.set_num_threads(min(self.threads, torch.get_num_threads()))

    def start(self, trained: dict, content: Callable[[], dict], line: str) -> None:
        """Begin writing. On --resume, fill what is trained.

        trained: modules, optimizers and tensors (counters) by their names in last.pt. content: makes the checkpoint of
        the model itself, in plain containers. line: printed.
        """
        self.trained, self.content = trained, content
        # Processes draw different random numbers from here on: dropout, dropped conditions, Gumbel noise.
        torch.manual_seed(hash((self.args.seed, self.rank, self.step)))
        if self.saved:
            checkpoint.restore(self.saved, trained, self.out / "last.pt")
            if self.rank < len(self.saved["random"]):
                processes.set_random_state(self.saved["random"][self.rank])
        self.saved = None  # a second copy of the weights
        if self.rank == 0:
            (self.out / "images").mkdir(parents=True, exist_ok=True)
            with runtime.written_whole(self.out / "config.json", "x") as file:
                json.dump({"flags": vars(self.args)}, file, indent=2)
            print(f"{line}; on {self.device}, {'bfloat16' if self.amp else 'float32'}")

    def steps(self) -> Iterator[int]:
        """The steps that are left, counted from 1. After each: the row of metrics.csv, last.pt, and the end if a signal
        has asked for it."""
        self.signal, self.agreed, self.signalled, self.row, total = 0, 0, math.inf, {}, self.args.steps
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note_signal)
        self.began, self.next_write = time.time(), 0.0
        with runtime.progress_bar(self.rank, initial=self.step, total=total) as self.bar:
            for step in range(self.step + 1, total + 1):
                self.step, self.is_last_step = step, step == total
                self.is_log_step = self.is_last_step or step % self.args.log_every == 0
                self.is_val_step = self.rank == 0 and (self.is_last_step or step % self.args.val_every == 0)
                yield step
                self.agreed = max(processes.gather(self.signal))  # all must leave the loop at the same step
                self.bar.update()
                self._end_row()
                if self.is_last_step or self.agreed or step % self.args.save_every == 0:
                    self._save()
                if self.is_val_step:
                    self._try_to_write(self.out / "loss.png", pictures.plot_columns, self.rows, self.panels)
                if self.agreed and not self.is_last_step:
                    break
        if self.rank == 0 and not self.is_last_step:
            command = ["python", SCRIPTS[self.kind], "--out", str(self.out), "--resume"]
            print(f"stopped and saved at step {self.step}; continue with: {shlex.join(command)}")

    def _note_signal(self, number: int, frame) -> None:
        """The step under way is finished and saved; a second Ctrl-C ends the program at once. Within two seconds it
        still counts as the first: torchrun passes on what the terminal has sent to each process."""
        if time.monotonic() - self.signalled > 2:
            raise KeyboardInterrupt
        self.signal, self.signalled = number, time.monotonic()

    @property
    def exit_code(self) -> int:
        """0 after the last step, else 128 + the number of the signal that ended the run."""
        return 0 if self.is_last_step else 128 + self.agreed

    @property
    def seconds(self) -> float:
        """Since the start, over all resumptions."""
        return self.seconds_before + time.time() - self.began

    def batches(self, dataset) -> Iterator[dict]:
        """Endless training batches of this process, beginning where the run stands."""
        seen, pin = self.step * self.args.batch_size, self.device.type == "cuda"
        place = (self.workers, self.rank, self.world)
        return data.train_loader(dataset, self.micro_batch, self.args.seed, seen, *place, pin)

    def micro_batches(self, batches: Iterator, *modules: nn.Module) -> Iterator:
        """The next --accumulate batches. Gradients are averaged over the processes once, with the last one."""
        for i in range(self.args.accumulate):
            for module in modules:
                module.require_backward_grad_sync = i == self.args.accumulate - 1  # as DDP.no_sync() sets it
            yield next(batches)

    def cuda_graph(self, *modules: nn.Module) -> Callable:
        """Decorator of the function that adds to the gradients of `modules`: a CUDA graph where that is possible.

        Not with Gumbel's temperature (a number in Python), with recomputed activations (they ask for the random state),
        with --compile or under torchrun.
        """
        others = any(getattr(self.args, name, False) for name in ("compile", "gumbel", "checkpoint_grad"))
        possible = self.args.cuda_graph and self.device.type == "cuda" and not dist.is_initialized() and not others
        return lambda function: CudaGraph(function, *modules) if possible else function

    def add(self, terms: dict) -> None:
        """Numbers of one micro-batch, of which the row has the mean since the last row. Raises UserError for one that
        is not finite: on a CPU at once, before it reaches the weights.

        On a GPU they are fetched with the next row only: each `.item()` would wait for the GPU.
        """
        # stack makes a copy; a CUDA graph writes its next numbers to the same place.
        numbers = torch.stack([torch.as_tensor(v, device=self.device).detach().float() for v in terms.values()])
        self.pending.append((self.step, list(terms), numbers))
        if self.device.type == "cpu":
            self._collect()

    def _collect(self) -> None:
        for step, names, numbers in self.pending:
            for name, number in zip(names, numbers.tolist(), strict=True):
                self._check_finite(step, name, number)
                self.values.setdefault(name, []).append(number)
        self.pending = []

    def _check_finite(self, step: int, name: str, number: float) -> None:
        if not math.isfinite(number):
            kept = (self.out / "last.pt").exists()
            advice = f"; {self.out} keeps the last good checkpoint, add --resume" if kept else ""
            raise UserError(f"step {step}: {name} is {number}; try a lower --lr{advice}")

    def note(self, **values: float) -> None:
        """Numbers of this step for its row."""
        self.row |= values

    def save_best(self, values: dict[str, float], score: float, since: int = 0) -> None:
        """Held-out numbers for the columns val_*, and best.pt if `score` is the lowest so far. Scores up to the step
        `since` do not count once it has passed."""
        for name, value in values.items():
            self._check_finite(self.step, f"val_{name}", value)
        self.row |= {f"val_{name}": value for name, value in values.items()}
        self.say("held out " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        if score < self.best or self.best_step <= since < self.step:
            content = self.content() | {"step": self.step, "flags": vars(self.args)}
            if self._try_to_write(self.out / "best.pt", checkpoint.save, self.kind, **content):
                self.best, self.best_step = score, self.step

    def save_images(self, rows: list[Tensor], name: str = "") -> None:
        """Rows of images (n, 3, H, W) in [-1, 1], as one grid in images/."""
        path = self.out / "images" / f"step_{self.step:07d}{name and '_' + name}.png"
        self._try_to_write(path, pictures.save_grid, rows)

    def say(self, text: str) -> None:
        """A line above the progress bar, from rank 0."""
        from tqdm import tqdm

        if self.rank == 0:
            tqdm.write(f"step {self.step}: {text}" if self.step else text)

    def _try_to_write(self, path: Path, write: Callable, *args, **kwargs) -> bool:
        """False if the file is refused, because a spreadsheet or a viewer has it open: no reason to end a run."""
        try:
            write(path, *args, **kwargs)
        except PermissionError as error:
            self.say(f"cannot write {path} ({error.strerror}); the run goes on and tries again")
            return False
        return True

    def _end_row(self) -> None:
        """Add this step's row to metrics.csv, if there is one, and show it."""
        if self.is_log_step:
            self._collect()
            parts = processes.gather(self.values)
            self.row |= {n: statistics.fmean(v for part in parts for v in part.get(n, ())) for n in self.values}
            self.values = {}
        row, self.row = self.row, {}
        if self.rank > 0 or not row:
            return
        self.rows.append({"step": self.step, "seconds": self.seconds, **row})
        now = time.time()
        if now >= self.next_write:
            self._try_to_write(self.out / "metrics.csv", write_csv, self.rows)
            self.next_write = time.time() + 20 * (time.time() - now)  # many rows may take 5 % of the time, no more
        shown = {name: f"{row[name]:.3f}" for name in self.shown if name in row}
        self.bar.set_postfix(shown)
        if self.is_log_step and not sys.stderr.isatty():  # a log file gets a line in place of the bar
            numbers = " ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {self.step}/{self.args.steps}, {self.seconds / 60:.1f} min: {numbers}", file=sys.stderr)

    def _save(self) -> None:
        self._collect()
        values, random = processes.gather(self.values), processes.gather(processes.random_state())
        if self.rank == 0:
            own = {name: getattr(self, name) for name in SAVED}
            own |= {"seconds": self.seconds, "values": values, "random": random, "flags": vars(self.args)}
            states = {n: part if isinstance(part, Tensor) else part.state_dict() for n, part in self.trained.items()}
            checkpoint.save(self.out / "last.pt", self.kind, **(self.content() | states | own))
            self._try_to_write(self.out / "metrics.csv", write_csv, self.rows)


def write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    """All rows, with a column for each name in them. The rows are in last.pt too: a resumed run writes them again."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with runtime.written_whole(path, "x") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read_csv(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"])} for row in rows]
