"""Pictures of benchmarks/ops.py's table: for each op the time of every peer, with the 20th and 80th percentile."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, str]


def draw(rows: list[Row], table: Path) -> list[Path]:
    """One picture for each op, beside the table and named after it; of "full" times, for the wrong have none."""
    timed = [row for row in rows if row["mode"] == "full" and row["median_ms"] != "-"]
    paths = []
    for op in dict.fromkeys(row["op"] for row in timed):
        by_case: dict[tuple[str, str], list[Row]] = {}
        for row in (row for row in timed if row["op"] == op):
            by_case.setdefault((row["shape"], row["dtype"]), []).append(row)
        heights = [1.0 + 0.3 * len(case) for case in by_case.values()]
        figure, axes = plt.subplots(
            len(by_case), squeeze=False, figsize=(9, sum(heights)), gridspec_kw={"height_ratios": heights}
        )
        for axis, ((shape, dtype), case) in zip(axes[:, 0], by_case.items(), strict=True):
            bars(axis, case)
            axis.set_title(f"{shape}, {dtype}", fontsize=9)
        axes[-1, 0].set_xlabel("ms, forward and backward (lines: 20 to 80 % of the runs; * see its note in the table)")
        figure.suptitle(f"{op} on {timed[0]['machine']}", fontsize=10)
        figure.tight_layout()
        paths.append(table.with_name(f"{table.stem}-{op}.png"))
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def bars(axis: Axes, rows: list[Row]) -> None:
    rows = sorted(
        {row["peer"]: row for row in rows}.values(), key=lambda row: -float(row["median_ms"])
    )  # fastest on top
    names = [row["peer"] + " *" * bool(row["note"]) for row in rows]
    middle, low, high = ([float(row[key]) for row in rows] for key in ("median_ms", "p20_ms", "p80_ms"))
    spread = [
        [m - p for m, p in zip(middle, low, strict=True)],
        [p - m for m, p in zip(middle, high, strict=True)],
    ]
    colors = ["C1" if name.startswith("tenfold") else "0.6" if name.startswith("ceiling") else "C0" for name in names]
    axis.barh(names, middle, xerr=spread, color=colors, error_kw={"linewidth": 1})
    for index, (value, end) in enumerate(zip(middle, high, strict=True)):
        axis.text(end, index, f"  {value:,.0f}" if value >= 100 else f"  {value:.3g}", va="center", fontsize=8)
    axis.set_xlim(0, 1.12 * max(high))  # bars from 0: as long as what they say
    axis.tick_params(labelsize=8)
