"""The ARC scripts from the command line to their files; what they learn is in RESULTS.md."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import numpy as np
import pytest

from tasks.arc.formats import load_puzzles, read_submission, write_bundle, write_puzzle
from tasks.arc.grid import Pair, Puzzle
from train import arc_ladder, arc_solve
from train.arc import data_of, main, preset_of
from train.champion import ChampionRun
from train.decoder_only import DecoderOnlyRun
from train.encoder_decoder import EncoderDecoderRun
from train.engine.optim import learning_rate

TINY = ["--tiny", "--max_steps", "2", "--cpu", "--wandb", "off", "--no-tensorboard"]


def puzzle(id: str, seed: int, pairs: int = 3) -> Puzzle:
    rng = np.random.default_rng(seed)
    grids = rng.integers(10, size=(pairs + 1, 3, 4), dtype=np.uint8)
    shown = [Pair(grid, grid[::-1].copy()) for grid in grids]
    return Puzzle(id, tuple(shown[1:]), (shown[0],))


@pytest.fixture(scope="module", autouse=True)
def _no_seconds_spent_on_the_machines_speed():
    with pytest.MonkeyPatch.context() as patch:
        for user in ("precision", "summary"):
            patch.setattr(f"train.engine.{user}.matmul_rate", lambda *args, **kwargs: 1e12)
        yield


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("champion") / "run"
    return folder, main(ChampionRun, [*TINY, "--run_dir", str(folder)])


def test_a_run_says_what_was_answered_beside_what_could_be_guessed(champion):
    folder, results = champion
    report = results.report
    assert set(report["context"]) == {"true", "none", "shuffled", "wrong"}
    assert {"examples", "skills", "examples, copy_input"} <= set(report["summary"])
    for part in ("examples", "skills"):
        exact = np.load(folder / "outcomes.npz")[part]
        assert report[part]["exact"] == exact.mean() and len(exact) == report[part]["questions"]
        assert report[part]["exact_low"] <= report[part]["exact"] <= report[part]["exact_high"]
    assert "<svg" in (folder / "gallery.html").read_text(encoding="utf-8")


def test_checkpoints_bear_the_names_of_the_original(champion):
    folder, _ = champion
    named = folder / "checkpoints" / "exp_3_champion"
    names = sorted(link.name for link in named.iterdir())
    assert names[-1] == "last" and all(n.startswith("champion-epoch=") and "-val_loss=" in n for n in names[:-1])
    assert (named / "last" / "model.safetensors").samefile(folder / "checkpoints" / "last" / "model.safetensors")


def test_trial_69_to_the_last_digit():
    run = preset_of(ChampionRun, [])
    assert (run.optimizer, run.betas, run.weight_decay, run.lr) == ("adam", (0.95, 0.999), 0.0, 0.0018498849832733245)
    assert (run.epochs, run.batch_size, run.grad_clip, run.early_stopping_patience, run.seed) == (100, 32, 1.0, 7, 307)
    rates = [learning_rate(run, 175 * epoch, None, 175.0) for epoch in range(7)]
    expected = [1.850e-3, 1.726e-3, 1.388e-3, 9.258e-4, 4.638e-4, 1.256e-4, 1.850e-3]
    assert rates == pytest.approx(expected, rel=1e-3) and rates[0] == 0.0018498849832733245
    floor = run.lr * run.final_lr_ratio
    assert floor == pytest.approx(1.6816632143867157e-06, rel=1e-15)
    shape = run.shape()
    rates = (shape.embedding_dropout, shape.encoder_dropout, shape.decoder_dropout)
    assert rates == (0.16712351989226623, 0.1, 0.014891948478374184)


def test_a_preset_gives_way_to_flags_and_is_read_from_settings(tmp_path):
    ours = preset_of(ChampionRun, ["--preset=tenfold"])
    assert ours.optimizer == "adamw" and ours.shape().rope2d and ours.shape().decoder_dropout == 0
    file = tmp_path / "settings.yaml"
    file.write_text("preset: tenfold\n")
    assert preset_of(ChampionRun, ["--settings", str(file)]) == ours


@pytest.mark.parametrize(
    ("config", "flags", "sentence"),
    [
        (EncoderDecoderRun, ["--context_pairs", "2"], "this model sees none"),
        (ChampionRun, ["--skills", "gravity"], "the skills to learn are"),
        (ChampionRun, ["--data", "x", "--skills", "reflect"], "give one of them"),
        (ChampionRun, ["--perminv", "table", "--fix_zero"], "fix_zero needs perminv canonical"),
        (ChampionRun, ["--val_data", "x"], "goes with --data"),
        (ChampionRun, ["--data", "nowhere"], "neither a file or folder nor a set"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_begins(config, flags, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(config, [*TINY, "--run_dir", str(tmp_path / "run"), *flags])
    assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_puzzles_are_split_by_sorted_id_and_none_is_learned_that_is_scored_on(tmp_path):
    for name in ("all", "turned"):
        (tmp_path / name).mkdir()
    for i in range(5):
        write_puzzle(tmp_path / "all" / f"{i}.json", puzzle(str(i), i))
    run = dataclasses.replace(preset_of(ChampionRun, []), data=str(tmp_path / "all"))
    data = data_of(run)
    assert {e.id[0] for e in data["train"]} == set("0123") and {e.id[0] for e in data["val"]} == {"4"}
    assert len(data["train"]) == 4 * 4  # every pair is a question
    turned = puzzle("another", 2)
    turned = Puzzle("another", *(tuple(Pair(*(np.rot90(g) for g in p)) for p in part) for part in turned[1:]))
    write_puzzle(tmp_path / "turned" / "another.json", turned)
    run = dataclasses.replace(run, val_data=str(tmp_path / "turned"))
    assert {e.id[0] for e in data_of(run)["train"]} == set("0134")
    with pytest.raises(ValueError, match="there is none to learn"):
        data_of(dataclasses.replace(run, data=str(tmp_path / "all" / "2.json")))


def test_grid_size_leaves_out_puzzles_with_larger_grids_in_learning_and_in_scoring(tmp_path, capsys):
    for i in range(10):
        small = puzzle(str(i), i)
        tall = Pair(small.test[0].input, np.ones((7, 1), np.uint8))
        write_puzzle(tmp_path / f"{i}.json", small._replace(test=(tall,)) if i in (3, 8) else small)
    run = dataclasses.replace(preset_of(ChampionRun, []), data=str(tmp_path), grid_size=6)
    data = data_of(run)
    assert {e.id[0] for e in data["train"]} == set("0124567") and {e.id[0] for e in data["val"]} == {"9"}
    assert "7 and 1 of 8 and 2 puzzles to learn and to be scored on are within 6 x 6" in capsys.readouterr().out
    assert len({e.id for e in data_of(dataclasses.replace(run, grid_size=7))["train"]}) == 8 * 4
    with pytest.raises(ValueError, match="leaves 0 and 0 of 8 and 2 puzzles"):
        data_of(dataclasses.replace(run, grid_size=3))


def test_who_wants_no_answers_gets_none(tmp_path):
    results = main(EncoderDecoderRun, [*TINY, "--free_run_at_end", "0", "--run_dir", str(tmp_path / "run")])
    assert "examples" not in results.report and not (tmp_path / "run" / "gallery.html").exists()
    assert (tmp_path / "run" / "checkpoints" / EncoderDecoderRun.experiment / "last").exists()


def test_the_decoder_of_the_original_vocabulary_trains_and_is_told_shapes(tmp_path):
    flags = ["--legacy_vocab", "--loss_on_input", "--run_dir", str(tmp_path / "run")]
    results = main(DecoderOnlyRun, [*TINY, *flags])
    assert "exact_free_run_given_shape" in results.final and "context" not in results.report


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _small_answers(monkeypatch):
    """A model that has learned nothing speaks until it is stopped."""
    monkeypatch.setattr(arc_solve, "solve", partial(arc_solve.solve, max_size=4))


@pytest.fixture
def bundle(tmp_path):
    asked = [puzzle("aaaa", 1), puzzle("bbbb", 2), puzzle("cccc", 3, pairs=1)]
    write_bundle(tmp_path / "challenges.json", tmp_path / "solutions.json", asked)
    return tmp_path / "challenges.json"


def solve(champion, bundle, *flags: str):
    output = bundle.parent / "submission.json"
    arc_solve.main([str(bundle), "-o", str(output), "--checkpoint", str(champion[0]), "--cpu", "--views", "2", *flags])
    return read_submission(output, {p.id: len(p.test) for p in load_puzzles(bundle)})


def test_a_bundle_never_seen_is_answered_in_a_file_that_validates(champion, bundle, monkeypatch):
    (champion[0] / "config.json").write_text("{")  # a checkpoint holds all that a solver needs
    answers = solve(champion, bundle, "--gallery", str(bundle.parent / "gallery.html"))
    assert list(answers) == ["aaaa", "bbbb", "cccc"] and (bundle.parent / "gallery.html").exists()
    assert not (bundle.parent / "submission.json.partial").exists()


def test_an_interrupted_answering_goes_on_where_it_was(champion, bundle, monkeypatch):
    monkeypatch.setattr(arc_solve, "AT_ONCE", 1)
    whole, asked = solve(champion, bundle), []
    candidates = arc_solve.Solver.candidates

    def dies(self, model, puzzles, config):
        asked.extend(p.id for p in puzzles)
        if asked == ["aaaa", "bbbb"]:
            raise KeyboardInterrupt
        return candidates(self, model, puzzles, config)

    monkeypatch.setattr(arc_solve.Solver, "candidates", dies)
    with pytest.raises(KeyboardInterrupt):
        solve(champion, bundle)
    partial = bundle.parent / "submission.json.partial"
    partial.write_text(partial.read_text() + '{"bbbb": [[')  # and in the middle of a line
    again = solve(champion, bundle)
    assert asked == ["aaaa", "bbbb", "bbbb", "cccc"]
    assert json.dumps(again, default=np.ndarray.tolist) == json.dumps(whole, default=np.ndarray.tolist)


def test_answers_of_other_flags_are_not_gone_on_with(champion, bundle, capsys):
    (bundle.parent / "submission.json.partial").write_text('{"views": 7}\n')
    with pytest.raises(SystemExit):
        solve(champion, bundle)
    assert "remove it, or give another -o" in capsys.readouterr().err


def test_training_at_test_time_changes_a_copy_only(champion, bundle):
    solver = arc_solve.load(champion[0], cpu=True)
    before = {name: value.clone() for name, value in solver.model.state_dict().items()}
    config = arc_solve.SolveConfig(puzzles=str(bundle), checkpoint=champion[0], ttt=2, ttt_lr=1e-2)
    shown, alone = puzzle("aaaa", 1), puzzle("cccc", 3, pairs=1)
    adapted = solver.adapted(shown, config).state_dict()
    assert any((adapted[name] != value).any() for name, value in before.items())
    assert all((solver.model.state_dict()[name] == value).all() for name, value in before.items())
    assert solver.adapted(alone, config) is solver.model  # a single demonstration has no other to learn it from


def test_the_ladder_sets_experiments_of_equal_steps_side_by_side(tmp_path):
    root = tmp_path / "ladder"
    flags = [
        "--experiments",
        "encoder_decoder",
        "grid2d",
        "--seeds",
        "2",
        "--free_run",
        "0",
        "--free_run_at_end",
        "2",
        "--run_dir",
        str(root),
    ]
    summary = arc_ladder.main([*TINY, *flags])
    rows = summary["experiments"]
    assert [row["steps"] for row in rows.values()] == [[2, 2], [2, 2]] and set(summary["steps_up"]) == {
        "grid2d over encoder_decoder"
    }
    table = (root / "table.md").read_text(encoding="utf-8")
    assert "± " in table and "equal steps" not in table
    assert arc_ladder.main([*TINY, *flags])["experiments"] == rows  # finished runs are read, not made again
