"""Reads the names in tables of the package from its source text, without importing torch."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


@cache
def keys_of(file: str, *tables: str) -> tuple[str, ...]:
    """Returns the keys of the dicts `tables` that a file of the package defines.

    A key has to be a string, or a name to which a string is assigned in the same file. The path of
    the file begins in the package, such as "runtime/trackers.py".
    """
    values: dict[str, ast.expr] = {}
    for node in ast.parse((_PACKAGE / file).read_bytes()).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value:
            targets = [node.target]
        for target in targets:
            if isinstance(target, ast.Name):
                values[target.id] = node.value  # type: ignore[attr-defined]
    keys: list[str] = []
    for table in tables:
        displayed = values[table]
        assert isinstance(displayed, ast.Dict)  # A table of ours.
        for key in displayed.keys:
            keys.append(ast.literal_eval(values[key.id] if isinstance(key, ast.Name) else key))  # type: ignore[arg-type]
    return tuple(keys)
