"""The folder of an evaluation: images named by their prompts, their scores as JSON lines, what they were made of.

Its files are all the state that there is: what is there already is not made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmdr_fast.disk import whole, write_whole
from dmdr_fast.errors import UserError
from dmdr_fast.eval.sheets import in_8_bits

SLUG = 50  # characters of a prompt in a file's name
SETTINGS, SCORES = "settings.json", "scores.jsonl"


@dataclass(frozen=True)
class Part:
    """Conditions ``rows`` of one seed: what is drawn, and scored, in one batch.

    Its bounds depend on the batch size alone, so the bits of its images depend neither on the ranks nor on a restart.
    """

    seed: int
    rows: range


@dataclass(frozen=True)
class Gallery:
    """``folder``/MODEL/NUMBER_PROMPT_SEED.png: an image of each model (teacher, student), caption and seed."""

    folder: Path
    captions: tuple[str, ...]
    seeds: int
    batch: int

    @property
    def parts(self) -> list[Part]:
        """All of them, one seed after the other: any run of consecutive images has every condition equally often."""
        count = len(self.captions)
        starts = range(0, count, self.batch)
        return [Part(seed, range(i, min(i + self.batch, count))) for seed in range(self.seeds) for i in starts]

    def begin(self, settings: Mapping[str, Any], rewards: Mapping[str, Any]) -> None:
        """Note what the images, and the scores, are made of. Scores of other rewards are dropped.

        Raises:
            UserError: the folder has images that were made otherwise.
        """
        file = self.folder / SETTINGS
        found = _read_settings(file) if any(self.folder.glob("*/*.png")) else {}
        digest = hashlib.sha256("\0".join(self.captions).encode()).hexdigest()
        prompts = f"{len(self.captions)}, sha256 {digest[:16]}"
        now = json.loads(json.dumps({**settings, "prompts": prompts, "rewards": rewards}))
        for name in sorted((found.keys() | now.keys()) - {"rewards"}) if found else ():
            if found.get(name) != now.get(name):
                raise UserError(
                    f"--out: {self.folder} has images of another evaluation: {name} {found.get(name)!r}, now "
                    f"{now.get(name)!r}; name another folder"
                )
        if found.get("rewards") != now["rewards"]:
            for scores in self.folder.glob("scores*.jsonl"):
                scores.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, f"{json.dumps(now, indent=1)}\n".encode())

    # Images

    def files(self, model: str, part: Part) -> list[Path]:
        return [self.folder / model / image_name(row, self.captions[row], part.seed) for row in part.rows]

    def undrawn(self, model: str) -> list[Part]:
        """The parts of which an image is missing."""
        folder = self.folder / model
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return [part for part in self.parts if any(file.name not in there for file in self.files(model, part))]

    def draw(self, model: str, part: Part, images: Tensor) -> None:
        """Write the images [B, 1 or 3, H, W] in [-1, 1] of a part."""
        (self.folder / model).mkdir(parents=True, exist_ok=True)
        for file, latent in zip(self.files(model, part), images.float().cpu().numpy(), strict=True):
            image, buffer = in_8_bits(latent), io.BytesIO()
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "PNG")
            write_whole(file, buffer.getvalue())

    def read(self, model: str, part: Part) -> Tensor:
        """The images of a part as they are kept, in 8 bits: fp32 [B, 1 or 3, H, W] in [-1, 1]."""
        pixels = torch.stack([torch.from_numpy(_pixels(file)) for file in self.files(model, part)])
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

    def all_files(self, model: str) -> list[Path]:
        """Every image of a model, one seed after the other."""
        return [file for part in self.parts for file in self.files(model, part)]

    def size(self, model: str) -> tuple[int, int]:
        """Height and width of its images."""
        height, width, _ = _pixels(self.all_files(model)[0]).shape
        return height, width

    def write_npz(self, model: str) -> Path:
        """``folder``/MODEL.npz for the ADM evaluation suite: arr_0, uint8 [N, H, W, 3], one seed after the other.

        That suite takes its inception score over 5,000 samples in a row, which must hold every class.
        """
        files, path = self.all_files(model), self.folder / f"{model}.npz"
        height, width = self.size(model)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), height, width, 3)}
        member = zipfile.ZipInfo("arr_0.npy")  # without the time of day
        with (
            whole(path) as aside,
            zipfile.ZipFile(aside, "w") as archive,
            archive.open(member, "w", force_zip64=True) as array,
        ):
            np.lib.format.write_array_header_1_0(array, header)
            for file in files:
                array.write(np.broadcast_to(_pixels(file), (height, width, 3)).tobytes())
        return path

    # Scores

    def gather_scores(self) -> dict[str, dict[str, Any]]:
        """{image: line of scores.jsonl}, with the lines that ranks have added since then; one process alone calls."""
        lines: dict[str, dict[str, Any]] = {}
        found = sorted(self.folder.glob("scores*.jsonl"))
        for file in found:
            for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:  # the last one, of a rank that was killed
                    continue
                lines[line["image"]] = line
        if lines:
            content = "".join(f"{json.dumps(lines[image], ensure_ascii=False)}\n" for image in sorted(lines))
            write_whole(self.folder / SCORES, content.encode())
        for file in found:
            if file.name != SCORES:
                file.unlink()
        return lines

    def unscored(self, model: str, lines: Mapping[str, Any]) -> list[Part]:
        """The parts of which an image has no line."""
        return [part for part in self.parts if any(self._image(f) not in lines for f in self.files(model, part))]

    def add_scores(self, model: str, part: Part, scores: Mapping[str, Tensor], rank: int) -> None:
        """Append a part's scores {name: [B]} to the rank's own file."""
        columns = {name: values.double().tolist() for name, values in scores.items()}
        lines = [
            {
                "image": self._image(file),
                "prompt": self.captions[row],
                "seed": part.seed,
                "scores": {name: values[i] for name, values in columns.items()},
            }
            for i, (file, row) in enumerate(zip(self.files(model, part), part.rows, strict=True))
        ]
        with (self.folder / f"scores.{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))

    def means(self, model: str, lines: Mapping[str, dict[str, Any]]) -> dict[str, float]:
        """The mean of each score over the images of a model."""
        scores = [lines[self._image(file)]["scores"] for file in self.all_files(model)]
        return {name: fsum(each[name] for each in scores) / len(scores) for name in scores[0]}

    def _image(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()


def image_name(number: int, caption: str, seed: int) -> str:
    """NUMBER_PROMPT_SEED.png. PROMPT is its ASCII letters and digits in lower case; NUMBER tells it from others."""
    plain = unicodedata.normalize("NFKD", caption).encode("ascii", "ignore").decode().lower()
    slug = "-".join(re.findall(r"[a-z0-9]+", plain))[:SLUG].rstrip("-")
    return "_".join([f"{number:05d}", *([slug] if slug else []), f"{seed}.png"])


def markdown(table: Mapping[str, Mapping[str, float]]) -> str:
    """{model: {metric: value}} as a table that is aligned as text, too: a column per model."""
    metrics = list(dict.fromkeys(name for values in table.values() for name in values))
    cells = [["", *table]]
    for name in metrics:
        cells.append([name, *(f"{values[name]:.4g}" if name in values else "-" for values in table.values())])
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _pixels(file: Path) -> np.ndarray:
    """uint8 [H, W, 1 or 3] of an image that is there.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(file) as image:
            pixels = np.array(image)
    except (OSError, ValueError) as error:
        raise UserError(f"image {file} cannot be read ({error}); delete it, and it is drawn again") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--out: {file} does not tell what is there ({error}); name another folder") from None
