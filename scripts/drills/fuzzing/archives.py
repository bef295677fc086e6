"""Archives and headers that claim other sizes than they have."""

import io
import json
import struct
import zipfile
from typing import Any

from fuzzing.draw import Draw, mutate_bytes

CLAIMS = (0, 1, 100, 2**30, 2**31 - 1, 2**32 - 2, 2**32 - 1)  # the last stands for a field of 64 bits
# Where a zip archive's header of an entry holds its packed size; the unpacked size follows.
SIZES = {b"PK\3\4": 18, b"PK\1\2": 20}


def forge_sizes(draw: Draw, data: bytes) -> bytes:
    """Let entries of a zip archive claim other sizes, in front of them, in the directory at its end, or in both."""
    forged = bytearray(data)
    for signature in draw.choice([[b"PK\3\4"], [b"PK\1\2"], list(SIZES)]):
        start = -1
        while (start := forged.find(signature, start + 1)) >= 0:
            if draw.random() < 0.7:
                field = start + SIZES[signature] + draw.choice([0, 4])
                forged[field : field + 4] = struct.pack("<I", draw.choice(CLAIMS))
    return bytes(forged)


def repack(data: bytes, extra: int) -> bytes:
    """Pack the entries of a zip archive again, deflated, with one more of `extra` zeros."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr(f"{old.namelist()[0].partition('/')[0]}/data/99", bytes(extra))
    return stream.getvalue()


def claim_elements(draw: Draw, data: bytes, elements: int) -> bytes:
    """Let a file of torch, as a zip archive or older, claim more elements where its pickle says `elements` (256 to 65,535)."""
    old, new = b"M" + struct.pack("<H", elements), b"J" + struct.pack("<i", draw.choice([1000, 10**6, 2**28, 2**31 - 1]))
    if not data.startswith(b"PK"):
        return data.replace(old, new)
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(stream, "w") as forged:
        for name in archive.namelist():
            forged.writestr(name, archive.read(name).replace(old, new, draw.choice([1, 2])))
    return stream.getvalue()


def forge_header(draw: Draw, data: bytes) -> bytes:
    """Let the tensors of a safetensors file claim other shapes and places, or its header another length."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        if draw.random() < 0.5:
            entry["shape"] = draw.choice([[10**9, 10**9], [2**62, 4], [0, 2**62], [-1], [10**12], [1] * 1000, [2**64]])
        if draw.random() < 0.5:
            entry["data_offsets"] = draw.choice([[0, 0], [0, 2**40], [2**40, 0], [0, 2**63], entry["data_offsets"]])
    text = json.dumps(header).encode()
    return struct.pack("<Q", draw.choice([len(text), len(text), length, 2**40, 2**63])) + text + data[8 + length :]


def huge_tensors(draw: Draw) -> dict[str, Any]:
    """Make tensors of a few bytes that stand for up to terabytes: strides of 0, no memory at all, no elements, few of many."""
    import torch

    small = torch.zeros(8)
    shapes = [
        *(small[:1].expand(10**9), small[:1].expand(2**20, 2**20), small.as_strided((10**6, 10**6), (0, 0))),
        *(small.as_strided((3, 10**9), (1, 0)), small[:1].expand(4, 3, 7, 7), small.as_strided((2**50,), (0,))),
        *(torch.empty(10**12, device="meta"), torch.zeros(0, 2**40), torch.zeros(2**40, 0)),
        *(torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), small[:1], (2**40,)), small.to(torch.complex64)),
    ]
    return {name: draw.choice(shapes) for name in draw.sample(["conv1.weight", "bn1.weight", "layer1.0.conv1.weight"], 2)}


def bad_archive(draw: Draw) -> bytes:
    """Make an archive of arrays that claims more than it holds, or unpacks to a gigabyte."""
    shape = draw.choice([(10**6, 4), (10**9, 4), (10**12, 4), (-1, 4), (2**62, 4), (0, 4)])
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    text = (
        header if draw.random() < 0.8 else draw.choice(["{", "(" * 3000, "{'descr': __import__('os')}", header * 3])
    ).encode()
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    stream = io.BytesIO()
    method = draw.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(stream, "w", method) as file:
        body = bytes(draw.choice([0, 100, 16_000_000 if method != zipfile.ZIP_STORED else 1000]))
        for name in ("train_ids", "train_boxes", "train_images"):
            file.writestr(f"{name}.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + body)
    change = draw.choice([mutate_bytes, forge_sizes, None, None])
    return change(draw, stream.getvalue()) if change else stream.getvalue()
