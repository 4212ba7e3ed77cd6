"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from dmdr_fast.plan.plan import KINDS, Plan
from dmdr_fast.plan.reward import reward_cost
from dmdr_fast.plan.workload import GB, Workload
from dmdr_fast.plan.zero import engines, trained_by


def described(work: Workload) -> str:
    """The workload in a line."""
    size = work.resolution if isinstance(work.resolution, int) else " x ".join(map(str, work.resolution))
    total = sum(engine.weights for engine in engines(work).values())
    generator = f"LoRA {work.student_lora.rank}" if work.student_lora else "all weights"
    own = "" if work.student is None else f" to {work.student.name}"
    rl = "no reward"
    if work.reward is not None and work.reward.models:
        rl = f"reward {' + '.join(net.kind for net in work.reward.models)}"
    guidance = "decoupled CFG" if work.decoupled else "CFG" if work.cfg else "no CFG"
    return (
        f"{work.shape.name}{own} at {size} px, sharing {work.sharing}, generator trains {generator} "
        f"({trained_by(work, 'generator') / 1e9:.2f}B of {total / 1e9:.2f}B stored), activation {work.activation}, "
        f"{work.blocks} blocks{', CUDA graphs' * work.cuda_graphs}, {work.dtype}, ZeRO-{work.zero.stage}, "
        f"N={work.student_steps}, R={work.fake_updates}, {guidance}, {rl}"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(header, widths, strict=True)) + " |"]
    lines.append("|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|")
    for row in rows:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(plan: Plan) -> str:
    """GB per GPU at the peak of every phase, by kind."""
    kinds = [kind for kind in KINDS if any(phase[kind] for phase in plan.phases.values())]
    rows = []
    for phase, sizes in plan.phases.items():
        total = sum(sizes.values()) / GB
        mark = " (peak)" if phase == plan.peak_phase else ""
        rows.append([phase + mark, *(f"{sizes[kind] / GB:.2f}" for kind in kinds), f"{total:.1f}"])
    return table(["GB per GPU", *kinds, "total"], rows)


def cost_table(plan: Plan) -> str:
    """F-units, FLOPs, bytes received and estimated time of every phase."""
    rows = []
    for phase, cost in plan.costs.items():
        numbers = [f"{cost.units:g}", f"{cost.flops / 1e12:.0f}", f"{cost.collectives:.0f}"]
        numbers += [f"{cost.received / GB:.1f}", f"{cost.host / GB:.1f}"]
        rows.append([phase, *numbers, f"{cost.seconds(plan.hardware):.2f}"])
    names = ("units", "flops", "collectives", "received", "host")
    units, flops, count, received, host = (sum(getattr(c, name) for c in plan.costs.values()) for name in names)
    sums = [f"{units:g}", f"{flops / 1e12:.0f}", f"{count:.0f}", f"{received / GB:.1f}", f"{host / GB:.1f}"]
    rows.append(["one update", *sums, f"{plan.seconds:.2f}"])
    return table(["per GPU", "F-units", "TFLOP", "collectives", "GB received", "GB to and from the host", "s"], rows)


def lines(plan: Plan) -> Iterator[str]:
    """The answer: what was planned, memory, cost, and whether it fits."""
    h = plan.hardware
    yield described(plan.work)
    yield ""
    yield memory_table(plan)
    yield ""
    yield cost_table(plan)
    yield ""
    node = f"{h.bandwidth / GB:.0f} GB/s per GPU"
    yield (
        f"{h.gpus} GPUs of {h.memory / GB:g} GB, {h.flops * h.utilisation / 1e12:.0f} TFLOP/s reached (by "
        f"convolutions {h.flops * h.convolutions / 1e12:.0f}, half of it in fp32: assumed, not measured), {node}, "
        f"{h.latency * 1e6:g} us: {plan.seconds:.2f} s per update of {plan.samples} samples"
    )
    if plan.work.reward is not None:
        yield from reward_cost(plan.work).notes
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield f"{verdict}: {plan.peak / GB:.1f} of {h.memory / GB:g} GB at the peak ({plan.peak_phase})"
