"""From a configuration to the numbers that the step reads, and the same in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmdr_fast.algorithm.dmd import Augmentation, DMDOptions
from dmdr_fast.algorithm.passes import Schedule
from dmdr_fast.algorithm.recipe import Recipe
from dmdr_fast.algorithm.schedules import RenoiseLaw, timestep_grid
from dmdr_fast.config import AdamW, Config
from dmdr_fast.engine.model import Model
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.ops.dmd import Prediction

if TYPE_CHECKING:
    from dmdr_fast.engine.networks import Roles  # which asks this file for the DMD options


def student_grid(config: Config) -> tuple[float, ...]:
    """The student's times t_0 .. t_N = 0."""
    return timestep_grid(config.student.steps, shift=config.student.shift, times=config.student.times)


def recipe_of(config: Config, model: Model) -> Recipe:
    """The numbers that the step reads."""
    shared = config.sharing != "separate"
    return Recipe(
        grid=student_grid(config),
        latent_shape=model.latent_shape,
        more_shapes=model.more_shapes,
        prediction=model.prediction,
        path=model.path,
        cold_start_steps=config.train.cold_start_steps,
        generator_steps=config.train.generator_steps,
        fake_updates=config.train.fake_updates,
        rollout_variant=config.student.rollout,
        eta=config.student.fresh_noise,
        rollout_reuse=config.train.rollout_reuse,
        stop_step_per=config.rollout.stop_step_per,
        real_lora_scale=config.dyna_dg.real_scale if shared else 0.0,
        dynamic_guidance_step=config.dyna_dg.dynamic_step,
        renoise=RenoiseLaw(**config.dyna_rs.model_dump(), **config.renoise.model_dump()),
        fake_renoise=None if config.fake.renoise is None else RenoiseLaw(**config.fake.renoise.model_dump()),
        dmd=dmd_options(config, model.prediction, model.token),
        tilt=config.rl.tilting,
        tilt_weight=config.rl.tilt.weight,
        method=config.rl.chosen,
        regularizer=config.rl.regularizer,
        kl_weight=0.0 if config.rl.regularizer == "none" else config.rl.kl_weight,
        reward_weight=1.0 if config.reward.weight == "auto" else config.reward.weight,  # auto: set as RL starts
        reward_final_weight=config.reward.final_weight,
        reward_warmup_steps=config.reward.warmup_steps,
        saturation=model.saturation,
    )


def dmd_options(config: Config, prediction: Prediction, token: int) -> DMDOptions:
    """The ``dmd`` section and the teacher's guidance as the algorithm takes them."""
    guided: dict[str, Any] = {}
    if config.uses_cfg:
        guided = {"cfg_scale": config.teacher.cfg_scale, "cfg_mode": config.cfg_mode}
    own = config.dmd.model_dump(exclude={"score_dtype", "decoupled", "ca"})
    ca = Augmentation(**config.dmd.ca.model_dump()) if config.dmd.decoupled else None
    return DMDOptions(prediction=prediction, token=token, ca=ca, **guided, **own)


def learning_rates(
    settings: AdamW, step: int, cold_start_steps: int, generator_steps: int, updates: int = 1, before: int | None = None
) -> list[float]:
    """The learning rates of a role's ``updates`` optimizer steps within a generator step.

    Constant, then linear to a tenth over the last share ``decay`` of the cold start, or of the updates after it; times
    (k + 1) / ``warmup_steps``, at most 1, at the role's own step k, counted from the run's start: ``before`` of them,
    ``updates`` per generator step unless given. A function of counters, so a resumed run has the same.
    """
    rl = step >= cold_start_steps
    start, end = (cold_start_steps, generator_steps) if rl else (0, cold_start_steps)
    peak = settings.rl_lr if rl and settings.rl_lr is not None else settings.lr
    left = (end - step) / ((end - start) * settings.decay) if settings.decay else 1.0
    rate = peak * max(0.1, min(1.0, 0.1 + 0.9 * left))
    first = (step * updates if before is None else before) + 1
    return [rate * min(1.0, k / (settings.warmup_steps or 1)) for k in range(first, first + updates)]


def describe(config: Config, step: int, recipe: Recipe, roles: Roles, ranks: Runtime) -> str:
    """The effective recipe of generator step ``step`` in a few lines, printed once, and what ``phases`` change."""
    phases = [f"phase      at step {start}: {', '.join(changes)}" for start, changes in config.switches.items()]
    config = config.at(step)
    # fp32 gradients, and two moments per parameter: fp32 or 8 bits
    master = sum(roles.trained_parameters.values()) * (12 if config.optimizer.kind == "adamw" else 6)
    stored = sum(roles.total_parameters.values()) * (4 if config.deepspeed.dtype == "fp32" else 2)
    batch = config.train.batch * ranks.world_size
    lines = [
        f"student    {config.student.steps} step(s) at t = {', '.join(f'{t:.4g}' for t in recipe.grid[:-1])}, "
        f"sampler {config.student.sampler}" + (f" with eta {recipe.eta:g}" if config.student.sampler == "cps" else ""),
        f"images     {_size_words(config)}",
        f"teacher    {_guidance_words(recipe.dmd)}",
        f"roles      {config.sharing}; parameters trained / all: "
        + ", ".join(f"{n} {t:,} / {c:,}" for n, t, c in _sizes(roles)),
        *(
            []
            if config.student.own_network is None
            else [f"generator  {config.student.own_network}, a network of its own"]
        ),
        f"memory     {stored / 2**20:.1f} MiB weights, {master / 2**20:.1f} MiB gradients and AdamW",
        f"renoise    {_law_words(recipe.renoise, recipe)}",
        *([] if recipe.fake_renoise is None else [f"fake       renoised by {_law_words(recipe.fake_renoise)}"]),
        f"updates    {config.train.cold_start_steps} cold start{_tilt_words(config)}, then to "
        f"{config.train.generator_steps} with {_rl_words(config)}; R = {recipe.fake_updates}, batch {batch}",
        _rollout_words(recipe, config.train.gradient_accumulation, ranks.world_size),
        f"engine     ZeRO stage {config.deepspeed.stage}, {config.deepspeed.dtype}, {ranks.world_size} rank(s) "
        f"on {ranks.device.type}",
        *roles.notes,
        *phases,
    ]
    return "\n".join(lines)


def _law_words(law: RenoiseLaw, recipe: Recipe | None = None) -> str:
    """A law of the renoise time, DynaRS at the start, middle and end of its way; with DynaDG's s_r of ``recipe``."""
    if law.kind != "dyna_rs":
        return law.kind
    steps = sorted({0, law.dynamic_step // 2, law.dynamic_step})
    scales = ["" if recipe is None else f" s_r {recipe.real_scale(s):.2f}" for s in steps]
    betas = [f"Beta({a:.2f}, {b:.2f})" for a, b in map(law.beta, steps)]
    return "; ".join(f"step {s}: {beta}{scale}" for s, beta, scale in zip(steps, betas, scales, strict=True))


def _size_words(config: Config) -> str:
    named = ", ".join(f"{height} x {width}" for height, width in config.model.sizes)
    drawn = ", one drawn for each micro-step" if len(config.model.sizes) > 1 else ""
    return f"{named} pixels{drawn}"


def _guidance_words(dmd: DMDOptions) -> str:
    standard = dmd.cfg_scale + (1.0 if dmd.cfg_mode == "offset" else 0.0)
    decoupled = "" if dmd.ca is None else ", decoupled: at times of its own, up to the generator's"
    rescaled = ", rescaled per token" if dmd.cfg_mode == "per_token" else ""
    return f"CFG scale {standard:g} (standard form{rescaled}){decoupled}"


def _rollout_words(recipe: Recipe, micro_steps: int, ranks: int) -> str:
    """What the rollouts of an update cost, and who draws their stop steps."""
    per_rank = recipe.stop_step_per == "rank" and ranks > 1
    plan = Schedule(
        steps=len(recipe.grid) - 1,
        fake_updates=recipe.fake_updates,
        accumulation=micro_steps,
        rollout_reuse=recipe.rollout_reuse,
        stop_ranks=ranks if per_rank else 1,
    )
    drawn = "rank and micro-step, of which all await the longest" if per_rank else "micro-step"
    reused = f", each renoised for {recipe.rollout_reuse} fake updates" if recipe.rollout_reuse > 1 else ""
    return (
        f"rollouts   {plan.rollouts} of {plan.rollout_steps:.4g} forwards per micro-step{reused}, one stop step per "
        f"{drawn}: {plan.rollouts * plan.rollout_steps * micro_steps:.4g} F-units an update"
    )


def _sizes(roles: Roles) -> list[tuple[str, int, int]]:
    """(network or adapter, trained, all) parameters."""
    trained, total = roles.trained_parameters, roles.total_parameters
    return [(n, trained.get(n, 0), total.get(n, trained.get(n, 0))) for n in dict.fromkeys([*total, *trained])]


def _rl_words(config: Config) -> str:
    """The RL phase in words: method, rewards, weight, and what holds the generator."""
    rl, reward = config.rl, config.reward
    if not rl.chosen.uses_reward:
        return "DMD alone"
    weight = reward.weight if reward.weight == "auto" else f"{reward.weight:g}"
    final = "" if reward.final_weight is None else f" to {reward.final_weight:g}"
    holds = {
        "dmd": "beside DMD",
        "dm": "beside DMD without guidance",
        "kl": f"with KL x {rl.kl_weight:g} to {rl.reference} reference",
        "none": "alone",
    }
    return f"{rl.method} on {_reward_words(config)} x {weight}{final}, {holds[rl.regularizer]}"


def _tilt_words(config: Config) -> str:
    tilt = config.rl.tilt
    if not config.rl.tilting.uses_reward:
        return ""
    return f" tilted by {tilt.method} on {_reward_words(config)} x {tilt.weight:g}"


def _reward_words(config: Config) -> str:
    return " + ".join(f"{term.weight:g} {term.called}" for term in config.reward.terms)


def table_text(table: dict[str, dict[str, float | None]]) -> str:
    """metrics.json as aligned text: a column per metric that some row has; - where another row lacks it."""
    names = list(dict.fromkeys(n for values in table.values() for n, value in values.items() if value is not None))
    cells = [["", *names]]
    for row, values in table.items():
        found = [values.get(name) for name in names]
        cells.append([row, *("-" if value is None else f"{value:.4g}" for value in found)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ([f"{row:<{widths[0]}}", *map(str.rjust, values, widths[1:])] for row, *values in cells)
    return "\n".join("  ".join(line) for line in lines)
