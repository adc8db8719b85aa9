"""Writes the pages of the recipes in docs/ from the recipes' docstrings.

It is run as `python -m fd_large.report.recipe_page`.
"""

from __future__ import annotations

import inspect
import re
import sys
from itertools import groupby
from pathlib import Path

from fd_large.recipes import registry
from fd_large.tasks.registry import kind_of

DOCS = Path(__file__).resolve().parents[2] / "docs"

_FACTS = ("Hardware:", "Duration:", "Memory:", "Result:")
_BEGINNING = """# Recipes

Made from the recipes' docstrings by `make docs`: change those, not this page. `python -m fd_large
recipes` prints the same table, `python -m fd_large recipes NAME` a recipe with all its fields, as
a run file.

```bash
deepspeed fd_large/train.py --deepspeed_config ds_configs/zero3.json --recipe NAME
```

To change fields, add flags (`--optim.base_lr 1e-4`), or write them to a file and add `--config
run.yaml`:

```yaml
name: fd_clip_vit_base   # the recipe that is changed
data: {root: /data/imagenet, workers: 8}
optim:
  base_lr: 1e-4
  max_steps: 20000
```

The file is YAML or JSON, nested as the `recipe.json` in the folder of a run, so that a
`recipe.json` can be given too. Flags win over the file, `--recipe` over its name. Mistakes name
file and line. Files are data: code of your own that they name runs only with `--allow_code
FILE.py`. `plan` takes run files too.

Duration and memory are what `plan` computes for each recipe's settings on A100s of 80 GB (40 where
it says so), in nodes of 8 with eight 100 Gb/s network cards, with the DeepSpeed JSON that the row
names, or with zero1.json. Public measurements of steps lie within such ranges; a run that waits for
images takes longer ([scaling.md](scaling.md)).
"""


def pages() -> dict[str, str]:
    """Returns {path in docs/: text} of all pages.

    recipes.md is a table of all recipes. The others have the recipes of one module each.
    """
    table, texts = [_BEGINNING], {}
    of = registry.RECIPES
    for module, names in groupby(of, key=lambda name: of[name].__module__):
        path = f"recipes/{module.rpartition('.')[2]}.md"
        title, *body = (inspect.getdoc(sys.modules[module]) or "").splitlines()
        table += [
            f"## {title.rstrip('.')}",
            "",
            "| recipe | teacher | student | duration | result |",
        ]
        table += ["|---|---|---|---|---|"]
        lines = [f"# {title.rstrip('.')}", *body]
        for name in names:
            table.append(_row(name, path))
            lines += ["", *_recipe(name)]
        table.append("")
        texts[path] = "\n".join(lines).replace("](", "](../") + "\n"
    return {"recipes.md": "\n".join(table), **texts}


def _row(name: str, path: str) -> str:
    run, facts = registry.get(name), registry.facts(name)
    cells = (
        f"[{name}]({path}#{name})",
        ", ".join(model.model for model in run.frozen_models.values()) or "-",
        run.student.model,
        facts.duration,
        facts.result,
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _recipe(name: str) -> list[str]:
    """Returns the lines of a recipe's section on its page.

    The section has the recipe's summary, facts and settings, and the rest of its docstring.
    """
    run, facts = registry.get(name), registry.facts(name)
    _, *body = (inspect.getdoc(registry.RECIPES[name]) or "").splitlines()
    rest: list[str] = []
    fact_keys: set[str] = set()
    for line in body:
        key = next((key for key in _FACTS if line.startswith(key)), None)
        # The first of each is a fact; a later one belongs to the reasons.
        if key is not None and key not in fact_keys:
            fact_keys.add(key)
        else:
            rest.append(line)
    length = f"{run.optim.epochs} epochs"
    if run.optim.max_steps:
        length = f"at most {run.optim.max_steps} steps"
    crops = f" crops of at least {run.data.min_crop_scale:g} of the area,"
    if "data.min_crop_scale" in kind_of(run.task.name).ignored_fields:
        crops = ""
    settings = (
        f"{run.data.image_size} px,{crops} global batch {run.batch.global_batch_size}, {length},"
        f" peak learning rate {run.optim.base_lr:g} per 512 images, drop path"
        f" {run.student.drop_path_rate:g}"
    )
    frozen = ", ".join(model.model for model in run.frozen_models.values())
    lines = [
        f"## {name}",
        "",
        facts.summary,
        "",
        f"- needs: {facts.hardware}",
        f"- takes: {facts.duration}{facts.memory and f'; {facts.memory}'}",
        f"- expect: {facts.result}",
        f"- models: {frozen} -> {run.student.model}" if frozen else f"- model: {run.student.model}",
        f"- settings: {settings}",
    ]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(_listed(rest))).strip("\n")
    return [*lines, "", *text.splitlines()] if text else lines


def _listed(lines: list[str]) -> list[str]:
    """Returns `lines` with each line of the form `section: reason` made an item of a Markdown list.

    A list begins after a line that ends in a colon, with an empty line between them. It ends at a
    line that has another form and is not indented. Lines outside of a list are unchanged.
    """
    listed: list[str] = []
    inside = False
    for line in lines:
        item = re.match(r"[a-z_]+: ", line)
        if item and not inside and listed and listed[-1].endswith(":"):
            listed.append("")
            inside = True
        elif not item and not line.startswith(" "):
            inside = False
        listed.append(f"- {line}" if item and inside else line)
    return listed


if __name__ == "__main__":
    (DOCS / "recipes").mkdir(exist_ok=True)
    for path in (DOCS / "recipes").glob("*.md"):
        path.unlink()
    for path, text in pages().items():
        (DOCS / path).write_text(text)
