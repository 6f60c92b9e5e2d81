"""Runs of the toy that are struck at counted events and go on come to what a run left alone does, bit for bit.

A run is a forked process, so that SIGKILL is SIGKILL. `python tests/chaos.py` does the same to the real scripts.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb

from tests.chaos_child import Aim, watch
from tests.chaos_compare import differences
from tests.forked import ended, fork, launch
from tests.toy import ToyModel, ToyTask
from train.engine import Trainer, TrainingConfig
from train.engine.experiments import ExperimentDB
from train.engine.run_folder import is_held, read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
HARD = dict(max_steps=12, batch_size=8, micro_batch_size=3, ema_decay=0.9, log_every=3, eval_every=4, save_every=5)
HARD |= dict(lr=1e-2, warmup_steps=2, mixed_precision="no", cpu=True, wandb="off", db="auto")


class Looks:
    """A hook that calls the model, and says at the end what it saw last."""

    def __call__(self, trainer, row):
        tokens = trainer.task.val[0]["tokens"][None]
        self.seen, self.trainer = trainer.predict({"tokens": tokens})["logits"].sum().item(), trainer

    def finish(self):
        self.trainer.report["looks"] = {"seen": self.seen}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.engine.summary.matmul_rate", lambda *args, **kwargs: 1e12)
        patch.setattr("train.engine.summary.plot_curves", lambda *args: None)
        patch.setattr("train.engine.run_folder._git", lambda *words: None)
        patch.setattr("accelerate.accelerator.release_memory", lambda *objects: objects)  # it collects garbage
        yield


def trainer_of(run_dir: Path, hooks=(), **settings) -> Trainer:
    torch.manual_seed(0)
    config = TrainingConfig(run_dir=run_dir, **{**HARD, **settings})
    return Trainer(ToyModel(0.2), config, ToyTask(), [Looks(), *hooks])


def forked(run_dir: Path, prepare: Callable[[], object] = lambda: None, **settings) -> int:
    """Train in a process of its own, after `prepare` there; how that ended, as subprocess has it."""
    return ended(fork(lambda: train(run_dir, prepare, **settings)))


def forked_pair(run_dir: Path, prepare: Callable[[], object] = lambda: None, **settings) -> list[int]:
    """The same in two processes."""
    return launch(lambda: train(run_dir, prepare, **settings), ACCELERATE_USE_CPU="1")


def train(run_dir: Path, prepare: Callable[[], object], **settings) -> None:
    aim = prepare()
    trainer_of(run_dir, **settings).train()
    if isinstance(aim, Aim):
        aim.say("counts", aim.counts)


def aimed(folder: Path, **aim) -> Callable[[], Aim]:
    def prepare() -> Aim:
        watch(made := Aim(str(folder), target="rank", **aim))
        return made

    return prepare


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """A run that was left alone, and how often each event happened in it."""
    folder = tmp_path_factory.mktemp("whole")
    trainer_of(folder / "unused")  # what it imports, no child has to
    assert forked(folder / "runs" / "run", aimed(folder)) == 0
    return folder / "runs" / "run", read_json(folder / "counts-0.json")


@pytest.fixture(scope="module")
def whole_pair(tmp_path_factory) -> Path:
    """A run of two processes that was left alone."""
    folder = tmp_path_factory.mktemp("pair")
    trainer_of(folder / "unused")
    assert forked_pair(folder / "runs" / "run") == [0, 0]
    return folder / "runs" / "run"


def strike(run_dir: Path, folder: Path, counts: dict[str, int], events: list[str], share: float) -> None:
    for struck, event in enumerate(events):
        number = max(1, int(share * counts[event]) // (struck + 1))
        assert forked(run_dir, aimed(folder, event=event, number=number)) in (-9, 0), event
    assert forked(run_dir) == 0


# ---- SIGKILL ---------------------------------------------------------------------------------------------------------

QUICK = [
    ["step: in a forward", "step: between micro-batches", "evaluation: in a hook", "save: between the renames"],
    ["end: before results.json"],
]
THOROUGH = [
    ["step: in a forward", "step: between micro-batches", "step: between optimizer and EMA", "row: half of it written"],
    ["evaluation: between batches", "evaluation: in a hook", "evaluation: before the hooks", "resume: state read"],
    ["save: folder made", "save: a part written", "save: weights written", "save: sealed"],
    ["save: before the links", "save: among the links", "save: done", "resume: rows cut back"],
    ["end: after results.json", "database: rows written", "end: before run.json"],
]


@pytest.mark.parametrize(
    ("events", "share"),
    [(events, 0.4) for events in QUICK]
    + [pytest.param(events, share, marks=pytest.mark.slow) for events in THOROUGH for share in (0.4, 0.9)],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_a_run_that_is_killed_again_and_again_loses_nothing(whole, tmp_path, events, share):
    run_dir, counts = whole
    cut = tmp_path / "runs" / "run"
    known = {"resume: state read": 1, "resume: rows cut back": 1, **counts}
    share = 1.0 if events[0].startswith("end") else share
    strike(cut, tmp_path, known, events, share)
    assert differences(run_dir, cut) == []


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_is_killed_alone_takes_the_other_with_it_and_nothing_else(whole_pair, tmp_path, rank):
    cut = tmp_path / "runs" / "run"
    ends = forked_pair(cut, aimed(tmp_path, event="step: in a forward", number=70, rank=rank))
    assert ends[rank] == -signal.SIGKILL and ends[1 - rank] == 1 and not is_held(cut)
    assert read_json(cut / "checkpoints" / "last" / "trainer.json")["step"] > 0
    assert forked_pair(cut) == [0, 0] and differences(whole_pair, cut) == []


def test_a_signal_to_one_process_stops_both_and_only_the_first_speaks(whole_pair, tmp_path, capfd):
    cut = tmp_path / "runs" / "run"
    aim = aimed(tmp_path, event="step: in a forward", number=70, rank=1, signals=["SIGTERM"])
    assert forked_pair(cut, aim) == [75, 75]
    assert read_json(cut / "run.json")["state"] == "interrupted"
    stopped_at = read_json(cut / "checkpoints" / "last" / "trainer.json")["step"]
    assert 2 <= stopped_at < HARD["max_steps"] and f"after step {stopped_at}" in capfd.readouterr().out
    assert forked_pair(cut) == [0, 0] and differences(whole_pair, cut) == []
    assert capfd.readouterr().out.count(f"step {HARD['max_steps']}/") == 1


def test_what_is_not_brought_back_is_noticed(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("train.engine.snapshot.set_random_state", lambda state: None)
    cut = tmp_path / "runs" / "run"
    strike(cut, tmp_path, whole[1], ["step: between micro-batches"], share=0.6)
    found = differences(whole[0], cut)
    assert ".: metrics.jsonl has other rows" in found and any("model.safetensors" in what for what in found)


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "number", "signals", "step"),
    [
        ("step: between optimizer and EMA", 4, ["SIGTERM"], 4),  # it has an evaluation due
        pytest.param("evaluation: between batches", 40, ["SIGINT", "SIGTERM"], 9, marks=pytest.mark.slow),  # of step 8
        pytest.param("evaluation: in a hook", 6, ["SIGUSR1"], 1, marks=pytest.mark.slow),  # before the first step
        ("save: a part written", 3, ["SIGTERM", "SIGTERM"], 6),  # of step 5
    ],
)
def test_a_signal_stops_and_saves_and_the_run_goes_on_as_if_there_had_been_none(
    whole, tmp_path, event, number, signals, step
):
    cut = tmp_path / "runs" / "run"
    assert forked(cut, aimed(tmp_path, event=event, number=number, signals=signals)) == 75
    assert read_json(cut / "run.json")["state"] == "interrupted"
    assert read_json(cut / "checkpoints" / "last" / "trainer.json")["step"] == step
    assert forked(cut) == 0 and differences(whole[0], cut) == []


def test_a_second_signal_while_the_run_lets_go_of_its_files_changes_nothing(whole, tmp_path):
    def prepare() -> Aim:
        aim = aimed(tmp_path, event="step: in a forward", number=9, signals=["SIGTERM"])()
        close = Trainer.close

        def struck_again(self: Trainer) -> None:
            aim.strike()
            close(self)

        Trainer.close = struck_again
        return aim

    cut = tmp_path / "runs" / "run"
    assert forked(cut, prepare) == 75
    assert forked(cut) == 0 and differences(whole[0], cut) == []


def test_one_that_comes_at_the_end_stops_the_next_run_of_the_script(tmp_path):
    def at_the_end(trainer, row):
        if row["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    assert trainer_of(tmp_path / "first", [at_the_end], max_steps=2, db="off").train().steps == 2
    with pytest.raises(SystemExit) as stopped:
        trainer_of(tmp_path / "second", max_steps=2, db="off").train()
    assert stopped.value.code == 75 and read_json(tmp_path / "second" / "run.json")["state"] == "interrupted"
    assert trainer_of(tmp_path / "second", max_steps=2, db="off").train().steps == 2


def test_workers_are_gone_when_a_run_is_interrupted(tmp_path):
    """They ignore signals, so that nothing but the trainer ends them."""
    held = []

    def hold_a_frame_and_stop(trainer, row):
        held.append(sys._getframe())
        if row["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        trainer_of(tmp_path / "run", [hold_a_frame_and_stop], eval_every=2, num_workers=1, db="off").train()
    assert stopped.value.code == 75 and multiprocessing.active_children() == []


# ---- the end of a run ------------------------------------------------------------------------------------------------


def test_a_run_that_stopped_early_stays_where_it_stopped(tmp_path):
    early = dict(max_steps=40, eval_every=1, save_every=1, early_stopping_patience=2, lr=1e-9)
    assert forked(tmp_path / "runs" / "whole", **early) == 0
    cut = tmp_path / "runs" / "cut"
    assert forked(cut, aimed(tmp_path, event="end: before results.json", number=1), **early) == -signal.SIGKILL
    assert forked(cut, **early) == 0
    assert differences(tmp_path / "runs" / "whole", cut) == []


def test_before_a_long_evaluation_all_is_saved(tmp_path, monkeypatch):
    def saved(trainer, row):
        seen[row["step"]] = trainer.saved_step

    for seconds, known in ((0.0, 4), (1e9, None)):
        seen: dict[int, int | None] = {}
        monkeypatch.setattr("train.engine.trainer.SECONDS_TO_RISK", seconds)
        trainer_of(tmp_path / f"{seconds}", [saved], db="off", max_steps=4, save_every=3).train()
        assert seen[4] == (known or 3)


def test_all_is_let_go_of_when_nothing_can_be_written_any_more(tmp_path, monkeypatch):
    closed = []

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.engine.metrics.JsonlFile.close", full)
    trainer = trainer_of(tmp_path / "run", db="off")
    begin = trainer.book.open

    def open_then_full(*args):
        begin(*args)
        monkeypatch.setattr("train.engine.run_folder.RunFolder.describe", full)
        trainer.book.trackers.append(SimpleNamespace(close=lambda: closed.append("the last"), log=lambda row: None))

    monkeypatch.setattr(trainer.book, "open", open_then_full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert closed == ["the last"] and not is_held(tmp_path / "run")


def test_a_run_that_dies_before_its_first_checkpoint_stays_one_run_on_wandb(tmp_path, monkeypatch):
    ids = []

    def begin(config, run_dir, run_id, say):
        ids.append(run_id)
        deeds = dict.fromkeys(("log", "complete"), lambda row: None)
        return SimpleNamespace(id=run_id or "new", num_rows=0, close=lambda: None, **deeds)

    monkeypatch.setattr("train.engine.logbook.WandbRun", begin)
    trainer = trainer_of(tmp_path / "run", wandb="offline", db="off")
    monkeypatch.setattr(trainer, "step", lambda window: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer_of(tmp_path / "run", wandb="offline", db="off").train()
    assert ids == [None, "new"]


@pytest.mark.parametrize("service", ["alive", "dead"])
def test_without_a_network_or_without_its_service_wandb_stops_nothing(tmp_path, monkeypatch, capsys, service):
    """As was seen: init gives up after 92 s with a CommError, or at once with a UsageError where nobody logged in."""
    rows, said = [], wandb.errors.CommError("Failed to get resume status: context deadline exceeded\nwhile retrying")

    def init(mode, id, settings, **about):
        if mode == "online" or service == "dead":
            raise said if mode == "online" else ConnectionResetError("Connection lost")
        assert settings.finish_timeout > 0  # 0, the default, is for ever: seen with a server that fell silent
        define = finish = lambda *args, **kwargs: None
        return SimpleNamespace(id="new", starting_step=0, define_metric=define, log=rows.append, finish=finish)

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "init", init)
    assert trainer_of(tmp_path / "run", wandb="online", db="off", max_steps=2, eval_every=2).train().steps == 2
    out, alive = capsys.readouterr().out, service == "alive"
    assert out.count("not reached (Failed to get resume status: context deadline exceeded)") == 1
    assert len(rows) == 3 * alive and out.count("lost (ConnectionResetError: Connection lost)") == 2 * (1 - alive)


def test_a_finished_run_that_could_not_say_so_says_so_the_next_time(tmp_path):
    run_dir = tmp_path / "runs" / "run"
    trainer_of(run_dir, max_steps=2).train()
    write_json(run_dir / "run.json", {**read_json(run_dir / "run.json"), "state": "running"})
    (tmp_path / "runs" / "experiments.db").unlink()
    trainer_of(run_dir, max_steps=2).train()
    assert read_json(run_dir / "run.json")["state"] == "finished"
    with ExperimentDB(tmp_path / "runs" / "experiments.db") as db:
        assert db.get_run(run_dir)["state"] == "finished" and len(db.rows(run_dir)) == 3
