"""The promises of the loop: exact accumulation, exact resume, steps that would do harm, and what ends a run."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from tests.toy import ToyModel, ToyTask
from train.engine import ConfigError
from train.engine.guard import TrainingBroken
from train.engine.run_folder import read_json, write_json
from train.engine.summary import plot_curves


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.inner.parameters()])


# ---- accumulation ----------------------------------------------------------------------------------------------------


def test_any_split_into_micro_batches_gives_the_same_weights_and_rows(make_trainer, rows):
    seen = []
    for micro in (8, 3, 1):
        trainer = make_trainer(f"micro{micro}", micro_batch_size=micro, dropout=0.0, optimizer="sgd", lr=0.1)
        trainer.train()
        seen.append((weights(trainer), [r["energy_loss"] for r in rows(trainer.run_dir) if r["split"] == "train"]))
    for other, energies in seen[1:]:
        torch.testing.assert_close(other, seen[0][0], atol=1e-6, rtol=0)
        assert energies == pytest.approx(seen[0][1], abs=1e-6)


def test_a_model_that_averages_by_itself_fails_the_same_check(make_trainer, monkeypatch):
    forward = ToyModel.forward
    monkeypatch.setattr(
        ToyModel, "forward", lambda self, tokens, labels=None, num_items=None: forward(self, tokens, labels)
    )
    seen = []
    for micro in (8, 1):
        trainer = make_trainer(f"micro{micro}", micro_batch_size=micro, dropout=0.0, optimizer="sgd", lr=0.1)
        trainer.train()
        seen.append(weights(trainer))
    assert (seen[0] - seen[1]).abs().max() > 1e-3


# ---- resume ----------------------------------------------------------------------------------------------------------


class KillAt(ToyTask):
    """Sends this process SIGTERM when the items of a step are counted for the n-th time."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def num_items(self, batch):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().num_items(batch)


EXACT = dict(micro_batch_size=3, ema_decay=0.9, log_every=3, eval_every=4, save_every=5, num_workers=0)


def test_an_interrupted_run_resumes_bit_for_bit(make_trainer, rows):
    whole = make_trainer("whole", **EXACT)
    whole.train()
    for micro_step in (4, 17):  # inside step 2, inside step 6
        name = f"cut{micro_step}"
        cut = make_trainer(name, task=KillAt(micro_step), **EXACT)
        with pytest.raises(SystemExit) as stopped:
            cut.train()
        assert stopped.value.code == 75
        assert read_json(cut.run_dir / "run.json")["state"] == "interrupted"
        resumed = make_trainer(name, **EXACT)
        resumed.train()
        assert rows(resumed.run_dir) == rows(whole.run_dir)
        assert torch.equal(weights(resumed), weights(whole))
        for mine, theirs in zip(resumed.ema.parameters(), whole.ema.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert resumed.progress.best == whole.progress.best


def test_a_hard_kill_goes_back_to_the_checkpoint_and_metrics_follow(make_trainer, rows):
    whole = make_trainer("whole", **EXACT)
    whole.train()

    class Crash(ToyTask):
        calls = 0

        def num_items(self, batch):
            self.calls += 1
            if self.calls == 26:  # step 9: rows and evaluations after the checkpoint at step 8 are on disk
                raise KeyboardInterrupt
            return super().num_items(batch)

    with pytest.raises(KeyboardInterrupt):
        make_trainer("crashed", task=Crash(), **EXACT).train()
    resumed = make_trainer("crashed", **EXACT)
    resumed.train()
    assert rows(resumed.run_dir) == rows(whole.run_dir)
    assert torch.equal(weights(resumed), weights(whole))


def test_when_one_evaluates_changes_no_weight(make_trainer):
    seldom, often = make_trainer("seldom", eval_every=12), make_trainer("often", eval_every=1)
    seldom.train()
    often.train()
    assert torch.equal(weights(seldom), weights(often))


def test_resume_from_another_run_starts_where_it_was(make_trainer):
    first = make_trainer("first", max_steps=6, schedule="constant")
    first.train()
    second = make_trainer("second", max_steps=8, schedule="constant", resume=str(first.run_dir))
    results = second.train()
    assert results.steps == 8 and second.run_dir != first.run_dir


def test_another_number_of_processes_is_refused(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.backend.world_size = 2
    with pytest.raises(ConfigError, match=r"by 1 process\(es\) and this launch has 2"):
        trainer.snapshot.read(trainer.run_dir / "checkpoints" / "last")


def test_a_damaged_checkpoint_is_named_and_passed_over(make_trainer, capsys):
    trainer = make_trainer(eval_every=4, max_steps=12)
    trainer.train()
    (trainer.run_dir / "results.json").unlink()
    last = (trainer.run_dir / "checkpoints" / "last").resolve()
    data = bytearray((last / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (last / "model.safetensors").write_bytes(data)
    make_trainer(eval_every=4, max_steps=12).train()
    out = capsys.readouterr().out
    assert "model.safetensors is damaged" in out and "resumed     after step 8" in out
    links = [p for p in (trainer.run_dir / "checkpoints").iterdir() if p.is_symlink()]
    assert links and all(link.exists() for link in links)


def test_a_score_that_is_not_finite_is_never_the_best(make_trainer, monkeypatch):
    monkeypatch.setattr(ToyTask, "evaluate", lambda self, predict: {"accuracy": float("nan")})
    trainer = make_trainer(max_steps=2)
    assert trainer.train().best == {} and (trainer.run_dir / "checkpoints" / "last").exists()


def test_best_checkpoints_are_kept_and_the_rest_pruned(make_trainer):
    trainer = make_trainer(eval_every=1, max_steps=12)
    trainer.train()
    folder = trainer.run_dir / "checkpoints"
    best = [read_json(folder / f"best-{i}" / "trainer.json")["step"] for i in (1, 2, 3)]
    assert best == [e["step"] for e in trainer.progress.best]
    scores = [e["score"] for e in trainer.progress.best]
    assert scores == sorted(scores, reverse=True)
    assert len(list(folder.glob("step-*"))) <= 4


def test_a_resumed_run_stays_in_the_precision_it_began_in(make_trainer, monkeypatch):
    monkeypatch.setattr("train.engine.backend.choose_precision", lambda asked, device: ("bf16", "measured"))
    assert make_trainer(mixed_precision="auto").backend.precision == "bf16"
    make_trainer(mixed_precision="auto", max_steps=1).train()
    monkeypatch.setattr("train.engine.backend.choose_precision", lambda asked, device: ("no", "measured"))
    assert make_trainer(mixed_precision="auto").backend.precision == "bf16"
    assert make_trainer("other", mixed_precision="auto").backend.precision == "no"


# ---- who may write where ---------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_changed_settings_are_refused(make_trainer, capsys):
    first = make_trainer()
    results = first.train()
    assert make_trainer().train() == results
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"lr: 0.01 -> 0.02"):
        make_trainer(lr=2e-2).train()
    with pytest.raises(ConfigError, match="already holds a run"):
        make_trainer(resume="never").train()


def test_a_second_run_in_the_folder_is_refused(make_trainer):
    def start_another(trainer, row):
        with pytest.raises(ConfigError, match="another process is training in"):
            make_trainer().train()

    make_trainer(hooks=[start_another], max_steps=1).train()


def test_a_hook_is_told_of_every_checkpoint(make_trainer):
    class Saved:
        def __call__(self, trainer, row):
            pass

        def saved(self, trainer):
            steps.append((trainer.progress.step, trainer.snapshot.checkpoints.newest(print).name))

    steps = []
    make_trainer(hooks=[Saved()], max_steps=6, eval_every=3, save_every=2).train()
    assert [step for step, _ in steps][-1] == 6 and (2, "step-00000002") in steps


def test_the_lock_dies_with_its_process_though_a_child_lives(make_trainer):
    children = []

    def fork(trainer, row):
        children.append(os.fork())
        if children[-1] == 0:
            signal.pause()

    first = make_trainer(hooks=[fork], max_steps=1)
    try:
        first.train()
        (first.run_dir / "results.json").unlink()
        make_trainer(max_steps=1).train()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_folder_that_cannot_be_written_is_a_sentence(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        make_trainer("file/run").train()


def test_a_checkpoint_of_another_shape_is_refused(make_trainer, monkeypatch, tmp_path):
    make_trainer("first", max_steps=2).train()
    monkeypatch.setattr("tests.toy.ToyModel.__init__", _wider(ToyModel.__init__))
    for _ in range(2):  # the refused run left nothing behind that would refuse the next
        with pytest.raises(ConfigError, match="does not fit this model"):
            make_trainer("second", resume=str(tmp_path / "first")).train()


def _wider(init):
    def build(self, dropout):
        init(self, dropout)
        self.head = torch.nn.Linear(16, 7)

    return build


def test_a_full_disk_loses_no_earlier_checkpoint(make_trainer, monkeypatch):
    trainer = make_trainer(eval_every=3, max_steps=9)
    written = torch.save

    def full_at_step_6(value, path):
        if "00000006" in str(path):
            raise OSError(28, "No space left on device")
        written(value, path)

    monkeypatch.setattr(torch, "save", full_at_step_6)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert read_json(trainer.run_dir / "run.json")["state"] == "failed"
    monkeypatch.undo()
    assert make_trainer(eval_every=3, max_steps=9).train().steps == 9


# ---- harmful steps ---------------------------------------------------------------------------------------------------


class Poisoned(ToyModel):
    """Its loss is NaN or huge in the given calls."""

    def __init__(self, calls: dict[int, float]) -> None:
        super().__init__()
        self.calls, self.count = calls, 0

    def forward(self, tokens, labels=None, num_items=None):
        out = super().forward(tokens, labels, num_items)
        if labels is not None and not isinstance(tokens, FakeTensor):
            self.count += 1
            out["loss"] = out["loss"] * self.calls.get(self.count, 1.0)
        return out


def poison(trainer, calls):
    trainer.inner.__class__ = type("P", (Poisoned,), {})
    trainer.inner.calls, trainer.inner.count = calls, 0
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])  # skipped on the device, and by being read
def test_a_step_that_is_not_finite_is_skipped_and_counted(make_trainer, rows, optimizer):
    seen = []
    trainer = poison(make_trainer(optimizer=optimizer, log_every=1), {5: float("nan")})
    step = trainer.step
    trainer.step = lambda window: seen.append(weights(trainer)) or step(window)
    results = trainer.train()
    assert results.skipped_steps == 1 and torch.equal(seen[4], seen[5])
    assert not torch.equal(seen[3], seen[4]) and torch.isfinite(weights(trainer)).all()
    assert [r["skipped"] for r in rows(trainer.run_dir) if r["split"] == "train"].index(1) == 4


def test_a_leap_of_the_loss_is_skipped_once_there_is_a_history(make_trainer):
    trainer = poison(make_trainer(max_steps=60, log_every=10), {3: 1e6, 50: 1e6})
    assert trainer.train().skipped_steps == 1  # the one at step 50; at step 3 nothing is known yet


def test_stop_and_rewind(make_trainer, rows, capsys):
    with pytest.raises(TrainingBroken, match=r"step 4 .*newest sound checkpoint: .*step-00000003"):
        poison(make_trainer("stop", bad_step="stop", eval_every=3), {5: float("nan")}).train()
    trainer = poison(make_trainer("rewind", bad_step="rewind", eval_every=3), {5: float("nan")})
    results = trainer.train()
    assert trainer.progress.banned_steps == [4] and results.steps == 12 and results.skipped_steps == 1
    steps = [r["step"] for r in rows(trainer.run_dir) if r["split"] == "train"]
    assert steps == sorted(set(steps))
    assert "going on from step 3" in capsys.readouterr().out


def test_nothing_but_bad_steps_ends_the_run(make_trainer):
    trainer = poison(make_trainer(max_steps=60), dict.fromkeys(range(3, 60), float("inf")))
    with pytest.raises(TrainingBroken, match="steps were all skipped"):
        trainer.train()


# ---- what ends a run -------------------------------------------------------------------------------------------------


def test_early_stopping(make_trainer):
    trainer = make_trainer(max_steps=50, eval_every=1, early_stopping_patience=3, lr=1e-9)
    results = trainer.train()
    assert results.stopped_by == "early_stopping" and results.steps == 4


def test_plan_exits_by_whether_it_fits(make_trainer, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as fits:
        make_trainer(plan=True)
    monkeypatch.setattr("train.engine.plan.free_memory", lambda device: 1000)
    with pytest.raises(SystemExit) as too_big:
        make_trainer(plan=True)
    assert (fits.value.code, too_big.value.code) == (0, 1)
    assert "does not fit" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_results_and_report_say_what_happened(make_trainer):
    trainer = make_trainer()
    results = trainer.train()
    on_disk = read_json(trainer.run_dir / "results.json")
    assert on_disk["steps"] == 12 and on_disk["stopped_by"] == "max_steps" and on_disk["final"] == results.final
    assert on_disk["parameters"] == sum(p.numel() for p in trainer.inner.parameters())
    assert on_disk["items_per_second"] > 0 and on_disk["ceiling_items_per_second"] > on_disk["items_per_second"]
    assert (trainer.run_dir / "metrics.csv").read_text().startswith("step,split,")


def test_the_plot_shows_parts_scores_and_floors(make_trainer):
    trainer = make_trainer()
    trainer.train()
    plot_curves(trainer.run_dir, {"chance": 0.2}, "accuracy")
    assert (trainer.run_dir / "plots" / "loss.png").stat().st_size > 10_000


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json") == {"a": 1}
