"""Numbers on their way from the device to people: running sums, timers, rows, the bar, and the places rows go to."""

from __future__ import annotations

import csv
import io
import json
import netrc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from train.engine.config import ConfigError, TrainingConfig
from train.engine.run_folder import write_whole, writing

Row = dict[str, Any]
# At the end of a run W&B has this long to send what is left, and then keeps it on disk; it would wait for ever.
SECONDS_TO_SEND = 60.0


class Meter:
    """Sums since the last row. They stay on the device; `read` is the one host sync of a log interval."""

    COUNTS = ("grad_norm", "items", "good", "skipped")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.names: list[str] = []
        self.sums = torch.empty(0)

    def add(self, parts: dict[str, Tensor], grad_norm: Tensor, items: Tensor, bad: Tensor) -> None:
        """One optimizer step. parts: this process's share, summed over its micro-batches; the rest is global."""
        if not self.names:
            self.names = list(parts)
            self.sums = torch.zeros(len(parts) + len(self.COUNTS), dtype=self.dtype, device=self.device)
        values = [*parts.values(), grad_norm, items, 1 - bad, bad]
        vector = torch.stack([v.detach().to(self.dtype) for v in values])
        vector[:-2] = torch.where(bad.bool(), 0, vector[:-2])
        self.sums += vector

    def left_out(self) -> None:
        """A step that wasn't made, for a rewind bans it."""
        self.sums[-1] += 1

    def read(self, total: Callable[[Tensor], Tensor]) -> Row:
        """Means per good step since the last call, and `items` and `skipped` in all. total: sums over processes."""
        n = len(self.names)
        values = torch.cat([total(self.sums[:n]), self.sums[n:]]).tolist()
        grad_norm, items, good, skipped = values[n:]
        mean = {name: value / good if good else float("nan") for name, value in zip(self.names, values, strict=False)}
        self.sums.zero_()
        return {
            **mean,
            "grad_norm": grad_norm / good if good else float("nan"),
            "items": items,
            "skipped": int(skipped),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "sums": self.sums.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names, self.sums = state["names"], state["sums"].to(self.device, copy=True)


class Stopwatch:
    """Seconds per phase: the host's clock on a CPU, events on a GPU, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if not self._on_gpu:
            start = time.perf_counter()
            yield
            self.add(phase, time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((phase, begin, end))

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def collect(self) -> dict[str, float]:
        """Seconds so far; call it where the device has been waited for."""
        if self._events:
            torch.cuda.synchronize()
        for phase, begin, end in self._events:
            self.add(phase, begin.elapsed_time(end) / 1000)
        self._events.clear()
        return dict(self.seconds)


class JsonlFile:
    """metrics.jsonl, a row a line, out of this process when `log` returns; metrics.csv is made from it at the end."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")
        self.cut_back(keep_bytes)

    def cut_back(self, keep_bytes: int) -> None:
        """Forget the rows after a checkpoint."""
        os.truncate(self.path, min(keep_bytes, self.path.stat().st_size))

    @property
    def size(self) -> int:
        """Bytes that are on disk, for a checkpoint to cut back to."""
        with writing(self.path):
            os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def log(self, row: Row) -> None:
        with writing(self.path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        with writing(self.path), self._file:
            os.fsync(self._file.fileno())
        rows, table = read_rows(self.path), io.StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path.with_suffix(".csv"), table.getvalue())


def read_rows(path: Path) -> list[Row]:
    """All rows of a metrics.jsonl; a last one that isn't whole, of a run that was killed or is writing it, is left out.

    Raises ConfigError where another line is damaged.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("split"), str):
                raise ValueError("a row has a step, which is a number, and a split")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}, is damaged: {error}") from error
    return rows


class WandbRun:
    """The same rows on Weights & Biases, on an axis of our own, so that a resumed run may go back.

    num_rows: what W&B's server has of this run; 0 offline, where each part stands alone and must hold all rows.
    """

    def __init__(self, config: TrainingConfig, run_dir: Path, run_id: str | None, say: Callable[[str], None]) -> None:
        import wandb

        # A sweep's agent decides itself where its runs go; `mode=None` leaves WANDB_MODE its say.
        mode = None if "WANDB_MODE" in os.environ else "online" if has_wandb_credentials() else "offline"
        if config.wandb != "auto":
            mode = config.wandb
        about = {
            "project": os.environ.get("WANDB_PROJECT", "tenfold"),
            "name": "/".join(run_dir.absolute().parts[1:][-2:]),
            "resume": "allow",
            "dir": run_dir.resolve(),  # its service keeps the folder that the process's first run began in
            "config": config.to_dict(),
            "settings": wandb.Settings(silent=True, console="off", finish_timeout=SECONDS_TO_SEND),
        }
        self.say, self._lost, self.id = say, False, run_id
        self.run: Any = None
        self.num_rows = 0

        def begin(mode: str | None) -> None:
            self.run = wandb.init(**about, id=self.id, mode=mode)
            self.run.define_metric("*", step_metric="step")
            self.id, self.num_rows = self.run.id, self.run.starting_step
            say(f"wandb       {mode or os.environ['WANDB_MODE']}, run {self.id}")

        def begin_anew() -> None:
            """Offline and with another service: a signal to every process of a job ends the one that there was."""
            with suppress(OSError):  # of telling the dead one that it is over
                wandb.teardown()
            begin("offline")

        self._begin_anew = begin_anew
        try:
            begin(mode)
        except Exception as error:  # no network, no account, no answer in 90 s: they name no common class
            said = str(error).partition("\n")[0]
            say(f"wandb       not reached ({said}); its rows stay in {run_dir / 'wandb'}, and `wandb sync` sends them")
            with self._or_without():
                begin_anew()

    def log(self, row: Row) -> None:
        with self._or_without():
            if not self._lost:
                self.run.log({"step": row["step"], **{f"{row['split']}/{k}": v for k, v in _scores(row).items()}})

    def complete(self, rows: list[Row]) -> None:
        """At the end of a run: where rows were lost on the way, all of them in an offline part of their own."""
        self.close()  # that the service has died since the last row is only noticed now
        if self._lost:
            self._lost = False
            with self._or_without():
                self._begin_anew()
            for row in rows:
                self.log(row)

    def close(self) -> None:
        run, self.run = self.run, None
        with self._or_without():
            if run is not None:
                run.finish()

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        """What keeps rows from W&B is said once, and does not stop training: metrics.jsonl has them all."""
        try:
            yield
        except Exception as error:  # wandb's own, a broken pipe to its service, a timeout: it names no common class
            if not self._lost:
                self.say(f"wandb       lost ({type(error).__name__}: {error}); training goes on without it")
            self._lost = True


def has_wandb_credentials() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_SWEEP_ID"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


class TensorBoardFile:
    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Rows stay in a process for two minutes and die with it: each process's file holds all, and hides the others.
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=0)

    def log(self, row: Row) -> None:
        for name, value in _scores(row).items():
            self.writer.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def close(self) -> None:
        self.writer.close()


def _scores(row: Row) -> Row:
    return {k: v for k, v in row.items() if k not in ("step", "split")}


class Bar:
    """A progress bar on a terminal, plain lines elsewhere, nothing on processes other than 0."""

    LEAST_SECONDS_BETWEEN_LINES = 1.0

    def __init__(self, shown: bool, item_name: str) -> None:
        self.shown, self.item_name, self._last_line = shown, item_name, 0.0
        self._on_terminal = shown and sys.stderr.isatty()
        self._bar: tqdm | None = None

    def say(self, text: str) -> None:
        if self.shown:
            tqdm.write(text)
            sys.stdout.flush()

    def show(self, row: Row, total: int | None) -> None:
        text = " ".join([*(f"{short}={row[name]:.4f}" for name, short in _short_names(row)), f"lr={row['lr']:.2e}"])
        if self._on_terminal:
            if self._bar is None:
                self._bar = tqdm(unit="step", dynamic_ncols=True, total=total, initial=row["step"])
            self._bar.total = total
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(row["step"] - self._bar.n)
        elif row["step"] == total or time.monotonic() - self._last_line >= self.LEAST_SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(f"step {row['step']}/{total or '?'}  {text}  {row['items_per_second']:,.0f} {self.item_name}/s")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _short_names(row: Row) -> Iterator[tuple[str, str]]:
    """Loss parts as people know them: ce_loss is ce."""
    rest = ("step", "split", "lr", "grad_norm", "skipped", "items_per_second", "elapsed")
    for name in row:
        if name not in rest:
            yield name, name.removesuffix("_loss")
