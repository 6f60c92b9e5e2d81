"""The same comparison over sizes from half a million to a hundred million parameters, on 16 x 16 mazes.

accelerate launch train/maze_scaling.py --sizes tiny small --max_minutes 60
accelerate launch train/maze_scaling.py --maze_size 16 --train 1000 --test 100 --epochs 50 --R 4 --T 4 --seed 42 \
    --lr 1e-3 --label-smoothing 0.1 --warmup-steps 2000 --multi-horizon 3 --validity-mask \
    --route-ent-weight 5e-4 --ent-anneal --output runs/as_documented
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from train.engine import parse
from train.engine.processes import process_state
from train.engine.run_folder import default_run_dir, write_json
from train.engine.script import sentences
from train.maze import MazeRun, train_all
from train.maze_report import draw_scaling


@dataclass(frozen=True, kw_only=True)
class ScalingRun(MazeRun):
    """Flags of the scaling script; --max_minutes is shared out evenly over the sizes."""

    sizes: tuple[Literal["tiny", "small", "medium", "large", "xl"], ...] = ("tiny", "small", "medium")
    # N of perfect-N, where --suite names nothing else.
    maze_size: int = 16
    suite: str | None = None  # type: ignore[assignment]

    warmup_steps: int = 2000
    multi_horizon: int = 3
    maze_enc: bool = True
    route_ent_weight: float = 5e-4

    def problems(self) -> list[str]:
        found = []
        if self.size != MazeRun.size:
            found.append(f"--size {self.size} is one size; name those to compare with --sizes")
        if self.suite is not None and self.maze_size != ScalingRun.maze_size:
            found.append(f"--maze_size {self.maze_size} and --suite {self.suite} both name the mazes; give one of them")
        if self.data is not None and self.maze_size != ScalingRun.maze_size:
            found.append(f"--maze_size {self.maze_size} and --data {self.data} both name the mazes; give one of them")
        made = MazeRun.suite if self.data is not None else f"perfect-{self.maze_size}"
        named = dataclasses.replace(self, suite=self.suite or made)
        return found + super(ScalingRun, named).problems()

    def filled_in(self) -> ScalingRun:
        return super(ScalingRun, dataclasses.replace(self, suite=self.suite or f"perfect-{self.maze_size}")).filled_in()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    with sentences():
        run = parse(ScalingRun, argv, fill=ScalingRun.filled_in)
        root, minutes = run.run_dir or default_run_dir(), run.max_minutes
        summaries = {}
        for number, size in enumerate(run.sizes, 1):
            # The clock counts from the start of the process: each size may use the time of those before it too.
            share = None if minutes is None else minutes * number / len(run.sizes)
            summaries[size] = train_all(dataclasses.replace(run, size=size, max_minutes=share), root / size)
        if process_state(run).is_main_process:
            write_json(root / "results.json", summaries)
            draw_scaling(root / "scaling.png", summaries)
    return summaries


if __name__ == "__main__":
    main()
