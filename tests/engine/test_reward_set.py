"""Several rewards at once: weights, running scales, held-out ones, and one error for whatever goes wrong."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dmdr_fast.engine.evaluation import Evaluator
from dmdr_fast.engine.rewards import RewardError, RewardSet, build_reward_set
from dmdr_fast.engine.running_scale import DECAY, EPS, RunningScale
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.eval.metrics import MEASURED

OWN = str(Path(__file__).parents[1] / "rewards" / "own_rewards.py")
DIFFERENTIABLE = {"mean": lambda x: x.flatten(1).mean(1), "square": lambda x: (x.flatten(1) ** 2).mean(1)}


class Given:
    """A reward that is whatever function it is given."""

    def __init__(self, name, score, differentiable=True):
        self.name, self.score, self.differentiable = name, score, differentiable

    def __call__(self, images, *, labels=None, prompts=None):
        return self.score(images)


@dataclass
class Entry:
    """A config entry, as reward.terms has them."""

    kind: str
    path: str | None = None
    name: str | None = None
    weight: float = 1.0
    normalize: str = "none"
    options: dict[str, Any] = field(default_factory=dict)


def images(seed, count=4):
    return torch.randn(count, 1, 3, 3, generator=torch.Generator().manual_seed(seed))


def reward_set(*terms, held_out=()):
    return RewardSet([(Given(n, DIFFERENTIABLE[n]), w, normalize) for n, w, normalize in terms], held_out)


def test_the_total_is_the_weighted_sum_and_differentiable():
    rewards = reward_set(("mean", 2.0, "none"), ("square", -0.5, "none"))
    x = images(0).requires_grad_()
    total, values = rewards.score(x, {}, batch="")
    exact = x.detach().double()
    want = 2 * exact.mean((1, 2, 3)) - 0.5 * (exact**2).mean((1, 2, 3))
    torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values["square"].double(), (exact**2).mean((1, 2, 3)), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(total.sum(), x)
    torch.testing.assert_close(gradient.double(), (2 - exact) / 9, rtol=1e-6, atol=1e-6)
    assert rewards.differentiable and total.dtype == torch.float32 and not values["mean"].requires_grad
    assert rewards.first_error() is None
    assert not RewardSet([(Given("a", torch.mean, differentiable=False), 1.0, "none")]).differentiable


def test_other_weights_are_those_of_the_update_and_not_of_an_evaluation():
    rewards, x = reward_set(("mean", 2.0, "none"), ("square", 1.0, "none")), images(0)
    before = rewards.mean_scores(x, {})
    rewards.weights = [0.0, 3.0]
    torch.testing.assert_close(rewards.score(x, {}, batch="")[0], 3 * (x**2).mean((1, 2, 3)))
    assert rewards.mean_scores(x, {}) == before == {"reward": pytest.approx((2 * x + x**2).mean().item())}


def spread(batches):
    """The running standard deviation after these batches of scores, by its definition, in fp64."""
    weights = torch.tensor([DECAY ** (len(batches) - 1 - k) for k in range(len(batches))], dtype=torch.float64)
    mean = torch.stack([b.double().mean() for b in batches])
    square = torch.stack([(b.double() ** 2).mean() for b in batches])
    return ((weights * square).sum() / weights.sum() - ((weights * mean).sum() / weights.sum()) ** 2).sqrt()


def test_a_running_scale_divides_by_the_spread_of_the_global_batch():
    ranks = [reward_set(("mean", 3.0, "running")) for _ in range(2)]
    seen = []
    for update in range(4):
        x = [5 + 0.1 * images(10 * update + r, count=6) for r in range(2)]
        factor = 1 / (spread(seen) + EPS) if seen else 0.0  # nothing is known in the first update
        for rank, part in zip(ranks, x, strict=True):
            for chunk in part.split(4):
                total, values = rank.score(chunk, {}, batch="")
                torch.testing.assert_close(total.double(), 3 * factor * values["mean"].double(), rtol=1e-5, atol=1e-5)
        seen.append(torch.cat([part.flatten(1).mean(1) for part in x]))
        pending = [rank._scales["mean"]._pending.clone() for rank in ranks]
        for rank in ranks:
            rank.end_update(lambda _, both=pending: both[0] + both[1])
    assert ranks[0].state_dict() == ranks[1].state_dict()


def test_scales_survive_json_to_the_bit_and_ignore_updates_without_scores():
    first = reward_set(("mean", 1.0, "running"), ("square", 1.0, "none"))
    first.score(images(1), {}, batch="")
    first.end_update(lambda x: x)
    state = first.state_dict()
    first.end_update(lambda x: x)
    assert first.state_dict() == state and list(state) == ["mean"]
    again = reward_set(("mean", 1.0, "running"), ("square", 1.0, "running"))
    again.load_state_dict(json.loads(json.dumps(state)))
    assert torch.equal(again._scales["mean"].factor(), first._scales["mean"].factor())
    assert again._scales["square"].factor() == 0


@pytest.mark.parametrize("alike", [[[0.3]], [[0.1] * 3, [0.1] * 3], [[1234.7] * 7] * 5])
def test_a_scale_has_no_effect_before_two_scores_have_differed(alike):
    """Updates of one sample, or of rewards that are all alike, large ones too, say nothing about a spread."""
    scale = RunningScale("cpu")
    for scores in alike:
        scale.observe(torch.tensor(scores))
        scale.end_update(lambda x: x)
        assert scale.factor() == 0
    scale.observe(torch.tensor([0.7]))
    scale.end_update(lambda x: x)
    want = 1 / (spread([torch.tensor(scores) for scores in [*alike, [0.7]]]) + EPS)
    torch.testing.assert_close(scale.factor().double(), want, rtol=1e-6, atol=0)


def test_values_that_are_not_finite_stay_out_of_the_scale():
    scale = RunningScale("cpu")
    scale.observe(torch.tensor([1.0, torch.nan, 3.0, torch.inf]))
    scale.end_update(lambda x: x)
    torch.testing.assert_close(scale.factor().double(), torch.tensor(1 / (1 + EPS)).double(), rtol=1e-6, atol=0)


def test_held_out_rewards_are_reported_and_never_optimised():
    rewards = reward_set(("mean", 1.0, "none"), held_out=[Given("square", DIFFERENTIABLE["square"])])
    x = images(2).requires_grad_()
    total, values = rewards.score(x, {}, batch="")
    held = rewards.held_out_scores(x, {}, batch="")
    assert list(values) == ["mean"] and torch.equal(total, values["mean"])
    torch.testing.assert_close(held["square"], (x.detach() ** 2).mean((1, 2, 3)))
    assert not held["square"].requires_grad


def raises(x):
    raise KeyError("no such tower")


FAULTS = {
    "raises": (raises, r"KeyError: 'no such tower'"),
    "shape": (lambda x: x.mean(), r"expected one score per image, floating point \[4\] on cpu, got .* \[\]"),
    "dtype": (lambda x: torch.zeros(4, dtype=torch.int64), r"got torch.int64"),
    "device": (lambda x: torch.zeros(4, device="meta"), r"on meta"),
    "type": (lambda x: 1.0, r"expected a tensor \[4\], got float"),
    "graph": (lambda x: x.detach().flatten(1).mean(1), r"its scores have no graph.*set differentiable = False"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_kept_once_and_makes_the_scores_nan(fault):
    score, said = FAULTS[fault]
    faulty = Given("faulty", score)
    rewards = RewardSet([(Given("mean", DIFFERENTIABLE["mean"]), 1.0, "none"), (faulty, 1.0, "running")])
    x = images(3).requires_grad_()
    total, values = rewards.score(x, {}, batch="update 7, samples 0 to 3")
    error = rewards.failure
    assert isinstance(error, RewardError) and isinstance(error.__cause__, Exception)
    with pytest.raises(RewardError, match=rf"^reward 'faulty', update 7, samples 0 to 3: .*{said}"):
        raise error
    assert str(error).count("'faulty'") == 1
    (gradient,) = torch.autograd.grad(total.sum(), x)
    assert total.isnan().all() and gradient.isnan().all() and values["mean"].isfinite().all()
    total, values = rewards.score(x.detach(), {}, batch="update 8, samples 0 to 3")
    assert total.isnan().all() and values["mean"].isnan().all() and total.shape == (4,)
    assert rewards.failure is error and rewards.first_error() is error


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_flagged_with_their_batch(odd):
    def score(x):
        return torch.where(x.flatten(1).mean(1) > 0.9, odd, 1.0)

    rewards = RewardSet([(Given("ok", DIFFERENTIABLE["mean"]), 1.0, "none"), (Given("odd", score, False), 1.0, "none")])
    ones, zeros = torch.ones(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)
    rewards.score(ones * torch.nan, {}, batch="update 0")  # the image's fault, not the reward's
    assert rewards.first_error() is None
    for update, x in ((1, zeros), (2, ones), (3, ones)):
        rewards.score(x, {}, batch=f"update {update}")
        assert rewards.failure is None  # nobody has looked at the device
    assert {n: int(flag) for n, flag in rewards.nonfinite.items()} == {"ok": 0, "odd": 2}
    error = rewards.first_error()
    assert str(error).startswith("reward 'odd', update 2: expected finite scores, got NaN or infinity")
    assert rewards.score(zeros, {}, batch="update 4")[0].isnan().all()


def test_an_odd_score_makes_its_image_s_gradient_nan_and_no_other_s():
    def score(x):
        mean = x.flatten(1).mean(1)
        return torch.where(mean > 0.9, torch.inf, mean)  # constant where it is odd: its own gradient is 0

    x = torch.stack([torch.zeros(1, 3, 3), torch.ones(1, 3, 3)]).requires_grad_()
    total, _ = RewardSet([(Given("odd", score), 2.0, "none")]).score(x, {}, batch="")
    (gradient,) = torch.autograd.grad(total.sum(), x)
    torch.testing.assert_close(gradient[0], torch.full((1, 3, 3), 2 / 9))
    assert gradient[1].isnan().all() and total[1].isnan()


def test_a_set_from_the_configuration_runs_score_only_rewards_in_workers():
    rewards = build_reward_set(
        [Entry(f"{OWN}:Brightness", weight=0.5, options={"scale": 2.0}), Entry(f"{OWN}:Fails", name="hangs")],
        [Entry(f"{OWN}:Brightness", name="watched")],
        timeout=60.0,
        num_classes=10,
        device=torch.device("cpu"),
    )
    x = images(4)
    assert not rewards.differentiable and list(rewards.nonfinite) == ["brightness", "hangs", "held_out_watched"]
    total, values = rewards.score(x, {"labels": torch.full((4,), 9)}, batch="update 1")
    torch.testing.assert_close(total, x.mean((1, 2, 3)) + values["hangs"])
    torch.testing.assert_close(rewards.held_out_scores(x, {}, batch="update 1")["watched"], x.mean((1, 2, 3)))
    rewards.terms[1][0].timeout = 0.5
    total, _ = rewards.score(x, {"labels": torch.full((4,), 1)}, batch="update 2")
    assert total.isnan().all()
    assert str(rewards.failure).startswith("reward 'hangs', update 2: a batch of 4 took longer than 0.5 s")
    rewards.close()


@pytest.mark.parametrize("place", ["reward.terms", "reward.held_out"])
def test_two_rewards_of_one_name_are_refused(place):
    twice = [Entry(f"{OWN}:Brightness"), Entry(f"{OWN}:Brightness")]
    given = {"reward.terms": (twice, []), "reward.held_out": ([], twice)}[place]
    with pytest.raises(ValueError, match=rf"{place}: expected a name of its own for each, got 'brightness' twice"):
        build_reward_set(*given, timeout=1.0, num_classes=None, device=torch.device("cpu"))


def test_what_fails_in_an_evaluation_is_named():
    mean = Given("mean", lambda x: x.flatten(1).mean(1))

    def broken(x):
        raise KeyError("tower")

    for odd, words in (
        (broken, "reward 'odd', evaluation: KeyError: 'tower'"),
        (lambda x: x.mean((1, 2)), "reward 'odd', evaluation: expected one score per image, floating point [2]"),
        (lambda x: x.flatten(1).mean(1) * torch.nan, "reward 'odd', evaluation: expected finite scores, got NaN"),
    ):
        rewards = RewardSet([(mean, 1.0, "none")], [Given("odd", odd)])
        with pytest.raises(RewardError) as raised:
            rewards.mean_scores(images(1), {}, chunk=2)
        assert str(raised.value).startswith(words), raised.value


def test_of_images_that_are_no_numbers_an_evaluation_measures_nothing(capsys):
    drawn, alone = images(1), Runtime(0, 1, torch.device("cpu"), None)
    drawn[2, 0, 0, 0] = torch.nan
    evaluator = Evaluator(None, alone, None, None, None, RewardSet([]), None, None)
    row = evaluator._measure(drawn, 4)
    assert row == dict.fromkeys(MEASURED) | {"nfe": 4.0}
    assert "evaluation: 1 of 4 images are not finite; nothing is measured" in capsys.readouterr().out
