"""KR: which layers of the student learn from which layers of the teacher."""

import numpy as np
import pytest

from kdlib.methods.representing import pair_layers


def pairs_of(own, other, n, shapes="A"):
    """The groups of one stage with ``own`` and ``other`` layers; ``shapes`` of the teacher's."""
    theirs = [shapes[k % len(shapes)] for k in range(other)] if len(shapes) < other else shapes
    return pair_layers([["S"], ["A"] * own], [["T"], list(theirs)], n)


@pytest.mark.parametrize(
    ("own", "other", "sizes", "students"),
    [
        (2, 8, [3, 3, 2], [0, 1, 1]),  # ResNet-26 to ResNet-8
        (4, 10, [3, 2, 3, 2], [0, 1, 2, 3]),  # ResNet-32 to ResNet-14
        (2, 2, [1, 1], [0, 1]),
        (1, 3, [3], [0]),
        (5, 2, [1, 1], [2, 4]),  # a student that is deeper than its teacher
    ],
)
def test_layers_are_grouped_as_in_the_paper(own, other, sizes, students):
    groups = pairs_of(own, other, n=3)
    assert [len(group.teacher) for group in groups] == sizes
    assert [group.student for group in groups] == students


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("own", [1, 2, 3, 4, 6, 9])
def test_groups_cover_a_stage_once_and_the_students_layers_are_in_order(own, n):
    for other in range(1, 13):
        groups = pairs_of(own, other, n)
        assert [layer for group in groups for layer in group.teacher] == list(range(other))
        sizes = [len(group.teacher) for group in groups]
        assert len(groups) == max(min(own, other), int(np.ceil(other / n)))
        assert 1 <= min(sizes) <= max(sizes) <= n
        assert max(sizes) - min(sizes) <= 1
        students = [group.student for group in groups]
        assert students == sorted(students)
        assert students[-1] == own - 1
        assert min(students) >= 0
        if own <= len(groups):
            assert set(students) == set(range(own))
        else:
            assert len(set(students)) == len(groups)
        assert {group.stage for group in groups} == {1}


@pytest.mark.parametrize("shapes", ["AB", "AAAB", "ABBBBB", "ABCDE", "AABBAA"])
@pytest.mark.parametrize("own", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_layers_of_a_group_have_one_shape(shapes, own, n):
    groups = pairs_of(own, len(shapes), n, shapes)
    assert [layer for group in groups for layer in group.teacher] == list(range(len(shapes)))
    assert all(len({shapes[layer] for layer in group.teacher}) == 1 for group in groups)
    assert max(len(group.teacher) for group in groups) <= n
    students = [group.student for group in groups]
    assert students == sorted(students)
    assert students[-1] == own - 1
    assert min(students) >= 0


def test_stages_pair_by_number_without_the_stems():
    for ours, theirs in (([1, 2, 3], [1, 4, 5, 6, 7]), ([1, 2, 3, 4, 5], [1, 4, 5])):
        shapes = [[["A"] * count for count in counts] for counts in (ours, theirs)]
        groups = pair_layers(*shapes, n=3)
        assert [group.stage for group in groups] == sorted(group.stage for group in groups)
        assert {group.stage for group in groups} == {1, 2}
        for stage in (1, 2):
            within = [group for group in groups if group.stage == stage]
            covered = [layer for group in within for layer in group.teacher]
            assert covered == list(range(theirs[stage]))
            assert within[-1].student == ours[stage] - 1
