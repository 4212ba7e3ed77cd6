"""Reinforcement learning: the rewards, how they reach the generator, and what watches for collapse."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import create_model, model_validator

from dmdr_fast.algorithm.rl.method import Method
from dmdr_fast.algorithm.rl.methods import METHODS, method_of
from dmdr_fast.algorithm.rl.refl import ReFL
from dmdr_fast.config.base import (
    Count,
    Fraction,
    NonNegative,
    Number,
    Place,
    Positive,
    PositiveFloat,
    Section,
    key,
    section_of,
)


class RewardTerm(Section):
    """One reward: a kind that the registry knows, or a user's own by import path."""

    kind: Place = key(
        "digits", "A registered reward, or a class of your own: package.module:Name or path/file.py:Name."
    )
    path: Place | None = key(None, "Folder or hub id of its weights, where it has any.")
    name: str | None = key(None, "Its name in the logs; null: the kind's own.")
    weight: Number = key(1.0, "Its weight in the sum of the rewards.")
    normalize: Literal["none", "running"] = key("none", "running: divided by its own running standard deviation.")
    options: dict[str, Any] = key({}, "Further keyword arguments of its constructor.")

    @property
    def called(self) -> str:
        """What the configuration knows it by."""
        return self.name or self.kind


class Reward(Section):
    """What the generator maximises after the cold start, and what is only watched."""

    terms: tuple[RewardTerm, ...] = key((), "Rewards that are optimised, summed with their weights.")
    held_out: tuple[RewardTerm, ...] = key((), "Rewards that are reported beside them and never optimised.")
    weight: NonNegative | Literal["auto"] = key(
        0.05,
        "Weight of the RL gradient beside the DMD gradient; 0: no RL; auto: the mean DMD loss at the end of the cold "
        "start over the size of the RL loss as RL starts (ReFL).",
    )
    warmup_steps: Count = key(0, "Updates over which the weight rises linearly from 0 once RL has started.")
    final_weight: NonNegative | None = key(None, "The weight at the last update, reached linearly; null: constant.")
    timeout: PositiveFloat = key(300.0, "Seconds that a score-only reward may take for one batch.")

    @model_validator(mode="before")
    @classmethod
    def _one_term_is_a_list_of_one(cls, values: Any) -> Any:
        """``terms: {kind: digits}`` means ``terms: [{kind: digits}]``."""
        if isinstance(values, dict):
            return {k: [v] if k in ("terms", "held_out") and isinstance(v, dict) else v for k, v in values.items()}
        return values


class Tilt(Section):
    """The reward in the cold start: DMD towards the teacher's distribution times exp(reward / beta)."""

    method: str = "none"  # of METHODS
    weight: PositiveFloat = key(0.05, "1 / beta: weight of the reward's gradient beside the DMD gradient.")


class RL(Section):
    """How rewards reach the generator, and what holds it near the teacher."""

    method: str = "refl"  # of METHODS
    regularizer: Literal["dmd", "dm", "kl", "none"] = key(
        "dmd", "Beside RL: the DMD gradient, that without the teacher's guidance, a KL to a reference, nothing."
    )
    kl_weight: NonNegative = key(0.0, "Weight of the KL to the reference; with regularizer dmd or dm it comes on top.")
    reference: Literal["auto", "lora_off", "frozen"] = key(
        "auto", "lora_off: the generator without its LoRA; frozen: a copy of it as RL starts; auto: whichever fits."
    )
    tilt: Tilt = Tilt()

    def options(self, name: str) -> Method:
        """Method ``name`` with the options of its section, its parts with those of theirs."""
        section = getattr(self, name, None)
        parts = {part: self.options(part) for part in METHODS[name].parts}
        return method_of(name, **({} if section is None else section.model_dump()), **parts)

    @property
    def chosen(self) -> Method:
        """The method."""
        return self.options(self.method)

    @property
    def tilting(self) -> Method:
        """The method of the cold start."""
        return self.options(self.tilt.method)

    @property
    def refl_options(self) -> ReFL:
        """``rl.refl``, whose chunk and checkpoint are the decoder's under every method."""
        options = self.options("refl")
        assert isinstance(options, ReFL)
        return options


def _with_methods(base: type[Section]) -> type[Section]:
    """``rl`` with the names of the methods, and a section for the options of each."""
    graded = ", ".join(name for name, method in METHODS.items() if method.needs_gradient)
    scored = ", ".join(name for name, method in METHODS.items() if method.uses_reward and not method.needs_gradient)
    keys: dict[str, Any] = {
        "method": (Literal[tuple(METHODS)], key("refl", f"{graded} need differentiable rewards; {scored} do not."))
    }
    tilts = tuple(name for name, method in METHODS.items() if method.needs_rollout or not method.uses_reward)
    tilt_method: Any = (Literal[tilts], key("none", "How the reward acts: refl, with the options of rl.refl, or none."))
    tilt = create_model("Tilt", __base__=Tilt, __doc__=Tilt.__doc__, method=tilt_method)
    keys["tilt"] = (tilt, key(tilt(), "The reward in the cold start."))
    for name, method in METHODS.items():
        if fields(method):
            section = section_of(method)
            keys[name] = (section, key(section(), f"{method.__name__}."))
    return create_model("RL", __base__=base, __doc__=base.__doc__, **keys)


if not TYPE_CHECKING:  # which cannot know the sections of the methods
    RL = _with_methods(RL)


class Monitors(Section):
    """Thresholds of the collapse monitors; null: not watched."""

    min_diversity: NonNegative | None = key(None, "Least per-class diversity: mean pairwise RMS distance of x0.")
    max_grad_ratio: PositiveFloat | None = key(None, "Largest ratio of the RL gradient's norm to the DMD gradient's.")
    max_fake_loss: PositiveFloat | None = key(None, "Largest loss of the fake score.")
    max_saturation: Fraction | None = key(None, "Largest share of x0 outside [-1, 1] (pixels) or 4 sigma (latents).")
    max_clip_fraction: Fraction | None = key(None, "Largest share of clipped ratios (GRPO).")
    max_score_rounding: PositiveFloat | None = key(
        None, "Largest rounding error of the DMD gradient on a probe, |g - g_fp32| / |g_fp32|, at each log interval."
    )
    patience: Positive = key(3, "Log intervals in a row beyond a threshold before it counts as collapse.")
