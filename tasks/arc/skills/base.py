"""What a skill is: a family of rules, inputs on which a rule shows, and two independent ways to apply it.

Grids are numpy uint8 [H, W]. A rule is any hashable value; where it has no meaning on a grid, its answer is None.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.random import Generator

from tasks.arc.grid import NUM_COLOURS, Episode, Grid, Pair

D8 = frozenset(range(8))
Rule = Hashable


class Skill(ABC):
    """One skill. Its docstring says, to a person, what its rules do.

    Attributes:
        symmetries: the elements g of D8 under which every rule becomes a rule of the same skill, as `turned` numbers
            them: an episode all of whose grids are turned by g is an episode of the skill.
        colours: the same for permutations of the colours: "all" of them, or those that "fix_zero", the background.
        smallest: the least `max_size` at which the skill has anything to show.
    """

    name: str
    symmetries: frozenset[int] = D8
    colours: str = "fix_zero"
    smallest: int = 6

    def rules(self) -> Sequence[Rule]:
        """All rules; none where they are too many to list, and `sample` and `candidates` make them up."""
        return ()

    @abstractmethod
    def draw(self, rule: Rule, rng: Generator, size: int) -> Grid:
        """An input on which the rule probably shows. Neither it nor its output exceeds `size` either way."""

    @abstractmethod
    def apply(self, rule: Rule, grid: Grid) -> Grid | None:
        """The rule's output."""

    @abstractmethod
    def solve(self, rule: Rule, grid: Grid) -> Grid | None:
        """The same by another algorithm, to check `apply` with. Slow."""

    def sample(self, rng: Generator, size: int) -> Rule:
        """A rule that grids of this size can show."""
        return pick(rng, self.rules())

    def candidates(self, pairs: Sequence[Pair]) -> Iterable[Rule]:
        """Rules among which are all that explain the pairs: where only one can, it is read off them."""
        return self.rules()

    def explaining(self, pairs: Sequence[Pair]) -> list[Rule]:
        """The candidates that give the output of every pair."""
        return [rule for rule in self.candidates(pairs) if all(same(self.apply(rule, x), y) for x, y in pairs)]

    def identifiable(self, episode: Episode) -> bool:
        """Do all rules that explain the demonstrations, of which there is one, agree on the query?"""
        answers = [self.apply(rule, episode.query.input) for rule in self.explaining(episode.demos)]
        answers = [answer for answer in answers if answer is not None]
        return bool(answers) and all(same(answers[0], other) for other in answers[1:])


# ---- grids -----------------------------------------------------------------------------------------------------------


def same(one: Grid | None, other: Grid | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def turned(grid: Grid, g: int) -> Grid:
    """The grid turned by g % 4 quarters counter-clockwise, then transposed if g >= 4."""
    grid = np.rot90(grid, g % 4)
    return np.ascontiguousarray(grid.T if g >= 4 else grid)


def shifted(mask: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """bool [H, W]: what was at (r, c) is at (r + dy, c + dx); nothing comes in from outside."""
    height, width = mask.shape
    out = np.zeros_like(mask)
    out[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = mask[
        max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
    ]
    return out


def paints(pair: Pair) -> Sequence[int]:
    """The colours with which a rule of one paint can have made the output: that of the cells that changed."""
    x, y = pair
    if x.shape != y.shape:
        return ()
    found = set(y[x != y].tolist())
    return range(1, NUM_COLOURS) if not found else tuple(found) if len(found) == 1 else ()


# ---- drawing ---------------------------------------------------------------------------------------------------------


def between(rng: Generator, low: int, high: int) -> int:
    """Uniform in low ... high, both included."""
    return int(rng.integers(low, high + 1))


def pick(rng: Generator, values: Sequence) -> Rule:
    return values[int(rng.integers(len(values)))]


def paint(rng: Generator, count: int, *, but: Iterable[int] = ()) -> list[int]:
    """`count` distinct colours, neither background nor any of `but`."""
    taken = {0, *but}
    return [colour for colour in rng.permutation(NUM_COLOURS).tolist() if colour not in taken][:count]


def noise(rng: Generator, height: int, width: int, palette: Sequence[int]) -> Grid:
    """Cells of the palette's colours, the first ones more often: 1 / sqrt(rank), about."""
    u = rng.random((height, width))
    return np.array(palette, dtype=np.uint8)[(u * u * len(palette)).astype(np.intp)]


def coloured(rng: Generator, height: int, width: int) -> Grid:
    """Noise of two to five colours, any of which may be the most common."""
    return noise(rng, height, width, rng.permutation(NUM_COLOURS)[: between(rng, 2, 5)])
