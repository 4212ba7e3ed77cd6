"""Few blocks traced and the rest extrapolated against the whole network traced."""

from dataclasses import replace

import pytest
import torch

from dmdr_fast.algorithm.dmd import DMDOptions
from dmdr_fast.algorithm.rl.grpo import GRPO
from dmdr_fast.algorithm.rl.hybrid import Hybrid
from dmdr_fast.algorithm.step import dmdr_update
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.plan.cost import forward_flops, units
from dmdr_fast.plan.trace import traced_peaks, update_peaks
from dmdr_fast.plan.workload import Adapter, Zero
from tests.algorithm.networks import networks, recipe, reward_model, update

from .measured import workload


def phases(peaks):
    found = {}
    for (phase, _), kinds in peaks.items():
        found[phase] = max(found.get(phase, 0), sum(kinds.values()))
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("activation", ["selective", "full"])
def test_extrapolated_peaks_are_those_of_the_whole_network(activation):
    work = workload("flux", activation=activation, zero=Zero(stage=2))
    work = replace(work, shape=work.shape.with_depths((3, 5)), fake_lora=Adapter(4, work.shape.opened().lora_targets))
    assert phases(update_peaks(work)) == pytest.approx(phases(traced_peaks(work)), rel=1e-3)


@pytest.mark.thorough
def test_offloaded_inputs_are_not_counted():
    """`offload` keeps no block's input on the GPU: what is left does not grow with the depth."""
    work = workload("flux", activation="offload", zero=Zero(stage=2), fake_lora=None, sharing="separate")
    shallow, deep = (phases(update_peaks(replace(work, shape=work.shape.with_depths((2, n))))) for n in (3, 30))
    assert deep["generator update"] == pytest.approx(shallow["generator update"], rel=1e-3)
    full = phases(update_peaks(replace(work, activation="full", shape=work.shape.with_depths((2, 30)))))
    assert full["generator update"] > 1.2 * deep["generator update"]


METHODS = [
    (Hybrid(grpo=GRPO(group_size=2, inner_epochs=3)), "backward_simulation"),
    (GRPO(group_size=2, inner_epochs=3), "same_step"),
    (GRPO(group_size=2), "backward_simulation"),
]


@pytest.mark.parametrize(("method", "variant"), METHODS)
def test_f_units_are_the_forwards_of_an_update_in_epochs(method, variant, monkeypatch):
    """Counted on an update itself; a backward pass of all weights is two. Rollouts stop at 0, then at 1 of 2 steps."""
    monkeypatch.setattr(Streams, "stop_step", lambda self, steps, step, r: r)
    nets, *modules = networks(torch.float32)
    counted, scored = [], []

    def count(module, given, out):
        counted.append(len(out) * (3 if out.requires_grad else 1))

    for module in modules:
        module.register_forward_hook(count)
    model = reward_model(lambda x0: x0, lambda images, labels: scored.append(len(images)) or images.flatten(1).sum(1))
    plan = recipe(2, dmd=DMDOptions(cfg_scale=4.0), method=method, reward_weight=0.1, rollout_variant=variant)
    dmdr_update(update(nets, plan, Streams(0), [Shard(0, 4, 4)], reward=model))
    work = workload("flux", sharing="separate", fake_lora=None, activation="none", cfg=True, student_steps=2)
    work = replace(
        work,
        fake_updates=2,
        same_step=variant == "same_step",
        epochs=method.generator_steps,
        policy_steps=method.graded_forwards(2),
        plain_steps=method.plain_forwards(),
    )
    assert sum(units(work).values()) == sum(counted) / 4
    assert method.reward_passes() == sum(scored) / 4


def test_f_units_and_flops():
    """20 for the reference's N=1 without CFG, 28.5 for N=4 with it; FLOPs are linear in depth and in the batch."""
    lora = Adapter(4, ("to_q",))
    one = workload("flux", fake_lora=lora, activation="none", student_steps=1, fake_updates=5, cfg=False)
    assert sum(units(one).values()) == 20
    assert sum(units(replace(one, student_steps=4, cfg=True)).values()) == 28.5
    assert sum(units(replace(one, activation="full")).values()) == 26
    four = replace(one, student_steps=4, cfg=True)
    # One rollout of 2.5 forwards in the place of five; eight ranks that stop each at their own step await the longest.
    assert sum(units(replace(four, rollout_reuse=5)).values()) == 28.5 - 10
    assert units(replace(four, rollout_reuse=2))["rollout"] == 7.5
    assert units(replace(four, stop_step_per_rank=True), gpus=8)["rollout"] == pytest.approx(5 * 3.8961, rel=1e-4)
    assert sum(units(replace(one, student_steps=4, cfg=True, decoupled=True)).values()) == 29.5
    # x0 of `same_step` is the rollout's own; the generator's update runs one forward more.
    assert units(replace(four, same_step=True))["rollout"] == 12.5
    shape = one.shape
    flops = [forward_flops(replace(one, shape=shape.with_depths((2, n)))).sum() for n in (2, 3, 9)]
    assert flops[2] - flops[0] == pytest.approx(7 * (flops[1] - flops[0]))
