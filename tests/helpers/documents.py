"""The project's documents, and the commands that they quote."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATHS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "results" / "README.md",
    ROOT / "results" / "RELIABILITY.md",
]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS if "docs/site/" not in path.as_posix()
}
TUTORIALS = [name for name in TEXTS if name.startswith("docs/pages/tutorials/")]
# "`mine/ablation/thin.yaml`:" and the block that follows: files that the reader is told to write.
FILES = {
    file: text
    for document in TEXTS.values()
    for file, text in re.findall(r"`(\S+\.(?:yaml|py))`:\n\n```(?:yaml|python)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
}


def blocks(text: str) -> list[str]:
    """Return the shell blocks of a document."""
    return re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """Return a document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def quoted(text: str) -> list[str]:
    """Return every command of a document that starts this project, in a block or within a line; `\\` joins lines."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(text))
    parts = [part for line in lines for part in re.split(r"&&|\|\|?|;", line.split(" #")[0])]
    matches = [re.search(r"(?:python3? -m (?=fpn_ablate)|^\s*(?:[^~\s]*/)?(?=fpn-ablate(?:\s|$))).*", part) for part in parts]
    return [match[0].strip().removeprefix("python3").removeprefix("python").strip() for match in matches if match]


def write_files(folder: Path) -> None:
    """Write the files that the documents tell their reader to write, below `folder`."""
    for file, text in FILES.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)


def without_code(text: str) -> str:
    """Return a document without code of any kind, whose brackets are no links."""
    return re.sub(r"`[^`\n]*`", "code", prose(text))


def links(text: str) -> list[str]:
    """Return the targets of a document's links and pictures."""
    text = without_code(text)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"<img[^>]*\bsrc=\"([^\"]+)\"", text)


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
