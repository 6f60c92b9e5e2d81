"""train/sweep.py: what is drawn, what a trial's process is, who takes over whose trial, and what bad input is told."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from optuna.trial import TrialState
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from train import sweep as tool
from train import sweep_worker
from train.children import processes_of
from train.engine.experiments import ExperimentDB
from train.engine.run_folder import read_json, write_json
from train.sweep import trial_results
from train.sweep_space import Sweep, distinct, parameter
from train.sweep_worker import Worker, open_study, share

# A script as ours are, in milliseconds. --hold N: trial N waits to be killed the first time, --slow N for SIGTERM.
PROGRAM = """
import argparse, json, os, signal, sys
from pathlib import Path

parser = argparse.ArgumentParser(allow_abbrev=False)
for flag, default in (("lr", 0.1), ("layers", 1), ("hold", -1), ("slow", -1), ("fail", -1)):
    parser.add_argument(f"--{flag}", type=type(default), default=default)
for flag in ("--wandb", "--db", "--run_dir"):
    parser.add_argument(flag, type=Path)
parser.add_argument("--print_config", action="store_true")
flags = parser.parse_args()
if flags.print_config:
    sys.exit(print("lr: 0.1\\nlayers: 1\\nhold: -1"))
run, number = flags.run_dir, int(flags.run_dir.name[-4:])

def about(state):
    (run / "run.json").write_text(json.dumps({"state": state, "started": "2026", "command": "accelerate launch p.py"}))

(run / "config.json").write_text(json.dumps({"lr": flags.lr, "layers": flags.layers}))
about("running")
with (run / "starts").open("a") as file:
    file.write(str(os.getpid()) + " ")
if number == flags.fail:
    about("failed")
    sys.exit("error: this one cannot work")
if number == flags.hold and not (run / "held").exists():
    (run / "held").touch()
    signal.pause()
with (run / "metrics.jsonl").open("w") as file:
    for step in range(5):
        loss = (flags.lr - 0.3) ** 2 + flags.layers + (1 if step else -9)
        file.write(json.dumps({"step": step, "split": "val", "loss": loss, "elapsed": 0.0}) + "\\n")
if number == flags.slow:
    signal.pause()
about("finished")
(run / "results.json").write_text("{}")
"""
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SPEC = {
    "program": "program.py",
    "command": ["${env}", "${interpreter}", "${program}", "${args_no_boolean_flags}"],
    "method": "random",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "parameters": {
        "lr": {"distribution": "log_uniform_values", "min": 0.01, "max": 1.0},
        "layers": {"values": [1, 2, 3]},
    },
}


@pytest.fixture
def begin(tmp_path, monkeypatch, capfd):
    """Run the tool in a folder with the program and a sweep file; returns (status, last line, all that was said)."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, **changes) -> tuple[int, dict | None, str]:
        (tmp_path / "s.yaml").write_text(yaml.safe_dump({**SPEC, **changes}))
        with pytest.raises(SystemExit) as ended:
            tool.main(["s.yaml", "--sweep_dir", "runs/s", *flags])
        out, err = capfd.readouterr()
        last = out.strip().rpartition("\n")[2]
        return ended.value.code, json.loads(last) if last.startswith("{") else None, out + err

    return run


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Queue `count` trials and have a worker in this very process do them; returns its study and folder."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_worker.signal, "signal", lambda *of: None)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *of: None, raising=False)
    folder = tmp_path / "runs" / "s"
    folder.mkdir(parents=True)

    def work(count: int, *extra: str, backend: str = "random", **changes) -> tuple:
        spec = {**SPEC, **changes}
        about = {"spec": spec, "backend": backend, "seed": 0, "extra": extra, "grace": 20, "db": "off"}
        write_json(folder / sweep_worker.SWEEP_FILE, about)
        tool.fill_queue(folder, Sweep.of(spec).points(backend, count, 0))
        Worker(folder, 0, 1).work()
        return open_study(folder), folder

    return work


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_a_grid_is_sampled_all_over_without_repeats_and_more_trials_begin_with_the_same():
    sweep = Sweep.of({**SPEC, "parameters": {"a": {"values": [*range(10)]}, "b": {"min": 0, "max": 9}}})
    points = [tuple(point.values()) for point in sweep.points("grid", 20, seed=3)]
    assert len(set(points)) == 20 and len({a for a, _ in points}) > 5 and len({b for _, b in points}) > 5
    assert [tuple(p.values()) for p in sweep.points("grid", 30, seed=3)][:20] == points
    assert set(distinct(100, 100, seed=1)) == set(range(100)) != set(distinct(100, 99, seed=1))
    assert (
        sweep.points("random", 9, seed=3)[:5] == sweep.points("random", 5, seed=3) != sweep.points("random", 5, seed=4)
    )


@pytest.mark.parametrize(
    ("spec", "middle", "of"),
    [
        ({"min": 1.0, "max": 3.0}, 2.0, float),
        ({"min": 1, "max": 3}, 2, int),
        ({"distribution": "q_uniform", "min": 0, "max": 64, "q": 8}, 32, int),
        ({"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}, 1e-3, float),
        ({"distribution": "log_uniform", "min": math.log(1e-4), "max": math.log(1e-2)}, 1e-3, float),
        ({"distribution": "inv_log_uniform", "min": math.log(1e2), "max": math.log(1e4)}, 1e-3, float),
        ({"distribution": "inv_log_uniform_values", "min": 1e-4, "max": 1e-2}, 1e-3, float),
        ({"distribution": "q_log_uniform_values", "min": 10, "max": 1000, "q": 10}, 100, int),
        ({"distribution": "normal", "mu": 5, "sigma": 0.5}, 5.0, float),
        ({"distribution": "log_normal", "mu": 0, "sigma": 0.5}, 1.0, float),
        ({"distribution": "beta", "a": 2, "b": 2}, 0.5, float),
        ({"values": [1, 5, 9], "probabilities": [0.1, 0.8, 0.1]}, 5, int),
    ],
)
def test_draws_are_of_the_distribution_that_wandb_documents(spec, middle, of):
    p = parameter("x", spec)
    sweep = Sweep.of({**SPEC, "parameters": {"x": spec}})
    drawn = [p.rounded(point["x"]) for point in sweep.points("random", 400, seed=0)]
    assert {type(x) for x in drawn} == {of}
    assert statistics.median(drawn) == pytest.approx(middle, rel=0.25)
    if "q" in spec:
        assert all(x % spec["q"] == 0 for x in drawn)


def test_every_macro_is_filled_in_as_wandb_does(monkeypatch, tmp_path):
    monkeypatch.setenv("CONFIG", "fsdp2.yaml")
    flags = {"lr": 1e-4, "on": True, "off": False, "kind": "a"}
    theirs = create_sweep_command_args({"args": {name: {"value": value} for name, value in flags.items()}})
    for macro in ("args", "args_no_boolean_flags", "args_no_hyphens", "args_no_equals", "args_json"):
        sweep = Sweep.of({**SPEC, "command": ["x", "${envvar:CONFIG}", "${program}", f"${{{macro}}}"]})
        assert sweep.command(flags, tmp_path / "f") == ["x", "fsdp2.yaml", "program.py", *theirs[macro]]
    sweep = Sweep.of({**SPEC, "command": ["${program}", "${args_json_file}"]})
    assert sweep.command(flags, tmp_path / "f.json") == ["program.py", str(tmp_path / "f.json")]
    assert read_json(tmp_path / "f.json") == flags


def test_workers_share_what_there_is_evenly():
    assert [share("0123", w, 2) for w in range(2)] == [["0", "2"], ["1", "3"]]
    assert [share("01", w, 3) for w in range(3)] == [["0"], ["1"], ["0"]]


# ---- the queue -------------------------------------------------------------------------------------------------------


def test_the_trial_of_a_killed_worker_is_run_again_and_none_twice(begin, tmp_path):
    killed = []

    def kill_in_mid_trial() -> None:
        held = tmp_path / "runs" / "s" / "trial-0001" / "held"
        while not held.exists():
            time.sleep(0.02)
        trial = psutil.Process(int((held.parent / "starts").read_text()))
        killed.extend([trial, trial.parent()])
        os.kill(trial.parent().pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_in_mid_trial)
    thread.start()
    status, last, said = begin("--workers", "2", "--trials", "4", "--grace", "2", "--", "--hold", "1")
    thread.join()
    folder = tmp_path / "runs" / "s"
    assert status == 0 and "another takes its place" in said
    assert (last["completed"], last["retried"], last["duplicated"]) == (4, 1, 0)
    assert not any(process.is_running() for process in killed)  # what the dead worker left was ended
    assert [len((folder / f"trial-{n:04d}" / "starts").read_text().split()) for n in range(4)] == [1, 2, 1, 1]
    study = open_study(folder)
    results = trial_results(folder)
    assert study.best_value == last["best"]["value"] == results["val/loss"].min()
    with ExperimentDB(tmp_path / "runs" / "experiments.db") as db:
        best = db.best_run("val/loss", "min", sweep=str(folder))
        assert (best["score"], str(best["run_dir"])) == (study.best_value, last["best"]["run_dir"])
        assert sorted(run["trial"] for run in db.runs(sweep=str(folder), state="finished")) == [0, 1, 2, 3]
    for name in ("trial_results.csv", "importance.png", "parallel.png"):
        assert (folder / name).stat().st_size > 0
    # Another space is refused with the difference, and nothing is lost.
    other = {"lr": {"min": 0.01, "max": 0.5}, "layers": {"values": [1, 2, 3]}}
    status, last, said = begin("--trials", "4", "--", "--hold", "1", parameters=other)
    assert status == 2 and "parameters.lr.max: 1.0 -> 0.5" in said and "--sweep_dir" in said
    assert trial_results(folder).equals(results)


def test_a_finished_folder_is_scored_without_another_run(worker):
    study, folder = worker(2)
    study.enqueue_trial(study.trials[1].params, user_attrs={"number": 1})  # as after a worker that died at the very end
    Worker(folder, 0, 1).work()
    assert study.trials[2].value == study.trials[1].value
    assert len((folder / "trial-0001" / "starts").read_text().split()) == 1


def test_a_trial_whose_process_is_killed_is_put_back(worker, tmp_path):
    def kill() -> None:
        held = tmp_path / "runs" / "s" / "trial-0000" / "held"
        while not held.exists():
            time.sleep(0.02)
        os.kill(int((held.parent / "starts").read_text()), signal.SIGKILL)

    threading.Thread(target=kill).start()
    study, _ = worker(1, "--hold", "0")
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.trials[0].params == study.trials[1].params and study.trials[0].user_attrs["why"] == "killed"


def test_a_failed_trial_is_not_tried_again_before_the_command_is(worker, capsys):
    study, folder = worker(2, "--fail", "0")
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert "trial 0: failed: this one cannot work" in capsys.readouterr().out
    rows = tool.rows(folder)
    assert [row["trial"] for row in rows] == [1, 0] and rows[1]["val/loss"] is None
    tool.fill_queue(folder, [{}, {}])
    waiting = study.trials[-1]
    assert (waiting.state, waiting.user_attrs["number"]) == (TrialState.WAITING, 0)
    assert waiting.system_attrs["fixed_params"] == study.trials[0].params


def test_a_trial_that_falls_behind_is_ended_early(worker):
    """The better of two at the third evaluation stays, and no pruned trial can be better than the best that ended."""
    early = {"type": "hyperband", "min_iter": 3}
    grid = {"lr": {"value": 0.3}, "layers": {"values": [3, 1]}}
    assert [point["layers"] for point in Sweep.of({**SPEC, "parameters": grid}).points("grid", 2, 0)] == [1, 3]
    study, _ = worker(2, "--slow", "1", backend="grid", early_terminate=early, parameters=grid)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert study.trials[0].value == pytest.approx(2.0)  # step 0 had less, and doesn't count
    assert study.trials[0].value < study.trials[1].value


def test_optuna_learns_from_the_trials_before(worker, monkeypatch):
    def without_a_process(self, trial, flags, run_dir) -> None:
        run_dir.mkdir()
        row = {"step": 1, "split": "val", "loss": (flags["lr"] - 0.3) ** 2}
        (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(Worker, "run", without_a_process)
    study, _ = worker(16, backend="optuna", parameters={"lr": {"min": 0.0, "max": 3.0}})
    losses = [trial.value for trial in study.trials]
    assert len(losses) == 16 and statistics.median(losses[10:]) < statistics.median(losses[:10])


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": {}}, "unknown key metrics (did you mean metric?)"),
        ({"metric": None}, "metric is missing"),
        ({"metric": {"name": "loss"}}, "as val/loss"),
        ({"metric": {"name": "val/loss", "goal": "minimise"}}, "minimize or maximize, not minimise"),
        ({"method": "bayesian"}, "unknown method bayesian (did you mean bayes?)"),
        ({"command": ["${program}", "${arg}"]}, "unknown macro ${arg} (did you mean args?)"),
        ({"early_terminate": {"type": "hyperband", "min_iters": 3}}, "min_iters (did you mean min_iter?)"),
        ({"parameters": {"lr": {"min": 2.0, "max": 1.0}}}, "min must be less than max, and 2.0 is not less than 1.0"),
        ({"parameters": {"lr": {"minimum": 2.0}}}, "unknown key minimum"),
        ({"parameters": {"lr": {"distribution": "log_unifrom", "min": 1, "max": 2}}}, "did you mean log_uniform?"),
        ({"parameters": {"lr": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, "more than 0"),
        ({"parameters": {"lr": {"distribution": "log_uniform_values", "min": 1}}}, "add max"),
        ({"parameters": {"lr": {"min": "1e-3", "max": 1.0}}}, "YAML reads 1e-3 as text; write min: 1.0e-3"),
        ({"parameters": {"lr": {"values": [[1, 2]]}}}, "no value of one flag"),
        ({"parameters": {"lr": 3}}, "must be a mapping, as {value: 3}"),
        ({"parameters": {"a": {"parameters": {}}}}, "nested"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(changes, said):
    with pytest.raises(ValueError) as caught:
        Sweep.of({**SPEC, **changes})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_searched_is_said_before_the_first_trial(begin, tmp_path, monkeypatch):
    for flags, changes, sentence in (
        ([], {}, "give --trials, or run_cap"),
        (["--backend", "grid"], {}, "lr has no end of values"),
        (["--trials=0", "--workers=0"], {}, "--workers must be at least 1, not 0; --trials must be at least 1"),
        (
            ["--trials=2"],
            {"parameters": {"layres": {"value": 1}}},
            "program.py has no flag --layres (did you mean layers?)",
        ),
        (["--trials=2", "--", "--run_dir=x"], {}, "--run_dir=x is what a sweep decides"),
        (["--trials=2"], {"program": "prgram.py"}, "prgram.py is not there"),
    ):
        status, last, said = begin(*flags, **changes)
        assert status == 2 and last is None and sentence in said and said.count("\n") == 1, said
        assert not (tmp_path / "runs" / "s" / "sweep.json").exists()
    monkeypatch.setattr(tool, "has_wandb_credentials", lambda: False)
    assert "wandb login" in begin("--backend", "wandb")[2]


def test_a_metric_that_no_row_has_ends_the_sweep_at_the_first_rows(worker, tmp_path):
    with pytest.raises(sweep_worker.SweepBroken, match=r"no row of .* has a val/los, only val/loss \(did you mean"):
        worker(3, "--slow", "0", metric={"name": "val/los", "goal": "minimize"})
    assert not processes_of(tmp_path / "runs" / "s" / "trial-0000")


def test_the_wandb_backend_registers_the_file_and_starts_agents(monkeypatch, begin):
    registered, started = [], []
    monkeypatch.setattr(tool, "has_wandb_credentials", lambda: True)
    monkeypatch.setattr("wandb.sweep", lambda spec, **of: registered.append((spec, of)) or "abc123")
    process = lambda words, env: started.append(words) or SimpleNamespace(wait=lambda: 0)
    monkeypatch.setattr(tool.subprocess, "Popen", process)
    status, _, _ = begin("--backend", "wandb", "--workers", "2", "--trials", "9", "--", "--tiny")
    [(spec, of)] = registered
    assert status == 0 and of["project"] == "tenfold" and spec["run_cap"] == 9
    assert spec["command"] == [*SPEC["command"], "--tiny"] and spec["parameters"] == SPEC["parameters"]
    assert [words[1:] for words in started] == [["-m", "wandb", "agent", "--project", "tenfold", "abc123"]] * 2


@pytest.mark.slow
def test_a_real_script_is_searched_by_two_workers(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    flags = ["--workers", "2", "--trials", "4", "--sweep_dir", str(tmp_path / "runs" / "s")]
    with pytest.raises(SystemExit) as ended:
        tool.main(["sweeps/language.yaml", *flags, "--", "--tiny", "--max_steps", "20", "--cpu"])
    last = json.loads(capfd.readouterr().out.strip().rpartition("\n")[2])
    assert ended.value.code == 0 and (last["completed"], last["duplicated"]) == (4, 0)
    with ExperimentDB(tmp_path / "runs" / "experiments.db") as db:
        best = db.best_run("val/bits_per_byte", "min", sweep=str(tmp_path / "runs" / "s"), state="finished")
    assert best["score"] == last["best"]["value"]
