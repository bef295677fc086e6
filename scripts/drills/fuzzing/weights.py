"""Bad files of weights."""

import io
import os
import pickle
import struct
from pathlib import Path

from fpn_ablate.utils.errors import UserError
from fuzzing.archives import claim_elements, forge_header, forge_sizes, huge_tensors, repack
from fuzzing.checks import check_equal, check_message
from fuzzing.draw import Draw, mutate_bytes, mutate_tree, nesting_depth


class Weights:
    """Try a file: it is refused with a message, or gives finite tensors; no code in it is run."""

    how = (
        "mutated files of weights (torch, pickle, safetensors: bytes, types, nesting, sizes that they do not have) through the "
        "reader and the converter"
    )

    def __init__(self, folder: Path) -> None:
        import torch

        from fpn_ablate.weights.files import write_safetensors

        self.file, self.marker = folder / "weights", folder / "run"
        shapes = {"conv1.weight": (4, 3, 7, 7), "bn1.weight": (4,), "layer1.0.conv1.weight": (4, 4, 1, 1)}
        generator = torch.Generator().manual_seed(0)  # a case is equal in every run
        tensors = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
        self.tree = {"model": {name: value.numpy() for name, value in tensors.items()}, "__author__": "x", "n": [1, {"a": 2.0}]}
        self.valid_files = []
        for old_format in (False, True):
            stream = io.BytesIO()
            torch.save({"model": tensors}, stream, _use_new_zipfile_serialization=not old_format)
            self.valid_files.append(stream.getvalue())
        self.packed = repack(self.valid_files[0], 50_000_000)
        write_safetensors(
            self.file, {f"backbone.stages.stem.{n}": value for n, value in enumerate(tensors.values())}, {"row": "fpn"}
        )
        self.safetensors = self.file.read_bytes()
        self.valid_files += [self.safetensors, *(pickle.dumps(self.tree, protocol) for protocol in (2, 4, 5))]

    def case(self, draw: Draw) -> str:
        import torch

        from fpn_ablate.weights.files import read
        from fpn_ablate.weights.loading import open_weights

        self.file.write_bytes(self._content(draw))
        try:
            stored = read(self.file)
            for name, value in stored.tensors.items():
                check_equal(
                    isinstance(name, str) and (not value.is_floating_point() or bool(torch.isfinite(value).all())), True, name
                )
            open_weights(self.file)
        except UserError as error:
            check_message(str(error))
            check_equal(self.marker.exists(), False, "code in the file was run")
            return "refused"
        return "accepted"

    def _content(self, draw: Draw) -> bytes:
        import torch

        kind = draw.randrange(14)
        if kind < 6:
            return mutate_bytes(draw, draw.choice(self.valid_files))
        if kind < 8:
            tree = mutate_tree(draw, self.tree)
            return (
                pickle.dumps(tree, draw.choice([2, 3, 4, 5])) if nesting_depth(tree) < 100 else b"\x80\x02" + b"]" * 3000 + b"."
            )
        if kind == 8:
            tensors = mutate_tree(draw, {"model": {"a.weight": 1, "b": [2]}})
            stream = io.BytesIO()
            torch.save(tensors if nesting_depth(tensors) < 100 else RunsCode(self.marker), stream)
            return stream.getvalue()
        if kind < 11:
            return forge_sizes(draw, draw.choice([self.valid_files[0], self.packed]))
        if kind == 11:
            return forge_header(draw, self.safetensors)
        if kind == 12 and draw.random() < 0.4:
            return claim_elements(draw, draw.choice(self.valid_files[:2]), 4 * 3 * 7 * 7)
        if kind == 12:
            stream, zipped = io.BytesIO(), draw.random() < 0.7
            torch.save({"model": huge_tensors(draw)}, stream, _use_new_zipfile_serialization=zipped)
            return stream.getvalue()
        return draw.choice(
            [
                self.packed,
                wide_pickle(draw.choice([3, 40, 1000])),
                pickle.dumps({"model": {"a": RunsCode(self.marker)}}, 2),
                draw.randbytes(500),
            ]
        )


class RunsCode:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def wide_pickle(width: int) -> bytes:
    """Nest dictionaries that hold one dictionary many times: a few kilobytes that stand for width^4 dictionaries."""
    data = b"\x80\x02}q\0"
    for level in range(4):
        keys = b"".join(b"X" + struct.pack("<I", 4) + b"%04d" % n + b"h" + bytes([level]) for n in range(width))
        data += b"0}q" + bytes([level + 1]) + b"(" + keys + b"u"
    return data + b"."
