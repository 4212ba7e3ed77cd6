"""What the trainer asks of a reward."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Reward(Protocol):
    """A score per image, higher is better. ``differentiable`` ones serve every method, others those that compare.

    One of your own is a class in a file of your own, named in the configuration as ``path/file.py:Brightness``::

        class Brightness:
            name = "brightness"
            differentiable = True

            def __call__(self, images, *, labels=None, prompts=None):
                return images.flatten(1).mean(1)

    ``options`` and ``path`` of its entry go to its constructor. An ``nn.Module`` is moved to the run's device. One
    that is not differentiable runs in a process of its own, without gradient, on CPU tensors, within
    ``reward.timeout`` seconds a batch. Scores must depend on each image alone, not on the batch that it comes in.
    """

    name: str
    differentiable: bool

    def __call__(self, images: Tensor, *, labels: Tensor | None = None, prompts: list[str] | None = None) -> Tensor:
        """Scores [B] on the images' device; images [B, C, H, W] in [-1, 1], labels int64 [B], B prompts."""
        ...


def check_reward(values: Tensor, images: Tensor, name: str) -> Tensor:
    """``values`` as they are, if they are scores of ``images``: floating point, [B], on the same device.

    Raises:
        ValueError: saying what came. The values themselves are not read: that would wait for the device.
    """
    if not isinstance(values, Tensor):
        raise ValueError(f"reward {name!r}: expected a tensor [{len(images)}], got {type(values).__name__}")
    if values.shape != images.shape[:1] or not values.is_floating_point() or values.device != images.device:
        raise ValueError(
            f"reward {name!r}: expected one score per image, floating point [{len(images)}] on "
            f"{images.device}, got {values.dtype} {list(values.shape)} on {values.device}: "
            "return such a tensor from __call__"
        )
    return values


def check_prompts(prompts: list[str] | None, images: Tensor, name: str) -> list[str]:
    """``prompts``, if there is one for each image.

    Raises:
        ValueError: there are none, or another number.
    """
    if prompts is None or len(prompts) != len(images):
        got = "none" if prompts is None else str(len(prompts))
        raise ValueError(
            f"reward {name!r}: expected one prompt per image, {len(images)}, got {got}: it needs a model that is "
            "trained on prompts"
        )
    return list(prompts)
