"""Put together: bytes per GPU by kind and phase, what fits, and how long an update takes."""

from __future__ import annotations

from dataclasses import dataclass

from dmdr_fast.plan.cost import PhaseCost, costs
from dmdr_fast.plan.reward import reward_cost
from dmdr_fast.plan.trace import update_peaks
from dmdr_fast.plan.workload import Hardware, Workload
from dmdr_fast.plan.zero import backward_buffers, engines, gathered, resident, step_buffers

Bytes = dict[str, float]
KINDS = (
    "parameters", "gradients", "optimizer", "EMA", "buckets", "decoder and reward", "gathered weights", "activations",
    "CUDA graphs", "reserve",
)  # fmt: skip

REPLAYED = ("rollout", "score pass")  # phases whose forwards compute.cuda_graphs replays


@dataclass(frozen=True)
class Plan:
    """The answer. ``phases`` has the bytes on one GPU at the peak of each phase, by kind."""

    work: Workload
    hardware: Hardware
    phases: dict[str, Bytes]
    costs: dict[str, PhaseCost]

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> float:
        """Bytes on one GPU at the largest moment of an update."""
        return sum(self.phases[self.peak_phase].values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the GPU's memory."""
        return self.peak <= self.hardware.memory

    @property
    def seconds(self) -> float:
        """Estimated time of one update."""
        return sum(cost.seconds(self.hardware) for cost in self.costs.values())

    @property
    def samples(self) -> int:
        """Samples of one update over all GPUs."""
        return self.work.batch * self.work.accumulation * self.hardware.gpus


def make_plan(work: Workload, hardware: Hardware) -> Plan:
    """Plan one update of ``work`` on ``hardware``."""
    return Plan(work, hardware, phase_bytes(work, hardware), costs(work, hardware))


def phase_bytes(work: Workload, hardware: Hardware) -> dict[str, Bytes]:
    """Bytes on one GPU at the peak of each phase, by kind."""
    always = resident(work, hardware.gpus) | {"reserve": hardware.reserve}
    if work.reward is not None:
        always["decoder and reward"] = float(reward_cost(work).weights)
    nets = engines(work)
    users = {"rollout": "generator", "fake update": "fake", "score pass": "teacher", "generator update": "generator"}
    found = {}
    for phase, moment in _largest_parts(work).items():
        net = nets.get(users[phase]) or nets.get("fake") or nets["generator"]
        role = phase.removesuffix(" update")
        graded = phase.endswith("update")
        whole = phase == "rollout" and work.keep_gathered and work.zero.stage == 3
        trained = net is not nets.get("teacher")
        extra = {"gathered weights": net.size if whole else gathered(work, net, graded=trained), **moment}
        found[phase] = _sum(always, extra, backward_buffers(work, role, hardware.gpus) if graded else {})
    if work.reward is not None and work.reward.scores:
        found["reward"] = _sum(always, {"activations": float(reward_cost(work).peak)})
    for role in ("fake", "generator"):
        found[f"{role} optimizer step"] = _sum(always, step_buffers(work, role, hardware.gpus))
    if work.cuda_graphs:  # what a forward without grad allocates is the graphs', and stays: one pool for all of them
        pool = max(found[phase]["activations"] for phase in REPLAYED)
        for phase, kinds in found.items():
            kinds |= {"CUDA graphs": pool} | ({"activations": 0.0} if phase in REPLAYED else {})
    return found


def _largest_parts(work: Workload) -> dict[str, Bytes]:
    """The part of the network at which each traced phase peaks."""
    found: dict[str, Bytes] = {}
    for (phase, _), kinds in update_peaks(work).items():
        if phase not in found or sum(kinds.values()) > sum(found[phase].values()):
            found[phase] = {kind: float(size) for kind, size in kinds.items()}
    return found


def _sum(*parts: Bytes) -> Bytes:
    total = dict.fromkeys(KINDS, 0.0)
    for part in parts:
        for kind, size in part.items():
            total[kind] += size
    return total
