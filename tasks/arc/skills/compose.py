"""Two skills, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from numpy.random import Generator

from tasks.arc.grid import MAX_SIZE, Episode, Grid, Pair
from tasks.arc.skills.base import Rule, Skill, between, same
from tasks.arc.skills.catalogue import SKILLS

DRAWS = 20


class Chain(Skill):
    """Do one skill, then another with what came out."""

    def __init__(self, first: str, second: str) -> None:
        self.first, self.second = SKILLS[first], SKILLS[second]
        self.name = f"{first}+{second}"
        self.symmetries = self.first.symmetries & self.second.symmetries
        self.colours = "all" if self.first.colours == self.second.colours == "all" else "fix_zero"
        self.smallest = max(self.first.smallest, self.second.smallest)

    def sample(self, rng: Generator, size: int) -> tuple[Rule, Rule]:
        return self.first.sample(rng, size), self.second.sample(rng, size)

    def candidates(self, pairs: Sequence[Pair]) -> Iterator[tuple[Rule, Rule]]:
        """The first part must be one of a list: what it gives is seen by nobody."""
        for first in self.first.rules():
            between_them = [self.first.apply(first, x) for x, _ in pairs]
            if not any(grid is None for grid in between_them):
                halves = [Pair(grid, y) for grid, (_, y) in zip(between_them, pairs, strict=True)]
                yield from ((first, second) for second in self.second.explaining(halves))

    def draw(self, rule: tuple[Rule, Rule], rng: Generator, size: int) -> Grid:
        """An input of either part on which both of them show, if one is found."""
        for _ in range(DRAWS):
            part = between(rng, 0, 1)
            grid = (self.first, self.second)[part].draw(rule[part], rng, size)
            halfway = self.first.apply(rule[0], grid)
            if halfway is None or max(halfway.shape) > size or same(grid, halfway):
                continue
            output = self.second.apply(rule[1], halfway)
            if output is not None and not same(halfway, output):
                break
        return grid

    def apply(self, rule: tuple[Rule, Rule], grid: Grid) -> Grid | None:
        return self._both(grid, (self.first.apply, rule[0]), (self.second.apply, rule[1]))

    def solve(self, rule: tuple[Rule, Rule], grid: Grid) -> Grid | None:
        return self._both(grid, (self.first.solve, rule[0]), (self.second.solve, rule[1]))

    @staticmethod
    def _both(grid: Grid | None, *parts: tuple) -> Grid | None:
        for do, rule in parts:
            grid = None if grid is None else do(rule, grid)
            if grid is not None and max(grid.shape) > MAX_SIZE:
                return None
        return grid

    def identifiable(self, episode: Episode) -> bool:
        """Decided by the demonstrations, which no single skill explains."""
        return not any(skill.explaining(episode.demos) for skill in SKILLS.values()) and super().identifiable(episode)


CHAINS: dict[str, Chain] = {
    chain.name: chain
    for chain in (
        *(Chain(first, "colour_map") for first in ("reflect", "rotate", "shift", "upscale", "tile")),
        *(Chain("reflect", second) for second in ("upscale", "outline", "connect", "size_rank", "crop")),
        *(Chain("rotate", second) for second in ("downscale", "tile", "outline", "fill", "shoot")),
        *(Chain(first, "reflect") for first in ("crop", "downscale", "fill", "combine")),
        *(Chain("shift", "tile"), Chain("crop", "upscale"), Chain("connect", "outline"), Chain("shoot", "outline")),
    )
}
