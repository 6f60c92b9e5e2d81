"""Skills as data: what is trained on, and three ways to ask for more than that.

    train       fourteen skills
    examples    the same skills, other episodes
    skills      the four skills that no training sees
    compose     two of the fourteen, one after the other, which no training does

Seeds alone would not keep small grids apart, so a pair belongs to training or to the other three by a hash of its
canonical form: no pair of an episode, nor a turned, mirrored or recoloured copy of one, is on both sides.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from tasks.arc.grid import Episode, Pair
from tasks.arc.skills.base import Skill
from tasks.arc.skills.catalogue import HELD_OUT, SKILLS, TRAINED
from tasks.arc.skills.compose import CHAINS
from tasks.arc.skills.sampling import DEFAULT_SIZE, DEMOS, check_request, sample_episode

SPLITS = ("train", "examples", "skills", "compose")


class SkillData:
    """`count` episodes of each skill of a split, the skills in turn: item i is episode i // n of skill i % n.

    `skills` names those to take; of the compositions, those of which it names both parts. Items are functions of the
    arguments and i alone.

    Raises ValueError for a split, skills or sizes that cannot be.
    """

    def __init__(
        self,
        split: str,
        count: int = 400,
        *,
        seed: int = 0,
        skills: Sequence[str] | None = None,
        max_size: int = DEFAULT_SIZE,
        demos: tuple[int, int] = DEMOS,
    ) -> None:
        if count < 1:
            raise ValueError(f"count={count}: at least 1 episode of each skill is needed")
        self.skills = skills_of(split, skills)
        for skill in self.skills:
            check_request(skill, max_size, demos)
        self.split, self.count, self.seed, self.max_size, self.demos = split, count, seed, max_size, demos

    def __len__(self) -> int:
        return self.count * len(self.skills)

    def __getitem__(self, i: int) -> Episode:
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        index, which = divmod(i, len(self.skills))
        seed = self.seed * len(SPLITS) + SPLITS.index(self.split)
        mine = is_training if self.split == "train" else is_held_out
        return sample_episode(self.skills[which], seed, index, max_size=self.max_size, demos=self.demos, accept=mine)


def skills_of(split: str, names: Sequence[str] | None = None) -> tuple[Skill, ...]:
    """The skills of a split, all of them or those named, in the order of the catalogue."""
    if split not in SPLITS:
        raise ValueError(f"no split of the skills is called {split!r}: use {', '.join(SPLITS)}")
    known = HELD_OUT if split == "skills" else TRAINED
    if names is None:
        names = known
    if strange := [name for name in names if name not in known]:
        raise ValueError(f"{', '.join(strange)}: the split {split} has the skills {', '.join(known)}")
    if split != "compose":
        return tuple(SKILLS[name] for name in SKILLS if name in names)
    chains = tuple(chain for chain in CHAINS.values() if chain.first.name in names and chain.second.name in names)
    if not chains:
        raise ValueError(f"no composition has both parts in {', '.join(names)}; there are {', '.join(CHAINS)}")
    return chains


# ---- which side a pair is on -----------------------------------------------------------------------------------------


def canonical_pair(pair: Pair) -> bytes:
    """The least of the pair's eight turned and mirrored forms, colours numbered in order of appearance."""
    forms = []
    for x, y in (pair, (pair.input.T, pair.output.T)):
        for rows in (slice(None), slice(None, None, -1)):
            for columns in (slice(None), slice(None, None, -1)):
                cells = x[rows, columns].tobytes() + y[rows, columns].tobytes()
                seen = bytes(dict.fromkeys(cells))
                forms.append(
                    bytes((*x.shape, *y.shape)) + cells.translate(bytes.maketrans(seen, bytes(range(len(seen)))))
                )
    return min(forms)


def is_held_out(pair: Pair) -> bool:
    """A quarter of all pairs is."""
    return zlib.crc32(canonical_pair(pair)) % 4 == 0


def is_training(pair: Pair) -> bool:
    return not is_held_out(pair)
