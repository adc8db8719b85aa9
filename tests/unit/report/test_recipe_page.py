"""docs/recipes.md and docs/recipes/ are what the recipes' docstrings say now."""

import pytest

from fd_large.recipes import registry
from fd_large.report.recipe_page import DOCS, _listed, pages


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return pages()


def test_the_pages_are_up_to_date(found):
    there = {f"recipes/{path.name}" for path in (DOCS / "recipes").glob("*.md")}
    assert found.keys() == {"recipes.md", *there}
    for path, text in found.items():
        assert (DOCS / path).read_text() == text, f"docs/{path} is old: run `make docs`"


def test_every_recipe_has_its_row_and_its_section(found):
    for name, recipe in registry.RECIPES.items():
        facts, path = registry.facts(name), f"recipes/{recipe.__module__.split('.')[-1]}.md"
        assert f"| [{name}]({path}#{name}) |" in found["recipes.md"]
        assert f"\n## {name}\n\n{facts.summary}\n\n- needs: {facts.hardware}\n" in found[path]
    assert all(text.isascii() for text in found.values())


def test_a_setting_that_the_task_ignores_is_left_out(found):
    sections = "".join(found.values()).split("\n## ")
    of = {name: next(s for s in sections if s.startswith(name + "\n")) for name in registry.RECIPES}
    assert "crops of at least 0.08 of the area" in of["finetune_clip_vit_base"]
    assert "- settings: 512 px, global batch 16, " in of["ade20k_linear"]
    assert "crops of at least" not in of["coco_mask_rcnn_vit_base"]


def test_reasons_by_section_become_items():
    lines = ["Why:", "student: small", "    and quick.", "optim: fast.", "", "note: no item"]
    expected = ["Why:", "", "- student: small", "    and quick.", "- optim: fast.", ""]
    assert _listed(lines) == [*expected, "note: no item"]
