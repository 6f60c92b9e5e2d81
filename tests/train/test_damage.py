"""Files that were damaged, disks that are full, and files that would run code: nothing that was written before is lost.

`python tests/faults.py` does to the real scripts what this does to the toy.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
import random
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch

from models.ten import TEN
from tests.chaos_compare import differences
from tests.faults import KINDS, cut_back, damage, damageable, judge
from tests.toy import ToyModel
from train.engine import ConfigError
from train.engine.checkpoint import Checkpoints, load_state, load_weights
from train.engine.experiments import ExperimentDB
from train.engine.run_folder import MANIFEST, RunFolder, crc32, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
RUN = dict(max_steps=6, eval_every=2, log_every=1, ema_decay=0.5)
HERE = ["config.json", "run.json", "metrics.jsonl", "metrics.csv", "results.json", "experiments.db"]
LINKS = ["checkpoints/last", "checkpoints/best-1"]
SAVED = ["model.safetensors", "ema.safetensors", "optimizer.pt", "rank-0.pt", "trainer.json", MANIFEST]
SAVED += ["run/config.json", "run/run.json", "run/metrics.jsonl"]
FILES = [*HERE, *LINKS, *(f"checkpoints/step-00000004/{name}" for name in SAVED)]
# All of them are tried; without --slow each kind of damage once, and every file.
SHORT = [(file, list(KINDS)[i % len(KINDS)]) for i, file in enumerate(FILES)]
# What needs no sentence: it is made anew, and nothing goes on from it.
SILENT = ("metrics.csv", "last", "best-1", "run/", "experiments.db")
# A row behind the checkpoint, a fact that nothing reads, and results that the run makes in any case.
UNNOTICED = (("metrics.jsonl", "flipped"), ("run.json", "flipped"), ("results.json", "removed"))


@pytest.fixture
def whole(make_trainer, tmp_path) -> Path:
    """A run that nothing befell; its database lies in its folder."""
    trainer = make_trainer("whole", db=str(tmp_path / "whole" / "experiments.db"), **RUN)
    trainer.train()
    return trainer.run_dir


def go_on(make_trainer, run_dir: Path, capsys) -> tuple[int, str]:
    """(exit status, output) of the same command in `run_dir`, as a script would have it."""
    capsys.readouterr()
    try:
        make_trainer(run_dir.name, db=str(run_dir / "experiments.db"), **RUN).train()
    except (ValueError, OSError) as error:  # `sentences` makes these an exit
        return 2, capsys.readouterr().out + f"error: {error}"
    return 0, capsys.readouterr().out


# ---- one file at a time ----------------------------------------------------------------------------------------------


def test_these_are_all_files_of_a_run_folder(whole):
    cut = whole.with_name("cut")
    cut_back(whole, cut)
    other = {"checkpoints/best-2", "checkpoints/best-3", ".lock"}
    assert {*damageable(cut), "results.json"} - other == set(FILES)


@pytest.mark.parametrize(
    "tries", [pytest.param(SHORT, id="short"), pytest.param([*product(FILES, KINDS)], id="all", marks=pytest.mark.slow)]
)
def test_a_run_goes_on_exactly_whatever_file_is_damaged(whole, tries, make_trainer, capsys):
    for number, (file, kind) in enumerate(tries):
        copy = whole.with_name(f"damaged{number}")
        if file == "results.json":
            shutil.copytree(whole, copy, symlinks=True)
        else:
            cut_back(whole, copy)
        damage(copy / file, kind, random.Random(number))
        status, output = go_on(make_trainer, copy, capsys)
        outcome, said = judge(whole, copy, file, status, output)
        assert outcome == "exact", (file, kind, output[-500:])
        silent = any(word in file for word in SILENT) or (file, kind) in UNNOTICED
        assert silent or said, (file, kind, output[:500])
        shutil.rmtree(copy)


def test_any_bit_of_a_checkpoint_is_missed(whole):
    checkpoint = (whole / "checkpoints" / "last").resolve()
    assert Checkpoints.damage(checkpoint) is None
    chance, files = random.Random(0), [f for f in checkpoint.rglob("*") if f.is_file()]
    for file in files * 25:
        sound = file.read_bytes()
        damage(file, "flipped", chance)
        found = Checkpoints.damage(checkpoint)
        assert found is not None and (file.name in found or file.name == MANIFEST), (file, found)
        file.write_bytes(sound)


def test_where_no_checkpoint_is_sound_nothing_is_overwritten(whole, make_trainer, capsys):
    cut_back(whole, cut := whole.with_name("cut"))
    for model in cut.glob("checkpoints/step-*/model.safetensors"):
        damage(model, "flipped", random.Random(0))
    rows = (cut / "metrics.jsonl").read_bytes()
    status, output = go_on(make_trainer, cut, capsys)
    assert status == 2 and "is sound; give a new --run_dir, or remove that folder" in output
    assert (cut / "metrics.jsonl").read_bytes() == rows and len(list(cut.glob("checkpoints/step-*"))) > 1


def test_results_without_a_checkpoint_to_make_them_anew_are_refused(whole, make_trainer, capsys):
    shutil.rmtree(whole / "checkpoints")
    damage(whole / "results.json", "flipped", random.Random(0))
    rows = (whole / "metrics.jsonl").read_bytes()
    status, output = go_on(make_trainer, whole, capsys)
    assert status == 2 and "results.json is damaged" in output and (whole / "metrics.jsonl").read_bytes() == rows


def test_a_damaged_row_of_the_database_is_a_sentence(tmp_path):
    with ExperimentDB(tmp_path / "experiments.db") as db:
        db.log_run(tmp_path / "run", script="toy", config={}, command="toy")
        db.connection.execute("UPDATE runs SET config = '{\"lr'")
        with pytest.raises(ConfigError, match=r"damaged where it tells of run.*runs\.py import run"):
            db.runs()


# ---- processes that die while they save ------------------------------------------------------------------------------


def write_checkpoint(checkpoints: Checkpoints, step: int, text: str) -> None:
    aside = checkpoints.begin(step)
    (aside / "trainer.json").write_text(text)
    checkpoints.seal(aside, [])


class Died(BaseException):
    pass


@pytest.mark.parametrize("again", [True, False])
def test_a_save_that_dies_anywhere_leaves_the_old_checkpoint_or_the_new(make_trainer, tmp_path, monkeypatch, again):
    """At every rename, flush and deletion. again: of a step that has a checkpoint, as after a rewind."""
    for n in range(40):
        run_dir = tmp_path / f"run{n}"
        checkpoints, config = Checkpoints(run_dir / "checkpoints"), make_trainer(f"run{n}").config
        RunFolder(run_dir, config).release()
        write_checkpoint(checkpoints, 2, "old")
        left = n

        def dies(call):
            def counted(*args, **kwargs):
                nonlocal left
                if left == 0:
                    raise Died
                left -= 1
                return call(*args, **kwargs)

            return counted

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (os, "unlink"), (os, "rmdir")):
                patch.setattr(owner, name, dies(getattr(owner, name)))
            try:
                write_checkpoint(checkpoints, 2 if again else 3, "new")
                died = False
            except Died:
                died = True
        RunFolder(run_dir, config).release()
        found = checkpoints.newest(print)
        assert found is not None and (found / "trainer.json").read_text() in ("old", "new")
        write_checkpoint(checkpoints, 2 if again else 3, "newest")  # what died before is in nobody's way
        assert (checkpoints.newest(print) / "trainer.json").read_text() == "newest"
        assert [p.name for p in checkpoints.folder.iterdir() if p.name.startswith(".")] == []
        if not died:
            break
    assert n > 10 and not died


def test_a_folder_that_was_copied_without_its_links_goes_on(whole, make_trainer, capsys):
    cut_back(whole, cut := whole.with_name("cut"))
    for link in LINKS:
        target = (cut / link).resolve()
        (cut / link).unlink()
        if target.exists():
            shutil.copytree(target, cut / link)
        else:
            (cut / link).mkdir()
    assert go_on(make_trainer, cut, capsys)[0] == 0 and differences(whole, cut) == []


# ---- full disks ------------------------------------------------------------------------------------------------------


class Disk:
    """From the n-th time on that something reaches the disk, nothing does."""

    def __init__(self, n: int, number: int) -> None:
        self.left, self.number, self.fsync = n, number, os.fsync

    def __call__(self, handle: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        self.fsync(handle)


def writes(make_trainer, monkeypatch) -> int:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk := Disk(10**6, errno.ENOSPC))
        make_trainer("counted", **RUN).train()
    return 10**6 - disk.left


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_or_read_only_from_some_write_on_loses_nothing(make_trainer, monkeypatch, rows, every):
    number = writes(make_trainer, monkeypatch)
    whole = make_trainer("counted").config.run_dir
    for n in range(1, number, every):
        full = make_trainer(f"full{n}", **RUN)
        reason = (errno.ENOSPC, errno.EROFS)[n % 2]
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", Disk(n, reason))
            with pytest.raises((OSError, ConfigError), match=os.strerror(reason)) as stopped:
                full.train()
        assert str(full.run_dir) in str(stopped.value)  # a sentence that says which file
        make_trainer(f"full{n}", **RUN).train()  # in the same process: the lock was let go of
        assert differences(whole, full.run_dir, database=False) == [], n
        assert [f.name for f in full.run_dir.iterdir() if f.name.startswith(".") and f.name != ".lock"] == []


def test_a_row_that_cannot_be_written_names_its_file(make_trainer):
    trainer = make_trainer(
        "full", **RUN, hooks=[lambda trainer, row: os.dup2(full, trainer.book._jsonl._file.fileno())]
    )
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match=r"metrics\.jsonl could not be written: No space left on device"):
        trainer.train()
    os.close(full)
    assert make_trainer("full", **RUN).train().steps == RUN["max_steps"]


# ---- files that would run code ---------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture
def bomb(tmp_path) -> Bomb:
    yield Bomb(tmp_path / "exploded")
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_is_one(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_no_file_of_a_checkpoint_runs_code(whole, bomb, make_trainer, capsys):
    for file in ("optimizer.pt", "rank-0.pt", "model.safetensors", "trainer.json"):
        cut_back(whole, cut := whole.with_name(f"cut-{file}"))
        checkpoint = max((cut / "checkpoints").glob("step-*"))
        torch.save({"launch": bomb}, checkpoint / file)
        sums = read_json(checkpoint / MANIFEST) | {file: [(checkpoint / file).stat().st_size, crc32(checkpoint / file)]}
        write_json(checkpoint / MANIFEST, sums)  # by somebody who knows how to seal
        status, output = go_on(make_trainer, cut, capsys)
        assert status == 2 and f"error: {checkpoint / file} " in output


def test_no_way_to_load_weights_runs_code(bomb, tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors"):
        file = tmp_path / name
        torch.save(bomb, file)
        with pytest.raises(ConfigError, match=name):
            load_state(file)
        with pytest.raises(ConfigError, match=name):
            load_weights(ToyModel(), file)
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 8}))
        with pytest.raises(ValueError, match="does not hold a TEN"):
            TEN.from_pretrained(tmp_path)
        file.unlink()


def test_every_load_says_that_it_wants_weights_only():
    for file in [
        f for floor in ("train", "tasks", "models", "kernels", "benchmarks") for f in (ROOT / floor).rglob("*.py")
    ]:
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert name != "torch.load" or keywords.get("weights_only") == "True", f"{file}:{call.lineno}"
            assert keywords.get("allow_pickle", "False") == "False", f"{file}:{call.lineno}"
            assert name not in ("pickle.load", "pickle.loads", "joblib.load"), f"{file}:{call.lineno}"


def test_a_run_killed_between_its_last_checkpoint_and_the_links_has_them_anew(make_trainer, whole, tmp_path, capsys):
    """The links are as the save before left them, and there is no save after it to move them."""
    run_dir = tmp_path / "killed"
    shutil.copytree(whole, run_dir, symlinks=True)
    before = {link: os.readlink(run_dir / link) for link in LINKS}
    for link in LINKS:
        (run_dir / link).unlink()
        (run_dir / link).symlink_to("step-00000002")
    (run_dir / "results.json").unlink()
    assert go_on(make_trainer, run_dir, capsys)[0] == 0
    assert {link: os.readlink(run_dir / link) for link in LINKS} == before
