"""The benchmarks run, at sizes that take seconds, and compare what they say they compare."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from benchmarks import language, language_speed
from benchmarks.language_peers import MODELS, OURS, build_model, count_parameters
from benchmarks.language_quality import Ledger, Recipe, Run, batches, interval
from benchmarks.language_speed import Device, flops_per_token, peak_memory_apart, take_turns
from models.ten import PRESETS

PEERS = [*OURS, "gpt2", "llama", "llama_wide", "llama_our_head"]
NEEDS_TRANSFORMERS = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")


@pytest.fixture(autouse=True)
def _one_thread():
    """At these sizes a second thread only waits, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("preset", ["nano", pytest.param("medium", marks=pytest.mark.slow)])
@pytest.mark.parametrize("classes", [257, pytest.param(50257, marks=pytest.mark.slow)])
def test_all_models_have_as_many_parameters(preset, classes):
    base = dataclasses.replace(PRESETS[preset], vocab_size=classes)
    # The meta device takes ten seconds more once inductor has been loaded: for models that don't fit otherwise.
    with torch.device("cpu" if preset == "nano" else "meta"):
        counts = {name: count_parameters(build_model(name, base, 1024)) for name in PEERS}
    assert max(counts.values()) <= 1.01 * min(counts.values()), counts
    assert counts["ten"] == counts["hten"]


@NEEDS_TRANSFORMERS
def test_a_peer_that_comes_in_no_such_size_is_refused():
    base = dataclasses.replace(language.TINY, d_model=64, num_layers=1, d_ff=8, num_eigenstates=2)
    with pytest.raises(ValueError, match="parameters"):
        build_model("llama", base, 32)


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("name", [n for n in MODELS if n in PEERS])
def test_every_model_scores_and_decodes_alike(name):
    """The loss is that of the logits, and a step after a prefill gives the logits of the whole sequence."""
    model = build_model(name, language.TINY, 32).eval()
    tokens = torch.randint(257, (2, 17), generator=torch.Generator().manual_seed(0))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    with torch.no_grad():
        logits = model(inputs)["logits"]
        losses = model(inputs, labels=labels)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(losses.get("ce_loss", losses["loss"]), expected)
        _, state = model.prefill(inputs[:, :-1], *([] if name in OURS else [8]))
        torch.testing.assert_close(model.step(inputs[:, -1], state)[0], logits[:, -1], atol=1e-4, rtol=1e-4)


@NEEDS_TRANSFORMERS
def test_flops_are_counted_in_full():
    """An attention costs more at greater length, by its causal half; a TEN costs the same."""
    for name, grows in (("ten", False), ("llama", True)):
        model = build_model(name, language.TINY, 64)
        short, long = (flops_per_token(name, model, language.TINY, n) for n in (32, 64))
        weights = 6 * count_parameters(model)  # of the tied embedding once: a lookup is no matmul
        assert long == pytest.approx(weights, rel=0.2)
        # Per token, layer and direction (backward twice): two products with half of the 32 more positions.
        per_layer = 3 * 2 * 2 * language.TINY.d_model * 32 / 2
        assert (long - short) / per_layer == (pytest.approx(model.inner.config.num_hidden_layers) if grows else 0)


def test_turns_are_taken():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = take_turns(runs, Device(), seconds=0.0)
    assert "".join(order) == "abcbcacab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}


@NEEDS_TRANSFORMERS
def test_speed_and_decoding_have_a_row_for_every_model(tmp_path, monkeypatch):
    monkeypatch.setattr(language_speed, "MATMUL_SIZE", {"cpu": 64})
    table = tmp_path / "speed.csv"
    common = "--tiny --vocab bytes --seconds 0 --peers ten hten llama mamba2"
    rows = language.main(f"speed {common} --lengths 8 16 --tokens 32 --csv {table}".split())
    assert [row["peer"] for row in rows] == ["ten", "hten", "llama", "mamba2", "matmul"] * 2
    for row in rows:
        measured = row["peer"] in ("ten", "hten", "llama")
        assert (row["tokens_per_s"] != "-") == (row["share"] != "-") == measured
        assert measured or "n/a: " in row["note"] or "ceiling" in row["note"]
    assert len(table.read_text().splitlines()) == 1 + len(rows)
    rows = language.main(f"decode {common} --prompts 4 16".split())
    assert [row["T"] for row in rows] == ["4"] * 4 + ["16"] * 4
    assert "x the cost at 4" in rows[4]["note"]


def test_quality_compares_and_does_not_repeat_what_it_finds(tmp_path, capsys):
    command = f"quality --tiny --peers ten ten_no_energy --tokens 768 --seeds 0 1 --lr 1e-3 --csv {tmp_path}/runs.csv"
    rows = language.main(command.split())
    first = capsys.readouterr().out
    assert [row["peer"] for row in rows[:2]] == ["ten", "ten_no_energy"]
    assert float(rows[0]["difference"]) == 0 and "…" in rows[1]["interval_95"]
    assert all(4 < float(row["bits_per_byte"]) < 9 for row in rows)
    assert first.count(" bits per byte, ") == 2 * (1 + 2)  # a sweep of one rate and two seeds for each model
    assert language.main(command.split()) == rows
    assert " bits per byte, " not in capsys.readouterr().out


def test_a_seed_fixes_the_order_and_a_change_of_the_recipe_is_another_run():
    recipe = Recipe(language.TINY, "bytes", 2, Device(), 1, tiny=True)
    task = recipe.task()
    one, again, other = (next(batches(task, 2, seed))["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    ledger, run = Ledger(None, recipe, {}), Run("ten", 1e-3, 0, 512)
    ledger.add(run, {"bits_per_byte": "1"})
    assert ledger.find(run) is not None
    assert ledger.find(dataclasses.replace(run, lr=2e-3)) is None
    ledger.recipe = dataclasses.replace(recipe, batch_size=4)
    assert ledger.find(run) is None


def test_the_interval_is_students():
    assert interval(torch.tensor([1.0, 2.0, 3.0])) == "-0.4843 … +4.4843"  # 2 ± 4.303 / sqrt(3)
    assert interval(torch.ones(1)) == "-"


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("speed --lengths 512 -1", "--lengths must be above 0"),
        ("quality --seeds 1 1", "--seeds must be at most 10 different numbers"),
        ("decode --peers gpt5", "invalid choice: 'gpt5'"),
    ],
)
def test_bad_input_is_a_sentence(command, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        language.main(command.split())
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_that_of_the_model_asked_for():
    small, large = (
        peak_memory_apart("ten", dataclasses.replace(language.TINY, d_ff=d_ff), Device(), 1, 16) for d_ff in (64, 65536)
    )
    # Two layers of two matrices, each with gradient and two moments, in fp32.
    assert large - small == pytest.approx(2 * 2 * 64 * (65536 - 64) * 16, rel=0.3)
