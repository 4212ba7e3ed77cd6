"""``dmdr-plan --config FILE --gpus 8 --gpu-memory 80``: will it fit, what does it cost, what to change.

Needs no GPU and no weights. Keys of the configuration may follow, as for training: ``--train.micro_batch_size 4``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dmdr_fast.cli import parse, run_user_command, user_path
from dmdr_fast.errors import UserError

MOST_GPUS = 1024
# Options that are numbers, from what they make sense to what no machine has.
BOUNDS = {
    "gpu_memory": (0.1, 1e5),
    "flops": (0.1, 1e6),
    "utilisation": (1e-3, 1.0),
    "convolutions": (1e-3, 1.0),
    "network": (1e-3, 1e5),
    "nvlink": (1e-3, 1e5),
    "latency": (0.0, 1e6),
    "gpus_per_node": (1, 1024),
    "reserve": (0.0, 1e4),
    "reward_gb": (0.0, 1e4),
    "resolution": (1, 2**15),
    "batch": (1, 2**15),
    "student_lora": (1, 2**15),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"plan: {message}")


def build_parser() -> argparse.ArgumentParser:
    """The options that are the planner's own."""
    parser = _Parser(prog="dmdr-plan", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--config", help="The run's YAML file, or the name of a recipe.")
    add("--model", help="A published shape, hub id or diffusers folder in place of the configuration's teacher.")
    add("--gpus", type=int, nargs="+", default=[8], help="GPUs; several for --sweep (default 8).")
    add("--gpu-memory", type=float, default=80.0, metavar="GB", help="Memory of one GPU, 10^9 bytes (default 80).")
    add("--network", type=float, default=50.0, metavar="GB/s", help="Between nodes, per GPU and direction (50).")
    add("--nvlink", type=float, default=450.0, metavar="GB/s", help="Inside a node, per GPU and direction (450).")
    add("--latency", type=float, default=10.0, metavar="US", help="One hop of a collective, microseconds (10).")
    add("--gpus-per-node", type=int, default=8, help="GPUs that NVLink joins (8).")
    add("--flops", type=float, default=989.0, metavar="TFLOP/s", help="Dense bf16 peak of one GPU (989, an H100).")
    add("--utilisation", type=float, default=0.4, help="Share of --flops that is reached (0.4).")
    add("--convolutions", type=float, default=0.2, help="Share of --flops that convolutions reach (0.2, assumed).")
    add("--reward-gb", type=float, default=0.0, metavar="GB", help="Of rewards that cannot be counted: weights, graph.")
    add("--reserve", type=float, default=2.5, metavar="GB", help="CUDA context, cuBLAS and NCCL workspaces (2.5).")
    own = parser.add_argument_group("in place of the configuration's keys")
    own.add_argument("--sharing", choices=["separate", "shared_score", "shared_all"])
    own.add_argument("--activation", choices=["none", "selective", "full", "offload"])
    own.add_argument(
        "--resolution", type=int, nargs="+", metavar="PIXELS", help="A square's side, or height and width."
    )
    own.add_argument("--batch", type=int, nargs="+", help="Micro-batch per GPU; several for --sweep.")
    own.add_argument("--student-lora", type=int, metavar="RANK", help="The generator as a LoRA of this rank.")
    add("--sweep", action="store_true", help="Sharing x activation x --batch x --gpus as a table.")
    add("--plot", type=user_path, metavar="PNG", help="Draw the sweep.")
    return parser


def main(argv: list[str]) -> int:
    """Print the plan. 0 where it fits (or for a sweep), 1 where it does not."""
    options, rest = build_parser().parse_known_args(argv)
    if not all(1 <= count <= MOST_GPUS for count in options.gpus):
        raise UserError(f"--gpus: expected 1 to {MOST_GPUS}, got {' '.join(map(str, options.gpus))}")
    for name, (least, most) in BOUNDS.items():
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [least if given is None else given]:
            if not least <= value <= most:
                raise UserError(f"--{name.replace('_', '-')}: expected {least:g} to {most:g}, got {value:g}")
    work, config = _workload(options, rest)
    _check_resolution(work)
    try:
        return _answer(work, config, options)
    except UserError:
        raise
    except Exception as error:  # of a folder whose JSON can be built and not run: diffusers checks no value
        from dmdr_fast.plan.shapes import published

        shape = work.shape
        if not shape.folder or any(shape.transformer == known.transformer for known in published()):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{shape.name}: its config.json files describe no networks that run ({reason})") from error


def _answer(work: Any, config: Any, options: argparse.Namespace) -> int:
    """The plan or the sweep that the options ask for, printed; the exit code."""
    if options.sweep:
        _sweep(work, options)
        return 0
    if len(options.gpus) > 1 or len(options.batch or ()) > 1:
        raise UserError("--gpus, --batch: several values are for --sweep; give one, or add --sweep")
    return _plan(work, config, options)


def _workload(options: argparse.Namespace, rest: list[str]) -> tuple[Any, Any]:
    """What is planned, and the configuration where there is one."""
    config = parse(["--config", options.config, *rest])[0] if options.config else None
    if config is None and rest:
        raise UserError(f"{rest[0]}: a key of the configuration needs --config FILE")
    if config is None and options.model is None:
        raise UserError("--config: missing; name the run's YAML file, or a shape with --model")
    from dmdr_fast.plan.from_config import workload  # torch and diffusers, seconds
    from dmdr_fast.plan.shapes import find_shape
    from dmdr_fast.plan.sweep import shared
    from dmdr_fast.plan.workload import GB, Adapter, Workload

    shape = None if options.model is None else find_shape(options.model)
    if config is None:
        assert shape is not None
        work = Workload(shape)
    else:
        work = workload(config, shape)
    if options.resolution is not None:
        size = options.resolution
        if len(size) > 2:
            raise UserError(f"--resolution: expected a side, or height and width, got {' '.join(map(str, size))}")
        work = replace(work, resolution=size[0] if len(size) == 1 else (size[0], size[1]))
    if options.activation is not None:
        work = replace(work, activation=options.activation)
    if options.batch is not None:
        work = replace(work, batch=options.batch[0])
    if options.student_lora is not None:
        work = replace(
            work, student_lora=Adapter(options.student_lora, work.shape_of("generator").opened().lora_targets)
        )
    if options.reward_gb and work.reward is not None:  # decoder and rewards are in every plan
        work = replace(work, reward=replace(work.reward, stated=options.reward_gb * GB))
    if options.sharing == "shared_all" and work.student is not None:
        raise UserError(f"--sharing: shared_all has one network, and the generator is a {work.student.name}")
    return shared(work, options.sharing or work.sharing), config


def _check_resolution(work: Any) -> None:
    size = work.resolution
    try:
        work.shape.opened().latent_shape(*(size, size) if isinstance(size, int) else size)
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise UserError(f"--resolution: {error}; give another one") from None


def _hardware(options: argparse.Namespace) -> Any:
    from dmdr_fast.plan.workload import GB, Hardware

    return Hardware(
        gpus=options.gpus[0],
        memory=options.gpu_memory * GB,
        flops=options.flops * 1e12,
        utilisation=options.utilisation,
        convolutions=options.convolutions,
        network=options.network * GB,
        latency=options.latency * 1e-6,
        node=options.gpus_per_node,
        nvlink=options.nvlink * GB,
        reserve=options.reserve * GB,
    )


def _plan(work: Any, config: Any, options: argparse.Namespace) -> int:
    from dmdr_fast.plan import disk
    from dmdr_fast.plan.advice import cheapest_change
    from dmdr_fast.plan.plan import make_plan
    from dmdr_fast.plan.report import lines
    from dmdr_fast.plan.workload import GB

    plan = make_plan(work, _hardware(options))
    print("\n".join(lines(plan)))
    if config is not None and config.phases:
        print("phases: an update with the largest micro-batch, batch and R and the guidance that any of them has")
    if config is not None:
        print("\n".join(disk.lines(disk.disk(config, work))))
    if plan.fits:
        return 0
    found = cheapest_change(plan)
    if found is None:
        print("no three of the changes together make it fit: more GPUs, a smaller model or a lower resolution would")
    else:
        keys, better = found
        print(
            f"the cheapest change: {'; '.join(keys)} -> {better.peak / GB:.1f} GB, "
            f"{better.seconds:.2f} s per update of {better.samples} samples"
        )
    return 1


def _sweep(work: Any, options: argparse.Namespace) -> None:
    from dmdr_fast.plan.report import described
    from dmdr_fast.plan.sweep import sweep, sweep_plot, sweep_table

    batches: Sequence[int] = options.batch or (1, 2, 4, 8)
    plans = sweep(work, _hardware(options), batches=batches, gpus=options.gpus)
    print(described(work))
    print(f"GB at the peak of one GPU and s per update; in brackets what is more than {options.gpu_memory:g} GB")
    print()
    print(sweep_table(plans))
    if options.plot is not None:
        sweep_plot(plans, options.plot)
        print(f"\n{options.plot}")


def command() -> int:
    """The console script."""
    return run_user_command(main)


if __name__ == "__main__":
    sys.exit(command())
