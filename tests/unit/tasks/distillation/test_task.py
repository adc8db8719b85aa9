import pretended_ranks
import pytest
import torch
from torch import nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import IMAGENET, normalise
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.vit.vit import ViT
from fd_large.data.loader import Batch
from fd_large.engine.forward_backward import arguments_of_step
from fd_large.engine.frozen import Frozen
from fd_large.errors import ConfigError, ShapeError
from fd_large.ranks import distributed
from fd_large.tasks.distillation.feature_panel import feature_panel
from fd_large.tasks.distillation.heads.map_head import MapShapes
from fd_large.tasks.distillation.job import KNOWN, composed
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.section import Weighting
from fd_large.tasks.distillation.several.weighting import DATASETS
from fd_large.tasks.distillation.target import references
from fd_large.tasks.distillation.task import Distillation, Seen, Target


@pytest.fixture
def task():
    torch.manual_seed(0)
    student = SwinV2(8, (1, 1), (1, 2), window_size=4, drop_path_rate=0.5)
    teacher = Frozen(SwinV2(12, (1, 1), (1, 2), window_size=4), IMAGENET)
    return Distillation(student, {"": teacher}, [make_target(student.width, teacher.width)])


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_loss_is_the_formula_written_out(task, images):
    loss, metrics = task(**task.prepare(images, None, None))
    pixels = normalise(images, IMAGENET)
    target = task.teachers.by_name[""].net(pixels).tokens
    mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True, unbiased=False)
    white = (target - mean) / (variance + 1e-5).sqrt()
    difference = (task.projection(task.student(pixels).tokens) - white).abs()
    by_hand = torch.where(difference < 2, difference**2 / 4, difference - 1).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert metrics == {}
    assert 0.2 < loss.item() < 0.6, "a fresh projection against unit targets"


def test_the_teacher_is_frozen_and_stays_in_evaluation(task, images):
    teacher = task.teachers.by_name[""]
    assert not any(name.startswith("_teachers") for name, _ in task.named_parameters())
    assert sum(p.numel() for p in task.parameters()) < sum(
        p.numel() for p in [*task.parameters(), *teacher.parameters()]
    )
    task.train()
    teacher.train()
    assert not teacher.training
    assert not teacher.net.training
    loss, _ = task(**task.prepare(images, None, None))
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_drop_path_is_an_input_per_sample(task, images):
    keep = torch.ones(len(task.drop_path_rates), 3, dtype=torch.bool)
    keep[-1, 1] = False
    whole = task.student(normalise(images, IMAGENET), torch.ones_like(keep)).tokens
    dropped = task.student(normalise(images, IMAGENET), keep).tokens
    assert torch.equal(whole[[0, 2]], dropped[[0, 2]])
    assert not torch.equal(whole[1], dropped[1])


def test_bfloat16_keeps_the_loss_in_float32(task, images):
    exact, _ = task(**task.prepare(images, None, None))
    low = task.bfloat16()
    loss, _ = low(**low.prepare(images, None, None))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)


def test_evaluation_reports_the_cosine(task, images):
    task.eval()
    with torch.no_grad():
        _, metrics = task(**task.prepare(images, None, None))
    assert -1 <= metrics["cosine"].item() <= 1


def several(weights, *kinds, normalisers=("whitening", "whitening"), **more):
    """The same student and teacher as `task`, the teacher several times."""
    torch.manual_seed(0)
    student = SwinV2(8, (1, 1), (1, 2), window_size=4, drop_path_rate=0.5)
    teacher = Frozen(SwinV2(12, (1, 1), (1, 2), window_size=4), IMAGENET)
    teachers = {f"t{number}": teacher for number in range(len(weights))}
    targets = [
        make_target(
            student.width,
            teacher.width,
            teacher=name,
            kind=kind,
            weight=weight,
            normaliser=normaliser,
            known=KNOWN,
        )
        for (name, weight), normaliser in zip(
            zip(teachers, weights, strict=True), normalisers, strict=False
        )
        for kind in kinds or ("map",)
    ]
    return composed(student, teachers, targets, **more)


def test_one_of_several_teachers_is_the_only_teacher_to_the_bit(task, images):
    one = several([1.0])
    names = {"heads.t0.map.weight": "projection.weight", "heads.t0.map.bias": "projection.bias"}
    own, state = task.state_dict(), one.state_dict()
    assert {names.get(name, name) for name in state} == own.keys()
    for each in (one, task):
        each(**each.prepare(images, None, None))[0].backward()
    grads = {n: p.grad for n, p in task.named_parameters()}
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, own[names.get(name, name)])
        assert torch.equal(parameter.grad, grads[names.get(name, name)])


def test_two_equal_teachers_at_half_weight_are_one(task, images):
    two = several([0.5, 0.5])
    for head in two.heads.values():
        head["map"].load_state_dict(task.projection.state_dict())
    one, both = (each(**each.prepare(images, None, None))[0] for each in (task, two))
    assert both.item() == pytest.approx(one.item(), rel=1e-6)
    one.backward()
    both.backward()
    grads = dict(two.student.named_parameters())
    for name, parameter in task.student.named_parameters():
        assert torch.allclose(grads[name].grad, parameter.grad, rtol=1e-4, atol=1e-7)


def test_each_target_has_its_loss_and_its_cosine(images):
    task = several([2.0, 1.0], "map", "summary").eval()
    with torch.no_grad():
        loss, metrics = task(**task.prepare(images, None, None))
    labels = ["t0", "t0_summary", "t1", "t1_summary"]
    assert metrics.keys() == {"cosine", *(f"{n}_{m}" for n in labels for m in ("loss", "cosine"))}
    losses = [metrics[f"{label}_loss"].item() for label in labels]
    expected = 2 * losses[0] + 2 * losses[1] + losses[2] + losses[3]
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert [key for key in task.models() if key] == ["teachers.t0.", "teachers.t1."]


@pytest.mark.parametrize(
    ("head", "options", "tokens"),
    [
        ("ladder", {"interpolation": "bilinear"}, 1 + 16),
        ("upsampling_mlp", {}, 64),
        ("convolutional", {"teacher_patch": 8}, 16),
        ("resized_mlp", {}, 64),
        ("linear", {"interpolation": "bilinear_student"}, 1 + 64),
        ("linear", {"interpolation": "bilinear_larger", "teacher_patch": 16}, 1 + 16),
    ],
)
def test_heads_and_resizing_compare_maps_on_one_grid(images, head, options, tokens):
    torch.manual_seed(0)
    student = ViT(16, 2, 2, patch_size=8, image_size=32)
    patch = options.get("teacher_patch", 4)
    teacher = Frozen(ViT(12, 1, 2, patch_size=patch, image_size=32), IMAGENET)
    grid, theirs = student.grid(32, 32), teacher.grid(32)
    target = make_target(
        student.width,
        teacher.width,
        head=head,
        maps=lambda: MapShapes(grid, theirs, student.num_prefix_tokens, 2),
        interpolation=options.get("interpolation", "none"),
    )
    task = composed(student, {"": teacher}, [target])
    prepared = task.prepare(images, None, None)
    task(**prepared)[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in target.head.parameters())
    # What nothing is learnt of has a gradient all the same, which ZeRO-3 waits for.
    assert all(p.grad is not None for p in student.parameters())
    assert references(task, **prepared)[0].shape == (3, tokens, 12)
    panel = feature_panel(task.eval(), task, images)
    side = round((tokens - tokens % 4) ** 0.5)
    assert panel["teacher"].shape == panel["student"].shape == (3, side, side, 12)


def two_steps(task, parts, count):
    """Losses, gradients and running statistics of two steps, of `count` micro batches a rank."""
    losses, ranks = [], distributed.world_size()
    for step in range(2):
        task.zero_grad()
        task.before_step(step / 4)
        total = 0.0
        for arguments in arguments_of_step(task, task, parts, seed=3, count=count):
            loss, _ = task(**arguments)
            (loss / count).backward()
            total += loss.detach() / count
        task.after_step()
        losses.append(distributed.sum_tensor(total) / ranks)
    sums = [distributed.sum_tensor(p.grad) / ranks for p in task.parameters()]
    return torch.stack(losses), sums, dict(task.named_buffers())


@pytest.mark.parametrize(
    ("normalisers", "rule"),
    [
        (("running", "batch"), "drop"),
        (("batch", "running"), "own_data"),
        (("running",) * 2, "fixed"),
    ],
)
def test_a_step_is_the_same_in_any_parts_and_on_any_ranks(normalisers, rule, monkeypatch):
    """Where public codes have the loss and the statistics of each rank by itself."""
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    datasets, teaches = torch.tensor([0, 0, 0, 1, 0, 1]), [[True, False], [True, True]]

    def made():
        weighting = Weighting(rule=rule)
        own = {"weighting": weighting, "taught": teaches, "normalisers": normalisers}
        return several([0.5, 1.0], "map", "summary", **own)

    def batch(places):
        targets = {DATASETS: datasets[places]} if rule == "own_data" else None
        return Batch(images[places], 1, places, places, targets=targets)

    every = torch.arange(6)
    wanted = two_steps(made(), [batch(every)], 1)
    found = [two_steps(made(), [batch(every[i::3]) for i in range(3)], 3)]
    world = pretended_ranks.World(monkeypatch, 2)
    tasks = [made(), made()]
    found += world.run(
        lambda: two_steps(
            tasks[pretended_ranks.rank()], [batch(every[pretended_ranks.rank() :: 2])], 1
        )
    )
    for losses, gradients, statistics in found:
        torch.testing.assert_close(losses, wanted[0], rtol=1e-6, atol=0)
        for one, other in zip(gradients, wanted[1], strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm() + 1e-8
        names = [name for name in statistics if name.startswith("running.")]
        assert len(names) == 2 * 2 * 2
        for name in names:
            torch.testing.assert_close(statistics[name], wanted[2][name], rtol=1e-6, atol=1e-7)


def test_what_is_counted_and_tested_needs_no_draws(images):
    task = several([1.0, 1.0], weighting=Weighting(rule="drop"), normalisers=("batch", "running"))
    assert task.shapes_only(Batch(images, 0, torch.arange(3), torch.arange(3))).isfinite()
    with torch.no_grad():
        loss, metrics = task.eval()(**task.prepare(images, None, None))
    # The mean over the teachers.
    assert loss.item() == pytest.approx((metrics["t0_loss"] + metrics["t1_loss"]).item() / 2)


def test_a_queue_holds_the_summaries_of_the_global_batch_whatever_its_division(monkeypatch):
    monkeypatch.setattr("fd_large.tasks.distillation.several.similarity.QUEUE", 10)
    draw = torch.Generator().manual_seed(0)
    batches = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8, generator=draw)

    def learn(ranks, micro_batches):
        """Losses of two steps and the queue after them, of ranks that run one after another."""
        torch.manual_seed(0)
        student = ViT(16, 1, 2, patch_size=8, image_size=32)
        teacher = Frozen(ViT(12, 1, 2, patch_size=8, image_size=32), IMAGENET)
        own = {"loss": "queue", "normaliser": "none", "known": KNOWN}
        targets = [make_target(16, 12, teacher="a", kind="summary", **own)]
        task = Distillation(student, {"a": teacher}, targets).train()
        place = "fd_large.tasks.distillation.several.similarity.distributed"
        monkeypatch.setattr(f"{place}.world_size", lambda: ranks)
        losses = []
        for images in batches:
            parts = images.chunk(ranks * micro_batches)
            prepared = [task.prepare(part, None, None) for part in parts]
            sums = []
            for number, one in enumerate(prepared):
                if number % micro_batches == 0:
                    assert task.two_passes(micro_batches)
                    task.begin_sums(micro_batches)
                    # A question, which changes nothing.
                    assert task.two_passes(1)
                    monkeypatch.setattr(f"{place}.rank", lambda n=number: n // micro_batches)
                sums.append(task.sums(task, one))
            totals = torch.stack(sums).sum(0)
            arguments = [task.with_totals(one, totals, parts=len(parts)) for one in prepared]
            losses.append(torch.stack([task(**one)[0] for one in arguments]).mean().item())
            task.after_step()
        return losses, task.state_dict()["queues.a_summary.rows"]

    losses, rows = learn(1, 1)
    assert losses[0] > 0
    assert torch.allclose(rows.norm(dim=1), torch.tensor([1.0] * 8 + [0.0] * 2))
    for ranks, micro_batches in ((1, 2), (2, 1), (2, 2)):
        others, theirs = learn(ranks, micro_batches)
        assert others == pytest.approx(losses, rel=1e-5)
        assert torch.allclose(theirs, rows, atol=1e-6)


def test_a_queue_is_refused_normalised_summaries():
    with pytest.raises(ConfigError, match=r"teachers\.a\.summary\.normaliser"):
        make_target(16, 12, teacher="a", kind="summary", loss="queue", known=KNOWN)


def test_the_small_target_is_the_named_one_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    named = make_target(8, 12)
    small = Target(named.head)
    projected, tokens = (torch.randn(3, 5, 12, generator=generator) for _ in range(2))
    assert torch.equal(small.value(projected, tokens), named.value(projected, tokens))
    assert torch.equal(small.cosine(projected, tokens), named.cosine(projected, tokens))
    torch.testing.assert_close(
        small.per_image(projected, tokens), named.per_image(projected, tokens)
    )
    assert (small.label, small.path) == (named.label, named.path)


def test_two_targets_of_one_name_and_maps_of_other_tokens_are_refused(task, images) -> None:
    targets = [Target(nn.Linear(task.student.width, 24), teacher=name) for name in "ab"]
    teachers = dict.fromkeys("ab", task.teachers.by_name[""])
    with pytest.raises(ConfigError, match="projection"):
        Distillation(task.student, teachers, targets)
    targets[1].label, targets[1].path = "b", "heads.b"
    both = Distillation(task.student, teachers, targets)
    assert {"projection.weight", "heads.b.weight"} <= dict(both.named_parameters()).keys()
    seen = Seen(FeatureMap(torch.zeros(1, 4, task.student.width), (2, 2), 0))
    with pytest.raises(ShapeError):
        targets[0].compared(seen, FeatureMap(torch.zeros(1, 5, 24), (2, 2), 1))
