"""Eighteen skills, their episodes and splits. A rule is drawn anew for each episode."""

from __future__ import annotations

from tasks.arc.grid import Episode
from tasks.arc.skills.base import Skill, turned
from tasks.arc.skills.catalogue import HELD_OUT, SKILLS, TRAINED
from tasks.arc.skills.compose import CHAINS
from tasks.arc.skills.sampling import DEFAULT_SIZE, DEMOS, VERSION, sample_episode
from tasks.arc.skills.splits import SPLITS, SkillData

__all__ = ["CHAINS", "HELD_OUT", "SKILLS", "SPLITS", "TRAINED", "VERSION", "Skill", "SkillData", "episode", "turned"]


def episode(
    name: str, seed: int, index: int, *, max_size: int = DEFAULT_SIZE, demos: tuple[int, int] = DEMOS
) -> Episode:
    """The episode of a skill, or of a composition such as "reflect+outline"; see `sampling.sample_episode`."""
    skill = SKILLS.get(name) or CHAINS.get(name)
    if skill is None:
        raise ValueError(f"no skill is called {name!r}: use {', '.join(SKILLS)}, or one of {', '.join(CHAINS)}")
    return sample_episode(skill, seed, index, max_size=max_size, demos=demos)
