"""Randomness depends on the seed, the purpose and the sample's global index, and on nothing else."""

import torch

from dmdr_fast.algorithm.schedules import RenoiseLaw
from dmdr_fast.algorithm.streams import Shard, Streams

CPU = torch.device("cpu")


def shards(world, micro_batch, micro_steps=1):
    return [Shard.of_rank(r, world, micro_batch, m, micro_steps) for m in range(micro_steps) for r in range(world)]


def test_ranks_split_the_global_batch_whatever_their_number():
    whole = Shard.of_rank(0, 1, 12)
    for parts in (shards(2, 6), shards(3, 4), shards(2, 3, 2), shards(1, 4, 3)):
        assert [p.start for p in parts] == [i * parts[0].size for i in range(len(parts))]
        noise = torch.cat([Streams(3).noise("n", 5, shape=(3, 5), shard=p, device=CPU) for p in parts])
        assert torch.equal(noise, Streams(3).noise("n", 5, shape=(3, 5), shard=whole, device=CPU))
        law = RenoiseLaw(dynamic_step=10)
        times = torch.cat([Streams(3).times(law, "t", 5, step=5, shard=p, device=CPU) for p in parts])
        assert torch.equal(times, Streams(3).times(law, "t", 5, step=5, shard=whole, device=CPU))


def test_streams_differ_by_seed_purpose_and_counter():
    whole = Shard.of_rank(0, 1, 64)
    draws = [
        Streams(seed).noise(purpose, *index, shape=(64,), shard=whole, device=CPU).flatten()
        for seed, purpose, index in ((0, "a", (1,)), (1, "a", (1,)), (0, "b", (1,)), (0, "a", (2,)), (0, "a", (1, 0)))
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 0.06  # 4 standard errors of 4096 independent pairs
