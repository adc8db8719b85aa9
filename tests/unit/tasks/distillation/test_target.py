"""A target compares what a head makes of the student's tokens with a teacher's."""

from __future__ import annotations

import pytest
import torch

from fd_large.backbones.feature_map import FeatureMap
from fd_large.errors import ConfigError
from fd_large.tasks.distillation.heads.map_head import MapShapes
from fd_large.tasks.distillation.job import KNOWN
from fd_large.tasks.distillation.losses import LOSSES
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.target import summary
from fd_large.tasks.distillation.task import Seen


def a_map(channels: int, prefix: int = 1, seed: int = 0) -> FeatureMap:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(3, prefix + 4, channels, generator=generator)
    return FeatureMap(tokens, (2, 2), prefix)


def test_the_summary_is_the_first_prefix_token_or_the_mean():
    with_cls, without = a_map(5, prefix=2), a_map(5, prefix=0)
    assert torch.equal(summary(with_cls), with_cls.tokens[:, :1])
    assert torch.equal(summary(without), without.tokens.mean(1, keepdim=True))


def test_a_map_is_learnt_with_its_cls_token_unless_that_is_a_target_of_its_own():
    student, teacher = a_map(4), a_map(6)
    counts = [
        make_target(4, 6, **options).compared(Seen(student), teacher)[1].shape[1]
        for options in ({}, {"with_prefix": False}, {"kind": "summary"})
    ]
    assert counts == [5, 4, 1]


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (loss, kind)
        for kind in ("map", "summary")
        for loss in [*KNOWN.losses, "0.9 cosine_of_map + 0.1 smooth_l1"]
        if loss != "queue" and (loss, kind) != ("relation", "summary")
    ],
)
def test_the_loss_is_the_mean_of_what_each_image_has(loss, kind):
    torch.manual_seed(0)
    target = make_target(4, 6, kind=kind, loss=loss, known=KNOWN)
    projected, wanted = target.compared(Seen(a_map(4)), a_map(6, seed=1))
    each = target.per_image(projected, wanted)
    assert each.shape == (3,)
    assert each.mean().item() == pytest.approx(target.value(projected, wanted).item(), rel=1e-5)
    alone = target.value(projected[1:2], wanted[1:2])
    assert each[1].item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["relation", "0.5 mse + 0.5 relation"])
def test_a_summary_alone_has_no_relations(loss):
    with pytest.raises(ConfigError, match=r"teachers\.a\.summary\.loss: .* got relation"):
        make_target(4, 6, teacher="a", kind="summary", loss=loss, known=KNOWN)


def test_a_loss_of_the_users_own_has_a_value_for_each_image(monkeypatch):
    monkeypatch.setitem(LOSSES, "own", lambda ours, theirs: (ours - theirs).abs().mean())
    own, l1 = (make_target(4, 6, loss=loss) for loss in ("own", "l1"))
    projected, wanted = torch.randn(2, 3, 5, 6).unbind()
    assert torch.allclose(own.per_image(projected, wanted), l1.per_image(projected, wanted))


def test_a_ladder_of_summaries_reads_the_cls_tokens_of_the_blocks():
    maps = [a_map(4, seed=number) for number in range(3)]
    target = make_target(
        4, 6, kind="summary", head="ladder", maps=lambda: MapShapes((1, 1), (1, 1), 0, 3)
    )
    projected, wanted = target.compared(Seen(maps[-1], tuple(maps)), a_map(6))
    assert projected.shape == wanted.shape == (3, 1, 6)
    by_hand = sum(target.head.patch[str(i)](map_.tokens[:, :1]) for i, map_ in enumerate(maps))
    assert torch.allclose(projected, by_hand)
