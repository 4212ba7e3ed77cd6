"""A benchmark: ``dmdr-evaluate RUN|PIPELINE --prompts FILE --out DIR``, images, scores and a table of their means."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dmdr_fast import cache, placement
from dmdr_fast.cli import Parser, load, read_value, run_user_command, user_path
from dmdr_fast.config import Config, Reward, RewardTerm
from dmdr_fast.disk import told, write_whole
from dmdr_fast.errors import UserError
from dmdr_fast.export import add_source, is_run, run_weights, weights_file
from dmdr_fast.preflight import check_captions, check_names, check_terms, check_writable
from dmdr_fast.sample import BATCH, prompts_of

if TYPE_CHECKING:
    from dmdr_fast.engine.drawing import Draw
    from dmdr_fast.engine.rewards import RewardSet
    from dmdr_fast.engine.runtime import Runtime
    from dmdr_fast.eval.gallery import Gallery, Part


@dataclass(frozen=True)
class Subject:
    """What is evaluated, as far as it is known before anything is loaded.

    Attributes:
        config: the run's; None for a pipeline.
        models: what draws images, by name: teacher and student, or pipeline.
        captions: prompts, or the classes' names.
        rewards: what scores the images.
        settings: what the images depend on.
    """

    config: Config | None
    models: tuple[str, ...]
    captions: tuple[str, ...]
    rewards: Reward
    settings: Mapping[str, Any]

    @property
    def num_classes(self) -> int | None:
        """None where images are of prompts."""
        return None if self.config is None else self.config.num_classes


def main(argv: list[str]) -> None:
    """Draw what is missing of the images, score them, and write the table. Mistakes exit with 2."""
    options = _parser().parse_args(argv)
    placement.take()
    subject = _run(options) if is_run(options, "evaluate") else _pipeline(options)
    _check(options, subject)
    from dmdr_fast.engine import runtime  # torch and deepspeed: after all that can be told without them
    from dmdr_fast.eval.gallery import Gallery

    batch = options.batch or (BATCH if subject.config is None else subject.config.eval.batch_size)
    gallery, ranks = Gallery(options.out, subject.captions, options.seeds, batch), runtime.start()
    rewards = subject.rewards.model_dump(mode="json", include={"terms", "held_out"})
    _on_main(ranks, lambda: gallery.begin(subject.settings, rewards))
    if options.real is not None:
        from dmdr_fast.eval.inception import check_weights

        _on_main(ranks, lambda: check_weights(options.inception))
    _draw(options, subject, gallery, ranks)
    if subject.rewards.terms or subject.rewards.held_out:
        _score(subject, gallery, ranks)
    _on_main(ranks, lambda: _conclude(options, subject, gallery, ranks))


def _parser() -> Parser:
    parser = Parser(prog="dmdr-evaluate", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("source", type=user_path, metavar="RUN|PIPELINE", help="A run, finished or not, or a pipeline of diffusers.")
    add("--prompts", nargs="+", help="Prompts, or one file of them, as data.prompts. A run on class labels has none.")
    add("--out", type=user_path, required=True, help="Folder of the images, the scores and the table.")
    add("--seeds", type=int, default=1, metavar="N", help="Images of each prompt or class (default 1).")
    add(
        "--rewards",
        nargs="*",
        metavar="KIND",
        help="Rewards, each a kind or an entry of reward.terms, '{kind: hps, path: FILE}' (default: the run's own).",
    )
    add("--student-only", action="store_true", help="Leave the run's teacher out.")
    add("--real", type=user_path, metavar="FOLDER", help="Real images: FID, inception score, precision and recall.")
    add("--inception", type=user_path, metavar="FILE", help="Inception's weights (default: torch-fidelity's download).")
    add("--npz", action="store_true", help="Write OUT/MODEL.npz for the ADM evaluation suite, too.")
    add("--batch", type=int, metavar="N", help=f"Images per forward (default: the run's eval.batch_size, or {BATCH}).")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    add_source(parser)
    return parser


def _run(options: argparse.Namespace) -> Subject:
    """A run's student beside its teacher, who samples as in the run's own evaluation."""
    config = load(options.source / "config.yaml")
    on_labels = config.model.family == "sit"
    if on_labels and options.prompts:
        raise UserError(f"--prompts: {options.source} is a run on class labels, which reads none; leave it out")
    if on_labels and options.step is not None:
        raise UserError(f"--step: {options.source} is a run on class labels; give a phase's file with --weights")
    captions = [f"class {label}" for label in range(config.model.num_classes)] if on_labels else _prompts(options)
    settings = {
        "generator": _content([weights_file(options.source, options.weights, options.step)]),
        "eval.teacher_steps": config.eval.teacher_steps,
        "data.negative_prompt": config.data.negative_prompt,
        "deepspeed.dtype": config.deepspeed.dtype,
    }
    for section in ("model", "teacher", "decoder", "student"):
        values = getattr(config, section).model_dump(mode="json")
        settings |= {f"{section}.{key}": value for key, value in values.items()}
    models = ("student",) if options.student_only else ("teacher", "student")
    return Subject(config, models, tuple(captions), _rewards(options, config.reward), settings)


def _pipeline(options: argparse.Namespace) -> Subject:
    """A pipeline as it is called; there is no teacher beside it."""
    settings = {"pipeline": _content(sorted(file for file in options.source.rglob("*") if file.is_file()))}
    return Subject(None, ("pipeline",), tuple(_prompts(options)), _rewards(options, Reward()), settings)


def _prompts(options: argparse.Namespace) -> list[str]:
    if not options.prompts:
        raise UserError("--prompts: missing; give a file of prompts, or the prompts themselves")
    return prompts_of(options.prompts)


def _content(files: Sequence[Path]) -> str:
    """What tells one content from another, wherever it lies."""
    hashes = "".join(cache.file_hash(file) for file in files)
    return f"sha256 {hashlib.sha256(hashes.encode()).hexdigest()[:16]}"


def _rewards(options: argparse.Namespace, own: Reward) -> Reward:
    """The rewards that are asked for, or a run's own."""
    if options.rewards is None:
        return own
    terms = []
    for word in options.rewards:
        value = read_value(word)
        try:
            terms.append(RewardTerm.model_validate({"kind": value} if isinstance(value, str) else value))
        except ValidationError as error:
            problem = error.errors()[0]
            where = "".join(f"{key}: " for key in problem["loc"])
            raise UserError(
                f"--rewards {word}: {where}{problem['msg']}; expected KIND, or {{kind: KIND, ...}}"
            ) from None
    return Reward(terms=tuple(terms), timeout=own.timeout)


def _check(options: argparse.Namespace, subject: Subject) -> None:
    """What can be told before anything is loaded."""
    for name in ("seeds", "batch"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise UserError(f"--{name}: expected at least 1, got {given}")
    terms = (*subject.rewards.terms, *subject.rewards.held_out)
    check_captions("--prompts", () if subject.num_classes else subject.captions, terms)
    check_names({key: (name, None) for key, name in check_terms("--rewards", terms, subject.num_classes).items()})
    if options.inception is not None:
        if options.real is None:
            raise UserError("--inception: it is for --real FOLDER; give that too, or leave it out")
        if not options.inception.is_file():
            raise UserError(f"--inception: no such file: {options.inception}; give torch-fidelity's weights")
    if options.real is not None:
        from dmdr_fast.data.images import image_files
        from dmdr_fast.eval.inception import LEAST_DRAWN, LEAST_REAL, check_installed

        check_installed()
        drawn, real = len(subject.captions) * options.seeds, len(image_files(options.real))
        if drawn < LEAST_DRAWN or real < LEAST_REAL:
            raise UserError(
                f"--real: expected at least {LEAST_REAL} images in it and {LEAST_DRAWN} drawn, got {real} and {drawn}; "
                "give more of them, or raise --seeds"
            )
    check_writable("--out", options.out)


def _on_main(ranks: Runtime, work: Callable[[], Any]) -> Any:
    """What ``work`` returns on rank 0, on all ranks."""
    return _together(ranks, work if ranks.is_main else lambda: None)[0]


def _together(ranks: Runtime, work: Callable[[], Any]) -> list[Any]:
    """What ``work`` returns on each rank. A mistake, or a disk's refusal, of one rank is every rank's."""
    result, fault = None, None
    try:
        result = work()
    except Exception as error:
        fault = told(error)
        if fault is None:
            raise
    found = ranks.gather((result, fault))
    if faults := [fault for _, fault in found if fault]:
        raise UserError(faults[0])
    return [result for result, _ in found]


def _draw(options: argparse.Namespace, subject: Subject, gallery: Gallery, ranks: Runtime) -> None:
    """Draw the images that are missing; the ranks share the parts."""
    missing = _on_main(ranks, lambda: {model: gallery.undrawn(model) for model in subject.models})
    if not any(missing.values()):
        return
    draws = _draws(options, subject, ranks)
    for model in subject.models:
        if missing[model]:
            _draw_parts(model, missing[model], draws[model], gallery, ranks)


def _draw_parts(model: str, parts: list[Part], load: Callable[[], Draw], gallery: Gallery, ranks: Runtime) -> None:
    from tqdm import tqdm

    draw = load()

    def work() -> None:
        mine = parts[ranks.rank :: ranks.world_size]
        for part in tqdm(mine, desc=model, unit="batch", mininterval=2.0, disable=not ranks.is_main):
            gallery.draw(model, part, draw(part.rows, part.seed))

    _together(ranks, work)


def _draws(options: argparse.Namespace, subject: Subject, ranks: Runtime) -> dict[str, Callable[[], Draw]]:
    """How each model is loaded. All ranks must call, these and what is returned."""
    from dmdr_fast.engine.drawing import RunImages, pipeline_images

    if subject.config is None:
        return {"pipeline": lambda: pipeline_images(options.source, subject.captions, ranks.device)}
    run = RunImages.open(subject.config, subject.captions, ranks)

    def student() -> Draw:
        """A checkpoint's weights are brought together once, by rank 0."""
        named = run_weights(run.model, options.source, options.weights, options.step, options.out)
        with named if ranks.is_main else nullcontext() as file:
            (file, *_) = ranks.gather(file)
            draw = run.student(file)
            ranks.barrier()
        return draw

    return {"teacher": run.teacher, "student": student}


def _score(subject: Subject, gallery: Gallery, ranks: Runtime) -> None:
    """Score the images that no line of scores.jsonl tells of; the ranks share the parts."""
    from tqdm import tqdm

    def unscored() -> list[tuple[str, Part]]:
        lines = gallery.gather_scores()
        return [(model, part) for model in subject.models for part in gallery.unscored(model, lines)]

    missing = _on_main(ranks, unscored)
    if not missing:
        return

    def work() -> None:
        mine, rewards = missing[ranks.rank :: ranks.world_size], _build_rewards(subject, ranks)
        try:
            for model, part in tqdm(mine, desc="scores", unit="batch", mininterval=2.0, disable=not ranks.is_main):
                images, inputs = gallery.read(model, part).to(ranks.device), _inputs(subject, part.rows, ranks)
                gallery.add_scores(model, part, _scores(rewards, images, inputs, model), ranks.rank)
        finally:
            rewards.close()

    _together(ranks, work)


def _build_rewards(subject: Subject, ranks: Runtime) -> RewardSet:
    from dmdr_fast.engine.rewards import build_reward_set

    rewards = subject.rewards
    try:
        return build_reward_set(
            rewards.terms,
            rewards.held_out,
            timeout=rewards.timeout,
            num_classes=subject.num_classes,
            device=ranks.device,
        )
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error).replace("reward.terms", "--rewards")) from None


def _inputs(subject: Subject, rows: range, ranks: Runtime) -> dict[str, Any]:
    """What rewards read beside the images."""
    import torch

    if subject.num_classes is not None:
        return {"labels": torch.tensor(rows, device=ranks.device)}
    return {"prompts": [subject.captions[row] for row in rows]}


def _scores(rewards: RewardSet, images: Any, inputs: Mapping[str, Any], model: str) -> dict[str, Any]:
    """{name: fp32 [B]} of every reward; held-out ones have ``held_out_`` in front."""
    import torch

    with torch.no_grad():
        _, scores = rewards.score(images, inputs, batch=f"images of the {model}")
    held_out = rewards.held_out_scores(images, inputs, batch=f"images of the {model}")
    if error := rewards.first_error():
        raise UserError(str(error))
    return scores | {f"held_out_{name}": values for name, values in held_out.items()}


def _conclude(options: argparse.Namespace, subject: Subject, gallery: Gallery, ranks: Runtime) -> None:
    """Everything that takes all images: the table, and the files for the ADM suite."""
    from dmdr_fast.eval.gallery import markdown

    lines, table = gallery.gather_scores(), dict[str, dict[str, float]]()
    for model, nfe in _evaluations(options, subject).items():
        table[model] = {"images": len(gallery.all_files(model)), **({} if nfe is None else {"NFE": nfe})}
        table[model] |= gallery.means(model, lines) if lines else {}
    if options.real is not None:
        from dmdr_fast.data.images import image_files
        from dmdr_fast.eval.inception import inception_metrics

        with TemporaryDirectory() as cache:
            for model in table:
                files = gallery.all_files(model)
                table[model] |= inception_metrics(
                    files,
                    image_files(options.real),
                    gallery.size(model),
                    weights=options.inception,
                    device=ranks.device,
                    cache=Path(cache),
                )
    if options.npz:
        for model in table:
            print(f"{gallery.write_npz(model)}: {len(gallery.all_files(model))} images for the ADM evaluation suite")
    write_whole(options.out / "metrics.json", f"{json.dumps(table, indent=1)}\n".encode())
    write_whole(options.out / "table.md", markdown(table).encode())
    print(f"{markdown(table)}{options.out}: images, scores.jsonl, table.md, metrics.json", flush=True)


def _evaluations(options: argparse.Namespace, subject: Subject) -> dict[str, int | None]:
    """Network evaluations of an image of each model, where they are known."""
    from dmdr_fast.engine.drawing import pipeline_arguments
    from dmdr_fast.engine.evaluation import teacher_nfe

    if subject.config is None:
        return {"pipeline": pipeline_arguments(options.source).get("num_inference_steps")}
    config = subject.config
    known = {"teacher": teacher_nfe(config, config.eval.teacher_steps), "student": config.student.steps}
    return {model: known[model] for model in subject.models}


def command() -> int:
    """The console script."""
    return run_user_command(main)


if __name__ == "__main__":
    sys.exit(command())
