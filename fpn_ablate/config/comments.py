"""Read what the files of `conf/` and `experiments/` say of themselves in comments: on top, and beside each key."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

GLOBAL = "# @package _global_"  # the first line of a file whose keys are those of the whole configuration


def introduction(file: Path) -> str:
    """Return the comment on top of a file without its commands, a line for each paragraph."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if re.match(r"#\s+python -m", line):
            lines[-1:] = [re.sub(":$", ".", before) for before in lines[-1:]]  # which led to the command
        elif line != GLOBAL:
            lines.append(line.lstrip("# "))
    paragraphs = "\n".join(lines).strip().split("\n\n")
    return "\n".join(re.sub(r"(?<![.:,;])\n(?=[A-Z])", ". ", text).replace("\n", " ") for text in paragraphs)


def keys_of(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted key, value as written, comment) of each key of a file in conf/, in order."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()

    def comment(node: yaml.Node) -> str:
        rest = lines[node.end_mark.line][node.end_mark.column :] if node.end_mark.line < len(lines) else ""
        found = re.match(r"\s*#\s*(.*)", rest)
        return found[1] if found else ""

    def walk(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, str, str]]:
        for key, value in node.value:
            name = prefix + key.value
            written = text[value.start_mark.index : value.end_mark.index].strip()
            if isinstance(value, yaml.MappingNode):
                note = comment(value) if value.flow_style else comment(key)
                if note:
                    yield name, "", note
                yield from walk(value, f"{name}.")
            else:
                yield name, written, comment(value)

    root = yaml.compose(text)
    if isinstance(root, yaml.MappingNode):
        yield from walk(root, "")
