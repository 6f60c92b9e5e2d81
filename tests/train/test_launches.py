"""The table of launches names all of them, and what trains otherwise than a single process is found out."""

from __future__ import annotations

import pytest

from tests.launches import BATCH, CLIP, LAUNCHES, Run, measures, problems
from tests.train.test_launchers import CONFIGS

SEEN = {"eigenvalues": ["torch.float32"], "products": ["torch.float32"], "peak_bytes": 2**20, "processes": 2}


def run(**changes: float) -> Run:
    rows = [
        {"step": step, "split": "train", "loss": 5.0 / step, "ce_loss": 4.9 / step, "lr": 1e-3 * step, "grad_norm": 2.0}
        for step in (1, 2, 3)
    ]
    rows.append({"step": 3, "split": "val", "loss": 1.7})
    rows[1] |= {name: rows[1][name] + by for name, by in changes.items()}
    return Run(rows, {"items_per_second": 100.0}, [SEEN, SEEN])


def test_every_launch_config_is_in_it_and_every_split_goes_up():
    assert {launch.config for launch in LAUNCHES} == {file.stem for file in CONFIGS}
    assert all(BATCH % (launch.processes * split) == 0 for launch in LAUNCHES for split in launch.splits)


@pytest.mark.parametrize(
    ("other", "processes", "words"),
    [
        (run(loss=1e-6, grad_norm=1e-6), 2, None),
        (run(ce_loss=1e-3), 2, "ce_loss/loss is off by 1.0e-03"),
        (run(loss=float("nan")), 2, "is off by inf"),
        (run(lr=1e-12), 2, "lr is off by 1.0e-12"),  # the schedule is a function of the step, exactly
        (run(grad_norm=-1.0), 2, "grad_norm is off by 1.0e+00"),
        (run(), 1, "2 processes had a part in it"),
        (Run(run().rows[:-1], {}, [SEEN, SEEN]), 2, "is off by inf"),
        (
            Run(run().rows, {}, [SEEN, SEEN | {"eigenvalues": ["torch.bfloat16"]}]),
            2,
            "eigenvalues are ['torch.bfloat16']",
        ),
    ],
)
def test_what_a_launch_does_otherwise_is_named(other, processes, words):
    found = problems(other, run(), processes, "no")
    assert found == [] if words is None else words in " ".join(found), found


def test_gradients_that_are_not_clipped_prove_nothing_about_clipping():
    short = run(grad_norm=CLIP / 2 - 2.0)
    assert problems(short, short, 2, "no") == ["some gradient was too short to be clipped"]


def test_a_row_has_all_columns():
    assert measures(run(lr=0.5), run()).keys() == measures(None, run()).keys()
    assert measures(run(lr=0.5), run())["d_lr"] == "5.0e-01"
