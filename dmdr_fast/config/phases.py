"""What may change on the way: ``phases``, a list of overrides of other keys from a generator step on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from dmdr_fast.config.base import Number, Positive, Section
from dmdr_fast.config.distillation import CA, DynaDG, DynaRS, Renoise
from dmdr_fast.config.networks import Fake, Teacher
from dmdr_fast.config.rl import Reward, RewardTerm, Tilt
from dmdr_fast.config.run import AdamW, Train

if TYPE_CHECKING:
    from dmdr_fast.config import Config

START = "from"  # the key of a phase that is no override
# Sections and those of their keys that a phase may set.
CHANGEABLE: dict[str, tuple[type[Section], tuple[str, ...]]] = {
    "teacher": (Teacher, ("cfg_scale",)),
    "fake": (Fake, ("renoise",)),
    "train": (Train, ("fake_updates", "rollout_reuse", "micro_batch_size", "gradient_accumulation")),
    "dyna_dg": (DynaDG, ("real_scale", "dynamic_step")),
    "dyna_rs": (DynaRS, tuple(DynaRS.model_fields)),
    "renoise": (Renoise, tuple(Renoise.model_fields)),
    "dmd.ca": (CA, ("t_min", "shift")),
    "reward": (Reward, ("weight", "final_weight")),
    "rl.tilt": (Tilt, ("weight",)),
    "optimizer.generator": (AdamW, ("lr", "rl_lr")),
    "optimizer.fake": (AdamW, ("lr", "rl_lr")),
}
TERM = re.compile(r"reward\.terms\.(.+)\.weight")  # of the term that is called so


class _Overrides(Section):
    """Keys by their dotted paths, each with the type and bounds that it has in its section."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number]  # the weights of terms

    @classmethod
    def field(cls, name: str) -> FieldInfo | None:
        return RewardTerm.model_fields["weight"] if TERM.fullmatch(name) else super().field(name)

    @property
    def start(self) -> int:
        """The generator step from which on it holds."""
        return getattr(self, START)

    @property
    def overrides(self) -> dict[str, Any]:
        """What it sets, by dotted path."""
        known = (path for path in type(self).model_fields if path in self.model_fields_set - {START})
        return {path: getattr(self, path) for path in known} | self.__pydantic_extra__

    @model_validator(mode="before")
    @classmethod
    def _can_change(cls, values: Any) -> Any:
        fixed = [path for path in values if cls.field(str(path)) is None] if isinstance(values, dict) else []
        if fixed:
            known = [path for path in cls.model_fields if path != START]
            raise PydanticCustomError(
                "phase",
                "{path} cannot change in a phase; these can, by their dotted names: {known}",
                {"path": fixed[0], "known": ", ".join([*known, "reward.terms.NAME.weight"])},
            )
        return values

    @model_serializer(mode="wrap")
    def _what_is_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {path: value for path, value in dump(self).items() if path in self.model_fields_set}


def _phase() -> type[_Overrides]:
    fields: dict[str, Any] = {START: (Positive, Field(description="The first generator step that it holds for."))}
    for section, (model, keys) in CHANGEABLE.items():
        for key in keys:
            field = model.model_fields[key]
            fields[f"{section}.{key}"] = (
                field.rebuild_annotation(),
                Field(field.default, description=field.description),
            )
    return create_model("Phase", __base__=_Overrides, __doc__=_Overrides.__doc__, **fields)


if TYPE_CHECKING:  # which cannot know its keys
    Phase = _Overrides
else:
    Phase = _phase()


def at(config: Config, step: int) -> Config:
    """The configuration of generator step ``step``, by the overrides of all phases that have begun; without phases."""
    begun, config = [p for p in config.phases if p.start <= step], config.model_copy(update={"phases": ()})
    for phase in begun:
        for path, value in phase.overrides.items():
            config = _with(config, path, value)
    return config


def _with(section: Any, path: str, value: Any) -> Any:
    if term := TERM.fullmatch(path):
        terms = section.reward.terms
        terms = tuple(t.model_copy(update={"weight": value}) if t.called == term[1] else t for t in terms)
        return _with(section, "reward.terms", terms)
    head, _, rest = path.partition(".")
    return section.model_copy(update={head: _with(getattr(section, head), rest, value) if rest else value})


def changes(config: Config, phase: _Overrides) -> list[str]:
    """What begins with a phase: "teacher.cfg_scale 4.5 -> 3.0" each."""
    before = at(config, phase.start - 1)
    return [f"{path} {_word(_value(before, path))} -> {_word(value)}" for path, value in phase.overrides.items()]


def _value(config: Config, path: str) -> Any:
    if term := TERM.fullmatch(path):
        return next(t.weight for t in config.reward.terms if t.called == term[1])
    return attrgetter(path)(config)


def _word(value: Any) -> str:
    if isinstance(value, Section):
        return "{" + ", ".join(f"{name}: {_word(each)}" for name, each in value) + "}"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def phase_problems(config: Config) -> Iterator[str]:
    """One line for each fault of ``phases`` that a single key cannot tell."""
    train, starts = config.train, [phase.start for phase in config.phases]
    if any(now >= later for now, later in pairwise(starts)):
        yield f"phases: {START} {', '.join(map(str, starts))}; expected rising steps, each once"
    for number, phase in enumerate(config.phases):
        here = f"phases.{number}"
        if phase.start >= train.generator_steps:
            yield (
                f"{here}.{START}: {phase.start} is never reached, train.generator_steps is {train.generator_steps}; "
                "lower it, or raise that"
            )
        if not phase.overrides:
            yield f"{here}: it changes nothing; name a key beside {START}, or leave it out"
        if phase.overrides.get("reward.weight") == "auto":
            yield f"{here}.reward.weight: auto is found once, as RL starts; set a number here"
        if "rl.tilt.weight" in phase.overrides and phase.start >= train.cold_start_steps:
            yield (
                f"{here}.rl.tilt.weight: the tilt ends with the cold start, at step {train.cold_start_steps}; set "
                "reward.weight"
            )
        called = [term.called for term in config.reward.terms]
        for path in phase.overrides:
            if (term := TERM.fullmatch(path)) and term[1] not in called:
                yield f"{here}.{path}: no reward has this name; reward.terms has {', '.join(called) or 'none'}"
        for role in ("generator", "fake"):
            rates = getattr(at(config, phase.start).optimizer, role)
            lr = f"optimizer.{role}.lr"
            if lr in phase.overrides and phase.start >= train.cold_start_steps and rates.rl_lr is not None:
                yield f"{here}.{lr}: after the cold start optimizer.{role}.rl_lr ({rates.rl_lr:g}) holds; set that"
