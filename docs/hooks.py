"""Hooks of mkdocs: pages of files that lie elsewhere in the repository, and links to its files.

Links are written as they hold in the repository (`../../conf/neck/fpn.yaml`, `../../results/README.md#speed`). In the site a
link to a document is one to its page. Any other file that is linked is copied into the site, to be read offline.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "pages"
# Page: the document outside docs/pages that it shows.
ELSEWHERE = {
    "index.md": "README.md",
    "results.md": "results/README.md",
    "reliability.md": "results/RELIABILITY.md",
    "changelog.md": "docs/CHANGELOG.md",
    "contributing.md": "docs/CONTRIBUTING.md",
}
TEXT_TYPES = (".py", ".sh", ".yaml", ".toml", ".lock", ".csv", ".json")  # copied as .txt, which browsers show
CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")


def source_of(page: str) -> Path:
    """Return the document that a page is made of."""
    return ROOT / ELSEWHERE[page] if page in ELSEWHERE else PAGES / page


def page_of(document: Path) -> str | None:
    """Return the page that shows a document; None if none does."""
    for page, source in ELSEWHERE.items():
        if ROOT / source == document:
            return page
    return document.relative_to(PAGES).as_posix() if document.is_relative_to(PAGES) and document.suffix == ".md" else None


def copy_of(file: Path) -> str:
    """Return where the site has the copy of a file of the repository."""
    name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
    return f"files/{name}.txt" if file.suffix in TEXT_TYPES or not file.suffix else f"files/{name}"


def linked_files(page: str) -> list[Path]:
    """Return the files of the repository, other than pages, to which a page links."""
    text = CODE.sub("code", source_of(page).read_text(encoding="utf-8"))
    targets = [_target(source_of(page), link[3]) for link in LINK.finditer(text)]
    return [target for target in targets if target and target.is_file() and not page_of(target)]


def _target(source: Path, link: str) -> Path | None:
    path = unquote(link.partition("#")[0])
    return None if not path or "://" in path or path.startswith("mailto:") else Path(os.path.normpath(source.parent / path))


def rewrite_links(text: str, page: str) -> str:
    """Return the text of a page with its links into the repository turned into links within the site."""
    source, folder = source_of(page), os.path.dirname(page)

    def rewrite(match: re.Match) -> str:
        mark, label, link = match.groups()
        target = _target(source, link)
        if target is None:
            return match[0]
        if target.is_dir():
            return label  # a site has no folders to look at
        place = page_of(target) or (copy_of(target) if target.is_file() else None)
        if place is None:
            return match[0]  # which mkdocs reports
        anchor = link[len(link.partition("#")[0]) :]
        return f"{mark}[{label}]({os.path.relpath(place, folder or '.')}{anchor})"

    code: list[str] = []  # is put aside, since what looks like a link there is none

    def put_aside(match: re.Match) -> str:
        code.append(match[0])
        return f"\0{len(code) - 1}\0"

    linked = LINK.sub(rewrite, CODE.sub(put_aside, text))
    return re.sub(r"\0(\d+)\0", lambda match: code[int(match[1])], linked)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and the linked files from outside docs/pages."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    pages = [file.src_uri for file in files.documentation_pages()]
    for target in sorted({target for page in pages for target in linked_files(page)}):
        files.append(File.generated(config, copy_of(target), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links into those of the site."""
    return rewrite_links(markdown, page.file.src_uri)
