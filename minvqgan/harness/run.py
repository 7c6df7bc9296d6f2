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

import contextlib
import csv
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint, data, pictures, processes, runtime
from .cuda_graph import CudaGraph
from .runtime import UserError

SCRIPTS = {"vqgan": "train_vqgan.py", "two_stage": "train_gpt.py"}  # by the kind of checkpoint they write


class Run:
    """args: the script's flags, see `flags.add_run_flags`. kind: of checkpoint. columns: of metrics.csv. panels: of
    loss.png. shown: columns in the progress bar. saved: the checkpoint to resume from, or None.

    Raises UserError for flags that cannot work.
    """

    def __init__(self, args, kind: str, columns: list[str], panels: list[list[str]], shown: list[str], saved):
        self.args, self.kind, self.saved = args, kind, saved
        self.columns, self.panels, self.shown = columns, panels, shown
        self.out = Path(args.out)
        held = [name for name in ("last.pt", "best.pt") if (self.out / name).exists()]
        if held and not args.resume:
            raise UserError(
                f"{self.out} already holds a run ({held[0]}); add --resume to continue it, or choose another --out"
            )
        self.device = runtime.pick_device(args.device)
        self.rank, self.world = processes.start(self.device)
        # Written back into the flags, so that they are saved and a resumed run keeps to them.
        if self.device.type == "cpu" and self.world == 1:
            args.threads = runtime.pick_threads(args.threads)
        self.amp = args.amp = runtime.pick_amp(args.amp, self.device)
        self.workers = (0 if self.device.type == "cpu" else 8) if args.workers is None else args.workers
        self.micro_batch, rest = divmod(args.batch_size, self.world * args.accumulate)
        if rest:
            raise UserError(
                f"--batch-size {args.batch_size} cannot be split into {self.world} processes x {args.accumulate} "
                "micro-batches"
            )
        self.is_last_step, self.step, self.seconds_before, self.best, self.best_step = False, 0, 0.0, math.inf, 0
        self.planned_steps = args.steps  # --steps when the run began; --resume may give more
        self.mark: int | None = None  # a step at which loss.png has a line
        self.sums: dict[str, list] = {}  # name -> [sum, count] since the last row, of this process
        self.pending: list[tuple[int, list[str], Tensor]] = []  # added, but still on the device
        self.rows: list[dict] = []  # not yet in metrics.csv
        self.row: dict[str, float] = {}  # of this step
        self.said: set[str] = set()
        if saved:
            with checkpoint.door(self.out / "last.pt"):
                self.step, self.best, self.best_step = saved["step"], saved["best"], saved["best_step"]
                self.seconds_before, self.sums = saved["seconds"], saved["sums"]
                self.rows = saved.get("rows", [])
                self.planned_steps = saved.get("planned_steps", saved["flags"]["steps"])
            if self.step >= args.steps:
                raise UserError(f"{self.out} is at step {self.step} of {args.steps} already; give more --steps")

    def start(self, trained: dict, content: Callable[[], dict], described: dict, line: str) -> None:
        """Begin writing. On --resume, fill what is trained.

        trained: modules, optimizers and tensors (counters) by their names in last.pt. content: makes the checkpoint of
        the model itself, in plain containers. described: for config.json. line: printed.
        """
        self.trained, self.content = trained, content
        # Processes draw different random numbers from here on: dropout, dropped conditions, Gumbel noise.
        torch.manual_seed(hash((self.args.seed, self.rank, self.step)))
        if self.saved:
            checkpoint.restore(self.saved, trained, self.out / "last.pt")
            if self.rank < len(self.saved["random"]):  # a run may be resumed with more processes
                processes.set_random_state(self.saved["random"][self.rank])
        self.saved = None  # a second copy of the weights
        if self.rank > 0:
            return
        (self.out / "images").mkdir(parents=True, exist_ok=True)
        with runtime.written_whole(self.out / "config.json", "x") as file:
            json.dump({"flags": vars(self.args)} | described, file, indent=2)
        self.metrics = MetricsFile(self.out / "metrics.csv", self.columns, self.step)
        self.board = _tensorboard(self.out / "tensorboard", self.step) if self.args.tensorboard else None
        threads = torch.get_num_threads()
        where = f"{self.device}, {threads} thread{'s' * (threads > 1)}" if self.device.type == "cpu" else self.device
        print(f"{line}; on {where}, {'bfloat16' if self.amp else 'float32'}")

    def steps(self) -> Iterator[int]:
        """The steps that are left, counted from 1. After each: the row of metrics.csv, last.pt, and the end if a signal
        has asked for it."""
        self.stopper, self.row, total = Stopper(), {}, self.args.steps
        self.began, self.first_step = time.time(), self.step + 1
        with runtime.progress_bar(self.rank, initial=self.step, total=total) as self.bar:
            for step in range(self.first_step, total + 1):
                self.step, self.is_last_step = step, step == total
                self.is_log_step = self.is_last_step or step % self.args.log_every == 0
                self.is_val_step = self.rank == 0 and (self.is_last_step or step % self.args.val_every == 0)
                yield step
                stopping = self.stopper.stop()
                self.bar.update()
                self._end_row()
                if self.is_last_step or stopping or step % self.args.save_every == 0:
                    self._save()
                if self.rank == 0 and (self.is_val_step or stopping):
                    path = self.out / "loss.png"
                    self._try_to_write(path, pictures.plot_columns, path, self.metrics.rows(), self.panels, self.mark)
                if stopping and not self.is_last_step:
                    break
        if self.rank == 0 and not self.is_last_step:
            command = ["python", SCRIPTS[self.kind], "--out", str(self.out), "--resume"]
            print(f"stopped and saved at step {self.step}; continue with: {shlex.join(command)}")

    @property
    def exit_code(self) -> int:
        """0 after the last step, else 128 + the number of the signal that ended the run."""
        return 0 if self.is_last_step else 128 + self.stopper.agreed

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
            with contextlib.ExitStack() as stack:
                for module in modules:
                    if isinstance(module, DistributedDataParallel) and i < self.args.accumulate - 1:
                        stack.enter_context(module.no_sync())
                yield next(batches)

    def cuda_graph(self, *modules: nn.Module) -> Callable:
        """Decorator of the function that adds to the gradients of `modules`: a CUDA graph where that is possible.

        Not with Gumbel's temperature (a number in Python), with recomputed activations (they ask for the random state),
        with --compile or under torchrun.
        """
        others = any(getattr(self.args, name, False) for name in ("compile", "gumbel", "checkpoint_grad"))
        possible = self.args.cuda_graph and self.device.type == "cuda" and not dist.is_initialized() and not others
        return lambda function: CudaGraph(function, *modules) if possible else function

    def autocast(self):
        """bfloat16 where it is safe, with --amp. It has float32's range, so no loss scaling is needed."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def add(self, terms: dict) -> None:
        """Numbers of one micro-batch, of which the row has the mean since the last row. Raises UserError for one that
        is not finite: on a CPU at once, before it reaches the weights.

        On a GPU they are fetched with the next row only: each `.item()` would wait for the GPU.
        """
        # stack makes a copy; a CUDA graph writes its next numbers to the same place.
        values = torch.stack([torch.as_tensor(v, device=self.device).detach().float() for v in terms.values()])
        self.pending.append((self.step, list(terms), values))
        if self.device.type == "cpu":
            self._collect()

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
            if self._try_to_write(self.out / "best.pt", checkpoint.save, self.out / "best.pt", self.kind, **content):
                self.best, self.best_step = score, self.step

    def save_images(self, rows: list[Tensor], name: str = "") -> None:
        """Rows of images (n, 3, H, W) in [-1, 1], as one grid in images/."""
        path = self.out / "images" / f"step_{self.step:07d}{name and '_' + name}.png"
        self._try_to_write(path, pictures.save_grid, path, rows)
        if self.board:
            import numpy as np

            self.board.add_image(name or "images", np.asarray(pictures.grid(rows)), self.step, dataformats="HWC")

    def say(self, text: str, once: bool = False) -> None:
        """A line above the progress bar, from rank 0. once: not if the same text was said before."""
        from tqdm import tqdm

        if self.rank == 0 and not (once and text in self.said):
            tqdm.write(f"step {self.step}: {text}" if self.step else text)
        self.said.add(text)

    def _try_to_write(self, path: Path, write: Callable, *args, **kwargs) -> bool:
        """False if the file is refused, because a spreadsheet or a viewer has it open: no reason to end a run."""
        try:
            write(*args, **kwargs)
        except PermissionError as error:
            self.say(f"cannot write {path} ({error.strerror}); the run goes on and tries again", once=True)
            return False
        return True

    def _collect(self) -> None:
        """Fetch what was added from the device, in one transfer, and sum it up."""
        if not self.pending:
            return
        numbers = torch.cat([values for _, _, values in self.pending]).tolist()
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

    def _sums_of_all(self) -> dict[str, list]:
        """The sums, averaged over the processes."""
        self._collect()
        if self.world == 1:
            return self.sums
        totals = torch.tensor([total for total, _ in self.sums.values()], dtype=torch.float64)
        dist.all_reduce(totals, group=processes.cpu_group())
        pairs = zip(self.sums.items(), (totals / self.world).tolist(), strict=True)
        return {name: [total, count] for (name, (_, count)), total in pairs}

    def _end_row(self) -> None:
        if self.is_log_step:
            self.row |= {name: total / count for name, (total, count) in self._sums_of_all().items()}
            self.sums = {}
        row, self.row = self.row, {}
        if self.rank > 0 or not row:
            return
        self.rows.append({"step": self.step, "seconds": self.seconds, **row})
        if self._try_to_write(self.metrics.path, self.metrics.write, self.rows):
            self.rows = []
        self._show(row)

    def _show(self, row: dict) -> None:
        """In the progress bar; as a line of its own where stderr is no terminal; for TensorBoard."""
        shown = {name: f"{row[name]:.3f}" for name in self.shown if name in row}
        self.bar.set_postfix(shown)
        if self.is_log_step and not sys.stderr.isatty() and "TQDM_DISABLE" not in os.environ:
            seconds_a_step = (time.time() - self.began) / (self.step - self.first_step + 1)
            left = (self.args.steps - self.step) * seconds_a_step / 60
            numbers = " ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {self.step}/{self.args.steps}: {numbers}, {left:.1f} minutes left", file=sys.stderr)
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, self.step)
            self.board.flush()

    def _save(self) -> None:
        sums, random = self._sums_of_all(), processes.random_states()
        if self.rank > 0:
            return
        own: dict = {"step": self.step, "seconds": self.seconds, "best": self.best, "best_step": self.best_step}
        own |= {"planned_steps": self.planned_steps, "sums": sums, "rows": self.rows}
        own |= {"flags": vars(self.args), "random": random}
        states = {n: part if isinstance(part, Tensor) else part.state_dict() for n, part in self.trained.items()}
        checkpoint.save(self.out / "last.pt", self.kind, **(self.content() | states | own))


class Stopper:
    """Turns Ctrl-C and SIGTERM into a number, so that the step under way is finished and saved. A second Ctrl-C ends
    the program at once.

    Within two seconds it still counts as the first: torchrun passes on what the terminal has sent to each process.
    """

    def __init__(self):
        self.signal, self.agreed, self.since = 0, 0, math.inf
        if runtime.in_main_thread():
            signal.signal(signal.SIGINT, self._note)
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.signal and now - self.since > 2:
            raise KeyboardInterrupt
        self.signal, self.since = number, now

    def stop(self) -> bool:
        """True once any process was asked to stop: all must leave the loop at the same step."""
        self.agreed = self.signal
        if dist.is_initialized():
            # A copy is reduced: a signal that arrives meanwhile stays in self.signal, for the next step.
            flag = torch.tensor(self.signal)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=processes.cpu_group())
            self.agreed = int(flag)
        return bool(self.agreed)


class MetricsFile:
    """`metrics.csv`: one row a logged step. Rows after `step`, the resumed one, are dropped: they are made again."""

    def __init__(self, path: Path, columns: list[str], step: int):
        self.path, self.columns = path, columns
        try:
            kept = [row for row in self.rows() if int(row["step"]) <= step] if step and path.exists() else []
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not as this run wrote it; rename it to resume with a new one") from None
        with runtime.written_whole(path, "x") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(kept)

    def _writer(self, file) -> csv.DictWriter:
        return csv.DictWriter(file, self.columns, restval="", lineterminator="\n")

    def rows(self) -> list[dict]:
        whole = self.path.read_text().rpartition("\n")[0]  # a last row without its end was cut off by a kill
        return list(csv.DictReader(whole.splitlines()))

    def write(self, rows: list[dict]) -> None:
        with open(self.path, "a", newline="") as file:
            for row in rows:
                self._writer(file).writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def _tensorboard(folder: Path, step: int):
    """A writer of event files for TensorBoard. Raises UserError if its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError('--tensorboard needs its package: pip install -e ".[tensorboard]"') from None
    return SummaryWriter(str(folder), purge_step=step + 1)  # drops what a killed run wrote after its last save
