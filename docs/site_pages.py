"""Pages of the site that stand elsewhere in the repository; a hook of mkdocs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Path in the repository: path in the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "benchmarks/README.md": "benchmarks/README.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, the plots of the benchmarks, and the examples as they are."""
    others = {
        str(path.relative_to(ROOT)): str(path.relative_to(ROOT))
        for pattern in ("benchmarks/results/*.png", "examples/*.py")
        for path in ROOT.glob(pattern)
    }
    for stands, shown in (PAGES | others).items():
        files.append(File.generated(config, shown, abs_src_path=str(ROOT / stands)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes links of the repository links of the site, whose pages all stand in docs/."""
    shown = page.file.src_uri
    if shown in PAGES.values():
        markdown = markdown.replace("](docs/", "](").replace('src="docs/', 'src="')
        return markdown.replace("](../docs/", "](../")
    up = "../" * shown.count("/")
    return markdown.replace(f"]({up}../", f"]({up}")


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Writes a page's Markdown beside its HTML."""
    path = Path(config.site_dir, page.file.src_uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.markdown, encoding="utf-8")
    return output


def on_nav(nav: Any, config: Any, files: Files) -> Any:
    """Adds llms.txt, the menu with links to the Markdown of each page (llmstxt.org)."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for entry in nav.items:
        pages = [entry] if entry.is_page else entry.children
        lines += [] if entry.is_page else ["", f"## {entry.title}", ""]
        lines += [f"- [{page.title}]({page.file.src_uri})" for page in pages]
    files.append(File.generated(config, "llms.txt", content="\n".join(lines) + "\n"))
    return nav
