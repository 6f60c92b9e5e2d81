"""Solve one maze with a trained run: its answer as text, and as a picture beside the shortest way.

    python train/maze_solve.py runs/maze_12x12/RUN/poh-seed0 --maze maze.txt
    python train/maze_solve.py RUN --index 7                       # test maze 7 of the suite that the run learned
    python train/maze_solve.py RUN --index 7 --write maze.txt      # writes that maze as a file to change

A maze file is a drawing: # walls, spaces, S and G; tasks/maze/formats.py says more. The picture goes to --output.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from models.maze_layers import MazeModel
from models.mlmu import MLMU
from tasks.maze.distance import distances
from tasks.maze.draw import draw_mazes
from tasks.maze.files import MazeFiles
from tasks.maze.formats import as_text, read_text, write_text
from tasks.maze.generate import Suite, sample
from tasks.maze.grid import Mazes, exits, marked
from tasks.maze.rollout import next_cells, said
from tasks.maze.score import greedy, start_distance
from tasks.maze.targets import moves_to_score
from train.engine import ConfigError
from train.engine.checkpoint import find_checkpoint, load_weights
from train.engine.run_folder import read_json, weights_of
from train.engine.script import sentences
from train.maze import KINDS


@dataclass(frozen=True, kw_only=True)
class SolveConfig:
    """Flags of train/maze_solve.py."""

    # Folder of one model of a run, as RUN/poh-seed0, or a folder in its checkpoints/.
    run: Annotated[Path, tyro.conf.Positional]
    maze: Path | None = None
    # Test maze of the run's own suite, where no --maze is given.
    index: int = 0
    # Write the maze as a drawing too.
    write: Path | None = None
    output: Path = Path("maze.png")


def load(run: Path) -> tuple[MazeModel, Suite | MazeFiles]:
    """The model of a run folder or checkpoint, and the mazes it learned. Raises ConfigError."""
    folder = find_checkpoint(run, lambda line: print(line, file=sys.stderr))
    values = read_json(folder / "config.json")
    made = [kind for kind in KINDS if {f.name for f in dataclasses.fields(kind)} == set(values)]
    if not made:
        raise ConfigError(f"{folder} holds no maze model; give a folder as RUN/poh-seed0 of a run of train/maze.py")
    model = KINDS[made[0]](made[0](**values))
    load_weights(model, weights_of(folder))
    data = read_json(folder / "run" / "run.json")["data"]
    if "files" in data:
        return model.eval(), MazeFiles(data["files"], data["val"])
    return model.eval(), Suite(data["suite"], data["min_path"], data["braid"])


def numbered(source: Suite | MazeFiles, index: int) -> Mazes:
    """A test maze. Raises ConfigError where files have no such."""
    if isinstance(source, Suite):
        return sample(source, "test", torch.tensor([index]))[0]
    mazes, _ = source.load("test", index + 1)
    if len(mazes.start) <= index:
        raise ConfigError(f"--index {index}: there are test mazes 0 to {len(mazes.start) - 1}")
    return mazes.take(slice(index, index + 1))


def answer(model: MazeModel, maze: Mazes) -> tuple[Tensor, Tensor | None]:
    """Cells of the model's walk, int64 [1, L], and its probabilities of the four moves, [1, N * N, 4], if any."""
    if isinstance(model, MLMU):
        with torch.no_grad():
            way = model(**maze._asdict())["path"]
        _, illegal = said(maze, way)
        way = way[way >= 0][: -1 if illegal > 0 else None]  # only the last can be a step into a wall
        return torch.cat([maze.start, way]).unsqueeze(0), None
    with torch.no_grad():
        scores = model(**maze._asdict(), candidates=moves_to_score(maze, model.config.horizons))["scores"][:, :, 0, :4]
    ahead = next_cells(maze, greedy(maze, scores))[0].tolist()
    walk = [int(maze.start)]
    while walk[-1] != int(maze.goal) and ahead[walk[-1]] not in walk:  # a policy without memory that comes back circles
        walk.append(ahead[walk[-1]])
    open_ = exits(maze.passages.flatten(1))
    return torch.tensor([walk]), scores.masked_fill(~open_, -torch.inf).softmax(-1).nan_to_num()


def main() -> None:
    config = tyro.cli(SolveConfig, description=__doc__)
    with sentences():
        model, source = load(config.run)
        maze = read_text(config.maze)[0] if config.maze else numbered(source, config.index)
        steps = distances(maze.passages, maze.goal)
        path, moves = answer(model, maze)
        if config.write:
            write_text(config.write, maze)
        shortest, solved = int(start_distance(maze, steps)), bool(path[0, -1] == maze.goal)
        verdict = f"{path.shape[1] - 1} steps, the shortest way has {shortest}" if solved else "it does not get there"
        print(as_text(maze, marked(path, maze.size))[0])
        print(f"{'solved' if solved else 'not solved'}: {verdict}; drawn in {config.output}")
        draw_mazes(maze, steps, path, config.output, titles=[verdict], moves=moves)


if __name__ == "__main__":
    main()
