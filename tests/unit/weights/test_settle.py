"""From a file to the model of a run: what is told, what is asked for, what is resized."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from loading import close, initial, loaded, scattered, settled, student_run, teacher_run
from safetensors.torch import save_file
from stored_run import FOUR, store_student

from fd_large.backbones.registry import FAMILIES, build
from fd_large.backbones.swin.swin import Swin
from fd_large.backbones.vit.published import KNOWN_HEADS
from fd_large.backbones.windows import coordinate_table
from fd_large.engine.checkpoint_models import sources_of
from fd_large.errors import ConfigError, WeightsError
from fd_large.recipes import registry
from fd_large.recipes.architectures import ARCHITECTURES, Architecture, resolve
from fd_large.recipes.run import Run
from fd_large.recipes.sections import Student
from fd_large.tasks.distillation.section import Objective, Teacher
from fd_large.tasks.jobs import job_of
from fd_large.weights.settle import settle_student

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SMALL = {"embed_dim": 32, "depths": (2,), "num_heads": (2,), "patch_size": 8, "image_size": 32}
SWIN = {
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "patch_size": 2,
    "image_size": 32,
}


# What a bare file of a ViT does not tell.
KNOWN = {"num_heads": (2,), "statistics": (0.5,) * 6}


def made(name, **fields):
    return scattered(build(name, Architecture(**fields), initialization="official", seed=0))


def saved(net, tmp_path, change=None):
    state = net.state_dict()
    if change:
        change(state)
    torch.save(state, tmp_path / "net.pth")
    return tmp_path / "net.pth"


TOLD = [n for n, a in ARCHITECTURES.items() if FAMILIES[a.family].published]


@pytest.mark.parametrize("name", TOLD)
def test_every_named_net_is_recognised_from_its_shapes(name):
    """But for what no name or shape tells."""
    with torch.device("meta"):
        net = build(name)
    shapes = {n: tuple(p.shape) for n, p in net.named_parameters()}
    asked = resolve(name)
    found = FAMILIES[asked.family].published.recognise(shapes, {})
    untold = {"norm_eps", "activation", "keep_distillation_token", "pretrained_window_sizes"}
    if asked.family == "swinv2":
        untold |= {"window_size", "image_size"}
    if asked.family == "vit" and asked.relative_position == "none":
        untold.add("num_heads")
        assert (KNOWN_HEADS[asked.embed_dim],) == asked.num_heads
    for field, value in vars(found).items():
        if value is not None:
            assert value == getattr(asked, field), field
        elif hasattr(asked, field):
            assert field in untold, field


def test_a_named_net_must_be_the_net_of_the_file(tmp_path):
    path = saved(made("dino_vit_base_patch16", **SMALL), tmp_path)
    with pytest.raises(WeightsError, match="embed_dim 32 instead of 768") as caught:
        loaded(path, "dino_vit_base_patch16")
    assert "--teacher.model auto" in str(caught.value)
    with pytest.raises(WeightsError, match=r"got vit, .*swinv2"):
        loaded(path, "swinv2_base")
    with pytest.raises(WeightsError, match="class_token True instead of False"):
        loaded(path, num_heads=(2,), class_token=False)
    _, teacher = loaded(path, "dino_vit_base_patch16", **SMALL)
    assert teacher.model == "dino_vit_base_patch16"


def test_an_open_clip_file_must_not_pass_for_openais(tmp_path):
    """A named model says quick_gelu, but the file does not tell: the user must."""
    state = {"visual.class_embedding": torch.zeros(32), "visual.proj": torch.zeros(1)}
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(WeightsError, match=r"no activation.*--teacher\.architecture\.activation"):
        teacher_run(tmp_path / "clip.pt", "clip_vit_base_patch16")


def test_widths_that_nobody_published_ask_for_their_heads(tmp_path):
    path = saved(made("dino_vit_base_patch16", **SMALL), tmp_path)
    with pytest.raises(WeightsError, match=r"no num_heads.*--teacher\.architecture\.num_heads"):
        loaded(path)


def test_all_that_is_missing_is_told_at_once_as_flags(tmp_path):
    path = saved(made("clip_vit_base_patch16", **SMALL), tmp_path)
    with pytest.raises(WeightsError) as caught:
        teacher_run(path)
    flags = str(caught.value).partition(" Set --")[2].split(" --")
    asked = {flag.split()[0]: flag.split()[1:7] for flag in flags}
    assert asked == {
        "teacher.architecture.activation": ["gelu|quick_gelu"],
        "teacher.architecture.num_heads": ["NUMBERS"],
        "teacher.statistics": ["MEAN"] * 3 + ["STD"] * 3,
    }
    statistics = (0.5,) * 6
    run = teacher_run(path, activation="gelu", num_heads=(2,), statistics=statistics)
    assert run.teacher.statistics == statistics


def test_settling_again_changes_nothing(tmp_path):
    path = saved(made("swin_base_esvit", **SWIN), tmp_path)
    run = teacher_run(path)
    assert run.teacher.model == "swin"
    assert settled(run) == run
    assert Run.from_dict(run.to_dict()) == run
    assert resolve(run.teacher.model, run.teacher.architecture) == replace(
        resolve("swin_base_esvit", Architecture(**SWIN)), image_size=16
    )


def test_a_vit_for_another_image_size(tmp_path, caplog):
    theirs = made("deit_vit_base_patch16", **SMALL)
    state = theirs.state_dict() | {"head.weight": torch.zeros(1, 32), "head.bias": torch.zeros(1)}
    torch.save({"model": state}, tmp_path / "deit.pth")
    with caplog.at_level(logging.INFO):
        net, _ = loaded(tmp_path / "deit.pth", num_heads=(2,), image_size=48)
    assert "1 x pos_embed resized from (1, 17, 32) to (1, 37, 32), bicubic" in caplog.text
    assert net(torch.zeros(1, 3, 48, 48)).grid == (6, 6)
    assert torch.equal(net.pos_embed[:, 0], theirs.pos_embed[:, 0])


def test_a_student_vit_for_another_image_size(tmp_path, caplog):
    """The table of relative positions follows data.image_size."""
    theirs = made("vit_base_patch16", **SMALL)
    state = {f"encoder.{n}": t for n, t in theirs.state_dict().items()}
    torch.save({"model": state}, tmp_path / "fd.pth")
    fields = {**SMALL, "image_size": 224}
    with caplog.at_level(logging.INFO):
        net, _ = initial(tmp_path / "fd.pth", "vit_base_patch16", 48, **fields)
    assert "resized from (52, 2) to (124, 2), by geometric progression" in caplog.text
    table = net.rel_pos_bias.relative_position_bias_table
    assert torch.equal(table[-3:], theirs.rel_pos_bias.relative_position_bias_table[-3:])


def test_a_swin_for_another_window(tmp_path, caplog):
    path = saved(made("swin_base_esvit", **SWIN), tmp_path)
    with caplog.at_level(logging.INFO):
        net, _ = loaded(path, window_size=8, image_size=32)
    assert "2 x relative_position_bias_table resized from (49, 4) to (225, 4)" in caplog.text
    assert net(IMAGES).tokens.isfinite().all()


def test_swinv2_keeps_its_coordinates_at_another_window(tmp_path, caplog):
    theirs = made("swinv2_base", **SWIN)
    with_tables = saved(theirs, tmp_path, tables)
    with caplog.at_level(logging.INFO):
        net, teacher = loaded(with_tables, window_size=8)
    assert teacher.architecture.pretrained_window_sizes == (4, 4)
    assert "window 8 in place of 4" in caplog.text
    assert [stage.pretrained_window for stage in net.layers] == [4, 4]
    same, _ = loaded(with_tables)
    close(same(IMAGES).tokens, theirs(IMAGES).tokens)
    # The same offsets have the same bias as before.
    cpb = theirs.layers[0].blocks[0].attn.cpb_mlp
    small = cpb(coordinate_table(4, 4, torch.device("cpu"))).view(7, 7, -1)
    large = cpb(coordinate_table(8, 4, torch.device("cpu"))).view(15, 15, -1)
    assert torch.allclose(large[4:11, 4:11], small, atol=1e-6)


def test_a_run_s_swinv2_keeps_the_windows_that_it_was_trained_with(tmp_path):
    store_student(tmp_path / "run", "swinv2_tiny", FOUR)
    found = []
    for window in (4, 8):
        shape = Architecture(**{**FOUR, "window_size": window})
        section = Student(model="swinv2_tiny", init=str(tmp_path / "run"), architecture=shape)
        settled = settle_student(section, sources_of(job_of))
        found.append(resolve(settled.model, settled.architecture).pretrained_window_sizes)
    # In its own window nothing is scaled otherwise; the last of its maps was half a window.
    assert found == [(0, 0, 0, 0), (4, 4, 4, 2)]


def tables(state):
    for stage in range(2):
        for block in range(2):
            at = f"layers.{stage}.blocks.{block}.attn.relative_coords_table"
            state[at] = coordinate_table(4, 0, torch.device("cpu")).view(1, 7, 7, 2)


def test_a_student_swinv2_keeps_the_coordinates_of_its_file(tmp_path):
    path = saved(made("swinv2_base", **SWIN), tmp_path, tables)
    _, student = initial(path, "swinv2_base", 32, **{**SWIN, "window_size": 8})
    assert student.architecture.pretrained_window_sizes == (4, 4)
    run = student_run(path, "swinv2_base", 32, **SWIN, pretrained_window_sizes=(0, 0))
    assert run.student.architecture.pretrained_window_sizes in (None, (0, 0))


def test_fewer_stages_than_the_file(tmp_path, caplog):
    theirs = made("swin_base_esvit", **SWIN)
    path = saved(theirs, tmp_path)
    with caplog.at_level(logging.INFO):
        net, _ = loaded(path, "swin_base_esvit", **{**SWIN, "depths": (2,), "num_heads": (2,)})
    assert "the first 1 of 2 stages" in caplog.text
    assert isinstance(net, Swin)
    assert net.width == 16


def test_names_that_the_user_allows(tmp_path, caplog):
    def change(state):
        del state["blocks.1.mlp.fc2.bias"]
        state["extra.weight"] = torch.zeros(3)

    path = saved(made("dino_vit_base_patch16", **SMALL), tmp_path, change)
    with pytest.raises(WeightsError) as caught:
        loaded(path, **KNOWN)
    message = str(caught.value)
    assert "missing: blocks.1.mlp.fc2.bias" in message
    assert "left over: extra.weight" in message
    assert "99.9% of the model's" in message
    assert "--teacher.allow" in message
    with caplog.at_level(logging.INFO):
        net, _ = loaded(path, **KNOWN, allow=("extra.*", "*.fc2.bias"))
    assert "blocks.1.mlp.fc2.bias: missing, and left as initialised (allowed)" in caplog.text
    assert "extra.weight: in the file alone (allowed)" in caplog.text
    assert (net.blocks[1].mlp.fc2.bias == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_with_numbers_that_are_none(tmp_path, value, dtype):
    def change(state):
        state["blocks.1.mlp.fc2.bias"] = state["blocks.1.mlp.fc2.bias"].to(dtype)
        state["blocks.1.mlp.fc2.bias"][7] = value

    path = saved(made("dino_vit_base_patch16", **SMALL), tmp_path, change)
    with pytest.raises(WeightsError, match=r"1 of 32 .* in blocks"):
        loaded(path, **KNOWN)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_files_of_another_type(tmp_path, dtype):
    def change(state):
        state["norm.bias"] = state["norm.bias"].to(dtype)

    path = saved(made("dino_vit_base_patch16", **SMALL), tmp_path, change)
    with pytest.raises(WeightsError, match=rf"norm.bias in {str(dtype).split('.')[1]}"):
        loaded(path, **KNOWN)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken(tmp_path, dtype):
    net = made("dino_vit_base_patch16", **SMALL)
    save_file({n: t.to(dtype) for n, t in net.state_dict().items()}, tmp_path / "a.safetensors")
    got, _ = loaded(tmp_path / "a.safetensors", **KNOWN)
    assert torch.equal(got.norm.weight, net.norm.weight.to(dtype).float())


def test_auto_needs_weights():
    run = registry.get("fd_clip_vit_base")
    for source in ("", "random"):
        automatic = replace(run, teacher=Teacher(model="auto", source=source))
        assert settled(automatic) == automatic


def test_recipes_of_record_settle_to_themselves():
    """But for what is automatic there: the teacher sees the student's images, on an equal grid."""
    for name in registry.RECIPES:
        run = registry.get(name)
        once = settled(run)
        if run.teachers or name in ("proxy_vit_base", "small_data"):
            # A name of timm's is taken apart, and patches of 14 px see another size than of 16, as
            # a map of stride 8 has another grid than one of stride 32.
            own = {each: getattr(once, each) for each in ("teacher", "teachers", "objective")}
            assert settled(once) == once == replace(run, **own)
        else:
            none = Objective()  # Of what is automatic.
            paper = {f: getattr(none, f) for f in ("interpolation", "teacher_image_size")}
            assert once == replace(run, objective=replace(run.objective, **paper))


def test_statistics_are_six_numbers():
    with pytest.raises(ConfigError, match=r"teacher\.statistics"):
        Teacher(model="swinv2_base", statistics=(0.5, 0.5, 0.5))


WIDE = {**SMALL, "embed_dim": 192, "depths": (1,), "num_heads": (6,)}


def test_heads_of_a_published_width_are_the_last_guess(tmp_path):
    net = made("dino_vit_base_patch16", **WIDE)
    path = saved(net, tmp_path)

    def heads(**given):
        return teacher_run(path, statistics=(0.5,) * 6, **given).teacher.architecture.num_heads

    assert heads() == (3,)
    assert heads(num_heads=(6,)) == (6,)
    own = {"architecture": {"num_heads": [6], "norm_eps": 1e-6, "activation": "gelu"}}
    (tmp_path / "config.json").write_text(json.dumps({"fd_large": own}))
    assert heads() == (6,)
