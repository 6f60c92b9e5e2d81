"""train/report.py: what stands on the page, and that a browser shows it without a word of complaint."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from train.engine.config import ConfigError
from train.report import find, main, report
from train.report_page import chart, shown, thinned, ticks

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROWS = [
    {"step": 0, "split": "val", "loss": 3.0, "elapsed": 0.1},
    {"step": 1, "split": "train", "loss": 2.9, "ce_loss": 2.5, "lr": 0.1, "elapsed": 0.2},
    {"step": 2, "split": "train", "loss": float("nan"), "ce_loss": 2.0, "lr": 0.05, "elapsed": 0.3},
    {"step": 2, "split": "val", "loss": 2.25, "elapsed": 0.4},
]
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def runs(make_run_folder) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folders = []
    for name, lr in (("one", 0.1), ("two", 0.2)):
        folder = make_run_folder(
            f"toy/{name}", ROWS, {"lr": lr, "prompt": EVIL}, command=f"python toy.py --name {name}"
        )
        for part in ("plots", "samples"):
            (folder / part).mkdir()
        plt.imsave(folder / "plots" / "loss.png", [[0.0, 1.0], [1.0, 0.0]])
        (folder / "samples" / "step-2.txt").write_text(f"def f(): {EVIL}" + "x" * 5000)
        folders.append(folder)
    return folders


class Tags(HTMLParser):
    """Every tag is closed in its turn; what the page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.fetched, self.seen = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href", "srcset")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_holds_scores_curves_settings_pictures_samples_and_commands(runs, tmp_path, capsys):
    main([*map(str, runs), "-o", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    tags = Tags(text)
    assert "script" not in tags.seen and EVIL not in text and "&lt;script&gt;" in text
    assert tags.fetched and all(address.startswith("data:") for address in tags.fetched)
    assert tags.seen.count("img") == 2 and tags.seen.count("svg") == 3  # validation loss, loss, ce_loss
    for held in ("toy/one", "python toy.py --name two", "2.25", "def f()", "characters more"):
        assert held in text, held
    differ = text.split("Settings that differ")[1].split("<details>")[0]
    assert "<td" in differ and "lr" in differ and "prompt" not in differ

    main([str(runs[0])])
    alone = (runs[0] / "report.html").read_text(encoding="utf-8")
    assert "Settings that differ" not in alone and "training lr" in alone


def test_runs_are_found_below_a_folder_and_told_apart(runs, make_run_folder, tmp_path):
    assert [run.name for run in find([tmp_path / "toy"])] == ["one", "two"]
    assert [run.name for run in find([runs[0], tmp_path / "toy"])] == ["one", "two"]
    (empty,) = find([make_run_folder("toy/empty", state="running")])
    assert empty.state == "dead"
    report([empty.folder])  # no row yet


def test_bad_input_is_told_in_a_sentence(runs, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        report([tmp_path / "gone"])
    (runs[0] / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        report(runs)


def test_charts_lose_no_spike_and_their_marks_are_round():
    points = [(float(k), 1.0) for k in range(5000)]
    points[1234] = (1234.0, 99.0)
    kept = thinned(points)
    assert len(kept) <= 500 and (1234.0, 99.0) in kept and kept == sorted(kept)
    for low, high in ((0, 1), (0.37, 0.41), (-3, 12_345), (1e-9, 2e-9)):
        marks = ticks(low, high)
        assert 4 <= len(marks) <= 9 and marks[0] <= low + 1e-12 and marks[-1] >= high * (1 - 1e-9)
    assert chart("nothing finite", {"a": [(1, float("nan"))]}) == ""
    drawn = chart("level", {"a": [(0, 2.0), (5, 2.0)]})
    places = [float(n) for n in re.findall(r"[\d.]+", re.search(r'class="c0" d="([^"]+)"', drawn)[1])]
    assert all(0 <= place <= 420 for place in places)
    assert [shown(v) for v in (None, True, 12, 123456, 0.123456, 1e-7)] == [
        "–",
        "True",
        "12",
        "123,456",
        "0.12346",
        "1e-07",
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_it_wide_and_narrow_and_has_nothing_to_say(runs, tmp_path):
    page = report(runs, tmp_path / "page.html")
    # Measured from around it: in how wide a frame does it lie, and how wide is what lies there?
    frames = "".join(f'<iframe src="page.html" width="{width}" height="800"></iframe>' for width in (360, 1280))
    script = (
        "onload = () => { document.title = [...document.querySelectorAll('iframe')].map(f => { const d = "
        "f.contentDocument; return d.documentElement.scrollWidth + '/' + d.documentElement.clientWidth + '/' + "
        "[...d.images].filter(i => i.naturalWidth > 0).length }).join(' ') }"
    )
    (tmp_path / "around.html").write_text(f"<html><body>{frames}<script>{script}</script></body></html>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    words = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*words, str(tmp_path / "around.html")], capture_output=True, text=True, timeout=240)
    measured = [tuple(map(int, m.split("/"))) for m in re.search("<title>(.*?)</title>", done.stdout)[1].split()]
    assert [width <= room and images == 2 for width, room, images in measured] == [True, True], measured
    assert "CONSOLE" not in done.stderr, done.stderr
    assert page.exists()
