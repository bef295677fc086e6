"""Image files of a COCO-format set: where they lie, a quick look at their header, and their pixels as RGB.

Orientation: the annotation's width and height decide. Equal to the stored size: the pixels stay as stored, whatever
EXIF says (boxes were drawn on them). Equal to the stored size transposed, and EXIF says that the picture is rotated: it
is rotated. A square picture cannot tell, so it stays as stored. Anything else is a mismatch.
"""

import os
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

TAIL = 4096  # bytes searched for the end marker; cameras append a little after it
# In entropy-coded JPEG data 0xFF is never followed by 0xD9, so the marker cannot occur by chance.
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
GREY16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")
DRAWINGS = ("EPS", "WMF")  # Pillow has them run by another program
MODES = {"1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LA", "PA", "La", "RGBa", "HSV", *GREY16}


def locate(root: str, file_name: str) -> str | None:
    """The path of `file_name` below the folder `root` (already resolved), or None where it would leave it.

    Refused: absolute names, `..` anywhere in the name, and links that lead outside.
    """
    if os.path.isabs(file_name) or ".." in file_name.replace("\\", "/").split("/"):
        return None
    path = os.path.join(root, file_name)
    try:
        inside = os.path.realpath(path).startswith(root.rstrip(os.sep) + os.sep)
    except ValueError:  # a null byte or half a surrogate pair: no file system has such a name
        return None
    return path if inside else None


@cache
def formats() -> tuple[str, ...]:
    """What Pillow reads, but for DRAWINGS."""
    Image.init()
    return tuple(name for name in Image.ID if name not in DRAWINGS)


def probe(path: str, width: int, height: int) -> tuple[int, str, str] | None:
    """Look at an image's header and its last bytes: (file size in bytes, kind of problem, details), or None where there
    is no such file.

    The kind is empty for a sound file. Catches: not an image, damaged header, pixel formats without an RGB reading,
    size other than `width` x `height`, data cut off. Where the end marker is missing from a JPEG or PNG, and for all
    other formats, the whole picture is decoded to be sure. Does not catch: damage in the middle of a file that has its
    header and its end.
    """
    if not os.path.isfile(path):
        return None
    size = 0
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file, Image.open(file, formats=formats()) as image:
            if image.mode not in MODES:
                return size, "image-mode", f"pixel format {image.mode}"
            if _rotation(image, width, height) is None:
                return size, "image-size", f"the file is {image.width}x{image.height}, annotated as {width}x{height}"
            if not _has_end(file, END_MARKERS.get(image.format or ""), size):
                problem = _decode_problem(path)
                return size, "image-truncated" if problem else "", problem
    except Exception as error:  # Pillow's parsers raise whatever they stumble on
        return size, "image-unreadable", f"{type(error).__name__}: {error}"
    return size, "", ""


def read_rgb(path: str, width: int, height: int) -> np.ndarray:
    """The picture as (height, width, 3) uint8 RGB, turned as the module's rule says.

    Transparency is dropped, 16-bit grey is scaled by its full range. Raises whatever Pillow raises on damaged data, and
    ValueError on a size that does not fit.
    """
    with Image.open(path, formats=formats()) as image:
        rotated = _rotation(image, width, height)
        if rotated:
            image = ImageOps.exif_transpose(image)
        pixels = _to_rgb(image)
    if rotated is None or pixels.shape != (height, width, 3):
        raise ValueError(f"the file is {pixels.shape[1]}x{pixels.shape[0]}, annotated as {width}x{height}")
    return pixels


def _rotation(image: Image.Image, width: int, height: int) -> bool | None:
    """False: leave as stored; True: apply EXIF; None: the annotated size does not fit."""
    if image.size == (width, height):
        return False
    # Asked only now: Pillow may have to decode a whole PNG to find its EXIF block.
    if image.size == (height, width) and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
        return True
    return None


def _has_end(file: BinaryIO, marker: bytes | None, size: int) -> bool:
    if marker is None:
        return False
    file.seek(max(0, size - TAIL))
    return marker in file.read(TAIL)


def _decode_problem(path: str) -> str:
    # A second handle: the first one's position was moved under Pillow's feet.
    try:
        with Image.open(path, formats=formats()) as image:
            image.load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in GREY16:
        grey = np.clip(np.array(image).astype(np.int64), 0, 65535)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about transparency stored as bytes
    return np.array(image.convert("RGB"))
