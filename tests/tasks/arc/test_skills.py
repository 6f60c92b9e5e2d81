from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import product

import numpy as np
import pytest

from tasks.arc.grid import Episode, Pair, checked_grid, episode_hash
from tasks.arc.skills import CHAINS, HELD_OUT, SKILLS, TRAINED, Skill, SkillData, episode, turned
from tasks.arc.skills.base import same
from tasks.arc.skills.geometry import Gravity
from tasks.arc.skills.sampling import sample_episode
from tasks.arc.skills.splits import canonical_pair, is_held_out

COUNT = 12
SIZE = 10
every_skill = pytest.mark.parametrize("skill", SKILLS.values(), ids=SKILLS)
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


@lru_cache
def some(skill: Skill, count: int = COUNT, size: int = SIZE) -> list[Episode]:
    return [sample_episode(skill, 1, i, max_size=max(size, skill.smallest)) for i in range(count)]


def pairs_of(episode: Episode) -> tuple[Pair, ...]:
    return (*episode.demos, episode.query)


def moved(episode: Episode, g: int, colours: np.ndarray) -> Episode:
    demos = [Pair(*(colours[turned(grid, g)] for grid in pair)) for pair in pairs_of(episode)]
    return Episode(episode.id, tuple(demos[:-1]), demos[-1])


def agree(skill: Skill, grids: Iterable[np.ndarray], rules: list) -> None:
    for grid, rule in product(grids, rules):
        assert same(skill.apply(rule, grid), skill.solve(rule, grid)), (skill.name, rule, grid)


# ---- rules -----------------------------------------------------------------------------------------------------------


@every_skill
def test_two_algorithms_agree_on_inputs_of_their_own_and_of_other_skills(skill):
    rng = np.random.default_rng(0)
    for shown in some(skill):
        rules = [skill.sample(rng, SIZE), *skill.explaining(shown.demos)]
        agree(skill, [pair.input for pair in pairs_of(shown)], rules)
    agree(skill, [some(other)[0].query.input for other in SKILLS.values()], rules)


@pytest.mark.slow
@every_skill
def test_two_algorithms_agree_on_hundreds_of_episodes(skill):
    for shown in some(skill, 400, 20):
        agree(skill, [pair.input for pair in pairs_of(shown)], skill.explaining(shown.demos))


@every_skill
def test_all_rules_that_explain_the_demonstrations_give_the_answer(skill):
    """Without `apply`, and among all rules where they can be listed."""
    for shown in some(skill)[: 1 if skill.name == "size_rank" else 6]:
        rules = skill.rules() or skill.candidates(shown.demos)
        rules = [rule for rule in rules if all(same(skill.solve(rule, x), y) for x, y in shown.demos)]
        answers = [skill.solve(rule, shown.query.input) for rule in rules]
        answers = [answer for answer in answers if answer is not None]
        assert answers and all(same(answer, shown.query.output) for answer in answers)


@every_skill
def test_every_rule_is_drawn(skill):
    rng = np.random.default_rng(0)
    drawn = {skill.sample(rng, SIZE) for _ in range(100)}
    assert len(drawn) > 8 if len(skill.rules()) > 8 or not skill.rules() else drawn == set(skill.rules())
    assert skill.__doc__ and skill.__doc__.endswith(".") and "\n" not in skill.__doc__


def question(demos: list, query: list) -> Episode:
    pairs = [Pair(*(np.array(grid, dtype=np.uint8) for grid in pair)) for pair in (*demos, query)]
    return Episode("by hand", tuple(pairs[:-1]), pairs[-1])


def test_what_the_demonstrations_leave_open_is_noticed():
    either_way = ([[1, 2]], [[2, 1]])  # mirrored, or turned upside down
    assert not SKILLS["shift"].identifiable(question([either_way], [[[1, 2, 3]], [[3, 1, 2]]]))
    assert SKILLS["shift"].identifiable(question([either_way, ([[1, 2, 3]], [[3, 1, 2]])], [[[4, 2, 3]], [[3, 4, 2]]]))
    colours = SKILLS["colour_map"]
    assert colours.identifiable(question([either_way], [[[1, 1, 2]], [[2, 2, 1]]]))
    assert not colours.identifiable(question([either_way], [[[1, 3, 2]], [[2, 3, 1]]]))  # nothing is known of 3
    assert not SKILLS["reflect"].identifiable(question([either_way, ([[1]], [[2]])], [[[1]], [[1]]]))  # no rule at all


def test_one_demonstration_is_enough_where_there_is_only_one():
    """Of shifts of small grids two in five would be left open."""
    shift = SKILLS["shift"]
    assert all(shift.identifiable(episode("shift", 0, i, max_size=8, demos=(1, 1))) for i in range(20))


# ---- symmetries ------------------------------------------------------------------------------------------------------


def illegal(skill: Skill, colours: str, elements=None, count: int = 6) -> list[str]:
    """The augmented episodes that no rule of the skill explains, or explains otherwise."""
    rng, found = np.random.default_rng(1), []
    for shown in some(skill)[:count]:
        for g in elements if elements is not None else skill.symmetries:
            table = rng.permutation(10) if colours == "all" else np.append(0, 1 + rng.permutation(9))
            copy = moved(shown, g, table.astype(np.uint8))
            if not skill.explaining(pairs_of(copy)) or not skill.identifiable(copy):
                found.append(f"{shown.id} turned by {g}, colours {table}")
    return found


@every_skill
def test_turned_and_recoloured_episodes_are_episodes_of_the_skill(skill):
    assert not illegal(skill, skill.colours)


@pytest.mark.parametrize("name", [name for name in SKILLS if SKILLS[name].colours == "fix_zero"])
def test_the_background_may_not_be_recoloured(name):
    assert illegal(SKILLS[name], "all", [0])


def test_a_symmetry_that_is_none_is_found():
    class Down(Gravity):
        def rules(self):
            return (0,)

    assert illegal(Down(), "fix_zero", range(1, 8)) and not illegal(Down(), "fix_zero", [0])


def test_turns_are_numbered_as_they_say():
    grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert turned(grid, 1).tolist() == [[2, 5], [1, 4], [0, 3]] and turned(grid, 4).tolist() == grid.T.tolist()
    assert len({turned(grid, g).tobytes() + bytes(turned(grid, g).shape) for g in range(8)}) == 8


# ---- episodes --------------------------------------------------------------------------------------------------------


@every_skill
def test_an_episode_is_a_function_of_skill_seed_and_index(skill):
    size = max(SIZE, skill.smallest)
    again = [sample_episode(skill, 1, i, max_size=size) for i in (2, 0, 1)]
    hashes = [episode_hash(shown) for shown in again]
    assert hashes == [episode_hash(some(skill)[i]) for i in (2, 0, 1)]
    assert len({*hashes, episode_hash(sample_episode(skill, 2, 0, max_size=size))}) == 4


@every_skill
def test_grids_are_what_they_should_be(skill):
    for size in (skill.smallest, SIZE):
        for shown in some(skill, 4 if size < SIZE else COUNT, size):
            assert 2 <= len(shown.demos) <= 5
            assert len({pair.input.tobytes() + bytes(pair.input.shape) for pair in pairs_of(shown)}) == len(
                pairs_of(shown)
            )
            for x, y in pairs_of(shown):
                for grid in (x, y):
                    assert grid.dtype == np.uint8 and grid.flags.c_contiguous and max(grid.shape) <= size
                    assert same(grid, checked_grid(grid, shown.id))
                assert not same(x, y) and len(np.unique(y)) > 1  # it does something, and not just paint it over


def test_episodes_stay_what_they_are():
    """A change that moves these must raise VERSION. (They also move if numpy changes its streams: NEP 19.)"""
    assert episode_hash(episode("reflect", 0, 0))[:12] == "21a3e1729038"
    assert episode_hash(episode("crop", 7, 3, max_size=10))[:12] == "c2d42ebc6911"


def test_trivial_answers_fail():
    """Copying the input, the last demonstration's output, or the most common colour answers next to nothing."""
    right = Counter()
    data = SkillData("train", 8, max_size=SIZE)
    for shown in map(data.__getitem__, range(len(data))):
        answer = shown.query.output
        right["copy"] += same(shown.query.input, answer)
        right["one colour"] += len(np.unique(answer)) == 1
        right["demonstration"] += any(same(pair.output, answer) for pair in shown.demos)
    assert right["copy"] == right["one colour"] == 0 and right["demonstration"] <= 0.02 * len(data)


def test_large_grids_are_possible():
    assert max(max(p.input.shape) for i in range(5) for p in episode("shift", 0, i, max_size=30).demos) > 20


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (lambda: episode("reflekt", 0, 0), "no skill is called 'reflekt'"),
        (lambda: episode("crop", 0, 0, max_size=5), "max_size=5: crop needs 8 to 30"),
        (lambda: episode("crop", 0, 0, max_size=31), "max_size=31: crop needs 8 to 30"),
        (lambda: episode("crop", -1, 0), "seed -1 and index 0"),
        (lambda: episode("crop", 0, 0, demos=(3, 2)), r"demos=\(3, 2\)"),
        (lambda: SkillData("test"), "no split of the skills is called 'test'"),
        (lambda: SkillData("train", 0), "count=0"),
        (lambda: SkillData("train", skills=["gravity"]), "gravity: the split train has the skills"),
        (lambda: SkillData("skills", skills=["reflect"]), "reflect: the split skills has the skills gravity"),
        (lambda: SkillData("compose", skills=["fill", "crop"]), "no composition has both parts in fill, crop"),
        (lambda: SkillData("train", max_size=6), "max_size=6: crop needs 8 to 30"),
    ],
)
def test_what_cannot_be_is_said(request_, said):
    with pytest.raises(ValueError, match=said):
        request_()


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_fourteen_are_trained_and_four_are_not():
    assert len(SKILLS) == 18 and len(TRAINED) == 14 and not set(TRAINED) & set(HELD_OUT)
    names = {split: {skill.name for skill in SkillData(split).skills} for split in ("train", "examples", "skills")}
    assert names["train"] == names["examples"] == set(TRAINED) and names["skills"] == set(HELD_OUT)
    assert all(part.name in TRAINED for chain in SkillData("compose").skills for part in (chain.first, chain.second))


def test_items_are_taken_from_the_skills_in_turn():
    data = SkillData("examples", 3, skills=["upscale", "reflect"], max_size=8)
    assert len(data) == 6
    assert [data[i].id for i in range(6)] == [f"{name}/{i}" for i in range(3) for name in ("reflect", "upscale")]
    with pytest.raises(IndexError):
        data[6]
    other = SkillData("examples", 3, skills=["upscale", "reflect"], max_size=8, seed=1)
    assert episode_hash(data[0]) != episode_hash(other[0])
    assert {skill.name for skill in SkillData("compose", skills=["upscale", "reflect"]).skills} == {"reflect+upscale"}


def test_no_pair_of_training_is_in_another_split():
    """Small grids, of which there are few; upscale alone has the same pair in hundreds of episodes."""
    sides = [set(), set()]
    for split in ("train", "examples"):
        data = SkillData(split, 40, skills=["upscale", "reflect"], max_size=4)
        for shown in map(data.__getitem__, range(len(data))):
            sides[split == "train"] |= {canonical_pair(pair) for pair in pairs_of(shown)}
    assert min(map(len, sides)) > 40 and not sides[0] & sides[1]


@pytest.mark.parametrize("name", ["tile", "outline"])
def test_a_pair_keeps_its_side_turned_and_recoloured(name):
    rng = np.random.default_rng(0)
    for shown in some(SKILLS[name], 4):
        for g in range(8):
            copy = moved(shown, g, rng.permutation(10).astype(np.uint8))
            for one, other in zip(pairs_of(shown), pairs_of(copy), strict=True):
                assert canonical_pair(one) == canonical_pair(other) and is_held_out(one) == is_held_out(other)
    swapped = Pair(one.output, one.input)
    assert canonical_pair(swapped) != canonical_pair(one)


@pytest.mark.slow
def test_no_episode_comes_twice_in_400_of_every_skill():
    seen = Counter()
    for split in ("train", "examples", "skills"):
        data = SkillData(split)
        seen.update(episode_hash(data[i]) for i in range(len(data)))
    assert len(seen) == (14 + 14 + 4) * 400


# ---- compositions ----------------------------------------------------------------------------------------------------


@every_chain
def test_a_composition_is_decided_and_is_no_single_skill(chain):
    for shown in some(chain, 2, 8):
        found = chain.explaining(pairs_of(shown))
        assert found and chain.identifiable(shown)
        for x, y in pairs_of(shown):
            halfway = chain.first.solve(found[0][0], x)
            assert same(chain.second.solve(found[0][1], halfway), y) and same(chain.solve(found[0], x), y)
        for skill in SKILLS.values():
            assert not any(
                all(same(skill.apply(r, x), y) for x, y in shown.demos) for r in skill.candidates(shown.demos)
            )


def test_what_one_skill_explains_is_no_composition():
    chain, mirrored = CHAINS["reflect+colour_map"], some(SKILLS["reflect"])
    assert all(chain.explaining(shown.demos) and not chain.identifiable(shown) for shown in mirrored)
