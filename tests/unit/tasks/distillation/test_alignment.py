import pytest
import torch

from fd_large.backbones.feature_map import FeatureMap
from fd_large.errors import ConfigError, ShapeError
from fd_large.tasks.distillation.alignment import align, teacher_side


def _map(grid, prefix=0, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, prefix + grid[0] * grid[1], width, generator=generator)
    return FeatureMap(tokens, grid, prefix)


def tokens_of(*maps, **options):
    return [map_.tokens for map_ in align(*maps, **options)]


def test_equal_prefixes_are_matched():
    student, teacher = _map((3, 2), 1), _map((3, 2), 1, width=6)
    s, t = tokens_of(student, teacher)
    assert torch.equal(s, student.tokens)
    assert torch.equal(t, teacher.tokens)


@pytest.mark.parametrize(("mine", "theirs"), [(0, 1), (1, 0), (1, 2)])
def test_unequal_prefixes_are_dropped(mine, theirs):
    student, teacher = _map((3, 2), mine), _map((3, 2), theirs)
    s, t = tokens_of(student, teacher)
    assert torch.equal(s, student.tokens[:, mine:])
    assert torch.equal(t, teacher.tokens[:, theirs:])


def test_unequal_grids_name_both_and_the_remedy():
    with pytest.raises(ShapeError, match=r"got 3x2 and 6x4.*--objective.interpolation bilinear"):
        align(_map((3, 2)), _map((6, 4)))
    with pytest.raises(ConfigError, match="cubic"):
        align(_map((3, 2)), _map((6, 4)), interpolation="cubic")


def test_interpolation_gives_the_teachers_map_the_students_grid():
    teacher = _map((4, 4))
    constant = FeatureMap(torch.full_like(teacher.tokens, 2.5), (4, 4), 0)
    for grid in ((2, 2), (4, 6), (8, 3)):
        s, t = tokens_of(_map(grid), constant, interpolation="bilinear")
        assert s.shape[1] == t.shape[1] == grid[0] * grid[1]
        assert torch.allclose(t, torch.full_like(t, 2.5))
    _, t = tokens_of(_map((2, 2)), teacher, interpolation="bilinear")
    # Antialiased halving weighs each source column by a triangle of half-width two.
    weights = torch.tensor([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    image = teacher.tokens.view(2, 4, 4, 4)
    by_hand = torch.einsum("ih,jw,bhwc->bijc", weights, weights, image).reshape(2, 4, 4)
    assert torch.allclose(t, by_hand, atol=1e-6)


@pytest.mark.parametrize(
    ("interpolation", "student", "wanted"),
    [
        ("bilinear_student", (2, 3), (4, 4)),
        ("bilinear_student", (6, 5), (4, 4)),
        ("bilinear_larger", (2, 3), (4, 4)),
        ("bilinear_larger", (6, 5), (6, 5)),
    ],
)
def test_the_students_map_is_resized_where_it_is_asked_for(interpolation, student, wanted):
    maps = [_map(student, 1), _map((4, 4), 1)]
    pair = tokens_of(*maps, interpolation=interpolation)
    for resized, map_ in zip(pair, maps, strict=True):
        assert resized.shape[1] == 1 + wanted[0] * wanted[1]
        assert torch.equal(resized[:, 0], map_.tokens[:, 0])
        assert torch.equal(resized, map_.tokens) == (map_.grid == wanted)


def grids(stride, *sizes):
    """The grid of a model of a stride; it takes the sizes alone, or all multiples of the stride."""

    def grid_at(side):
        takes = side in sizes if sizes else side % stride == 0
        return (side // stride, side // stride) if takes else None

    return grid_at


@pytest.mark.parametrize(
    ("student", "image_size", "grid_at", "own_size", "side"),
    [
        (14, 224, grids(16), 224, 224),  # Equal as they are.
        (14, 224, grids(14), 518, 196),  # Positions are resized.
        (16, 128, grids(14), 518, 224),
        (14, 224, grids(14, 518), 518, 518),  # It takes its own size alone.
        (16, 128, grids(16, 256, 224), 224, 256),
        (16, 128, grids(16, 128, 224), 224, 224),  # The coarser map gets the size of its training.
        (16, 128, grids(32), 224, 224),  # 512 pixels would be more than twice that.
        (14, 224, grids(32), 224, 448),
        (7, 224, grids(16), 224, 224),  # 112 pixels would be half the student's image.
        (7, 224, grids(14), 518, 224),
        (16, 128, grids(16), 0, 256),  # Nothing is known of its training.
        (16, 128, grids(32), 0, 128),
        (16, 128, grids(14, 7), 0, 128),  # It takes nothing that is known here.
    ],
)
def test_the_teachers_image_follows_from_both_grids(student, image_size, grid_at, own_size, side):
    wanted = (student, student)
    assert teacher_side(wanted, grid_at, image_size=image_size, own_size=own_size) == side
