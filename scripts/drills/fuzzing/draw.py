"""Random draws: values of any type, and trees and bytes with faults."""

import copy
import math
import random
import struct
from collections.abc import Iterator
from typing import Any

Draw = random.Random

TEXTS = [
    *("", " ", "0", "-1", "1e5", "nan", "null", "true", "None", "..", ".", "/", "../../etc/passwd", "/etc/passwd", "a/../../b"),
    *("..\\x.jpg", "C:\\x.jpg", "\\\\host\\x", "a\0b", "\ud800", "\udcff", "\x1b[2J\x1b]0;x\x07", "a\nb", "a\r\nb", "\t=1+1"),
    *("=cmd|' /C calc'!A0", "+1", "-x", "@SUM(A1)", "＝1+1", "x;=1+1", "<script>alert(1)</script>"),
    *("</script><img src=x onerror=a>", "datum.y", "[[x]]"),
    *("{{ 7*7 }}", "${oc.env:HOME}", "${nope}", "???", "$(id)", "`id`", "; rm -rf x", "\\input{/etc/passwd}",),
    *("$\\frac{", "%", "&", "$", "a$b$c", "$x_{i}^2$", "$\\nope$", "\\(x\\)", "x_", "^"),
    *("| a | b |", "[x](javascript:a)", "![x](http://x)", "**x", "[red]x[/red]", "[/]", "é", "日本語", "\u202etxt"),
    *("\u2028", "\ufeff"),
    *("\x85", "\xa0x", "a\u0300" * 40, "x" * 300, "x" * 5000, "'; DROP TABLE x;--", "javascript:alert(1)",),
    *("data:text/html,x", "%00"),
    *("__proto__", "constructor", "datum.x", "fpn+upsample=bilinear", "con", "a.jpg/", "./a.jpg", "sub//b.png", "A.JPG"),
]  # fmt: skip
NUMBERS = [
    *(0, 1, -1, 2, 3, 255, 65536, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, -(10**30)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -0.001, 1e-320, 1e-9, 1e10, 1.1e10, 1e18, 1e308, -1e308, math.nan, math.inf, -math.inf),
    10**400,
]  # fmt: skip


def random_value(draw: Draw, depth: int = 2) -> Any:
    """Draw a value of any type."""
    kind = draw.randrange(9 if depth else 6)
    if kind < 2:
        return draw.choice(NUMBERS)
    if kind < 4:
        return draw.choice(TEXTS)
    if kind < 6:
        return draw.choice([None, True, False, [], {}, [[]], [None], {"": None}])
    if kind < 7:
        return [random_value(draw, depth - 1) for _ in range(draw.choice([1, 2, 4, 4, 30]))]
    if kind < 8:
        return {draw.choice(["id", "name", "bbox", draw.choice(TEXTS)]): random_value(draw, depth - 1) for _ in range(3)}
    return nested(draw.choice([5, 40, 200, 400]), draw.choice(["list", "dict"]))


def nested(depth: int, kind: str) -> Any:
    """Nest lists or dictionaries `depth` deep."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def paths(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value below `tree`."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def value_at(tree: Any, path: tuple) -> Any:
    """Return the value at a path."""
    for key in path:
        tree = tree[key]
    return tree


def mutate_tree(draw: Draw, tree: Any) -> Any:
    """Put one to four faults into a tree of dictionaries and lists: types, numbers, keys, nesting, order, repetition."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 1, 2, 2, 4])):
        all_paths = list(paths(tree))
        if not all_paths:
            return random_value(draw)
        path = draw.choice(all_paths)
        holder, key = value_at(tree, path[:-1]), path[-1]
        match draw.randrange(11):
            case 0 | 1 | 2 | 3:
                holder[key] = random_value(draw)
            case 4:
                del holder[key]
            case 5:
                holder[key] = [holder[key]] if draw.random() < 0.5 else {"x": holder[key]}
            case 6:  # a value from another place
                holder[key] = copy.deepcopy(value_at(tree, draw.choice(all_paths)))
            case 7 if isinstance(holder, list):
                holder[key:key] = [copy.deepcopy(holder[key])] * draw.choice([1, 1, 2, 50])
            case 8 if isinstance(holder, list):
                draw.shuffle(holder)
            case 9 if isinstance(holder, dict):
                holder[draw.choice([str(key) + "s", str(key).upper(), draw.choice(TEXTS)])] = holder.pop(key)
            case _:
                value = holder[key]
                holder[key] = (
                    f" {value} " if isinstance(value, str) else not value if isinstance(value, bool) else draw.choice(NUMBERS)
                )
    return tree


def mutate_bytes(draw: Draw, data: bytes) -> bytes:
    """Put one to three faults into bytes: cut, flip, fill, repeat or insert some."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        a = draw.randrange(len(data) + 1)
        b = min(len(data), a + draw.choice([1, 1, 2, 4, 16, 300]))
        rubbish = draw.randbytes(draw.choice([1, 1, 4, 64, 5000]))
        match draw.randrange(9):
            case 0:
                data = data[:a]
            case 1:
                data = data[a:]
            case 2 | 3 | 4:
                data = data[:a] + bytes(byte ^ 1 << draw.randrange(8) for byte in data[a:b]) + data[b:]
            case 5:
                data = data[:a] + bytes([draw.choice([0, 255])]) * (b - a) + data[b:]
            case 6:
                data = data[:a] + data[a:b] * draw.choice([2, 50]) + data[b:]
            case 7:
                data = data[:a] + rubbish + data[a if draw.random() < 0.5 else b :]
            case 8:  # too large a number, in either byte order
                wide = struct.pack(draw.choice("<>") + draw.choice("IQ"), draw.choice([2**31 - 1, 2**31, 2**32 - 1, 0]))
                data = data[:a] + wide + data[a + len(wide) :]
    return data


def nesting_depth(value: Any) -> int:
    """Return how deep lists and dictionaries are nested."""
    depth, layer = 0, [value]
    while layer := [
        inner
        for item in layer
        for inner in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
    ]:
        depth += 1
    return depth
