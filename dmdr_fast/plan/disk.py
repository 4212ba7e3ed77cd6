"""Bytes on disk: of one checkpoint, and of everything that a run leaves or holds at once.

Headers, logs and the report are left out: below a MB of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dmdr_fast.config import Config
from dmdr_fast.data.prompts import load_prompts
from dmdr_fast.errors import UserError
from dmdr_fast.plan.networks import DTYPES
from dmdr_fast.plan.shapes import count
from dmdr_fast.plan.workload import GB, Workload
from dmdr_fast.plan.zero import trained_by

# Bytes of AdamW's moments per trained element, as a checkpoint has them; paged ones are the same as 8-bit ones.
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 2 + 2 * 4 / 256}


@dataclass(frozen=True)
class Disk:
    """Bytes. ``checkpoints`` is how many lie there at most at once, the one that is being written among them.

    snapshots: the generator after the cold start, at the end, and of the last evaluation, by the folder or file.
    prompts: different ones, the negative one too; None where their file is not here. per_prompt: bytes of the longest.
    """

    checkpoint: float
    checkpoints: int
    snapshots: dict[str, float]
    prompts: int | None
    per_prompt: float

    @property
    def run_dir(self) -> float:
        """The most that the run's folder takes."""
        return self.checkpoint * self.checkpoints + sum(self.snapshots.values())


def checkpoint_bytes(work: Workload) -> float:
    """Bytes of one checkpoint on any number of GPUs: fp32 weights, moments and average of what is trained."""
    generator, fake = (trained_by(work, role) for role in ("generator", "fake"))
    return (4 + MOMENTS[work.optimizer]) * (generator + fake) + (4 * generator if work.ema else 0)


def disk(config: Config, work: Workload) -> Disk:
    """The disk that a run of ``config`` needs."""
    elements = trained_by(work, "generator")
    if work.student_lora is not None and work.shape.opened().merges_lora:
        elements = count(work.shape_of("generator"))[0]
    final = {"fp32": 4, "bf16": 2}[config.export.dtype]
    snapshots = {"cold_start": 4.0 * elements, "final": float(final * elements)}
    if config.eval.every and config.eval.samples:
        snapshots["evaluated.safetensors"] = 4.0 * elements
    return Disk(checkpoint_bytes(work), most_checkpoints(config), snapshots, *_embeddings(config, work))


def most_checkpoints(config: Config) -> int:
    """Checkpoints at once: the newest ``checkpoint.keep``, those that stay, and the one that is being written."""
    keep, start, last = config.checkpoint, config.train.cold_start_steps, config.train.generator_steps
    steps = sorted({*range(keep.every, last + 1, keep.every), start, last} - {0})
    stay = {step for step in steps if step == start or (keep.keep_every and step % keep.keep_every == 0)}
    return len(stay | set(steps[-keep.keep - 1 :]))


def _embeddings(config: Config, work: Workload) -> tuple[int | None, float]:
    """(different prompts, None where their files are not here; bytes of one embedding at the longest)."""
    if not work.shape.opened().takes_prompts:
        return 0, 0.0
    dtype = DTYPES["fp32" if config.deepspeed.dtype == "fp32" else "bf16"]
    entry = work.shape.opened().empty_condition(1, dtype)
    size = sum(t.nbytes for name, t in entry.items() if name not in ("mask", "lengths"))
    files = [file for file in (config.data.prompts, config.eval.prompts) if file is not None]
    try:
        prompts = {prompt.text for file in files for prompt in load_prompts(file, config.data.key)}
    except UserError:
        return None, float(size)
    return len(prompts) + 1, float(size)  # and the negative prompt


def lines(disk: Disk) -> Iterator[str]:
    """The disk in words."""
    kept = ", ".join(f"{name} {size / GB:.3g}" for name, size in disk.snapshots.items())
    yield (
        f"disk: {disk.checkpoint / GB:.3g} GB a checkpoint, {disk.checkpoints} at once while one is written; "
        f"{kept}: {disk.run_dir / GB:.3g} GB in run_dir at most"
    )
    if disk.prompts is None:
        yield f"text embeddings: at most {disk.per_prompt / 1e6:.2f} MB a prompt; the file of data.prompts is not here"
    elif disk.prompts:
        total = disk.prompts * disk.per_prompt
        yield f"text embeddings: at most {total / GB:.3g} GB in the cache ({disk.prompts} prompts)"
