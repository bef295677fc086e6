"""Bad files of proposals."""

import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fpn_ablate.utils.errors import UserError
from fuzzing.archives import bad_archive, forge_sizes
from fuzzing.checks import check_equal, check_message
from fuzzing.configs import BASES, configuration
from fuzzing.draw import Draw, mutate_bytes
from fuzzing.valid_set import valid_annotations, write_pictures


class Proposals:
    """Try a file: it is refused with a message, or each of its boxes is handed out with its picture."""

    how = "mutated proposals.npz (types, shapes, values, keys, bytes, archives that unpack to much), loaded and handed out"

    def __init__(self, folder: Path) -> None:
        from fpn_ablate.data.coco import CocoDataset

        self.file, self.count = folder / "proposals.npz", configuration(None, *BASES[1]).recipe.eval_images
        (folder / "instances.json").write_text(json.dumps(valid_annotations()))
        images = write_pictures(folder)
        self.splits = tuple(CocoDataset(folder / "instances.json", images, "set") for _ in range(2))

    def _arrays(self) -> dict[str, Any]:
        dataset = self.splits[0]
        ids = np.repeat(np.array(dataset.image_ids), 3)
        boxes = np.tile(np.array([[0, 0, 20, 30], [1, 2, 10, 12], [5, 5, 6, 6.5]], np.float32), (3, 1))
        split = {"ids": ids, "boxes": boxes, "images": np.array(dataset.image_ids)}
        named = {f"{part}_{name}": array for part in ("train", "val") for name, array in split.items()}
        return named | {"row": "fpn", "fingerprint": "0", "train_data": dataset.digest, "val_data": dataset.digest}

    def case(self, draw: Draw) -> str:
        from fpn_ablate.data.proposals import WithProposals
        from fpn_ablate.engine.fixed_proposals import FixedProposals

        self.file.write_bytes(self._content(draw))
        try:
            proposals = FixedProposals.load(self.file, self.splits, self.count, "leave it out")
            for split in ("train", "val"):
                ids, boxes = getattr(proposals, f"{split}_ids"), getattr(proposals, f"{split}_boxes")
                joined = WithProposals(self.splits[0], ids, boxes, 1000)
                samples = [joined[n] for n in range(len(joined))]
                check_equal(sum(len(sample.proposals) for sample in samples), len(boxes), "boxes handed out")
                for sample in samples:
                    height, width = sample.image.shape[:2]
                    beyond = np.abs(sample.proposals - np.clip(sample.proposals, 0, [width, height] * 2))
                    check_equal(bool((beyond <= 1).all()), True, f"boxes {sample.proposals.tolist()} in {width}x{height}")
        except UserError as error:
            check_message(str(error))
            return "refused"
        return "accepted"

    def _content(self, draw: Draw) -> bytes:
        arrays, stream = self._arrays(), io.BytesIO()
        for _ in range(draw.choice([0, 1, 1, 2])):
            name = draw.choice(list(arrays))
            arrays[name] = self._mutate(draw, arrays[name])
            if draw.random() < 0.1:
                del arrays[name]
        (np.savez_compressed if draw.random() < 0.5 else np.savez)(stream, **arrays)
        data = stream.getvalue()
        kind = draw.random()
        if kind < 0.05:
            return draw.choice(
                [b"", b"PK\3\4", b"PK\5\6" + bytes(18), b"\x93NUMPY", pickle.dumps(arrays), data[:100], bytes(1000)]
            )
        if kind < 0.15:
            return bad_archive(draw)
        if kind < 0.25:
            return forge_sizes(draw, data)
        return mutate_bytes(draw, data) if kind < 0.5 else data

    @staticmethod
    def _mutate(draw: Draw, array: Any) -> Any:
        array = np.asarray(array)
        match draw.randrange(8):
            case 0 if array.dtype.kind in "iuf":
                return array.astype(
                    draw.choice(["f4", "f8", "f2", "u8", "i1", "c8", "S3", "O", "?", ">f4", ">i8"]), casting="unsafe"
                )
            case 1:
                return array.reshape(draw.choice([(-1,), (1, -1), (*array.shape, 1)]))
            case 2 | 3 if array.size and array.dtype.kind in "iuf":
                array, limits = array.copy(), np.iinfo(array.dtype) if array.dtype.kind in "iu" else np.finfo(array.dtype)
                array.flat[draw.randrange(array.size)] = draw.choice([0, 1, 3, 99, limits.max, limits.min])
                return array
            case 4 if array.dtype.kind == "f" and array.size:
                array = array.copy()
                array.flat[draw.randrange(array.size)] = draw.choice([math.nan, math.inf, -1e30, 1e30, 1e5, -3, -0.5])
                return array
            case 5:
                return array[: draw.randrange(4)] if array.ndim else array
            case 6:
                return np.array(draw.choice([0, None, "x", [1, 2], {"a": 1}]), dtype=draw.choice([object, None]))
            case _:
                return np.concatenate([array, array]) if array.ndim else np.array([array, array])
