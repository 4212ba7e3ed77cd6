"""What a method of reinforcement learning is to the step, the configuration and the planner.

A method is one file here, its options and a subclass of :class:`Method`, named in ``dmdr_fast.algorithm.rl.methods``.
The configuration makes its section ``rl.NAME`` of the options. It reads these files before torch is loaded, so what
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
Regularizer = Literal["dmd", "kl", "none"]


def option(default: Any, description: str, *, above: float | None = None, least: float | None = None) -> Any:
    """A field of a method's options: the default, a line of help, and the bound (exclusive, or inclusive)."""
    bounds = {name: value for name, value in (("gt", above), ("ge", least)) if value is not None}
    return field(default=default, metadata={"description": description, "bounds": bounds})


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has none."""


@dataclass(frozen=True)
class Setting:
    """What a method has to fit: the student's steps, what is beside RL, the teacher's guidance (None: none given)."""

    student_steps: int
    regularizer: Regularizer
    cfg_scale: float | None
    uses_cfg: bool


@dataclass(frozen=True)
class Method:
    """The method ``none``, DMD alone; its subclasses are the others. ``options``: the numbers of ``rl.NAME``."""

    name: ClassVar[str] = "none"
    title: ClassVar[str] = ""  # its name in prose
    Options: ClassVar[type] = NoOptions
    uses_reward: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False  # of the reward; scores alone will not do
    needs_reference: ClassVar[bool] = False  # without a KL too
    needs_rollout: ClassVar[bool] = False  # has a gradient on x0 of a rollout, where DMD needs none too
    kl_on_x0: ClassVar[bool] = True  # the KL to the reference acts on x0, not in the method's own losses
    auto_weight: ClassVar[bool] = False  # has a ``loss_on_x0`` that ``reward.weight: auto`` matches DMD's with

    options: Any = NoOptions()

    @property
    def group_size(self) -> int | None:
        """Samples per condition that are compared, the option of that name; None where samples stand alone."""
        return getattr(self.options, "group_size", None)

    @property
    def rollout_group(self) -> int:
        """Samples per condition in the rollout that the generator update trains on."""
        return 1

    @property
    def inner_epochs(self) -> int:
        """Generator steps on one batch of its own samples."""
        return 1

    def graded_forwards(self, student_steps: int) -> int:
        """Graded generator forwards per micro-batch and update that its losses add."""
        return 0

    def lacks(self, prediction: str) -> str | None:
        """Why networks that predict ``prediction`` will not do, in words; None where they will."""
        return None

    def problems(self, setting: Setting) -> Iterator[str]:
        """A line for each option that does not fit, naming its key and the remedy."""
        if self.group_size is not None and self.group_size < 2:
            yield f"rl.{self.name}.group_size: {self.group_size} leaves nothing to compare; set it to 2 or more"

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
        """Samples of its own with their rewards, by the generator as it is; None where it learns from the rollout's."""
        return None

    def losses(self, update: Update, experience: Experience) -> list[Loss]:
        """The weighted losses of one generator step on what was collected, each one graded forward."""
        return []
