"""Many plans at once: sharing, activation, batch and GPUs, as a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from dmdr_fast.plan.plan import Plan, make_plan
from dmdr_fast.plan.report import table
from dmdr_fast.plan.workload import GB, Activation, Adapter, Hardware, Sharing, Workload

SHARINGS: tuple[Sharing, ...] = ("separate", "shared_score", "shared_all")  # the last one's generator is the teacher
ACTIVATIONS: tuple[Activation, ...] = ("none", "selective", "full", "offload")


def shared(work: Workload, sharing: Sharing) -> Workload:
    """``work`` with another sharing, with the LoRAs that it needs."""
    lora = work.fake_lora or Adapter(32, work.shape.opened().lora_targets)
    return replace(
        work,
        sharing=sharing,
        fake_lora=None if sharing == "separate" else lora,
        student_lora=(work.student_lora or lora) if sharing == "shared_all" else work.student_lora,
    )


def sweep(
    work: Workload,
    hardware: Hardware,
    *,
    sharings: Sequence[Sharing] = SHARINGS,
    activations: Sequence[Activation] = ACTIVATIONS,
    batches: Sequence[int] = (1, 2, 4, 8),
    gpus: Sequence[int] = (8,),
) -> list[Plan]:
    """A plan for every combination."""
    return [
        make_plan(replace(shared(work, sharing), activation=activation, batch=batch), replace(hardware, gpus=count))
        for sharing, activation, batch, count in product(sharings, activations, batches, gpus)
        if sharing != "shared_all" or work.student is None
    ]


def sweep_table(plans: Sequence[Plan]) -> str:
    """One row per sharing, activation and GPUs; a column per batch with GB, and s per update where it fits."""
    batches = sorted({plan.work.batch for plan in plans})
    rows: dict[tuple, dict[int, Plan]] = {}
    for plan in plans:
        rows.setdefault((plan.work.sharing, plan.work.activation, plan.hardware.gpus), {})[plan.work.batch] = plan
    return table(
        ["sharing", "activation", "GPUs", *(f"batch {batch}" for batch in batches)],
        [[sharing, mode, str(n), *(_cell(row[b]) for b in batches)] for (sharing, mode, n), row in rows.items()],
    )


def _cell(plan: Plan) -> str:
    memory = f"{plan.peak / GB:.0f} GB"
    return f"{memory}, {plan.seconds:.1f} s" if plan.fits else f"({memory})"


def sweep_plot(plans: Sequence[Plan], path: Path) -> None:
    """Peak memory and time per sample against the batch; one panel per number of GPUs and quantity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    counts = sorted({plan.hardware.gpus for plan in plans})
    figure, axes = pyplot.subplots(2, len(counts), figsize=(1.5 + 5 * len(counts), 7.5), squeeze=False, sharex=True)
    styles = dict(zip(ACTIVATIONS, (":", "-.", "-", "--"), strict=True))
    colours = dict(zip(SHARINGS, ("tab:red", "tab:blue", "tab:green"), strict=True))
    for column, count in enumerate(counts):
        memory, time = axes[:, column]
        for sharing, mode in product(SHARINGS, ACTIVATIONS):
            part = [p for p in plans if (p.work.sharing, p.work.activation, p.hardware.gpus) == (sharing, mode, count)]
            if not part:
                continue
            style = {"color": colours[sharing], "linestyle": styles[mode], "label": f"{sharing}, {mode}"}
            memory.plot([p.work.batch for p in part], [p.peak / GB for p in part], marker=".", **style)
            fitting = [p for p in part if p.fits]
            seconds = [1000 * p.seconds / p.samples for p in fitting]
            time.plot([p.work.batch for p in fitting], seconds, marker=".", **style)
        memory.axhline(plans[0].hardware.memory / GB, color="black", linewidth=0.8)
        memory.set(title=f"{plans[0].work.shape.name}, {count} GPUs", yscale="log")
        memory.set_yticks([t for t in (10, 20, 40, 80, 160, 320, 640) if _within(t, memory.get_ylim())])
        time.set(xlabel="micro-batch per GPU", xscale="log", xticks=sorted({p.work.batch for p in plans}))
        time.xaxis.set_minor_locator(NullLocator())
        memory.yaxis.set_minor_formatter(NullFormatter())
        for axis in (memory.yaxis, time.xaxis):
            axis.set_major_formatter(ScalarFormatter())
    axes[0, 0].set(ylabel="peak, GB per GPU (line: the GPU's memory)")
    axes[1, 0].set(ylabel="ms per sample, where it fits (estimate)")
    axes[0, -1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=3.5)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
