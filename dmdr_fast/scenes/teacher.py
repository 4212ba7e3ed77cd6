"""Train the teacher of scenes: ``python -m dmdr_fast.scenes.teacher --out FOLDER``.

First the VAE, then text encoders and transformer jointly by flow matching on its latents. Every number drawn is a
function of the seed and the step, so a training that was killed and is started again ends with the bytes of one that
was not. FOLDER gets the pipeline (fp16 safetensors, by ``save_pretrained``), ``losses.json`` with the loss of every
step, and ``training.json``, which says how it was made.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dmdr_fast.algorithm.schedules import cosine_decay
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.cli import Parser, run_user_command, user_path
from dmdr_fast.commit import commit
from dmdr_fast.errors import UserError
from dmdr_fast.scenes.captions import combinations
from dmdr_fast.scenes.data import Scenes, SceneSource
from dmdr_fast.scenes.pipeline import TOKENS, build_pipeline, build_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline

BATCH, WARM_UP, CLIP, DECAY = 32, 100, 1.0, 0.999  # samples, steps, gradient norm, of the moving average of weights
VAE_STEPS, VAE_LEARNING_RATE, KL_WEIGHT = 2_000, 2e-3, 3e-4
STEPS, LEARNING_RATE, DROPPED_CAPTIONS = 10_000, 1e-3, 0.1
SAVE_EVERY = 250  # steps
STATISTICS = 1024  # scenes that the latents' mean and standard deviation are taken over
RECORD, LOSSES = "training.json", "losses.json"


def train_teacher(out: Path, *, seed: int = 0, vae_steps: int = VAE_STEPS, steps: int = STEPS) -> None:
    """Train the teacher into ``out``, going on where an earlier call was stopped.

    Raises:
        UserError: ``out`` holds a finished teacher, or the beginnings of one with other settings.
    """
    settings = {"seed": seed, "vae_steps": vae_steps, "steps": steps, "batch_size": BATCH}
    _claim(out, settings)
    vae, vae_seconds = train_vae(out, seed=seed, steps=vae_steps)
    pipeline, seconds = train_pipeline(out, vae, seed=seed, steps=steps)
    pipeline.to(torch.float16).save_pretrained(out)
    record = {
        **settings,
        "command": f"python -m dmdr_fast.scenes.teacher --seed {seed} --vae-steps {vae_steps} --steps {steps}",
        "commit": commit(Path(__file__).parent),
        "seconds": {"vae": round(vae_seconds), "pipeline": round(seconds), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "sha256": {
            str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(out.rglob("*.safetensors"))
        },
    }
    _replace(out / RECORD, lambda aside: aside.write_text(json.dumps(record, indent=2) + "\n"))
    for stage in ("vae", "pipeline"):
        _state_file(out, stage).unlink()


def train_vae(out: Path, *, seed: int, steps: int, stop: int | None = None) -> tuple[AutoencoderKL, float]:
    """The VAE after ``stop`` of ``steps`` steps (all by default), and the seconds they took.

    E |D(z) - x|^2 + KL_WEIGHT KL(q(z | x) | N(0, 1)), means over pixels and over latents. The finished weights are
    rounded to fp16, in which they are stored, and the latents' mean and standard deviation over the data become
    ``shift_factor`` and 1 / ``scaling_factor``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = build_vae()
    source, streams = _source(seed), Streams(seed)

    def loss(step: int) -> Tensor:
        images = _batch(source, step).images
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * _noise(streams, "vae", step, like=posterior.mean)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.mse_loss(vae.decode(latents).sample, images) + KL_WEIGHT * kl

    seconds = _train("vae", vae, loss, out, steps=steps, learning_rate=VAE_LEARNING_RATE, stop=stop)
    vae.half().float().requires_grad_(False).eval()
    with torch.no_grad():
        posterior = vae.encode(source(range(STATISTICS)).images).latent_dist
        deviation = (posterior.mean.var() + posterior.var.mean()).sqrt()
    shift = posterior.mean.mean()
    vae.register_to_config(scaling_factor=round(1 / deviation.item(), 4), shift_factor=round(shift.item(), 4))
    return vae, seconds


def train_pipeline(
    out: Path, vae: AutoencoderKL, *, seed: int, steps: int, stop: int | None = None
) -> tuple[StableDiffusion3Pipeline, float]:
    """The pipeline around ``vae`` after ``stop`` of ``steps`` steps (all by default), and the seconds they took.

    Flow matching, E |v(x_t, t, caption) - (eps - x0)|^2 with t logit-normal; gradients reach the text encoders through
    the pipeline's own ``encode_prompt``. Of the captions a share :data:`DROPPED_CAPTIONS` is empty, for CFG.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = build_pipeline(vae)
    source, streams = _source(seed), Streams(seed)
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)

    def loss(step: int) -> Tensor:
        scenes, rng = _batch(source, step), streams.rng("teacher", step)
        dropped = rng.random(BATCH) < DROPPED_CAPTIONS
        t = torch.from_numpy(rng.standard_normal(BATCH)).float().sigmoid()
        with torch.no_grad():
            posterior = vae.encode(scenes.images).latent_dist
            latents = posterior.mean + posterior.std * _noise(streams, "latent", step, like=posterior.mean)
            x0 = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        noise = _noise(streams, "noise", step, like=x0)
        captions = ["" if drop else prompt for drop, prompt in zip(dropped, scenes.prompts, strict=True)]
        embeds, _, pooled, _ = pipeline.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        v = pipeline.transformer(
            hidden_states=torch.lerp(x0, noise, t.view(-1, 1, 1, 1)),
            timestep=1000 * t,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return F.mse_loss(v, noise - x0)

    module = nn.ModuleList((pipeline.transformer, *encoders))
    seconds = _train("pipeline", module, loss, out, steps=steps, learning_rate=LEARNING_RATE, stop=stop)
    module.eval()
    return pipeline, seconds


def _train(
    stage: str,
    module: nn.Module,
    loss: Callable[[int], Tensor],
    out: Path,
    *,
    steps: int,
    learning_rate: float,
    stop: int | None,
) -> float:
    """Minimise ``loss(step)`` over ``module`` from the stage's saved state, or from the start, to its end or ``stop``.

    AdamW with a linear warm-up and a cosine to 0; at the end the weights' moving average takes their place. Every
    :data:`SAVE_EVERY` steps the state is saved; the losses of a later step are written again. Returns the seconds of
    all steps so far.
    """
    trained = list(module.train().parameters())
    average = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    start, seconds, file = 0, 0.0, _state_file(out, stage)
    if file.is_file():
        state = torch.load(file)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, start, seconds = state["average"], state["step"], state["seconds"]
    losses = read_losses(out)
    mine = losses[stage] = losses.get(stage, [])[:start]
    began = time.monotonic()
    end = steps if stop is None else stop
    for step in tqdm(range(start, end), desc=stage, unit="step", initial=start, total=end, mininterval=5.0):
        factor = min(1.0, (step + 1) / WARM_UP) * cosine_decay(step, steps)
        optimizer.param_groups[0]["lr"] = learning_rate * factor
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in trained], 1 - min(DECAY, (step + 1) / (step + 10)))
        mine.append(float(f"{value.item():.7g}"))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == end:
            state = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step + 1,
                "seconds": seconds + time.monotonic() - began,
            }
            _replace(out / LOSSES, lambda aside: aside.write_text(json.dumps(losses) + "\n"))
            _replace(file, lambda aside: torch.save(state, aside))  # noqa: B023 - called at once
    with torch.no_grad():
        for parameter, mean in zip(trained, average, strict=True):
            parameter.copy_(mean)
    return seconds + time.monotonic() - began


def read_losses(folder: Path) -> dict[str, list[float]]:
    """The log of a training: of its stages, "vae" and "pipeline", the loss of each step's batch to seven digits."""
    file = folder / LOSSES
    return json.loads(file.read_text()) if file.is_file() else {}


def _source(seed: int) -> SceneSource:
    return SceneSource("teacher", combinations(held_out=False), seed=seed)


def _batch(source: SceneSource, step: int) -> Scenes:
    """No scene comes twice."""
    return source(range(step * BATCH, (step + 1) * BATCH))


def _noise(streams: Streams, purpose: str, step: int, *, like: Tensor) -> Tensor:
    shard = Shard(0, len(like), len(like))
    return streams.noise(purpose, step, shape=tuple(like.shape[1:]), shard=shard, device=like.device)


def _state_file(out: Path, stage: str) -> Path:
    return out / f"{stage}.state"


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """``file`` as ``write`` leaves it aside: whole, or as it was."""
    aside = file.with_name(f".{file.name}")
    write(aside)
    os.replace(aside, file)


def _claim(out: Path, settings: dict[str, int]) -> None:
    """Make ``out``, or see that what lies in it is the beginning of this very training.

    Raises:
        UserError: it is not.
    """
    record = out / RECORD
    if record.is_file():
        found = json.loads(record.read_text())
        if found == settings:
            return
        if "sha256" in found:
            raise UserError(f"--out {out}: holds a finished teacher; give another folder, or remove it")
        raise UserError(f"--out {out}: began with {found}, not {settings}; give these, or another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _replace(record, lambda aside: aside.write_text(json.dumps(settings) + "\n"))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); give a folder that can") from None


def main(argv: list[str]) -> None:
    """Train the teacher. Mistakes exit with 2."""
    parser = Parser(prog="python -m dmdr_fast.scenes.teacher", description=main.__doc__)
    parser.add_argument(
        "--out", type=user_path, required=True, help="Folder of the pipeline; an interrupted one goes on."
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"Of the transformer (default {STEPS}).")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS, help=f"Of the VAE (default {VAE_STEPS}).")
    parser.add_argument("--seed", type=int, default=0, help="Of everything drawn (default 0).")
    options = parser.parse_args(argv)
    for name in ("steps", "vae_steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    train_teacher(options.out, seed=options.seed, vae_steps=options.vae_steps, steps=options.steps)


if __name__ == "__main__":
    sys.exit(run_user_command(main))
