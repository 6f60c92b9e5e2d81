"""The maze scripts from the command line: every model beside floors and oracle, resume, and one maze's answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.maze_transformer import MazeTransformerConfig
from models.parity import flops, parameters
from tasks.maze import formats
from tasks.maze.generate import Suite, sample
from train.engine.run_folder import read_json
from train.maze import MazeRun, configs

TINY = "--tiny --max_steps 2 --wandb off --cpu --run_dir run"


def test_models_are_trained_tested_and_set_beside_floors_and_oracle(run_command, tmp_path):
    flags = "--ent_anneal --route_ent_weight 5e-4 --position rope2d --test_sizes 6 --rollout_mazes 2"
    command = f"accelerate launch train/maze_12x12.py {TINY} --models baseline poh {flags}"
    status, output = run_command(command)
    assert status == 0, output
    for said in (
        "poh, walls zeroed |",
        "| wall follower |",
        "| oracle |",
        "| oracle, perfect-6 |",
        "re-encoded (2 mazes)",
        "beats the baseline:",
        "warm-up     0 steps",
    ):
        assert said in output, said
    results = read_json(tmp_path / "run" / "results.json")
    assert set(results["models"]) == {"baseline", "poh"} and results["oracle"]["optimal"] == 1
    assert {"random", "random_no_revisits", "manhattan", "wall_follower"} == set(results["floors"])
    for name, row in results["models"].items():
        assert row["steps"] == [2] and set(row["walls_zeroed"]) == set(row["test_sizes"]["6"]) < set(row["test"])
        with np.load(tmp_path / "run" / f"{name}-seed0" / "outcomes.npz") as kept:
            assert kept["success"].shape == kept["size6_success"].shape == (32,)
            assert np.isfinite(kept["reencode_success"]).sum() == 2
    lengths = results["by_length"]
    assert sum(row["mazes"] for row in lengths) == 32 and {"poh", "wall_follower"} < set(lengths[0]["success"])
    mean = sum(row["mazes"] * row["success"]["poh"]["mean"] for row in lengths) / 32
    assert mean == pytest.approx(results["models"]["poh"]["test"]["success"]["mean"])
    routing = read_json(tmp_path / "run" / "poh-seed0" / "routing.json")
    assert np.shape(routing["mean"]) == np.shape(routing["deviation"]) == (1, 4, 2)  # blocks, refinements, heads
    assert np.sum(routing["mean"], -1) == pytest.approx(1.0, abs=1e-5)
    for picture in ("scores.png", "by_length.png", "poh-seed0/plots/routing.png"):
        assert (tmp_path / "run" / picture).exists()
    assert not (tmp_path / "run" / "baseline-seed0" / "routing.json").exists()

    status, output = run_command(command)
    assert status == 0 and output.count("is finished") == 2
    assert read_json(tmp_path / "run" / "results.json") == results

    (tmp_path / "run" / "poh-seed0" / "run.json").write_text("{")  # a checkpoint holds all that a solver needs
    status, output = run_command("python train/maze_solve.py run/poh-seed0 --index 3 --write maze.txt")
    assert status == 0 and (tmp_path / "maze.png").exists(), output
    drawn = (tmp_path / "maze.txt").read_text()
    assert drawn.count("S") == drawn.count("G") == 1
    assert drawn in output.replace("o", " ")


def test_mazes_of_ones_own_are_learned_and_solved_by_mlmu_too(run_command, tmp_path):
    for split, count in (("train", 30), ("test", 6)):
        formats.write_hrm(tmp_path / "mine", split, sample(Suite("randwall-6"), split, torch.arange(count))[0])
    status, output = run_command(f"accelerate launch train/maze.py {TINY} --models mlmu --data mine --eval_every 2")
    assert status == 0, output
    results = read_json(tmp_path / "run" / "results.json")
    assert results["data"] == "mine" and results["test_mazes"] == 6 and results["oracle"]["success"] == 1
    scores = results["models"]["mlmu"]["test"]
    assert {"success", "optimal", "spl", "exact_grid", "shortest_path_grid", "illegal_moves"} <= set(scores)
    data = read_json(tmp_path / "run" / "mlmu-seed0" / "run.json")["data"]
    assert data["train"] == 14 and data["val"] == 16 and data["test_in_train"] == 0
    assert run_command("python train/maze_solve.py run/mlmu-seed0 --index 5")[0] == 0
    status, output = run_command("python train/maze_solve.py run/mlmu-seed0 --index 6")
    assert status == 2 and "there are test mazes 0 to 5" in output


def test_all_models_of_a_run_have_one_length(run_command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "length.json").write_text('{"max_steps": 2, "warmup_steps": 0}')
    command = "accelerate launch train/maze_12x12.py --tiny --wandb off --cpu --run_dir run --models baseline"
    status, output = run_command(f"{command} poh --max_steps 4")
    assert status == 2 and "begun with 2 steps each, not 4" in output


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--size small", "name those to compare with --sizes"),
        ("--suite perfect-8 --maze_size 12", "--maze_size 12 and --suite perfect-8 both name the mazes"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(run_command, tmp_path, flags, sentence):
    status, output = run_command(f"accelerate launch train/maze_scaling.py --run_dir run --wandb off {flags}")
    assert status == 2 and sentence in output
    assert not (tmp_path / "run").exists()


def test_sizes_come_together_in_one_plot(run_command, tmp_path, monkeypatch):
    made = []

    def train_all(run, root):
        root.mkdir(parents=True)
        made.append((run.size, run.suite, root.name, run.max_minutes))
        score = {"mean": 0.5, "half_interval": None}
        row = {"test": {"success": score, "optimal": score}, "parameters": len(made)}
        return {"models": {"baseline": row, "poh": row}}

    monkeypatch.setattr("train.maze.train_all", train_all)
    status, output = run_command(
        "accelerate launch train/maze_scaling.py --run_dir run --sizes tiny small --max_minutes 9"
    )
    assert status == 0, output
    assert made == [("tiny", "perfect-16", "tiny", 4.5), ("small", "perfect-16", "small", 9.0)]
    assert (tmp_path / "run" / "scaling.png").exists()
    assert list(read_json(tmp_path / "run" / "results.json")) == ["tiny", "small"]


@pytest.mark.parametrize("match", ["parameters", "flops"])
def test_every_model_costs_what_the_baseline_does(match):
    names = ("baseline", "poh", "looped", "deep", "poh_depth3", "trm", "mlmu")
    shapes = configs(MazeRun(models=names, match=match), 12)
    cost = parameters if match == "parameters" else flops
    for name in ("poh", "looped", "poh_depth3", "trm", "mlmu"):
        assert cost(shapes[name]) == pytest.approx(cost(shapes["baseline"]), rel=0.01), name
    assert flops(shapes["deep"]) == pytest.approx(flops(shapes["poh"]), rel=0.01)
    assert shapes["poh_depth3"].num_layers == 3 and shapes["poh"].num_layers == 4


def test_legacy_is_the_originals_pair():
    shapes = configs(MazeRun(legacy=True, models=("baseline", "poh")), 12)
    assert [parameters(shapes[name]) for name in ("baseline", "poh")] == [7_210_896, 7_040_825]
    assert isinstance(shapes["baseline"], MazeTransformerConfig)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--suite perfect-2", "N must lie in 3..100"),
        ("--suite maze", "no maze suite is called 'maze'"),
        ("--ent_anneal", "--ent_anneal has nothing to anneal"),
        ("--models", "--models needs at least one model"),
        ("--models poh poh", "--models names one twice"),
        ("--legacy --models trm", "--legacy has the original's models only"),
        ("--test_sizes 16 20", "--test_sizes needs --position rope2d"),
        ("--test_sizes 2 --position rope2d", "N must lie in 3..100"),
        ("--data mine --suite perfect-8", "--data brings its own mazes"),
        ("--data mine", "neither train.csv nor train/"),
        ("--multi_horizon 4 --seeds 0", "--multi_horizon must be 1, 2 or 3"),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_nothing(run_command, tmp_path, flags, sentence):
    status, output = run_command(f"accelerate launch train/maze_12x12.py --run_dir run --wandb off {flags}")
    assert status == 2 and sentence in output
    assert not (tmp_path / "run").exists()
