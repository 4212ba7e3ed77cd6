"""Sheets of samples: which of them, where, under which captions; and pictures as bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

ROWS, COLUMNS = 10, 8  # the most rows of a class each, and images in a row of anything else
CAPTIONED = 16  # pictures of a sheet with a caption under each
_CELL, _GAP = 48, 4  # pixels: least side of an image in a sheet, space between two
_LARGEST_CELL = 160
_LEAST_WITH_CAPTION, _LARGEST_WITH_CAPTION = 160, 256
_FONT_SIZE, _LINE = 12, 15  # pixels: of a caption
_ROW_CAPTION = 200  # pixels: the most that the caption of a row takes
_CAPTION_LINES = 3
_JPEG_FROM = 200_000  # bytes of a PNG: a larger one is a photograph


def sample_order(labels: np.ndarray) -> tuple[np.ndarray, list[int] | None]:
    """Where each sample is on a sheet: (indices int [rows, columns], -1 for none; the class of each row or None).

    One class per row where there are at most ``ROWS`` of two samples or more each; else ``COLUMNS`` in a row.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) <= ROWS and counts.min() >= 2:
        order = np.full((len(classes), counts.max()), -1)
        for row, name in zip(order, classes, strict=True):
            found = np.flatnonzero(labels == name)
            row[: len(found)] = found
        return order, classes.tolist()
    return rows_of(len(labels), COLUMNS), None


def rows_of(count: int, columns: int) -> np.ndarray:
    """0 ... ``count`` - 1 in rows of at most ``columns``; -1 where the last row has none left."""
    columns = min(columns, count)
    order = np.full(-(-count // columns) * columns, -1)
    order[:count] = np.arange(count)
    return order.reshape(-1, columns)


def sheet(samples: np.ndarray, order: np.ndarray, *, least: int = _CELL, most: int = _LARGEST_CELL) -> np.ndarray:
    """``samples`` [n, C, h, w] in [-1, 1] placed as ``order`` says, on white: uint8 [H, W, C].

    Images of less than ``least`` pixels are enlarged by a whole factor, with sharp pixels; of more than ``most``,
    reduced.
    """
    return _placed(samples, order, least, most, below=0)[:-_GAP, :-_GAP]


def _placed(samples: np.ndarray, order: np.ndarray, least: int, most: int, below: int) -> np.ndarray:
    """The sheet, with ``below`` pixels of room under each image and a gap after each row and column."""
    rows, columns = order.shape
    height, width, channels = _cell(samples[0], least, most).shape
    down, right = height + below + _GAP, width + _GAP
    page = np.full((rows * down, columns * right, channels), 255, dtype=np.uint8)
    for i, j in zip(*np.nonzero(order >= 0), strict=True):
        page[i * down : i * down + height, j * right : j * right + width] = _cell(samples[order[i, j]], least, most)
    return page


def in_8_bits(image: np.ndarray) -> np.ndarray:
    """[C, H, W] in [-1, 1] as uint8 [H, W, C]; what is no number is black."""
    return np.rint((np.clip(np.nan_to_num(image, nan=-1.0), -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)


def _cell(image: np.ndarray, least: int, most: int) -> np.ndarray:
    pixels = in_8_bits(image)
    longest = max(pixels.shape[:2])
    if longest > most:
        size = [max(1, side * most // longest) for side in pixels.shape[1::-1]]
        small = Image.fromarray(pixels.squeeze()).resize(size, Image.Resampling.LANCZOS)
        return np.asarray(small).reshape(size[1], size[0], -1)
    factor = max(1, -(-least // longest))
    return pixels.repeat(factor, 0).repeat(factor, 1)


def captioned_sheet(samples: np.ndarray, labels: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """``samples`` [n, C, h, w] in [-1, 1] with the caption of each, on white: uint8 [H, W, 3].

    A caption stands beside a row where every class has a row (``sample_order``), else under each of the first
    ``CAPTIONED`` samples. What does not fit ends in an ellipsis.
    """
    order, classes = sample_order(labels)
    font = _font(captions)
    if classes is not None:
        page = _placed(samples, order, _CELL, _LARGEST_CELL, below=0)
        texts: Sequence[str] = [captions[row[0]] for row in order]
        beside = min(_ROW_CAPTION, max(round(font.getlength(text[:_ROW_CAPTION])) for text in texts) + 12)
        page = np.pad(_coloured(page), ((0, 0), (beside, 0), (0, 0)), constant_values=255)
        height = len(page) // len(order)
        boxes = [(4, i * height, beside - 8, (height - _GAP) // _LINE) for i in range(len(order))]
    else:
        shown = min(len(samples), CAPTIONED)
        order = rows_of(shown, round(shown**0.5))
        page = _coloured(
            _placed(samples, order, _LEAST_WITH_CAPTION, _LARGEST_WITH_CAPTION, below=_CAPTION_LINES * _LINE + 2)
        )
        down, right = len(page) // order.shape[0], page.shape[1] // order.shape[1]
        top = down - _GAP - _CAPTION_LINES * _LINE
        places = [divmod(i, order.shape[1]) for i in range(shown)]
        boxes = [(j * right + 2, i * down + top, right - _GAP - 2, _CAPTION_LINES) for i, j in places]
        texts = captions[:shown]
    picture = Image.fromarray(page)
    draw = ImageDraw.Draw(picture)
    for (left, top, width, lines), text in zip(boxes, texts, strict=True):
        for i, line in enumerate(_wrapped(text, font, width, lines)):
            draw.text((left, top + i * _LINE), line, fill=(31, 35, 40), font=font)
    return np.asarray(picture)


def _coloured(page: np.ndarray) -> np.ndarray:
    return page if page.shape[-1] == 3 else page.repeat(3, -1)


def _font(texts: Sequence[str]) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, or for scripts that it has not, Noto CJK where the machine has that."""
    own = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    known = FT2Font(str(own)).get_charmap()
    if any(ord(letter) not in known for text in texts for letter in text):
        try:
            return ImageFont.truetype("NotoSansCJK-Regular.ttc", _FONT_SIZE)
        except OSError:
            pass  # the report has the text all the same
    return ImageFont.truetype(str(own), _FONT_SIZE)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """``text`` in at most ``most`` lines of ``width`` pixels, cut between words where there are any."""
    rest = " ".join(text.split())
    lines: list[str] = []
    while rest:
        end = _fitting(rest, font, width)
        if len(lines) == most - 1 and end < len(rest):
            return [*lines, rest[: _fitting(rest, font, width - round(font.getlength("…")))].rstrip() + "…"]
        space = rest.rfind(" ", 0, end + 1)
        end = space if end < len(rest) and space > 0 else end
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """How many of its first characters fit, at least one."""
    end = 1
    while end < len(text) and font.getlength(text[: end + 1]) <= width:
        end += 1
    return end


def image_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 1 or 3] as PNG."""
    return _encoded(pixels, format="PNG", optimize=True)


def image_uri(pixels: np.ndarray) -> str:
    """uint8 [H, W, 1 or 3] as the ``src`` of an ``<img>`` that needs no file: PNG, large photographs as JPEG."""
    png = image_png(pixels)
    return data_uri(png) if len(png) < _JPEG_FROM else data_uri(_encoded(pixels, format="JPEG", quality=90), "jpeg")


def _encoded(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, **options)
    return buffer.getvalue()


def data_uri(content: bytes, kind: str = "png") -> str:
    """A picture's file as the ``src`` of an ``<img>``."""
    return f"data:image/{kind};base64," + base64.b64encode(content).decode("ascii")
