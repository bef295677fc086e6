"""Locate, check and read the image files of a COCO-format set.

The annotated width and height decide the orientation. If they equal the stored size, the pixels stay as stored, whatever EXIF
says: the boxes were drawn on them. If they equal the transposed size and EXIF says that the picture is rotated, it is rotated.
A square picture is ambiguous and stays as stored. Any other size is a mismatch.
"""

import os
from functools import cache, lru_cache
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, ImageOps

TAIL = 4096  # bytes searched for the end marker; cameras append a little after it
# In entropy-coded JPEG data 0xFF is never followed by 0xD9, so the marker does not occur by chance.
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
GREY16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")
DRAWINGS = ("EPS", "WMF")  # Pillow runs another program to render them
MODES = {"1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LA", "PA", "La", "RGBa", "HSV", *GREY16}


def locate(root: str, file_name: str, links: bool = False) -> str | None:
    """Return the path of `file_name` below the folder `root` (already resolved), or None if it would leave that folder.

    Absolute names and `..` anywhere in the name are refused, and without `links` also links out of the folder.
    """
    if os.path.isabs(file_name) or ".." in file_name.replace("\\", "/").split("/"):
        return None
    path, inside = os.path.join(root, file_name), root.rstrip(os.sep) + os.sep
    try:
        leaves = not os.path.realpath(path).startswith(inside)
    except ValueError:  # a null byte or half a surrogate pair, which no file name can have
        return None
    return path if not leaves or (links and os.path.normpath(path).startswith(inside)) else None


def nearest(root: str, file_name: str) -> str | None:
    """Return the file below `root` that a name may mean that is no file itself; None if there is none.

    Tried are / in place of \\, %-codes, fewer leading folders (of an absolute path, a URL, or `root` itself), another case.
    """
    parts = [part for part in file_name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    for names in dict.fromkeys((tuple(parts), tuple(unquote(part) for part in parts))):
        for n in range(len(names)):
            path = locate(root, "/".join(names[n:]))
            folder, name = os.path.split(path or root)
            name = _names(folder).get(name.lower()) if path else None
            if name and os.path.isfile(os.path.join(folder, name)):
                return os.path.relpath(os.path.join(folder, name), root)
    return None


@lru_cache(maxsize=8)
def _names(folder: str) -> dict[str, str]:
    """Map the names of a folder in lower case to the names; empty if it cannot be read."""
    try:
        return {name.lower(): name for name in os.listdir(folder)}
    except (OSError, ValueError):
        return {}


@cache
def formats() -> tuple[str, ...]:
    """Return the formats that Pillow reads, except DRAWINGS."""
    Image.init()
    return tuple(name for name in Image.ID if name not in DRAWINGS)


def probe(path: str, width: int, height: int) -> tuple[int, str, str]:
    """Check an image's header and last bytes.

    Detects: not an image, a damaged header, a pixel format that cannot become RGB, a size other than `width` x `height`, and
    truncated data. A JPEG or PNG without its end marker, and every other format, is decoded completely. Does not detect damage
    in the middle of a file whose header and end are intact.

    Returns:
        (file size in bytes, kind of problem, details), the kind being empty for a sound file.
    """
    if not os.path.isfile(path):
        target = f": it is a link to {os.path.realpath(path)} (dvc pull or git annex get?)" if os.path.islink(path) else ""
        return 0, "image-missing", f"no such file{target}"
    size, kind = 0, "image-unreadable"
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file, Image.open(file, formats=formats()) as image:
            if image.mode not in MODES:
                return size, "image-mode", f"pixel format {image.mode}"
            if _rotation(image, width, height) is None:
                return size, "image-size", f"the file is {image.width}x{image.height}, annotated as {width}x{height}"
            marker = END_MARKERS.get(image.format or "")
            file.seek(max(0, size - TAIL))
            is_whole = marker is not None and marker in file.read(TAIL)
        kind = "image-truncated"
        if not is_whole:  # a second handle: Pillow does not expect the first one's position to change
            with Image.open(path, formats=formats()) as image:
                image.load()
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return size, "image-too-large", f"more than {limit:,} pixels, annotated as {width}x{height}"
    except Exception as error:  # Pillow's parsers raise whatever they stumble on
        return size, kind, f"{type(error).__name__}: {error}"
    return size, "", ""


def read_rgb(path: str, width: int, height: int) -> np.ndarray:
    """Read a picture as (height, width, 3) uint8 RGB, in the orientation that this module's docstring defines.

    Transparency is dropped, 16-bit grey is scaled by its full range.

    Raises:
        ValueError: the size is not `width` x `height`.
        Exception: of any type, by Pillow on damaged data.
    """
    with Image.open(path, formats=formats()) as image:
        rotated = _rotation(image, width, height)
        if rotated:
            image = ImageOps.exif_transpose(image)
        pixels = _to_rgb(image)
    if rotated is None or pixels.shape != (height, width, 3):
        raise ValueError(f"the file is {pixels.shape[1]}x{pixels.shape[0]}, annotated as {width}x{height}")
    return pixels


def grey16_peak(path: str) -> int | None:
    """Return the largest value of a 16-bit grey picture; None for any other, or one that cannot be read."""
    try:
        with Image.open(path, formats=formats()) as image:
            return int(np.max(np.array(image))) if image.mode in GREY16 else None
    except Exception:  # `probe` says what is wrong
        return None


def _rotation(image: Image.Image, width: int, height: int) -> bool | None:
    """Return whether EXIF's rotation applies; None if the annotated size matches neither orientation."""
    if image.size == (width, height):
        return False
    # Only now: Pillow may have to decode a whole PNG to find its EXIF block.
    if image.size == (height, width) and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
        return True
    return None


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in GREY16:
        grey = np.clip(np.array(image).astype(np.int64), 0, 65535)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # converting to RGB directly, Pillow warns about transparency stored as bytes
    return np.array(image.convert("RGB"))
