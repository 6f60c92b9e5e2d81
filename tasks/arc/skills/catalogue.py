"""The eighteen skills in a fixed order, and the four that no training sees."""

from __future__ import annotations

from tasks.arc.skills.base import Skill
from tasks.arc.skills.colour import ColourMap, SizeRank
from tasks.arc.skills.geometry import Gravity, Reflect, Rotate, Shift
from tasks.arc.skills.layout import Downscale, Sort, Tile, Upscale
from tasks.arc.skills.logic import Combine, OddPanel
from tasks.arc.skills.objects import Crop, Denoise, Fill, Outline
from tasks.arc.skills.relations import Connect, Shoot

SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        *(Reflect(), Rotate(), Shift(), Gravity()),
        *(Tile(), Upscale(), Downscale(), Sort()),
        *(Crop(), Outline(), Fill(), Denoise()),
        *(ColourMap(), SizeRank()),
        *(Connect(), Shoot()),
        *(Combine(), OddPanel()),
    )
}
HELD_OUT = ("gravity", "sort", "denoise", "odd_panel")  # one each of four families
TRAINED = tuple(name for name in SKILLS if name not in HELD_OUT)
