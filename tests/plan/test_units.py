"""F-units and passes of reinforcement learning, against the forwards of an update of the algorithm itself."""

from collections import Counter

import pytest
import torch

from dmdr_fast.algorithm.passes import Schedule
from dmdr_fast.algorithm.recipe import Networks
from dmdr_fast.algorithm.rl.dpo import DPO
from dmdr_fast.algorithm.rl.grpo import GRPO
from dmdr_fast.algorithm.rl.hybrid import Hybrid
from dmdr_fast.algorithm.rl.nft import NFT
from dmdr_fast.algorithm.score_pass import separate_scores
from dmdr_fast.algorithm.step import dmdr_update
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.cli import CONFIGS, load
from dmdr_fast.plan.cost import units
from dmdr_fast.plan.from_config import workload
from dmdr_fast.plan.workload import Workload
from tests.algorithm.networks import Denoiser, PlainRole, recipe, reward_model, update

BATCH, PARTS, STEPS = 8, 2, 3
TWICE = GRPO(group_size=4, inner_epochs=2, trained_steps=1)


class Counting(PlainRole):
    """A role that counts its calls, and their samples, by whether they are graded."""

    def __init__(self, seed):
        super().__init__(Denoiser(seed))
        self.calls, self.samples = Counter(), Counter()

    def __call__(self, x, t, condition):
        graded = torch.is_grad_enabled()
        self.calls[graded] += 1
        self.samples[graded] += len(x)
        return super().__call__(x, t, condition)


@pytest.mark.parametrize("variant", ["backward_simulation", "same_step"])
@pytest.mark.parametrize(
    "method",
    [TWICE, NFT(group_size=4), DPO(group_size=4), Hybrid(grpo=TWICE)],
    ids=["grpo in two epochs", "nft", "dpo", "hybrid in two epochs"],
)
def test_an_update_runs_what_is_planned(method, variant, monkeypatch):
    """With a score pass and a graded forward of DMD's for every epoch, and of DPO two samples in K."""
    monkeypatch.setattr(Streams, "stop_step", lambda self, steps, *counters: steps - 1)
    monkeypatch.setattr(Schedule, "rollout_steps", float(STEPS))
    generator, fake, teacher, reference = (Counting(seed) for seed in range(4))
    nets = Networks(generator, fake, separate_scores(fake, teacher), reference)
    shards = [Shard(start, start + BATCH, PARTS * BATCH) for start in range(0, PARTS * BATCH, BATCH)]
    numbers = recipe(STEPS, method=method, reward_weight=0.1, rollout_variant=variant)
    reward = reward_model(lambda x: x, lambda images, labels: images[:, 0, 0, 0].float())
    dmdr_update(update(nets, numbers, Streams(3), shards, reward=reward))

    count = {"policy_steps": method.graded_forwards(STEPS), "reference_steps": method.reference_forwards(STEPS)}
    count |= {"reference_steps": 0} if not method.needs_reference else {}  # a KL's, which there is none of
    count["plain_steps"] = method.plain_forwards()
    same_step, epochs = variant == "same_step", method.generator_steps
    shared = {"fake_updates": 2, "accumulation": PARTS, "same_step": same_step, "epochs": epochs, **count}
    passes = Schedule(STEPS, **shared).passes()
    both = generator.calls + reference.calls
    assert sum(part.get("generator", 0.0) for part in passes.values()) == both[False] + 2 * both[True]
    assert passes["score pass"] == {"fake": fake.calls[False], "teacher": teacher.calls[False]}
    assert passes["fake update"] == {"fake": 2 * fake.calls[True]}

    work = Workload(None, student_steps=STEPS, cfg=False, activation="none", policy_share=method.graded_share, **shared)
    found = [role.samples for role in (generator, fake, teacher, reference)]
    assert sum(units(work).values()) * BATCH == sum(samples[False] + 3 * samples[True] for samples in found)


def test_texts_are_as_long_as_data_max_length():
    work = workload(load(CONFIGS / "sd35_large_lora.yaml"))  # 128, of which CLIP has 77 more
    assert work.shape.opened().empty_condition(1, torch.float32)["prompt_embeds"].shape[1] == 128 + 77
