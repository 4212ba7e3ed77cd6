"""Distribution matching: DynaDG, DynaRS, the renoise time, the DMD gradient."""

from __future__ import annotations

from typing import Literal

from dmdr_fast.config.base import Count, Fraction, NonNegative, Number, PositiveFloat, Section, key


class DynaDG(Section):
    """DynaDG: the real score has the fake score's LoRA, at a falling scale. Off with ``sharing: separate``."""

    fake_scale: PositiveFloat = key(2.0, "s_f, LoRA scale of the fake score.")
    real_scale: NonNegative = key(0.75, "s_r0, LoRA scale of the real score at step 0; 0 turns DynaDG off.")
    dynamic_step: Count = key(200, "Generator updates over which s_r falls to 0 by a cosine.")


class DynaRS(Section):
    """Dynamic renoise sampling: t ~ Beta(alpha, beta), from high noise to uniform."""

    alpha0: PositiveFloat = key(4.0, "alpha at step 0; falls to 1.")
    beta0: PositiveFloat = key(1.5, "beta at step 0; falls to 1.")
    dynamic_step: Count = key(200, "Generator updates over which both reach 1 by a cosine; 0 turns DynaRS off.")


class Renoise(Section):
    """The law of the renoise time."""

    kind: Literal["dyna_rs", "uniform", "logit_normal"] = key("dyna_rs", "Law of t before range and shift.")
    mean: Number = key(0.0, "Mean of the logit-normal law.")
    std: PositiveFloat = key(1.0, "Standard deviation of the logit-normal law.")
    t_min: Fraction = key(0.001, "Smallest t.")
    t_max: Fraction = key(0.999, "Largest t.")
    shift: PositiveFloat = key(1.0, "Timestep shift applied to t.")
    per: Literal["sample", "batch"] = key("sample", "One t per sample, or one for the whole batch of an update.")


class FakeRenoise(Renoise, DynaRS):
    """A law of its own for the fake update: the keys of renoise and of dyna_rs, with their defaults."""


class CA(Section):
    """The guidance part of decoupled DMD; its times are uniform from t_min to the generator's own, then shifted."""

    t_min: Fraction = key(0.001, "Smallest t, before the shift.")
    shift: PositiveFloat = key(1.0, "Timestep shift: of the student's grid (student.shift) for uniform on its scale.")
    normalizer: Literal["per_sample", "global", "none"] = key("per_sample", "As dmd.normalizer, of this part.")


class DMD(Section):
    """The DMD gradient; docs/drop-in.md has the values of other code bases."""

    normalizer: Literal["per_sample", "global", "none"] = key("per_sample", "Over what mean|x0 - x0_real| is taken.")
    eps: NonNegative = key(1e-8, "Added to the normaliser, or its lower bound.")
    eps_mode: Literal["add", "clamp", "none"] = key("add", "What eps does.")
    nan_policy: Literal["keep", "zero", "torch", "zero_sample"] = key(
        "keep",
        "Non-finite elements of g: keep lets the update be skipped; zero hides them; torch is nan_to_num; zero_sample: "
        "such samples get no gradient.",
    )
    score_dtype: Literal["compute", "fp16", "fp32"] = key(
        "compute",
        "Type of the score pass alone. compute: deepspeed.dtype. fp16 rounds eight times less than bf16 and "
        "overflows at 65504; fp32 is slow and exact. Weights are cast layer by layer as they are used.",
    )
    reduction: Literal["mean", "sum"] = key("mean", "mean: gradient g / numel; sum: rCM's 2 g / batch.")
    decoupled: bool = key(
        False,
        "Distribution matching (fake - cond, at renoise's times) and guidance (at dmd.ca's) with a time, a noise and a "
        "normaliser each; four score rows. Needs teacher.cfg_scale.",
    )
    ca: CA = key(CA(), "The guidance part of decoupled DMD.")
