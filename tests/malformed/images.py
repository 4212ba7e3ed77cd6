"""Folders of images: each is a square of numbers in [-1, 1], or refused in a line that names the file."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dmdr_fast.data.images import load_image_folder

from . import Case, contents
from .runs import flipped

SIZE = 8


def picture(mode: str = "RGB", size: tuple[int, int] = (12, 10), form: str = "PNG", **save: Any) -> bytes:
    """A file of an image with a gradient in every band."""
    width, height = size
    values = np.add.outer(np.arange(height) * 9, np.arange(width) * 7) % 256
    image = Image.fromarray(values.astype(np.uint8)).convert("RGB")
    written = io.BytesIO()
    (image.convert(mode) if mode != "RGB" else image).save(written, form, **save)
    return written.getvalue()


def png(width: int, height: int, data: bytes = b"", depth: int = 8, kind: int = 2) -> bytes:
    """A PNG with whatever is said in its header."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


REFUSED: dict[str, dict[str, bytes]] = {
    "no file": {},
    "no image": {"readme.txt": b"no"},
    "empty": {"a.png": b""},
    "a text": {"a.png": b"an image\n"},
    "a page": {"a.jpg": b"<html><body>404</body></html>"},
    "PNG cut": {"a.png": picture()[:60]},
    "JPEG cut": {"a.jpg": picture(form="JPEG")[:200]},
    "WebP cut": {"a.webp": picture(form="WEBP")[:30]},
    "a mark of PNG alone": {"a.png": b"\x89PNG\r\n\x1a\n"},
    "a mark of JPEG alone": {"a.jpg": b"\xff\xd8\xff"},
    "no width": {"a.png": png(0, 4)},
    "no data": {"a.png": png(4, 4)},
    "too little data": {"a.png": png(4, 4, b"\0\1\2")},
    "data that no inflater takes": {"a.png": png(4, 4).replace(zlib.compress(b""), b"\0" * len(zlib.compress(b"")))},
    "a bomb": {"a.png": png(100_000, 100_000)},
    "the largest PNG": {"a.png": png(2**31 - 1, 2**31 - 1)},
    "a depth that there is not": {"a.png": png(4, 4, b"\0" * 60, depth=3)},
    "one of several": {"a.png": picture(), "b/c.png": b"no"},
    "SVG": {"a.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>'},
}
RIGHT: dict[str, bytes] = {
    "RGB": picture(),
    "grey": picture("L"),
    "a palette": picture("P"),
    "with transparency": picture("RGBA"),
    "grey with transparency": picture("LA"),
    "one bit": picture("1"),
    "16 bits": picture("I;16"),
    "CMYK": picture("CMYK", form="JPEG"),
    "YCbCr": picture("YCbCr", form="JPEG"),
    "another format than its name": picture(form="BMP"),
    "a GIF": picture("P", form="GIF"),
    "of several frames": picture(form="WEBP", save_all=True, append_images=[Image.new("RGB", (12, 10))]),
    "one pixel": picture(size=(1, 1)),
    "one row": picture(size=(300, 1)),
    "a long strip": picture(size=(1, 60_000)),
    "a large one": picture(size=(900, 700)),
}
TURNED = {
    "a.png": picture(),
    "a.jpg": picture(form="JPEG"),
    "a.webp": picture(form="WEBP"),
    "a.bmp": picture(form="BMP"),
}


def start(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    before = contents(folder)
    try:
        images = load_image_folder(folder, (SIZE, SIZE))
    finally:
        assert contents(folder) == before
    assert images.shape == (len(files), 3, SIZE, SIZE) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1


def strip(folder: Path) -> None:
    """What would take gigabytes resized as a whole."""
    (folder / "a.png").write_bytes(picture(size=(60_000, 1)))
    assert load_image_folder(folder, (1024, 1024)).shape == (1, 3, 1024, 1024)


def cases(count: int) -> Iterator[Case]:
    for name, files in REFUSED.items():
        yield Case(name, partial(start, files))
    yield Case("a file for a folder", lambda folder: load_image_folder(__file__, (SIZE, SIZE)))
    yield Case("a folder that is not there", lambda folder: load_image_folder(folder / "no", (SIZE, SIZE)))
    for name, content in RIGHT.items():
        yield Case(name, partial(start, {"a.PNG": content}), "accepted")
    yield Case("a strip at 1024 pixels", strip, "accepted")
    for seed in range(count // 2):
        name = sorted(TURNED)[seed % len(TURNED)]
        content = flipped(TURNED[name], random.Random(seed))
        yield Case(f"{name}: bytes turned by {seed}", partial(start, {name: content}), "either")
