"""The teachers' shapes: published configurations by name or hub id, or the JSON files of a diffusers folder.

A shape is built on the meta device: modules without storage, in any depth.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dmdr_fast import built_in
from dmdr_fast.errors import UserError
from dmdr_fast.models.families import BACKBONES, Backbone, Family, open_family

if TYPE_CHECKING:
    from diffusers import ModelMixin

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Shape:
    """One teacher: the configurations of its transformer and VAE (diffusers' own keys, as JSON text: hashable).

    Attributes:
        length: text tokens of a condition.
        folder: whether it was read from a user's folder.
        parameters: the published count, weights and stored tables, None where there is none.
    """

    name: str
    family: str
    transformer: str
    vae: str | None
    length: int
    hub_id: str | None = None
    parameters: int | None = None
    published: str = ""
    folder: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The transformer's configuration."""
        return json.loads(self.transformer)

    @property
    def vae_config(self) -> dict[str, Any] | None:
        """The VAE's configuration; None for pixel-space models."""
        return None if self.vae is None else json.loads(self.vae)

    @property
    def depths(self) -> tuple[int, ...]:
        """How many blocks of each kind there are."""
        return self.opened().depths

    def with_depths(self, depths: tuple[int, ...]) -> Shape:
        """The same widths, other numbers of blocks (for SD3: of all blocks, and of those with dual attention)."""
        return replace(self, transformer=json.dumps(self.opened().with_depths(depths)))

    def opened(self) -> Backbone:
        """The family that feeds the network."""
        return BACKBONES[self.family].of(self.name, self.config, self.vae_config, self.length)

    def build(self) -> nn.Module:
        """The transformer on the meta device."""
        with torch.device("meta"):
            return BACKBONES[self.family].build_from_config(self.config)

    @property
    def vae_class(self) -> Any:
        """diffusers' class of the VAE; None for pixel-space models."""
        import diffusers

        config = self.vae_config
        return None if config is None else getattr(diffusers, config["_class_name"])

    @property
    def vae_recomputes(self) -> bool:
        """Whether there is a VAE that can recompute its decoder's blocks."""
        return self.vae_class is not None and self.vae_class._supports_gradient_checkpointing

    def build_vae(self) -> ModelMixin | None:
        """The VAE on the meta device; None for pixel-space models."""
        with torch.device("meta"):
            return None if self.vae_class is None else self.vae_class.from_config(self.vae_config)


def published() -> Iterator[Shape]:
    """The shapes that come with the package, smallest first."""
    yield from sorted((_read(path) for path in MODELS.glob("*.json")), key=lambda shape: shape.parameters or 0)


def _read(path: Path) -> Shape:
    values = json.loads(path.read_bytes())
    return Shape(**values | {part: json.dumps(values[part]) for part in ("transformer", "vae")})


def find_shape(name: str, key: str = "teacher.pipeline") -> Shape:
    """The shape of a published model (its short name or hub id) or of a diffusers folder, of which only JSON is read.

    ``key`` is that of the configuration that an error names.

    Raises:
        UserError: neither of them, or a pipeline of no known family.
    """
    for shape in published():
        if name in (shape.name, shape.hub_id):
            return shape
    try:
        is_folder = Path(built_in.pipeline(name)).expanduser().is_dir()
    except OSError:  # a name that is too long
        is_folder = False
    if not is_folder:
        known = ", ".join(shape.name for shape in published())
        raise UserError(
            f"{key}: no shape is known for {name!r}; expected a diffusers folder, or one of {known} "
            "(--model takes these too, in place of the configuration's teacher)"
        )
    try:
        family = open_family(name)
    except (ValueError, OSError) as error:
        raise UserError(f"{key}: {error}") from None
    shape = Shape(
        name=Path(name).name,
        family=family.name,
        transformer=json.dumps(dict(family.network_config)),
        vae=json.dumps(dict(family.vae_config)),
        length=family.length,
        folder=True,
    )
    _try(shape, family, key)
    return shape


def _try(shape: Shape, family: Family, key: str) -> None:
    """Build what a folder's JSON describes.

    Raises:
        UserError: it cannot be built, or has no blocks.
    """
    for part, config, named in (
        (family.folder, family.network_config, family.network),
        ("vae", family.vae_config, family.vae),
    ):
        try:
            if config.get("_class_name") != named:
                raise ValueError(f"expected a {named}, got {config.get('_class_name')}")
            if part == "vae":
                shape.build_vae()
            elif not count(shape)[0] or not all(depth >= 0 for depth in shape.depths) or not shape.depths[0]:
                raise ValueError("a network without blocks")
        except Exception as error:  # diffusers checks no value: a wrong one shows wherever it is first used
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"{key}: {shape.name}: {part}/config.json describes no network ({reason})") from None


@cache
def count(shape: Shape) -> tuple[int, int]:
    """(weights, elements of tables that are no weights) of the transformer."""
    model = shape.build()
    return sum(p.numel() for p in model.parameters()), sum(b.numel() for b in model.buffers())
