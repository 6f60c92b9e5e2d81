"""Maze suites, addressed by index: maze i of a split is a function of (suite, split, i) and of nothing else.

    perfect-N       randomised depth-first search on N x N cells: a spanning tree, one way between any two cells
    perfect30px     a perfect maze of 14 x 14 cells drawn as 30 x 30 pixels: unique ways in the Maze-Hard format
    randwall-N      walls on 30 to 50 % of N x N cells, the way at least N long (Lehnert et al., arXiv 2402.14083)
    hard30          30 x 30 with such walls, start and goal as far apart as two sweeps find, the way longer than 110

A maze that is unsolvable, too short, or of another split is passed over and the next attempt of the same index taken,
so there are never fewer than asked for. The split is read off the maze itself, by the least hash over its eight
symmetries: no maze is in two of them, nor is a turned or mirrored copy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from tasks import random
from tasks.maze.distance import distances
from tasks.maze.grid import (
    NUM_SYMMETRIES,
    OPPOSITE,
    STEPS,
    Mazes,
    codes,
    exits,
    neighbors,
    passages_of_floor,
    symmetric,
)

VERSION = 1
SPLITS = {"train": range(6, 16), "val": range(4, 6), "test": range(4)}  # sixteenths of all mazes
MAX_BATCH = 2048  # mazes worked on at once: their arrays stay in the cache
FIRST_ATTEMPTS = 4  # for each index: most take fewer; then as many again as there were, while they fit into a batch
MAX_ATTEMPTS = 100_000  # for one index; hard30 takes thousands


@dataclass(frozen=True)
class Suite:
    """What mazes to make. `name` is one of the above; min_path counts the cells of the way, both ends included."""

    name: str
    min_path: int = 0
    braid: float = 0.0  # the share of dead ends that get a second exit, perfect-N only
    kind: str = field(init=False)
    size: int = field(init=False)  # of the grid

    def __post_init__(self) -> None:
        found = re.fullmatch(r"(perfect|randwall)-(\d+)|perfect30px|hard30", self.name)
        if found is None:
            raise ValueError(f"no maze suite is called {self.name!r}: use perfect-N, perfect30px, randwall-N or hard30")
        kind, size = found.groups()
        object.__setattr__(self, "kind", kind or self.name)
        object.__setattr__(self, "size", int(size or 30))
        if not 3 <= self.size <= 100:
            raise ValueError(f"a maze of {self.size} x {self.size} cells: N must lie in 3..100")
        if not 0 <= self.braid <= 1 or (self.braid and self.kind != "perfect"):
            raise ValueError(f"braid={self.braid}: a share in 0..1 of the dead ends of perfect-N")
        if not 0 <= self.min_path <= self.size**2 // 2:
            raise ValueError(
                f"min_path={self.min_path}: a way that long is too rare in {self.size} x {self.size} cells; "
                f"at most {self.size**2 // 2}"
            )

    @property
    def steps_at_least(self) -> int:
        own = {"randwall": self.size - 1, "hard30": 111}.get(self.kind, 1)
        return max(own, self.min_path - 1)

    @property
    def info(self) -> dict[str, str | int | float]:
        return {"suite": self.name, "min_path": self.min_path, "braid": self.braid}

    @property
    def key(self) -> int:
        text = f"tenfold-mazes-{VERSION} {self.name} min_path={self.min_path} braid={self.braid}"
        key = 0
        for letter in text.encode():
            key = int(random.keys(key, letter))
        return key


# ---- one attempt -----------------------------------------------------------------------------------------------------


@lru_cache
def _pick(device: torch.device) -> Tensor:
    """int32 [16 * 12]: of the free directions of a code, the (r % count)-th; 4 if none is. 12 divides by 1, 2, 3, 4."""
    free = [[k for k in range(4) if code >> k & 1] or [4] for code in range(16)]
    return torch.tensor([f[r % len(f)] for f in free for r in range(12)], device=device, dtype=torch.int32)


def carve(key: Tensor, size: int) -> Tensor:
    """Perfect mazes by randomised depth-first search, all in lock-step: passages uint8 [B, N, N] of keys [B].

    Every iteration a maze goes on to a random unseen neighbour, or back where there is none. All that is kept is how
    each cell was entered: from it follow the way back and, at the end, the passages.
    """
    batch, width, device = len(key), size + 2, key.device
    offsets = [y * width + x for y, x in STEPS]
    unseen = torch.zeros(batch, width, width, dtype=torch.int32, device=device)
    unseen[:, 1:-1, 1:-1] = 1
    entered = torch.full_like(unseen, 4).flatten()  # by which direction; 4 at the first cell, which has no way back
    unseen, first = unseen.flatten(), random.integers(key, 1, size * size, stream=1).squeeze(1)
    corner = torch.arange(batch, device=device) * width * width  # a cell of the border, for what is written nowhere
    cell = corner + (first // size + 1) * width + first % size + 1
    unseen[cell] = 0

    choices = random.integers(key, 2 * (size * size - 1), 12, stream=2).T.to(torch.int32)
    pick, nothing = _pick(device), unseen.new_zeros(batch)
    moves = torch.tensor([o for o in offsets for _ in range(5)] + [-o for o in (*offsets, 0)], device=device)
    around = [unseen[width + o :] if o < 0 else unseen[o:] for o in offsets]  # shifted views of the same memory
    for step, choice in enumerate(choices):
        if step % 16 == 0 and step >= size * size and not unseen.any():
            break
        free = choice
        for k, (offset, view) in enumerate(zip(offsets, around, strict=True)):
            place = cell - width if offset < 0 else cell
            free = torch.add(free, view.index_select(0, place), alpha=12 << k)
        direction = pick.index_select(0, free)
        cell = cell + moves.index_select(0, 5 * direction + entered.index_select(0, cell))
        new = torch.where(direction == 4, corner, cell)
        entered.scatter_(0, new, direction)
        unseen.scatter_(0, new, nothing)

    entered = entered.view(batch, width, width)
    back = [entered == k for k in range(4)]  # the way back is the opposite direction, the way there starts next door
    ways = [back[OPPOSITE[k]] | back[k].roll((-STEPS[k][0], -STEPS[k][1]), (1, 2)) for k in range(4)]
    return codes(torch.stack(ways, -1)[:, 1:-1, 1:-1])


def braided(passages: Tensor, key: Tensor, share: float) -> Tensor:
    """Open a second exit in a random `share` of the dead ends."""
    size = passages.shape[-1]
    near = neighbors(size, passages.device)
    open_ = exits(passages.flatten(1))  # [B, N * N, 4]
    dead = open_.sum(-1) == 1
    chosen = dead & (random.integers(key, size * size, 1 << 20, stream=3) < share * (1 << 20))
    closed = ~open_ & (near >= 0)
    choice = random.integers(key, size * size, 12, stream=4)
    direction = _pick(passages.device)[codes(closed).long() * 12 + choice]
    opened = codes(chosen.unsqueeze(-1) & (direction.unsqueeze(-1) == torch.arange(4, device=passages.device)))
    wider = passages.flatten(1) | opened
    for k in range(4):
        from_there = torch.nn.functional.pad(opened, (0, 1))[:, near[:, OPPOSITE[k]]]  # index -1 reads the padding
        wider |= (from_there >> k & 1) << OPPOSITE[k]
    return wider.view_as(passages)


def random_walls(key: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Floor bool [B, N, N], and all cells in a random order, walls first, int64 [B, N * N]; 30 to 50 % are walls."""
    cells = size * size
    count = (3 * cells + 9) // 10 + random.integers(key, 1, cells // 2 - (3 * cells + 9) // 10 + 1, stream=5)  # [B, 1]
    order = random.order(key, cells, stream=6)
    floor = order.argsort(1) >= count
    return floor.view(-1, size, size), order


def drawn(passages: Tensor) -> Tensor:
    """Floor bool [B, 2N + 2, 2N + 2]: cells at even pixels, passages between them, walls below and to the right."""
    batch, size, _ = passages.shape
    floor = torch.zeros(batch, 2 * size + 2, 2 * size + 2, dtype=torch.bool, device=passages.device)
    floor[:, : 2 * size : 2, : 2 * size : 2] = True
    floor[:, 1 : 2 * size : 2, : 2 * size : 2] = exits(passages)[..., 1]
    floor[:, : 2 * size : 2, 1 : 2 * size : 2] = exits(passages)[..., 3]
    return floor


def _two_cells(key: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    start = random.integers(key, 1, cells, stream=7).squeeze(1)
    other = random.integers(key, 1, cells - 1, stream=8).squeeze(1)
    return start, other + (other >= start)


def _farthest(steps: Tensor) -> Tensor:
    return steps.flatten(1).argmax(1)


def attempt(suite: Suite, key: Tensor) -> Mazes:
    """One maze of each key [B], which may be unsolvable, too short, or of another split."""
    size = suite.size
    if suite.kind == "perfect":
        passages = carve(key, size)
        passages = braided(passages, key, suite.braid) if suite.braid else passages
        return Mazes(passages, *_two_cells(key, size * size))
    if suite.kind == "perfect30px":
        start, goal = _two_cells(key, 14 * 14)
        pixel = [cell // 14 * 2 * size + cell % 14 * 2 for cell in (start, goal)]
        return Mazes(passages_of_floor(drawn(carve(key, 14))), *pixel)
    floor, order = random_walls(key, size)
    passages, start, goal = passages_of_floor(floor), order[:, -1], order[:, -2]
    if suite.kind == "hard30":
        start = _farthest(distances(passages, start))
        goal = _farthest(distances(passages, start))
    return Mazes(passages, start, goal)


# ---- splits and suites -----------------------------------------------------------------------------------------------


@lru_cache
def _hash_table(size: int) -> tuple[Tensor, Tensor]:
    """Numbers of (cell, code) and of (cell, end) under every symmetry: int64 [N * N * 16, 8], [N * N * 2, 8]."""
    cells = torch.arange(size * size)
    columns = []
    for which in range(NUM_SYMMETRIES):
        square = cells.view(1, size, size)
        every_code = [
            symmetric(Mazes(torch.full_like(square, code, dtype=torch.uint8), cells, cells), which)
            for code in range(16)
        ]
        place = every_code[0].start
        recoded = torch.stack([maze.passages[0, 0, 0] for maze in every_code]).long()
        columns.append(
            (random.keys(place.unsqueeze(1), recoded), random.keys(place.unsqueeze(1), torch.tensor([16, 17])))
        )
    return tuple(torch.stack(parts, -1).flatten(0, 1) for parts in zip(*columns, strict=True))


def canonical_hash(mazes: Mazes) -> Tensor:
    """int64 [B]: the least hash over the eight symmetries, equal for mazes that are turned or mirrored copies."""
    of_codes, of_ends = (table.to(mazes.start.device) for table in _hash_table(mazes.size))
    place = 16 * torch.arange(mazes.size**2, device=mazes.start.device)
    cells = of_codes[place + mazes.passages.flatten(1)].sum(1)  # [B, 8]
    return random.mix(cells + of_ends[2 * mazes.start] + of_ends[2 * mazes.goal + 1]).amin(1)


def sample(suite: Suite, split: str, indices: Tensor) -> tuple[Mazes, Tensor]:
    """The mazes of these indices, int64 [B], and the steps to their goals, int16 [B, N, N].

    Raises:
        ValueError: the split is none of train, val, test.
        RuntimeError: an index found no maze in a hundred thousand attempts.
    """
    if split not in SPLITS:
        raise ValueError(f"no split is called {split!r}: use train, val or test")
    wanted = torch.tensor([part in SPLITS[split] for part in range(16)], device=indices.device)
    which_split = list(SPLITS).index(split)
    size, count, device = suite.size, len(indices), indices.device
    found = Mazes(
        torch.empty(count, size, size, dtype=torch.uint8, device=device),
        *torch.empty(2, count, dtype=torch.int64, device=device),
    )
    steps = torch.empty(count, size, size, dtype=torch.int16, device=device)
    for rows in torch.arange(count, device=device).split(MAX_BATCH):
        tried = 0
        while len(rows):
            if tried >= MAX_ATTEMPTS:
                raise RuntimeError(f"{suite} found no maze for index {int(indices[rows[0]])} in {tried:,} attempts")
            room = max(1, MAX_BATCH // len(rows))
            numbers = tried + torch.arange(min(room, max(FIRST_ATTEMPTS, tried)), device=device)  # of attempts, at once
            mazes = attempt(suite, random.keys(suite.key, which_split, indices[rows].unsqueeze(1), numbers).flatten())
            good = wanted[canonical_hash(mazes) & 15].nonzero().squeeze(1)
            mazes = mazes.take(good)
            to_goal = distances(mazes.passages, mazes.goal)
            kept = to_goal.flatten(1).gather(1, mazes.start.unsqueeze(1)).squeeze(1) >= suite.steps_at_least
            row = good[kept] // len(numbers)
            first = torch.ones_like(row, dtype=torch.bool)
            first[1:] = row[1:] != row[:-1]  # the earliest good attempt of each index
            for place, part in zip((*found, steps), (*mazes, to_goal), strict=True):
                place[rows[row[first]]] = part[kept][first]
            missing = torch.ones_like(rows, dtype=torch.bool)
            missing[row] = False
            rows, tried = rows[missing], tried + len(numbers)
    return found, steps
