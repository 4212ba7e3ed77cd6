"""The rewards of a run: several at once, weighted and normalised, and what happens when one of them fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmdr_fast.engine.running_scale import RunningScale
from dmdr_fast.rewards.base import Reward, check_reward
from dmdr_fast.rewards.registry import build_reward, is_differentiable
from dmdr_fast.rewards.worker import WorkerReward

if TYPE_CHECKING:
    from dmdr_fast.config.rl import RewardTerm


class RewardError(Exception):
    """A reward failed; the message names it and the batch, and says what was expected."""


class RewardSet:
    """total = sum_i weight_i r_i (/ its running standard deviation), beside rewards that are only watched.

    A reward that raises, times out or returns something else than finite scores [B] ends the run, but not in the
    middle of an update, where other ranks wait in a collective: from then on scores are NaN, which skips the update
    on every rank alike, and the first error is kept for :meth:`first_error`.

    Args:
        terms: (reward, weight, normalize) each, normalize being "none" or "running".
        held_out: rewards that never enter the total.
        device: of the images.

    Attributes:
        weights: of ``terms`` in the totals to come; an evaluation's stay those that they were given with.
        differentiable: whether all of ``terms`` are, so that ReFL can use the total.
        failure: the first error on this rank, None until there is one. Says nothing of values that are not finite.
        nonfinite: per reward (held-out ones as ``held_out_NAME``) a 0-d int64 tensor on the device: 0, or the number
            (from 1) of the first call with a NaN or infinite score for a finite image.
    """

    def __init__(
        self,
        terms: Sequence[tuple[Reward, float, str]],
        held_out: Sequence[Reward] = (),
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.terms, self.held_out = list(terms), list(held_out)
        self.weights = [weight for _, weight, _ in terms]
        self.differentiable = all(reward.differentiable for reward, _, _ in self.terms)
        self.failure: RewardError | None = None
        watched = [reward.name for reward, _, _ in self.terms] + [f"held_out_{r.name}" for r in self.held_out]
        self.nonfinite = {name: torch.zeros((), dtype=torch.int64, device=device) for name in watched}
        self._scales = {r.name: RunningScale(device) for r, _, normalize in self.terms if normalize == "running"}
        self._batches: list[str] = []  # what nonfinite's call numbers mean

    def score(self, images: Tensor, inputs: Mapping[str, Any], *, batch: str) -> tuple[Tensor, dict[str, Tensor]]:
        """(total fp32 [B], {name: fp32 [B]} of each term as the reward gave it, detached).

        Args:
            images: [B, C, H, W] in about [-1, 1]; the total is differentiable in them if ``differentiable``.
            inputs: ``labels`` and ``prompts`` of these images, as far as the data has them.
            batch: which batch this is, for the error: "update 12, samples 32 to 39".
        """
        self._batches.append(batch)
        total, values = torch.zeros(len(images), device=images.device), {}
        for (reward, _, _), weight in zip(self.terms, self.weights, strict=True):
            scores = self._scores(reward, reward.name, images, inputs)
            values[reward.name] = scores.detach()
            if scale := self._scales.get(reward.name):
                scale.observe(scores)
                scores = scores * scale.factor()
            total = total + weight * scores
        return total, values

    @torch.no_grad()
    def held_out_scores(self, images: Tensor, inputs: Mapping[str, Any], *, batch: str) -> dict[str, Tensor]:
        """{name: fp32 [B]} of the held-out rewards; arguments as in :meth:`score`."""
        self._batches.append(batch)
        images = images.detach()
        return {r.name: self._scores(r, f"held_out_{r.name}", images, inputs) for r in self.held_out}

    @torch.no_grad()
    def mean_scores(self, images: Tensor, inputs: Mapping[str, Any], *, chunk: int = 1024) -> dict[str, float]:
        """``reward``, the weighted sum of the terms' means as they are, and the mean ``held_out_reward``.

        For an evaluation: no running scale is used or moved. A missing kind is left out. Waits for the device.

        Raises:
            RewardError: one of them failed, or its scores of these images, which are finite, are not.
        """
        found = {}
        for key, rewards in (
            ("reward", [(reward, weight) for reward, weight, _ in self.terms]),
            ("held_out_reward", [(reward, 1.0 / len(self.held_out)) for reward in self.held_out]),
        ):
            if not rewards:
                continue
            found[key] = 0.0
            for reward, weight in rewards:
                found[key] += weight * _mean_score(reward, images, inputs, chunk)
        return found

    def end_update(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Renew the running scales: once per update, on all ranks, e.g. with ``Runtime.sum``."""
        for scale in self._scales.values():
            scale.end_update(sum_over_ranks)

    def first_error(self) -> RewardError | None:
        """``failure``, or else the first score that is not finite, as an error; None where all is well.

        Looks at the device and forgets the batches before: call it when metrics are flushed or an update was skipped.
        """
        if self.failure is not None:
            return self.failure
        flags = list(self.nonfinite)
        calls = torch.stack(list(self.nonfinite.values())).tolist() if flags else []
        bad = [(call, name) for call, name in zip(calls, flags, strict=True) if call]
        if bad:
            call, name = min(bad)
            self.failure = RewardError(
                f"reward {name!r}, {self._batches[call - 1]}: expected finite scores, got NaN or infinity for a finite "
                "image: make the reward return a number for every image, or lower reward.weight if the images have "
                "left its domain"
            )
            return self.failure
        self._batches.clear()
        return None

    def state_dict(self) -> dict[str, list[float]]:
        """The running scales by reward, as JSON keeps them exactly. Waits for the device."""
        return {name: scale.state() for name, scale in self._scales.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on with these scales; a reward that is not among them starts anew."""
        for name, scale in self._scales.items():
            if name in state:
                scale.load(state[name])

    def close(self) -> None:
        """End the worker processes."""
        for reward in (*(reward for reward, _, _ in self.terms), *self.held_out):
            if isinstance(reward, WorkerReward):
                reward.close()

    def _scores(self, reward: Reward, flag: str, images: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """fp32 [B] of one reward; NaN, with a graph where there should be one, after a failure."""
        if self.failure is None:
            try:
                scores = check_reward(reward(images, **inputs), images, reward.name)
                graded = torch.is_grad_enabled() and images.requires_grad
                if reward.differentiable and graded and not scores.requires_grad:
                    raise ValueError(
                        f"reward {reward.name!r}: says that it is differentiable, but its scores have no graph to the "
                        "images: set differentiable = False, or leave out detach(), no_grad() and NumPy"
                    )
            except Exception as error:
                self.failure = RewardError(f"reward {flag!r}, {self._batches[-1]}: {_text(error, reward.name)}")
                self.failure.__cause__ = error
            else:
                bad = ~scores.detach().isfinite()
                self._note_nonfinite(flag, bad & images.detach().flatten(1).isfinite().all(1))
                # A score can be NaN with a gradient that is none: only NaN gradients skip the update on all ranks.
                return scores.float() + torch.where(bad, torch.nan, 0.0) * _sums(images)
        return torch.nan * _sums(images)

    def _note_nonfinite(self, flag: str, bad: Tensor) -> None:
        first = self.nonfinite[flag]
        first += torch.where(bad.any() & (first == 0), len(self._batches), 0)


def _sums(images: Tensor) -> Tensor:
    """fp32 [B], connected to the images: what times NaN makes their gradient NaN."""
    return images.flatten(1).sum(1, dtype=torch.float32)


def _mean_score(reward: Reward, images: Tensor, inputs: Mapping[str, Any], chunk: int) -> float:
    try:
        parts = []
        for i in range(0, len(images), chunk):
            scores = reward(images[i : i + chunk], **{k: v[i : i + chunk] for k, v in inputs.items()})
            parts.append(check_reward(scores, images[i : i + chunk], reward.name))
        mean = torch.cat(parts).double().mean().item()
    except Exception as error:
        raise RewardError(f"reward {reward.name!r}, evaluation: {_text(error, reward.name)}") from error
    if not math.isfinite(mean):
        raise RewardError(
            f"reward {reward.name!r}, evaluation: expected finite scores, got NaN or infinity for finite images"
        )
    return mean


def _text(error: Exception, name: str) -> str:
    """The error without the reward's name in front, which is there already; an unexpected one with its type."""
    text = " ".join(str(error).split()).removeprefix(f"reward {name!r}: ")
    return text if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {text}"


def build_reward_set(
    terms: Sequence[RewardTerm],
    held_out: Sequence[RewardTerm],
    *,
    timeout: float,
    num_classes: int | None,
    device: torch.device,
) -> RewardSet:
    """The rewards of ``reward.terms`` and ``reward.held_out``; score-only ones each in a worker process.

    Raises:
        ValueError, FileNotFoundError: naming the entry and what to change.
    """
    built = {}
    for key, entries in (("reward.terms", terms), ("reward.held_out", held_out)):
        try:
            built[key] = [_build(entry, timeout=timeout, num_classes=num_classes, device=device) for entry in entries]
        except (ValueError, FileNotFoundError) as error:  # its text takes the entry for one of reward.terms
            raise type(error)(str(error).replace("reward.terms", key)) from error
        names = [reward.name for reward in built[key]]
        if repeated := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"{key}: expected a name of its own for each, got {repeated!r} twice: set name of one")
    weighted = [(r, t.weight, t.normalize) for r, t in zip(built["reward.terms"], terms, strict=True)]
    return RewardSet(weighted, built["reward.held_out"], device=device)


def _build(entry: RewardTerm, *, timeout: float, num_classes: int | None, device: torch.device) -> Reward:
    given = (entry.kind, entry.path, entry.name, entry.options)
    if is_differentiable(entry.kind):
        return build_reward(*given, num_classes=num_classes, device=device)
    return WorkerReward(*given, num_classes=num_classes, timeout=timeout)
