"""A folder of image files as one tensor: real images to evaluate a generator against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmdr_fast.errors import UserError

LONGEST = 8  # of the longer edge, in shorter ones: what lies beyond is cropped before the resizing
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load_image_folder(path: str | Path, size: tuple[int, int]) -> Tensor:
    """Every image under ``path``, subdirectories included: float32 RGB [N, 3, height, width] in [-1, 1].

    Files come in the order of their path relative to ``path``. An image is resized with an antialiased bicubic filter
    so that it just covers ``size`` (height, width), then cropped around its centre; one that fits already is only
    cropped.

    Raises:
        UserError: the folder is missing or holds no image, or a file cannot be read as one.
    """
    if min(size) < 1:
        raise UserError(f"image size: expected at least 1 pixel, got {size[0]} x {size[1]}")
    files = image_files(path)
    images = np.empty((len(files), 3, *size), dtype=np.float32)
    for index, file in enumerate(files):
        images[index] = read_cropped(file, *size).transpose(2, 0, 1)
    return torch.from_numpy(images).div_(127.5).sub_(1)


def image_files(path: str | Path) -> list[Path]:
    """Every image file under ``path``, in the order of their path relative to it.

    Raises:
        UserError: the folder is missing or holds no image.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"image folder {folder}: no such directory; give a directory of image files")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"image folder {folder}: no image in it; expected files ending in {', '.join(SUFFIXES)}")
    return files


def read_cropped(file: Path, height: int, width: int) -> np.ndarray:
    """One image as uint8 [height, width, 3]: resized to cover it, the middle kept."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # a decoder raises whatever a broken file leads it to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"image {file} cannot be read: {reason}; replace or remove it") from None
    side = min(image.size)
    if max(image.size) > LONGEST * side:  # resized whole, a strip of 1 x 60000 would take 180 GB at 1024 pixels
        left, top = ((edge - min(edge, LONGEST * side)) // 2 for edge in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    factor = max(width / image.width, height / image.height)
    if factor != 1.0:
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
