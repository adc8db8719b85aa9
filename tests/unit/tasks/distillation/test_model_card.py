"""Two teachers of one model are told apart on the card."""

from dataclasses import replace

from fd_large.recipes.architectures import Architecture
from fd_large.recipes.sections import Data
from fd_large.tasks.distillation.model_card import learned
from fd_large.tasks.distillation.section import NamedTeacher

USUAL = NamedTeacher(model="dino_vit_base_patch16", source="random", teacher_image_size=0)


def test_teachers_of_one_model_are_told_apart():
    entries = {
        "coarse": USUAL,
        "fine": replace(
            USUAL,
            architecture=Architecture(image_size=448),
            teacher_image_size=448,
            layer="before_norm",
        ),
        "slim": replace(USUAL, architecture=Architecture(depths=(6,))),
    }
    card = learned(entries, {}, Data(root="", image_size=224))
    coarse, fine, slim = (card.tables[f"Teacher {name}"] for name in entries)
    assert coarse["model"] == fine["model"] == slim["model"] == "dino_vit_base_patch16"
    assert coarse["map"].startswith("14 x 14 tokens of 768 channels at 224 px")
    assert fine["map"].startswith("28 x 28 tokens of 768 channels at 448 px")
    assert fine["layer"] == "before_norm"
    assert slim["changed fields"] == "depths 6"
    assert "changed fields" not in coarse
    assert all(f"({name})" in card.title for name in entries)


def test_teachers_of_several_models_have_their_names_alone():
    entries = {"a": USUAL, "b": replace(USUAL, model="clip_vit_base_patch16")}
    card = learned(entries, {}, Data(root=""))
    assert card.title == "distilled from dino_vit_base_patch16 and clip_vit_base_patch16"
