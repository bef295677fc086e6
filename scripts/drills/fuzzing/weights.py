"""Files of weights."""

import io
import os
import pickle
import struct
from pathlib import Path

from fpn_ablate.utils.errors import UserError
from fuzzing.checks import same, told
from fuzzing.draw import Draw, damaged, deep, spoilt


class Weights:
    """A file is refused with a message, or gives tensors that hold numbers; nothing in it is run."""

    how = "mutated files of weights (torch, pickle, safetensors: bytes, types, nesting) through the reader and the converter"

    def __init__(self, folder: Path) -> None:
        import torch

        from fpn_ablate.weights.files import write_safetensors

        self.file, self.mark = folder / "weights", folder / "run"
        shapes = {"conv1.weight": (4, 3, 7, 7), "bn1.weight": (4,), "layer1.0.conv1.weight": (4, 4, 1, 1)}
        generator = torch.Generator().manual_seed(0)  # a case is the same in every run
        tensors = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
        self.tree = {"model": {name: value.numpy() for name, value in tensors.items()}, "__author__": "x", "n": [1, {"a": 2.0}]}
        self.whole = []
        for old in (False, True):
            stream = io.BytesIO()
            torch.save({"model": tensors}, stream, _use_new_zipfile_serialization=not old)
            self.whole.append(stream.getvalue())
        write_safetensors(
            self.file, {f"backbone.stages.stem.{n}": value for n, value in enumerate(tensors.values())}, {"row": "fpn"}
        )
        self.whole += [self.file.read_bytes(), *(pickle.dumps(self.tree, protocol) for protocol in (2, 4, 5))]

    def case(self, draw: Draw) -> str:
        import torch

        from fpn_ablate.weights.files import read
        from fpn_ablate.weights.loading import open_weights

        self.file.write_bytes(self._content(draw))
        try:
            stored = read(self.file)
            for name, value in stored.tensors.items():
                same(isinstance(name, str) and (not value.is_floating_point() or bool(torch.isfinite(value).all())), True, name)
            open_weights(self.file)
        except UserError as error:
            told(str(error))
            same(self.mark.exists(), False, "something in the file was run")
            return "refused"
        return "taken"

    def _content(self, draw: Draw) -> bytes:
        import torch

        kind = draw.randrange(10)
        if kind < 6:
            return damaged(draw, draw.choice(self.whole))
        if kind < 8:
            tree = spoilt(draw, self.tree)
            return pickle.dumps(tree, draw.choice([2, 3, 4, 5])) if deep(tree) < 100 else b"\x80\x02" + b"]" * 3000 + b"."
        if kind == 8:
            tensors = spoilt(draw, {"model": {"a.weight": 1, "b": [2]}})
            stream = io.BytesIO()
            torch.save(tensors if deep(tensors) < 100 else Runs(self.mark), stream)
            return stream.getvalue()
        return draw.choice(
            [wide_pickle(draw.choice([3, 40, 1000])), pickle.dumps({"model": {"a": Runs(self.mark)}}, 2), draw.randbytes(500)]
        )


class Runs:
    """Leaves a file where a pickle of it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def wide_pickle(width: int) -> bytes:
    """Dictionaries of dictionaries, each the same one many times: a few kilobytes that stand for width^4 of them."""
    data = b"\x80\x02}q\0"
    for level in range(4):
        keys = b"".join(b"X" + struct.pack("<I", 4) + b"%04d" % n + b"h" + bytes([level]) for n in range(width))
        data += b"0}q" + bytes([level + 1]) + b"(" + keys + b"u"
    return data + b"."
