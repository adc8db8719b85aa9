"""An installed package, as the doors see it: its metadata alone."""

from __future__ import annotations

from pathlib import Path


def install(folder: Path, kind: str, *entries: str) -> None:
    """Writes the metadata of a package with entry points.

    Args:
        folder: On Python's path, or put there by the caller.
        kind: What it brings: "losses", "tasks", ...
        entries: "NAME = module:attribute" each.
    """
    info = folder / "plugin_of_a_test-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-a-test\nVersion: 1\n")
    lines = [f"[fd_large.{kind}]", *entries, ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
