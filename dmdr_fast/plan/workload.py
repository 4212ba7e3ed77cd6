"""What is planned: one update of a run, and the machine that it runs on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dmdr_fast.plan.shapes import Shape

Sharing = Literal["separate", "shared_score", "shared_all"]
Activation = Literal["none", "selective", "full", "offload"]
GB = 10**9


@dataclass(frozen=True)
class Adapter:
    """A LoRA: its rank and the suffixes of the layers that have it."""

    rank: int
    targets: tuple[str, ...]
    form: Literal["standard", "post_projection"] = "standard"


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed holds state; the defaults are those of its 0.19 JSON. Sizes in elements."""

    stage: Literal[0, 2, 3] = 3
    reduce_bucket: int = 500_000_000
    prefetch: int | None = None  # None: one block, as the trainer sets it
    reuse_distance: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    offload_optimizer: bool = False
    offload_parameters: bool = False
    overlap: bool = True  # two reduce buckets under stage 2
    efficient_linear: bool = True  # stage 3 runs DeepSpeed's own linear layers

    @property
    def own_linear(self) -> bool:
        """Whether a run's linear layers are DeepSpeed's."""
        return self.stage == 3 and self.efficient_linear


@dataclass(frozen=True)
class RewardNet:
    """A reward as the configuration names it; ``options`` are its constructor's other arguments, as JSON."""

    kind: str
    path: str | None = None
    options: str = "{}"
    num_classes: int | None = None


@dataclass(frozen=True)
class RewardPass:
    """Decode ``chunk`` samples at a time and score them; ``graded`` (ReFL) goes back to x0 through both.

    Of the cold start's pass, where it is tilted, and RL's the one that needs more.

    tiling, recompute and dtype are the keys of ``decoder``, checkpoint that of ``rl.refl``. Reward models are fp32
    unless their options say otherwise. ``scores``: an update runs them; a run without RL only holds their weights.
    ``times``: as often for each sample. ``stated``: bytes of rewards that cannot be counted.
    """

    graded: bool = True
    chunk: int = 1
    models: tuple[RewardNet, ...] = (RewardNet("pickscore"),)
    tiling: bool = False
    recompute: bool = False
    checkpoint: bool = False
    dtype: Literal["fp32", "bf16"] = "bf16"
    scores: bool = True
    times: int = 1
    stated: float = 0.0


@dataclass(frozen=True)
class Workload:
    """One DMDR update as the planner sees it. ``batch`` is the micro-batch per GPU; dtype is that of the networks.

    ``shape`` is the teacher's, and the generator's where ``student`` is None; the fake score is always of ``shape``.
    """

    shape: Shape
    student: Shape | None = None  # under `shared_all` there is none
    resolution: int | tuple[int, int] = 1024  # a square's side, or height and width
    batch: int = 1
    accumulation: int = 1
    sharing: Sharing = "shared_score"
    activation: Activation = "full"
    blocks: Literal["eager", "fused", "compiled"] = "compiled"
    cuda_graphs: bool = False
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    frozen: Literal["native", "int8", "float8"] = "native"
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    student_lora: Adapter | None = None  # None: the generator trains all its weights
    fake_lora: Adapter | None = None  # None only under `separate`: the fake score trains all its weights
    student_steps: int = 4
    fake_updates: int = 5
    rollout_reuse: int = 1  # fake updates that share a rollout
    stop_step_per_rank: bool = False  # ranks draw their own stop steps, and wait for the longest rollout
    same_step: bool = False  # student.rollout: one forward more, x0 is renoised to its own time
    cfg: bool = True
    decoupled: bool = False  # dmd.decoupled: four score rows
    ema: bool = True
    keep_gathered: bool = False
    reward: RewardPass | None = field(default_factory=RewardPass)
    epochs: int = 1  # steps of the generator with a DMD gradient each
    policy_steps: int = 0  # graded generator forwards that the method's own losses add to an update
    plain_steps: int = 0  # and without grad
    policy_share: float = 1.0  # the samples of one of them over the micro-batch
    reference: Literal[None, "lora_off", "frozen"] = None  # what a KL or DPO holds the generator to
    reference_steps: int = 0  # its forwards in the method's own losses
    kl_on_x0: int = 0  # 1: one more, for a KL on x0
    zero: Zero = Zero()

    def shape_of(self, role: str) -> Shape:
        """The shape of the network that plays a role, or runs in a phase named after it ("generator update")."""
        generates = role.partition(" ")[0] in ("generator", "rollout", "policy")
        return self.student or self.shape if generates else self.shape


@dataclass(frozen=True)
class Hardware:
    """The machine. Rates in bytes/s and FLOP/s per GPU; one node has ``node`` GPUs that see each other at ``nvlink``.

    The defaults are an H100 SXM: 989 TFLOP/s of dense bf16, of which ``utilisation`` is reached by matrix products and
    ``convolutions`` by convolutions (assumed, not measured: a decoder's have few channels for their size); NVLink 450
    GB/s in each direction, 400 Gb/s InfiniBand per GPU. ``reserve`` is what no tensor holds: CUDA context, cuBLAS and
    NCCL workspaces.
    """

    gpus: int = 8
    memory: float = 80 * GB
    flops: float = 989e12
    utilisation: float = 0.4
    convolutions: float = 0.2
    network: float = 50 * GB
    latency: float = 10e-6
    node: int = 8
    nvlink: float = 450 * GB
    host: float = 25 * GB
    hbm: float = 3350 * GB
    reserve: float = 2.5 * GB

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a collective over all GPUs: inside one node NVLink's, else the network's."""
        return self.nvlink if self.gpus <= self.node else min(self.network, self.nvlink)
