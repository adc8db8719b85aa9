"""Losses, normalisers and heads: built-in ones, and a user's own in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fd_large import doors
from fd_large.backbones.statistics import IMAGENET
from fd_large.backbones.vit.vit import ViT
from fd_large.engine.frozen import Frozen
from fd_large.engine.heads import check_head
from fd_large.errors import ConfigError
from fd_large.tasks.distillation import losses
from fd_large.tasks.distillation.heads.map_head import WHERE
from fd_large.tasks.distillation.heads.registry import HEADS, reads_maps
from fd_large.tasks.distillation.held_out import constant_prediction_losses
from fd_large.tasks.distillation.job import KNOWN
from fd_large.tasks.distillation.losses import SmoothL1, check_loss, make_loss
from fd_large.tasks.distillation.normalisers import check_normaliser, make_normaliser
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.section import Objective
from fd_large.tasks.distillation.target import references
from fd_large.tasks.distillation.task import Distillation

COSINE = """
import torch.nn.functional as F

def cosine(projected, target):
    return 1 - F.cosine_similarity(projected, target, dim=-1).mean()
"""


def own(path: Path, text: str, name: str) -> str:
    path.write_text(text)
    source = f"module:{path}:{name}"
    doors.allow(source)
    return source


def distillation(**objective: object) -> Distillation:
    torch.manual_seed(0)
    student = ViT(8, 1, 1, patch_size=8, image_size=16, absolute_position=True)
    teacher = Frozen(ViT(12, 1, 1, patch_size=8, image_size=16, absolute_position=True), IMAGENET)
    target = make_target(student.width, teacher.width, **objective)
    return Distillation(student, {"": teacher}, [target])


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=generator)


def test_a_loss_of_the_users_own_is_trained_and_has_words_and_a_baseline(tmp_path):
    source = own(tmp_path / "cosine.py", COSINE, "cosine")
    loss = make_loss(source, beta=2.0)
    check_loss(loss, source)
    assert loss.label == "cosine loss"
    task = distillation(loss=source).eval()
    prepared = task.prepare(images(), None, None)
    value, metrics = task(**prepared)
    assert value.item() == pytest.approx(1 - metrics["cosine"].item(), abs=1e-6)
    value.backward()
    assert task.projection.weight.grad.abs().sum() > 0
    target = references(task, **prepared)[0].flatten(0, 1)
    best = 1 - F.cosine_similarity(target.mean(0, keepdim=True), target).mean()
    batches = [(prepared, 1), (prepared, 0)]
    (found,) = constant_prediction_losses(task, lambda: iter(batches), _same)
    assert found == pytest.approx(best.item(), rel=1e-5)


def test_a_loss_that_relates_the_images_of_a_batch_is_refused(tmp_path):
    text = (
        "def relational(projected, target):\n"
        "    ours, theirs = (x.mean(1) @ x.mean(1).T for x in (projected, target))\n"
        "    return (ours - theirs).square().mean()\n"
    )
    source = own(tmp_path / "relational.py", text, "relational")
    with pytest.raises(ConfigError, match=r"objective\.loss.*not a mean over the images"):
        check_loss(make_loss(source, beta=2.0), source)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_built_in_loss_is_a_mean_over_the_images(name):
    check_loss(make_loss(name, beta=2.0), name)


def test_a_built_in_loss_is_one_line_in_its_table(monkeypatch):
    def l2(projected, target):
        return (projected - target).square().mean()

    monkeypatch.setitem(losses.LOSSES, "l2", l2)
    task = distillation(loss=Objective(loss="l2").loss)
    value, _ = task(**task.prepare(images(), None, None))
    assert value.dtype == torch.float32
    assert task.targets[0].loss.label == "l2 loss"
    monkeypatch.setattr(l2, "__name__", "mse_loss")
    assert make_loss("l2", beta=2.0).label == "mse loss"


def test_smooth_l1_is_the_same_fused_and_written_out():
    projected, tokens = torch.randn(2, 2, 3, 8).unbind()
    loss, whiten = SmoothL1(0.5), make_normaliser("whitening", eps=1e-3)
    assert torch.equal(loss.fused(projected, tokens, 1e-3), loss(projected, whiten(tokens)))


# That against a queue is a mean over images once it has one: test_task.py.
@pytest.mark.parametrize("name", [name for name in KNOWN.losses if name != "queue"])
def test_built_in_losses_are_means_over_images_and_have_the_best_constant(name):
    target = (torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)) + 0.3).exp()
    loss = KNOWN.loss(name, beta=0.5)
    check_loss(loss, name)
    constant = target.mean((0, 1)).requires_grad_()

    def value(rows: slice = slice(None)) -> torch.Tensor:
        return loss(constant.expand_as(target[rows]), target[rows])

    # Whatever the division into micro batches, and with the slope that the baseline takes.
    parts = (value(slice(0, 1)) + 3 * value(slice(1, 4))) / 4
    assert parts.item() == pytest.approx(value().item(), rel=1e-5)
    (slope,) = torch.autograd.grad(4 * value(), constant)
    found, unit = loss.newton(constant.detach(), target), F.normalize(constant.detach(), dim=0)
    if found is None:
        assert slope.abs().max() < 1e-5, "a loss without slopes is the same for all constants"
        return
    difference = found[0] - slope
    if name.startswith(("cosine", "cls")):  # The length of a constant changes no cosine.
        difference = difference - (difference @ unit) * unit
    assert difference.abs().max() < 1e-5


def test_a_sum_by_weight_is_the_sum_of_its_terms():
    projected, target = torch.randn(2, 3, 4, 8).unbind()
    both = make_loss("0.9 cosine_of_map + .1 smooth_l1", beta=1.0)
    cosine, smooth = (make_loss(name, beta=1.0) for name in ("cosine_of_map", "smooth_l1"))
    expected = 0.9 * cosine(projected, target) + 0.1 * smooth(projected, target)
    assert both(projected, target).item() == pytest.approx(expected.item(), rel=1e-6)
    assert both.label == "0.9 x map cosine + 0.1 x smooth L1 loss"
    assert both.reads_beta
    assert not make_loss("1 mse + 2 l1", beta=1.0).reads_beta
    for wrong, part in (
        ("0.9 cosin + 1 l1", "nearest"),
        ("-1 mse + 1 l1", "-1 mse"),
        ("1 ", "'1 '"),
    ):
        with pytest.raises(ConfigError, match=rf"objective\.loss.*{part}"):
            make_loss(wrong, beta=1.0)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("return (projected - target).mean(-1)", "(2, 3)"),
        ("return (projected - target).mean().double()", "float64"),
        ("return target.mean()", "RuntimeError"),
        ("return projected.mean() / 0", "float32"),
        ("return projected @ target", "own.py line 2"),
    ],
    ids=["shape", "type", "gradient", "infinite", "error"],
)
def test_a_loss_that_does_not_work_is_refused_before_a_run(tmp_path, body, part):
    source = own(tmp_path / "own.py", f"def own(projected, target):\n    {body}\n", "own")
    with pytest.raises(ConfigError, match=r"objective\.loss") as caught:
        check_loss(make_loss(source, beta=2.0), source)
    assert part in str(caught.value)


def test_a_loss_class_that_cannot_be_made_is_refused(tmp_path):
    text = "from fd_large.tasks.distillation.losses import Loss\n"
    text += "class Own(Loss):\n    def __init__(self):\n        super().__init__()\n"
    with pytest.raises(ConfigError, match=r"objective\.loss"):
        make_loss(own(tmp_path / "own.py", text, "Own"), beta=2.0)


def test_a_normaliser_of_the_users_own_treats_each_token_alone(tmp_path):
    text = (
        "def scaled(tokens):\n    return tokens.float() / 2\n"
        "def batch(tokens):\n    return tokens - tokens.mean((0, 1))\n"
        "def narrow(tokens):\n    return tokens[..., :2]\n"
        "def broken(tokens):\n    return tokens @ tokens\n"
    )
    scaled = own(tmp_path / "own.py", text, "scaled")
    check_normaliser(make_normaliser(scaled, eps=1e-5), scaled)
    task = distillation(normaliser=scaled)
    prepared = task.prepare(images(), None, None)
    assert torch.equal(references(task, **prepared)[0], prepared["maps"][""].tokens / 2)
    whole, half = task(**prepared)[0], distillation(normaliser="none")(**prepared)[0]
    assert whole != half
    for name, part in (("batch", "mixes"), ("narrow", "2, 3, 2"), ("broken", "own.py line 8")):
        source = own(tmp_path / "own.py", text, name)
        with pytest.raises(ConfigError, match=rf"objective\.normaliser.*{part}"):
            check_normaliser(make_normaliser(source, eps=1e-5), source)


def test_a_head_of_the_users_own_is_trained(tmp_path):
    text = (
        "from torch import nn\n"
        "def mlp(width, teacher_width):\n"
        "    return nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, teacher_width))\n"
    )
    task = distillation(head=own(tmp_path / "own.py", text, "mlp"))
    assert {n for n, _ in task.named_parameters() if n.startswith("projection.")} == {
        f"projection.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    task(**task.prepare(images(), None, None))[0].backward()
    assert task.projection[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [n for n, make in HEADS.items() if not reads_maps(make)])
def test_a_built_in_head_trains_all_that_it_has(name):
    with torch.device("meta"):
        check_head(HEADS[name](32, 12), name, (2, 3, 32), 12, where=WHERE)
    head = HEADS[name](32, 12)
    head(torch.randn(2, 3, 32)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())


def test_attention_that_does_not_fit_the_student_is_refused():
    with pytest.raises(ConfigError, match=r"objective\.head.*24.*16 heads"):
        HEADS["attention_mlp"](24, 12)


def test_recipes_hold_the_path_of_a_file_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objective = Objective(loss="module:own.py:cosine")
    assert objective.loss == f"module:{tmp_path}/own.py:cosine"
    assert Objective() == Objective(loss="smooth_l1", normaliser="whitening", head="linear")


def _same(totals: torch.Tensor) -> torch.Tensor:
    return totals
