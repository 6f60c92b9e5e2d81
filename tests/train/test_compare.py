"""train/compare.py against scripts that learn nothing but say what a run says, in milliseconds."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from train import children, compare
from train.compare import CompareConfig, grid_of, main, names_of, parse_budget
from train.compare_report import pairs, sign_flip
from train.engine.config import ConfigError
from train.engine.metrics import read_rows
from train.engine.run_folder import read_json

ROOT, LAUNCH = children.ROOT, compare.LAUNCH
# A script whose loss is (log10 lr - log10 of its best)^2 + its own floor + a little for the seed.
SCRIPT = """
import argparse, fcntl, json, math, os, signal, sys
from pathlib import Path

p = argparse.ArgumentParser()
for name, kind, value in (("lr", float, 1e-2), ("seed", int, 0), ("best_lr", float, 1e-2), ("floor", float, 1.0),
                          ("monitor", str, "loss"), ("corpus", str, "a"), ("breaks_above", float, 9.0),
                          ("max_steps", int, 0), ("max_minutes", float, 0), ("epochs", str, ""),
                          ("run_dir", Path, None), ("hold", str, "")):
    p.add_argument("--" + name, type=kind, default=value)
p.add_argument("--print_config", action="store_true")
flags = p.parse_args()
if flags.print_config:
    print(json.dumps({"lr": flags.lr, "best_lr": flags.best_lr, "floor": flags.floor, "batch_size": 8, "seq_len": 4}))
    sys.exit()
with open("calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + chr(10))
out = flags.run_dir
lock = (out / "lock").open("w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("error: another process is training here")
if out.name == flags.hold and not (out / "held").exists():  # the first time, waits to be killed
    (out / "pid").write_text(str(os.getpid()))
    (out / "pid").rename(out / "held")
    signal.pause()
data = {"corpus_sha256": flags.corpus, "tokenizer_sha256": str(flags.floor)}
facts = {"monitor": flags.monitor, "mode": "min", "data": data, "command": "accelerate launch toy.py"}
if flags.lr > flags.breaks_above:
    facts |= {"state": "failed", "error": "TrainingBroken: the losses leapt"}
(out / "facts").write_text(json.dumps(facts))
(out / "facts").rename(out / "run.json")  # which may be read at any time
if flags.lr > flags.breaks_above:
    sys.exit(2)
loss = (math.log10(flags.lr) - math.log10(flags.best_lr)) ** 2 + flags.floor + 0.01 * flags.seed
row = {"step": flags.max_steps, "split": "val", flags.monitor: loss, "elapsed": 1.0}
(out / "metrics.jsonl").write_text(json.dumps(row) + chr(10))
(out / "config.json").write_text("{}")
if flags.seed:
    import numpy as np

    solved = np.random.default_rng(flags.seed).random(200) > 0.4 * flags.floor
    np.savez(out / "outcomes.npz", solved=solved, gaps=[np.nan] * 9)
(out / "results.json").write_text(json.dumps({"steps": flags.max_steps, "parameters": 7, "seconds": 1.0,
    "items_per_second": 3.0, "item_name": "toys", "stopped_by": "max_steps", "final": {flags.monitor: loss}}))
"""
A, B = "toy.py --floor 1 --best_lr 1e-3", "toy.py --floor 2 --best_lr 1e-1"
USUAL = ["--budget", "640tokens", "--tune", "lr=1e-4:1e-1", "--trials", "4", "--seeds", "3", "--compare_dir", "out"]


@pytest.fixture(autouse=True)
def _scripts(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "LAUNCH", [sys.executable])
    monkeypatch.setattr(compare, "POLL", 0.02)


def calls() -> list[str]:
    return Path("calls.txt").read_text().splitlines()


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_equal_budget_tuning_seeds_and_what_they_come_to(capsys):
    main([A, B, *USUAL])
    found = read_json(Path("out/results.json"))
    first, second = found["candidates"].values()
    assert (first["tuned_to"], second["tuned_to"]) == (1e-3, 1e-1)  # each its own best of one grid
    assert found["seeds"] == [1, 2, 3] and first["scores"] == pytest.approx([1.01, 1.02, 1.03])
    made = [dict(zip(w[::2], w[1::2], strict=True)) for w in (c.replace("=", " ").split() for c in calls())]
    assert {call["--max_steps"] for call in made} == {"20"}  # 640 tokens at 8 items of 4
    tried = {floor: [c["--lr"] for c in made if c["--seed"] == "0" and c["--floor"] == floor] for floor in "12"}
    assert tried["1"] == tried["2"] == ["0.0001", "0.001", "0.01", "0.1"]
    assert [call["--floor"] for call in made[:4]] == ["1", "2", "1", "2"]  # they take turns
    (pair,) = found["pairs"]
    assert pair["difference"] == pytest.approx(-1.0) and pair["half_interval"] == pytest.approx(0.0, abs=1e-9)
    assert pair["p"] == 0.25  # the least that three seeds can show
    assert set(pair["items"]) == {"solved"} and pair["items"]["solved"]["interval"][0] > 0
    said = capsys.readouterr().out
    assert "is better" in said and "an end of the grid" in said and "below 0.25" in said
    assert Path("out/comparison.png").stat().st_size > 10_000 and Path("out/table.md").read_text() in said

    before = len(calls())
    shutil.rmtree(next(Path("out").glob("*/seed-2")))
    main([A, B, *USUAL])
    assert len(calls()) == before + 1 and read_json(Path("out/results.json"))["pairs"] == found["pairs"]


# ---- killed ----------------------------------------------------------------------------------------------------------


def started(*words: str) -> int:
    """The process id of a fork that compares."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            main(words)
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        finally:
            os._exit(status)
    return child


def killed_once(there: Path, number: int, *words: str) -> int:
    """Start a comparison, send it the signal as soon as a file is `there`, and return how it ended."""
    child = started(*words)
    while not (there.exists() and there.stat().st_size):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_same_command_goes_on_after_sigterm_and_sigkill_and_runs_nothing_twice():
    words = [A, B, "--budget", "20steps", "--seeds", "2", "--compare_dir", "out", "--", "--hold", "seed-2"]
    first, second = (Path("out") / name / "seed-2" / "held" for name in names_of([A.split(), B.split()]))
    assert killed_once(first, signal.SIGTERM, *words) == 75
    assert not psutil.pid_exists(int(first.read_text()))
    assert killed_once(second, signal.SIGKILL, *words) == -signal.SIGKILL
    assert psutil.pid_exists(int(second.read_text()))  # nobody could tell it, and it has the lock
    main(words)
    made = [
        (w[w.index("--floor") + 1], w[w.index("--seed") + 1]) for w in (c.replace("=", " ").split() for c in calls())
    ]
    assert made == [("1", "1"), ("2", "1"), ("1", "2"), ("1", "2"), ("2", "2"), ("2", "2")]  # the held ones again
    scores = [c["scores"] for c in read_json(Path("out/results.json"))["candidates"].values()]
    assert scores == [pytest.approx([2.01, 2.02]), pytest.approx([3.01, 3.02])]


def test_a_second_comparison_in_the_folder_is_refused_and_ends_nothing(capsys):
    words = [A, B, "--budget", "20steps", "--seeds", "1", "--compare_dir", "out"]
    with children.held(Path("out"), "compare"):
        assert "another compare.py runs in" in refused(capsys, *words)
    assert not Path("calls.txt").exists()


def test_a_process_that_ends_while_it_is_being_ended_is_no_error(monkeypatch, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(gone.pid)
    gone.wait()
    monkeypatch.setattr(children, "processes_of", lambda run_dir: [process])
    children.end(tmp_path)


@pytest.mark.slow
def test_real_scripts_come_to_the_same_when_the_comparison_was_killed(monkeypatch, tmp_path):
    """Once by SIGTERM, which the run is passed; once by SIGKILL, which leaves it running."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compare, "LAUNCH", LAUNCH)
    flags = ["--tiny", "--cpu", "--wandb=off", "--db=off", "--log_every=1", "--eval_every=50", "--save_every=10"]
    two = ["train/nano.py", "train/nano.py --use_hten", "--budget", "100steps", "--seeds", "1", "--compare_dir"]
    whole, cut = ([*two, str(tmp_path / name), "--", *flags] for name in ("whole", "cut"))
    main(whole)
    first, second = (tmp_path / "cut" / name / "seed-1" / "metrics.jsonl" for name in ("nano", "use_hten"))
    assert killed_once(first, signal.SIGTERM, *cut) == 75
    assert read_json(first.with_name("run.json"))["state"] == "interrupted"
    assert killed_once(second, signal.SIGKILL, *cut) == -signal.SIGKILL
    main(cut)
    for name in ("nano", "use_hten"):
        rows, as_whole = (read_rows(tmp_path / n / name / "seed-1" / "metrics.jsonl") for n in ("cut", "whole"))
        assert [(r["step"], r["split"], r["loss"]) for r in rows] == [
            (r["step"], r["split"], r["loss"]) for r in as_whole
        ]
    scores = [read_json(tmp_path / name / "results.json")["candidates"] for name in ("whole", "cut")]
    assert [c["scores"] for c in scores[0].values()] == [c["scores"] for c in scores[1].values()]


# ---- what is no comparison -------------------------------------------------------------------------------------------


def test_what_diverges_has_had_its_trial(capsys):
    short = [*USUAL[:4], "--trials", "2", "--seeds", "1", "--compare_dir"]
    main([A + " --breaks_above 5e-2", B, *short, "out"])
    found = read_json(Path("out/results.json"))
    scores = [trial["score"] for trial in next(iter(found["tuning"].values()))]
    assert scores[-1] is None and None not in scores[:-1]
    assert any("diverged in 1 of its 2 trials" in note for note in found["notes"])
    assert "a single seed says nothing" in capsys.readouterr().out
    assert "diverged with every value" in refused(capsys, A + " --breaks_above 1e-9", B, *short, "other")


@pytest.mark.parametrize("flags, fact", [("--monitor gap", "monitor"), ("--corpus b", "data.corpus_sha256")])
def test_what_cannot_be_compared_is_refused_at_the_second_run(capsys, flags, fact):
    said = refused(capsys, A, f"{B} {flags}", *USUAL)
    assert "cannot be compared" in said and fact in said and len(calls()) == 2


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([A, B, "--budget", "10"], "--budget must be a number and one of"),
        ([A, "--budget", "10m"], "needs two scripts"),
        ([A, A, "--budget", "10m"], "two candidates are the same"),
        ([A, "gone.py", "--budget", "10m"], "gone.py is not there"),
        ([A, B, "--budget", "10m", "--tune", "lrr"], "no flag --lrr (did you mean lr?)"),
        ([A, B, "--budget", "10m", "--tune", "lr=1:0.1"], "from a number above 0 to a larger one"),
        ([A, B + " --lr 1", "--budget", "10m", "--tune", "lr"], "--lr is what a comparison decides"),
        ([A, B + " --max-steps 1", "--budget", "10m"], "--max_steps is what a comparison decides"),
        ([A, B + " --what 1", "--budget", "10m"], "is refused: "),
        ([A, B, "--budget", "10m", "--seeds", "17"], "--seeds must be from 1 to 16"),
    ],
)
def test_bad_input_is_told_in_a_sentence_before_any_run(capsys, words, sentence):
    assert sentence in refused(capsys, *words, "--compare_dir", "out")
    assert not Path("calls.txt").exists()


def test_a_folder_of_another_comparison_is_refused(capsys):
    Path("out").mkdir()
    compare.prepare(Path("out"), {"budget": "10m", "seeds": 3})
    compare.prepare(Path("out"), {"budget": "10m", "seeds": 3})
    with pytest.raises(ConfigError, match="seeds: 3 -> 5"):
        compare.prepare(Path("out"), {"budget": "10m", "seeds": 5})


def test_a_script_that_trains_two_models_is_no_candidate(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds 2 runs"):
        compare.own_folder(tmp_path / "run")


def test_names_budgets_and_grids():
    assert names_of([["m.py", "--models", "poh"], ["m.py", "--models", "baseline"]]) == ["poh", "baseline"]
    assert names_of([["train/nano.py"], ["train/nano.py", "--use_hten"]]) == ["nano", "use_hten"]
    assert names_of([["a.py", "--x", "1"], ["b.py", "--x", "1"]]) == ["a", "b"]
    assert parse_budget("1e15flops") == (1e15, "flops") and parse_budget("90s") == (90, "s")
    config = CompareConfig(candidates=("a", "b"), budget="1m", tune="lr", trials=3)
    both = [compare.Candidate(n, n, (), {"lr": lr}, ()) for n, lr in (("a", 1e-3), ("b", 1e-1))]
    name, values = grid_of(config, both)
    assert name == "lr" and values == pytest.approx([1e-3 / 10**0.5, 1e-2, 1e-1 * 10**0.5], rel=1e-3)


def test_data_are_known_by_their_hashes_and_without_any_by_how_they_are_made():
    text = {"corpus_sha256": "x", "tokenizer_sha256": "y", "vocab_size": 3}
    assert compare.identity(text) == {"data.corpus_sha256": "x"}
    assert compare.identity({"hash": {"train": 1}, "kind": 2}) == {"data.hash.train": 1}
    assert compare.identity({"suite": "perfect-5", "val": 3}) == {"data.suite": "perfect-5", "data.val": 3}


def test_the_sign_test_counts_every_way_to_swap():
    rng = np.random.default_rng(0)
    for n in (1, 4, 7):
        x = rng.normal(0.3, 1, n)
        flipped = [abs(np.dot(signs, x)) for signs in itertools.product((1, -1), repeat=n)]
        assert sign_flip(x.tolist()) == np.mean(np.array(flipped) >= abs(x.sum()) - 1e-12)
    # Under no difference p is at most a half half of the time: the negative control of a p that is always small.
    often = np.mean([sign_flip(rng.normal(0, 1, 6).tolist()) <= 0.5 for _ in range(300)])
    assert 0.4 < often < 0.6


def test_pairs_are_corrected_for_how_many_there_are(tmp_path):
    runs = {n: [{"score": s + k, "run_dir": str(tmp_path)} for s in (0.0, 0.1, 0.2)] for k, n in enumerate("abc")}
    found = pairs(runs)
    assert len(found) == 3 and all(pair["p"] == 0.25 and pair["p_holm"] == 0.75 for pair in found)
    assert json.dumps(found)
