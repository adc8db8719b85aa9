"""docs/recipes.md is what the recipes' docstrings say now."""

from fd_large.recipes import registry
from fd_large.report.recipe_page import PATH, _listed, recipe_page


def test_the_page_is_up_to_date():
    assert PATH.read_text() == recipe_page(), "docs/recipes.md is old: run `make docs`"


def test_every_recipe_has_its_row_and_its_section():
    page = recipe_page()
    for name in registry.RECIPES:
        facts = registry.facts(name)
        assert f"| [{name}](#{name}) |" in page
        assert f"\n### {name}\n\n{facts.summary}\n\n- needs: {facts.hardware}\n" in page
    assert page.isascii()


def test_a_setting_that_the_task_ignores_is_left_out():
    sections = recipe_page().split("\n### ")
    of = {name: next(s for s in sections if s.startswith(name + "\n")) for name in registry.RECIPES}
    assert "crops of at least 0.08 of the area" in of["finetune_clip_vit_base"]
    assert "- settings: 512 px, global batch 16, " in of["ade20k_linear"]
    assert "crops of at least" not in of["coco_mask_rcnn_vit_base"]


def test_reasons_by_section_become_items():
    lines = ["Why:", "student: small", "    and quick.", "optim: fast.", "", "note: no item"]
    expected = ["Why:", "", "- student: small", "    and quick.", "- optim: fast.", ""]
    assert _listed(lines) == [*expected, "note: no item"]
