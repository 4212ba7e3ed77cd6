"""What every section of the configuration is made of."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo
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

    @classmethod
    def field(cls, name: str) -> FieldInfo | None:
        """What a key takes; None where there is no such key."""
        return cls.model_fields.get(name)


def key(default, description: str):
    """A documented key with its default."""
    return Field(default, description=description)


def section_of(options: type) -> type[Section]:
    """The section of a dataclass of ``dmdr_fast.algorithm.rl.method.option``: its keys, defaults, bounds and help."""
    types, keys = get_type_hints(options), dict[str, Any]()
    for field in fields(options):
        if not field.metadata:  # a part, which has a section of its own
            continue
        kind, bounds = types[field.name], dict[str, Any](field.metadata["bounds"])
        number = next((t for t in (int, float) if t in (kind, *get_args(kind))), None)
        if number is not None:
            if number is float:
                bounds["allow_inf_nan"] = False
            bounded: Any = Annotated[number, _NUMBER, Field(**bounds)]
            kind = bounded if kind is number else bounded | None
        keys[field.name] = (kind, key(field.default, field.metadata["description"]))
    return create_model(options.__name__, __base__=Section, **keys)
