"""What mkdocs does beyond docs/: it shows the pages and the plots that lie elsewhere in the repository.

Each page's links are written for the repository (GitHub, editors); here they become those of the site.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PLOTS = "benchmarks/results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the top level and every plot of the results."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for plot in sorted((ROOT / PLOTS).rglob("*.png")):
        place = plot.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, content=plot.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links into the repository into links within the site."""
    if page.file.src_uri in PAGES.values():
        return re.sub(r"\]\(docs/", "](", _to_pages(markdown, ""))
    up = "../" * page.file.src_uri.count("/")  # from the page to the top of the site
    return _to_pages(markdown.replace(f"]({up}../{PLOTS}/", f"]({up}{PLOTS}/"), f"{up}../")


def _to_pages(markdown: str, prefix: str) -> str:
    """Point links to pages of the top level, `prefix` above this one, at their copies in the site."""
    for source, target in PAGES.items():
        markdown = markdown.replace(f"]({prefix}{source}", f"]({prefix.removeprefix('../')}{target}")
    return markdown
