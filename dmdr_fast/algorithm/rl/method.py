"""What a method of reinforcement learning is to the step, the configuration and the planner.

A method is a frozen dataclass in a file of its own, named in ``dmdr_fast.algorithm.rl.methods``; its fields are its
options, of which the configuration makes the section ``rl.NAME``. These files are read before torch is loaded, so what
runs on tensors is imported where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_fast.algorithm.rl.experience import Experience
    from dmdr_fast.algorithm.rollout import Network
    from dmdr_fast.algorithm.simulation import Simulated
    from dmdr_fast.algorithm.update import Update

Metrics = dict[str, "Tensor"]
# A loss of the generator, built when it is called, so that one graph lives at a time.
Loss = Callable[["Network"], tuple["Tensor", Metrics]]
Regularizer = Literal["dmd", "dm", "kl", "none"]


def option(default: Any, description: str, **bounds: float) -> Any:
    """An option of a method: its default, its line of help, and its bounds, gt or ge."""
    return field(default=default, metadata={"description": description, "bounds": bounds})


@dataclass(frozen=True)
class Setting:
    """What a method has to fit: the student's steps, what is beside RL, the teacher's guidance, and its family."""

    student_steps: int
    regularizer: Regularizer
    cfg_scale: float | None
    uses_cfg: bool
    family: str
    prediction: str


@dataclass(frozen=True)
class Method:
    """The method ``none``, DMD alone; its subclasses are the others."""

    name: ClassVar[str] = "none"
    parts: ClassVar[tuple[str, ...]] = ()  # methods that it is made of, each a field of that name
    uses_reward: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False  # of the reward; scores alone will not do
    needs_reference: ClassVar[bool] = False  # without a KL too
    needs_rollout: ClassVar[bool] = False  # has a gradient on x0 of a rollout
    kl_on_x0: ClassVar[bool] = True  # the KL to the reference acts on x0, not in the method's own losses
    auto_weight: ClassVar[bool] = False  # has a ``loss_on_x0`` that ``reward.weight: auto`` matches DMD's with

    @property
    def compared(self) -> int | None:
        """Samples per condition that are compared, its option ``group_size``; None where samples stand alone."""
        return getattr(self, "group_size", None)

    @property
    def rollout_group(self) -> int:
        """Samples per condition in the rollout that the generator update trains on."""
        return 1

    @property
    def generator_steps(self) -> int:
        """Steps of the generator on one batch of the method's own samples."""
        return 1

    def graded_forwards(self, student_steps: int) -> int:
        """Graded generator forwards per micro-batch and update that its losses add."""
        return 0

    @property
    def graded_share(self) -> float:
        """The samples of one of these forwards over those of the micro-batch."""
        return 1.0

    def reference_forwards(self, student_steps: int) -> int:
        """Forwards of the reference per micro-batch and update that its losses add, where there is a reference."""
        return 0

    def plain_forwards(self) -> int:
        """Forwards of the generator without grad per micro-batch and update that its losses add."""
        return 0

    def reward_passes(self) -> int:
        """How often an update scores a micro-batch."""
        return 1

    def problems(self, setting: Setting) -> Iterator[str]:
        """A line for each option that does not fit, naming its key and the remedy."""
        if self.compared is not None and self.compared < 2:
            yield f"rl.{self.name}.group_size: {self.compared} leaves nothing to compare; set it to 2 or more"

    def guidance(self, update: Update, samples: Sequence[Simulated]) -> tuple[Sequence[Tensor | None], Metrics]:
        """A factor fp32 [B] on the teacher's guidance for each micro-batch (None: 1), and metrics."""
        return [None] * len(samples), {}

    def leaf(self, update: Update, sample: Simulated, x0: Tensor) -> tuple[Tensor, Metrics] | None:
        """Its gradient on the leaf x0 [B, ...], unweighted, and metrics; None where it has none."""
        return None

    def loss_on_x0(self, update: Update, sample: Simulated) -> Tensor:
        """The loss whose gradient ``leaf`` is, at the sample's own x0, 0-d."""
        raise NotImplementedError(f"{self.name} has no loss on x0")

    def collect(self, update: Update) -> Experience | None:
        """Samples of its own with their rewards and losses, by the generator as it is; None where it has none."""
        return None
