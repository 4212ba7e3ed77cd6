"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_truth_value(value: object) -> object:
    if isinstance(value, bool):  # which Python would count as 1 or 0
        raise ValueError("a truth value")
    return value


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
