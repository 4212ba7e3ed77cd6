"""What every section of the configuration is made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _no_truth_value(value: object) -> object:
    if isinstance(value, bool):  # which Python would count as 1 or 0
        raise ValueError("a truth value")
    return value


def _at_home(value: object) -> object:
    """A path with the user's folder in place of a ``~`` at its start."""
    if not isinstance(value, (str, Path)) or not str(value).startswith("~"):
        return value
    expanded = os.path.expanduser(value)
    if str(expanded).startswith("~"):
        raise PydanticCustomError(
            "home", "nobody's home folder: {path}; write ./ in front of a name with ~", {"path": str(value)}
        )
    return expanded


_HOME = BeforeValidator(_at_home)
File = Annotated[Path, _HOME]
Place = Annotated[str, _HOME]  # a path, or what only the reader tells from one: a hub id, a URL, a built-in name
_NUMBER = BeforeValidator(_no_truth_value)
Positive = Annotated[int, _NUMBER, Field(gt=0)]
Count = Annotated[int, _NUMBER, Field(ge=0)]
TorchSeed = Annotated[int, _NUMBER, Field(ge=0, lt=2**63)]  # torch.manual_seed takes no more
Number = Annotated[float, _NUMBER, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, _NUMBER, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, _NUMBER, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, _NUMBER, Field(ge=0, le=1)]


class Section(BaseModel):
    """A group of keys: unknown ones are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def key(default, description: str):
    """A documented key with its default."""
    return Field(default, description=description)
