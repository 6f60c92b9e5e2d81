"""Episodes as a pure function of (version, skill, seed, index)."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from numpy.random import Generator, Philox, SeedSequence

from tasks.arc.grid import MAX_SIZE, Episode, Pair, grid_hash
from tasks.arc.skills.base import Rule, Skill, between, same

VERSION = 1
DEFAULT_SIZE = 12
DEMOS = (2, 5)
DRAWS = 40  # of one pair before its rule is given up
ATTEMPTS = 400  # at one episode
TRIES_OF_A_RULE = 8

Accept = Callable[[Pair], bool]


def sample_episode(
    skill: Skill,
    seed: int,
    index: int,
    *,
    max_size: int = DEFAULT_SIZE,
    demos: tuple[int, int] = DEMOS,
    accept: Accept = lambda pair: True,
) -> Episode:
    """Demonstrations of a rule and a query that they decide.

    No grid exceeds `max_size` either way; there are demos[0] ... demos[1] demonstrations; `accept` says which pairs
    may occur. No output equals its input or is of one colour, and no input comes twice. Where the demonstrations leave
    the query open, or its rule cannot show, the next numbers of the same stream are drawn.

    Raises:
        ValueError: the sizes, counts, seed or index cannot be.
        RuntimeError: nothing was found in 400 attempts.
    """
    check_request(skill, max_size, demos)
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed} and index {index}: both must be at least 0")
    key = SeedSequence((VERSION, zlib.crc32(skill.name.encode()), seed, index))
    rng = Generator(Philox(key))
    count = between(rng, *demos) + 1
    pairs: list[Pair] = []
    for attempt in range(ATTEMPTS):
        if attempt % TRIES_OF_A_RULE == 0 or not pairs:
            rule = skill.sample(rng, max_size)
        pairs = []
        while len(pairs) < count and (pair := _pair(skill, rule, rng, max_size, accept)) is not None:
            pairs.append(pair)
        if len({grid_hash([pair.input]) for pair in pairs}) < count:
            continue
        episode = Episode(f"{skill.name}/{index}", tuple(pairs[:-1]), pairs[-1])
        if skill.identifiable(episode):
            return episode
    raise RuntimeError(f"{skill.name}/{index} of seed {seed}: no episode in {ATTEMPTS} attempts; raise max_size")


def check_request(skill: Skill, max_size: int, demos: tuple[int, int]) -> None:
    if not skill.smallest <= max_size <= MAX_SIZE:
        raise ValueError(f"max_size={max_size}: {skill.name} needs {skill.smallest} to {MAX_SIZE}")
    if not 1 <= demos[0] <= demos[1]:
        raise ValueError(f"demos={demos}: the least and the greatest number of demonstrations, from 1 on")


def _pair(skill: Skill, rule: Rule, rng: Generator, size: int, accept: Accept) -> Pair | None:
    """An input and its output, if one is found on which the rule shows."""
    for _ in range(DRAWS):
        grid = np.ascontiguousarray(skill.draw(rule, rng, size), dtype=np.uint8)
        output = skill.apply(rule, grid)
        if output is None or max(output.shape) > size or output.min() == output.max() or same(grid, output):
            continue
        pair = Pair(grid, np.ascontiguousarray(output, dtype=np.uint8))
        if accept(pair):
            return pair
    return None
