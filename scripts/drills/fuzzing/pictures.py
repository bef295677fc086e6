"""Bad pictures."""

import contextlib
import io
import json
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fpn_ablate.utils.errors import UserError
from fuzzing.checks import Hang, check_equal, check_message
from fuzzing.draw import Draw, mutate_bytes
from fuzzing.valid_set import CATEGORIES

MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "PA", "I;16", "I", "F", "HSV", "LAB")
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "SGI", "EPS", "PDF", "DDS")
NO_PICTURES = [
    *(b"", b"\0", b"<!doctype html><html><body>404</body></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a"),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 30\n%%EndComments\n(x) run\n%%EOF\n",
    *(b"P6 99999 99999 255\n", b"BM" + bytes(60)),
    *(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"PK\3\4"),
    *(b"RIFF\0\0\0\0WEBPVP8 ", b"\xff\xd8\xff"),
    b"\x89PNG\r\n\x1a\n",
]  # fmt: skip


def png_bomb(draw: Draw) -> bytes:
    """Make a PNG of a few hundred bytes that claims to be up to 60,000 pixels high and wide."""
    side = struct.pack(">II", draw.choice([30_000, 60_000, 2**31 - 1]), draw.choice([1, 30_000, 60_000]))
    header = b"IHDR" + side + bytes([8, draw.choice([0, 2]), 0, 0, 0])
    chunks = [header, b"IDAT" + zlib.compress(bytes(draw.choice([10, 100_000]))), b"IEND"]
    if draw.random() < 0.3:  # a text that unpacks to 60 MB
        chunks.insert(1, b"zTXtx\0\0" + zlib.compress(bytes(60_000_000), 1))
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def picture_bytes(draw: Draw) -> tuple[bytes, tuple[int, int]]:
    """Draw a file in any mode and format, perhaps damaged, and its (width, height)."""
    size = draw.choice([(1, 1), (20, 30), (20, 30), (33, 17), (1, 300), (300, 1), (30_000, 1), (30_000, 40), (3, 20_000)])
    if draw.random() < 0.12:
        return (draw.choice(NO_PICTURES) if draw.random() < 0.7 else png_bomb(draw)), size
    small = Image.frombytes("RGB", (8, 8), draw.randbytes(192))
    image = small.resize(size, Image.Resampling.NEAREST)
    with contextlib.suppress(ValueError):  # RGB cannot be converted to every mode
        image = image.convert(draw.choice(MODES))
    stream, options = io.BytesIO(), {}
    form = draw.choice(FORMATS if draw.random() < 0.5 else FORMATS[:5])
    if draw.random() < 0.15 and form in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"save_all": True, "append_images": [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)] * 3}
    if draw.random() < 0.3 and form in ("JPEG", "PNG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[274] = draw.choice([0, 1, 2, 3, 5, 6, 7, 8, 9, 65535])
        options["exif"] = exif
    try:
        image.save(stream, form, **options)
    except Exception:  # a mode that the format lacks, or a side that it cannot have
        stream = io.BytesIO()
        image.convert("RGB").save(stream, "PNG")
    data = stream.getvalue()
    return (mutate_bytes(draw, data) if draw.random() < 0.4 else data), size


class Pictures:
    """Try a picture: it is refused with a message, or gives pixels of the annotated size."""

    how = "pictures in 14 modes and 15 formats, damaged, truncated, huge, misnamed, animated, rotated, and other files"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir()

    def case(self, draw: Draw) -> str:
        from fpn_ablate.data.checks import examine
        from fpn_ablate.data.coco import CocoDataset
        from fpn_ablate.data.transforms import Resize, prepare

        data, (width, height) = picture_bytes(draw)
        name = draw.choice(["a.jpg", "a.png", "a", "a.gif", "a.eps", "a.txt"])
        (self.folder / "images" / name).write_bytes(data)
        width, height = draw.choice([(width, height)] * 6 + [(height, width), (width + 1, height), (1, 1), (10**9, 10**9)])
        entry = {"id": 1, "file_name": name, "width": width, "height": height}
        rows = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, width, height], "area": 1, "iscrowd": 0}]
        file = self.folder / "instances.json"
        file.write_text(json.dumps({"images": [entry], "annotations": rows, "categories": CATEGORIES}))
        report = examine.examine(file, self.folder / "images")
        for finding in report.findings:
            check_message(str(finding))
        try:
            with no_process():
                dataset = CocoDataset(file, self.folder / "images", "set")
        except UserError as error:
            check_message(str(error))
            check_equal(report.sound, False, "refused although sound")
            return "refused"
        try:
            with no_process():
                sample = dataset[0]
        except UserError as error:  # damage in the middle, which the quick check misses
            check_message(str(error))
            return "refused when read"
        check_equal((sample.image.shape, sample.image.dtype), ((height, width, 3), np.uint8), "pixels")
        item = prepare(sample, Resize(128, 256), True)
        check_equal(min(item.image.shape[1:]) >= 1 and max(item.image.shape[1:]) <= 256, True, "the input's size")
        return "accepted"


@contextlib.contextmanager
def no_process() -> Iterator[None]:
    """Raise Hang if a process would be started, as Pillow does for PostScript."""

    def refuse(*arguments: Any, **_: Any) -> None:
        raise Hang(f"a process would be started: {arguments}")

    original, subprocess.Popen.__init__ = subprocess.Popen.__init__, refuse
    try:
        yield
    finally:
        subprocess.Popen.__init__ = original
