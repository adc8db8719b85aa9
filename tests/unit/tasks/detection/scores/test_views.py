"""Views of an image, and what is seen in all of them as one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from detection_batches import batch_of, boxes, narrow_run

from fd_large.backbones.position_tables import fit_offsets
from fd_large.engine.forward_backward import prepared
from fd_large.tasks.dense import windowed_vit
from fd_large.tasks.dense.geometry import padded
from fd_large.tasks.detection.heads.roi_heads import Candidates
from fd_large.tasks.detection.heads.rpn import Proposals
from fd_large.tasks.detection.heads.selection import Selection
from fd_large.tasks.detection.job import DetectionJob, model_of
from fd_large.tasks.detection.scores.views import Model, TestViews, in_areas, mirrored

# An image of 40 x 60 pixels, seen at half its size and at its own, both ways round.
ORIGINAL = torch.tensor([[40, 60]])
HALVES = [torch.zeros(1, 3, 20, 30).byte(), torch.zeros(1, 3, 40, 60).byte()]
SIZES = [torch.tensor([[20, 30]]), torch.tensor([[40, 60]])]
SHAPES = [(40, 90), (96, 60)]
OBJECT = boxes((12, 8, 36, 24))


class Knows:
    """Sees the object in every view, with a score and a mask of the view's number."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, images, sizes, ask):
        self.asked.append(ask.what)
        number = self.asked.count(ask.what) - 1
        width = float(sizes[0, 1])
        here = OBJECT * (width / 60)
        if number % 2:
            here = here[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1]) + width * torch.tensor(
                [1.0, 0, 1, 0]
            )
        if ask.what == "proposals":
            return [Proposals(here, torch.tensor([float(number)]))]
        if ask.what == "candidates":
            if ask.boxes is not None:
                torch.testing.assert_close(ask.boxes[0], here)
            return [Candidates(here[:, None], torch.tensor([[0.1, 0.2 + number / 10]]))]
        torch.testing.assert_close(ask.boxes[0], here.expand(len(ask.boxes[0]), 4))
        side = torch.zeros(len(ask.boxes[0]), 2, 2)
        side[..., number % 2] = 1.0  # The object's left half, which a mirror shows at the right.
        return [side]


@pytest.mark.parametrize(
    ("merge", "areas", "passes", "scores"),
    [
        # The mean of 0.2, 0.3, 0.4 and 0.5.
        ("average", (), 3, [0.35]),
        # What is best of four equal boxes; two of them are left out where only small ones count.
        ("union", (), 2, [0.5]),
        ("areas", (), 2, [0.5]),
        ("areas", ("s", "l"), 2, [0.3]),
    ],
)
def test_an_object_of_every_view_is_seen_once(merge, areas, passes, scores):
    see = Knows()
    views = TestViews(40, 60, (0.5, 1.0), True, merge, areas)
    (seen,) = Model(see, views, Selection(least_score=0.15), 10).detect(HALVES, SIZES, ORIGINAL)
    torch.testing.assert_close(seen.boxes, OBJECT)
    assert seen.scores.tolist() == pytest.approx(scores)
    assert seen.labels.tolist() == [1]
    assert seen.masks.tolist() == [[[1, 0], [1, 0]]]
    assert len(see.asked) == 4 * passes


def test_an_image_is_mirrored_without_its_padding():
    images = torch.arange(8).view(1, 1, 2, 4).expand(2, 3, 2, 4).byte()
    found = mirrored(images, torch.tensor([[2, 3], [1, 4]]))
    assert found[0, 0, 0].tolist() == [2, 1, 0, 3]
    assert found[1, 0, 0].tolist() == [3, 2, 1, 0]


def test_areas_are_cocos():
    sides = torch.tensor([32.0, 33, 96, 97])
    at = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    assert in_areas(at, "s").tolist() == [True, False, False, False]
    assert in_areas(at, "ml").tolist() == [False, True, True, True]


@pytest.mark.parametrize("merge", ["average", "union"])
def test_a_mirrored_image_is_seen_mirrored(merge):
    torch.manual_seed(0)
    task = DetectionJob(narrow_run("coco_mask_rcnn_swinv2_tiny")).make_task().eval()
    image, size = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8), torch.tensor([[64, 64]])
    model = Model(task.see, TestViews(64, 64, (1.0,), True, merge), Selection(least_score=0), 20)
    (seen,) = model.detect([image], [size], size)
    (other,) = model.detect([image.flip(-1)], [size], size)
    back = other.boxes[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1])
    assert len(seen.boxes) > 4
    torch.testing.assert_close(seen.scores, other.scores)
    torch.testing.assert_close(
        seen.boxes, back + torch.tensor([64.0, 0, 64, 0]), atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(seen.masks, other.masks.flip(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "side", "grid"),
    [
        ("coco_mask_rcnn_vit_base", 96, (6, 6)),
        # 100 px are 7 patches of 14 and a part of one: as COCO's 1024 are 73 and a part.
        ("coco_cascade_vit_large", 100, (8, 8)),
        ("coco_mask_rcnn_swinv2_tiny", 96, None),
    ],
)
def test_images_are_seen_on_one_square_whatever_their_neighbours(recipe, side, grid, monkeypatch):
    """An image that is wide, alone, and beside a high one: as in training, on the same tables."""
    tables = []

    def fit(table, old, new):
        tables.append((new, fit_offsets(table, old, new)))
        return tables[-1][1]

    monkeypatch.setattr(windowed_vit, "fit_offsets", fit)
    torch.manual_seed(0)
    run = narrow_run(recipe, image_size=side)
    if run.student.model == "vit_large_patch14":
        architecture = replace(run.student.architecture, image_size=56)
        run = replace(run, student=replace(run.student, architecture=architecture))
    task, shapes = DetectionJob(run).make_task(), []
    targets = batch_of(0, (side, side), [2, 1])
    task(**prepared(task, targets, 0))  # As it is trained.
    task.eval()

    def see(images, sizes, ask):
        shapes.append(tuple(images.shape[-2:]))
        return task.see(images, sizes, ask)

    model = model_of(run, see)
    low, high = (torch.randint(0, 255, (1, 3, *size), dtype=torch.uint8) for size in SHAPES)
    sizes = torch.tensor(SHAPES)
    (alone,) = model.detect([low], [sizes[:1]], sizes[:1])
    both = model.detect(
        [torch.cat([padded(image, (96, 90)) for image in (low, high)])], [sizes], sizes
    )[0]
    assert shapes == [(side, side)] * 2
    for one, other in zip(alone, both, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    # The bias of an offset is that of training.
    assert [new for new, _ in tables] == [grid] * len(tables)
    assert len(tables) == (3 if grid else 0)
    assert all(torch.equal(table, tables[0][1]) for _, table in tables)


def test_images_that_were_trained_on_whole_are_seen_one_by_one():
    run = narrow_run("coco_mask_rcnn_swinv2_tiny")
    whole = replace(run.task.detection, whole_size=(40, 60, 90), scale_range=(0.1, 2.0))
    run = replace(run, task=replace(run.task, detection=whole))
    assert model_of(run, Knows()).views.square == 0


def test_a_score_says_how_images_were_seen():
    plain = Model(Knows(), TestViews(800, 1333), Selection(), 10)
    assert plain.in_words() == "800 px (at most 1333), hard NMS from IoU 0.5, scores above 0.05"
    views = TestViews(800, 1333, (0.5, 1.0), True, "union")
    rule = Selection(nms="linear", least_score=0.001, rescored=True)
    words = Model(Knows(), views, rule, 10).in_words()
    for part in ("scales 0.5 1", "mirrored", "union", "linear NMS", "0.001", "masks"):
        assert part in words
