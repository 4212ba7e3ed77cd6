"""The two sides of bench_step.py: this package's update and the reference's structure, on the same draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bench_preprocess_reward import RewardPreprocessing
from benchmarks.eager_step import DenseLora, Draws, EagerUpdate, FakeDraws
from dmdr_fast import ops
from dmdr_fast.algorithm.recipe import Batch, Networks, Recipe, RewardModel
from dmdr_fast.algorithm.rollout import Network
from dmdr_fast.algorithm.score_pass import shared_scores
from dmdr_fast.algorithm.step import dmdr_update
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.algorithm.update import Update
from dmdr_fast.models.attention import AttentionKernel, Choice, set_attention
from dmdr_fast.models.blocks import repeated_blocks
from dmdr_fast.models.cast import ReadAs
from dmdr_fast.models.eight_bit import quantise_blocks
from dmdr_fast.models.lora import LoraAdapter, add_lora
from dmdr_fast.models.sit import SiT
from dmdr_fast.patch import patch

FAKE_UPDATES, FAKE_SCALE, REAL_SCALE, RANK = 5, 2.0, 0.75, 32
CLIP, LR = 1.0, 2e-5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LATENT = (4, 32, 32)  # 256 pixels behind an 8x VAE: 256 tokens
STREAMS = Streams(0)

Optimizers = tuple[torch.optim.Optimizer, torch.optim.Optimizer]  # the generator's, the fake score's


@dataclass(frozen=True)
class Size:
    """The SiT, the micro-batch, the dtype of the weights, and the width of the decoder before the reward."""

    name: str
    network: dict[str, Any]
    batch: int
    dtype: torch.dtype
    decoder_width: int


@dataclass(frozen=True)
class ComputePath:
    """How the networks of this package's side run, by the keys of a configuration.

    Attributes:
        blocks: ``compute.blocks``.
        attention: ``memory.attention``.
        graphs: ``compute.cuda_graphs``.
        float8: ``memory.frozen: float8``, of the base of the scores.
        scores: ``dmd.score_dtype``; None is the dtype of the weights.
    """

    blocks: Literal["eager", "fused", "compiled"] = "eager"
    attention: AttentionKernel = "sdpa"
    graphs: bool = False
    float8: bool = False
    scores: torch.dtype | None = None

    def __str__(self) -> str:
        """What differs from plain layers over torch's own attention, for the name of a row."""
        taken: list[str] = [each for each in (self.blocks, self.attention) if each not in ("eager", "sdpa")]
        taken += ["CUDA graphs"] * self.graphs
        taken += ["float8 base"] * self.float8
        taken += [] if self.scores is None else [f"{str(self.scores).removeprefix('torch.')} scores"]
        return "".join(f", {each}" for each in taken)

    def apply(self, network: nn.Module) -> None:
        set_attention(network, Choice(self.attention))
        if self.blocks == "fused":
            patch(network)
        if self.blocks == "compiled":
            from dmdr_fast.engine.compute import compile_blocks  # which needs pydantic

            compile_blocks(repeated_blocks(network))

    def replayed(self, *networks: nn.Module) -> Sequence[Network]:
        """The networks, whose forwards without grad are replayed where that was asked for."""
        if not self.graphs:
            return networks
        from dmdr_fast.engine.graphs import Graphs

        graphs = Graphs()
        return [graphs.of(network) for network in networks]

    def for_scores(self, scored: Network, base: nn.Module, own: torch.dtype) -> Network:
        """``scored``, which runs ``base`` with weights of dtype ``own``, as the score pass calls it."""
        dtype, read_as = self.scores, ReadAs(base, own)
        if dtype is None:
            return scored

        def cast(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            with read_as(dtype):
                return scored(x_t, t, condition)

        return cast


class Fused:
    """This package's update: ``Fused(...)(step)``."""

    def __init__(self, size: Size, recipe: Recipe, device: torch.device, path: ComputePath):
        generator, base, adapter = _networks(size, device)
        if path.float8:
            quantise_blocks(base, "float8")
        path.apply(generator)
        path.apply(base)
        self.optimizers = _optimizers(generator.parameters(), adapter.parameters(), fused=True)
        rolled, scored = path.replayed(generator, base)
        scored = path.for_scores(scored, base, size.dtype)
        fake = _Trained(base, self.optimizers[1], before=lambda: adapter.set_scale(FAKE_SCALE))
        scores = shared_scores(scored, adapter.set_scale, fake_scale=FAKE_SCALE)
        self.networks = Networks(_Trained(rolled, self.optimizers[0]), fake, scores)
        self.null = generator.null_condition
        decoder, classifier = _reward_networks(size, device)

        def score(images: Tensor, given: dict[str, Tensor], batch: str) -> tuple[Tensor, dict[str, Tensor]]:
            return _log_prob(classifier(ops.preprocess_reward(images, 224, MEAN, STD)), given["labels"]), {}

        self.reward = RewardModel(decoder, score)
        self.recipe, self.device, self.shard = recipe, device, Shard(0, size.batch, size.batch)

    def __call__(self, step: int) -> None:
        given = self.networks, self._data, self.reward, [self.shard], self.device
        dmdr_update(Update(self.recipe, STREAMS, *given, step=step))

    def _data(self, index: tuple[int, ...], shard: Shard, group: int = 1) -> Batch:
        labels = _labels(index, shard.size, self.device)
        return Batch(labels, self.null(labels), labels, {"labels": labels})


class Eager:
    """The reference's structure: ``Eager(...)(step)`` for the steps whose draws it was given."""

    def __init__(self, size: Size, recipe: Recipe, device: torch.device, steps: Iterable[int]):
        generator, base, adapter = _networks(size, device)
        layers = zip(*[iter(adapter.parameters())] * 4, strict=True)
        plain = _network(size, device).to(device, size.dtype)
        plain.load_state_dict({name: value for name, value in base.state_dict().items() if "lora" not in name})
        lora = DenseLora(plain, [tuple(tensor.detach() for tensor in layer) for layer in layers])
        self.optimizers = _optimizers(generator.parameters(), lora.parameters(), fused=None)
        decoder, classifier = _reward_networks(size, device)
        preprocess = RewardPreprocessing(MEAN, STD).to(device)
        self.engine = EagerUpdate(
            generator,
            plain,
            lora,
            self.optimizers,
            recipe.grid,
            fake_scale=FAKE_SCALE,
            real_scale=REAL_SCALE,
            cfg_scale=recipe.dmd.cfg_scale,
            clip=CLIP,
            reward=lambda x0, labels: _log_prob(classifier(preprocess(decoder(x0), 224)), labels),
            reward_weight=recipe.reward_weight,
        )
        self.draws = {step: _draws(step, size.batch, recipe, device) for step in steps}

    def __call__(self, step: int) -> None:
        self.engine.update(self.draws[step])


def balanced_steps(steps: int, reuse: int = 1) -> tuple[int, int]:
    """Two step counters whose rollouts' stop steps have the mean (N - 1) / 2, each as near to it as can be.

    ``reuse`` fake updates share a rollout.
    """
    found: list[int] = []
    twice = len(_stops(0, steps, reuse)) * (steps - 1)
    for total in (twice // 2, twice - twice // 2):
        found.append(next(s for s in itertools.count() if sum(_stops(s, steps, reuse)) == total and s not in found))
    return found[0], found[1]


class _Trained:
    """A network with AdamW and a norm bound, as ``dmdr_fast.algorithm.recipe.Trained`` asks."""

    def __init__(self, network: Network, optimizer: torch.optim.Optimizer, before: Callable[[], None] = lambda: None):
        self.network, self.optimizer, self.before = network, optimizer, before

    def __call__(self, x_t, t, condition):
        self.before()
        return self.network(x_t, t, condition)

    def backward(self, loss, *, last):
        loss.backward()

    def step(self):
        nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True


def _network(size: Size, device: torch.device) -> SiT:
    with device:  # drawing a SiT-XL/2 on a CPU takes seconds
        return SiT(input_size=LATENT[1], in_channels=LATENT[0], **size.network)


def _networks(size: Size, device: torch.device) -> tuple[SiT, SiT, LoraAdapter]:
    """(generator, base, the base's adapter) from one seed; what starts at zero is drawn, so every gradient is alive."""
    torch.manual_seed(0)
    generator, base = _network(size, device), _network(size, device)
    for module in itertools.chain(generator.modules(), base.modules()):
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    adapter = add_lora(base, "fake", rank=RANK, targets=["attn.qkv"], form="post_projection", init_std=0.02)
    for name, parameter in adapter.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return generator.to(device, size.dtype), base.to(device, size.dtype), adapter


def _reward_networks(size: Size, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """(decoder to 8 times the latent's sides, classifier of 224 pixels), frozen, fp32: stand-ins of a VAE and a ViT.

    As in the real ones, a sample's activations at full resolution are the largest of the whole update.
    """
    torch.manual_seed(1)
    width, layers = size.decoder_width, []
    for channels in (LATENT[0], width, width):
        layers += [_conv(channels, width), nn.SiLU(), nn.Upsample(scale_factor=2)]
    decoder = nn.Sequential(*layers, _conv(width, width), nn.SiLU(), _conv(width, 3))
    patches = nn.Conv2d(3, 256, 16, stride=16)
    classifier = nn.Sequential(patches, nn.SiLU(), nn.AvgPool2d(14), nn.Flatten(), nn.Linear(256, 1000))
    return decoder.requires_grad_(False).to(device), classifier.requires_grad_(False).to(device)


def _conv(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, padding=1)


def _log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    """The reward [B]: the label's log-probability, DMDR's classifier reward."""
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def _optimizers(*roles: Iterable[nn.Parameter], fused: bool | None) -> Optimizers:
    """AdamW for both roles, ``fused`` as the trainer has it or None, torch's default, as the reference has it.

    The moments are in place, so that no measurement counts them.
    """
    optimizers = []
    for parameters in roles:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=fused)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # of zero gradients: it moves nothing
        optimizer.zero_grad()
        optimizers.append(optimizer)
    return optimizers[0], optimizers[1]


def _draws(step: int, batch: int, recipe: Recipe, device: torch.device) -> Draws:
    """The very draws that ``dmdr_update`` makes at ``step``."""
    steps, reuse, shard = len(recipe.grid) - 1, recipe.rollout_reuse, Shard(0, batch, batch)

    def noise(purpose: str, *counters: int) -> torch.Tensor:
        return STREAMS.noise(purpose, *counters, shape=LATENT, shard=shard, device=device)

    def times(purpose: str, *counters: int) -> torch.Tensor:
        return STREAMS.times(recipe.renoise, purpose, *counters, step=step, shard=shard, device=device)

    # Where rollouts are shared the reference runs the same one again: it has no other structure.
    fake = [
        FakeDraws(
            labels=_labels((step, r - r % reuse), batch, device),
            rollout=[noise("rollout", step, r - r % reuse, i) for i in range(steps)],
            stop=_stops(step, steps, reuse)[r // reuse],
            t=times("fake_t", step, r),
            noise=noise("fake_noise", step, r),
        )
        for r in range(FAKE_UPDATES)
    ]
    return Draws(fake, times("dmd_t", step), noise("dmd_noise", step))


def _stops(step: int, steps: int, reuse: int = 1) -> list[int]:
    """The stop step of every rollout of an update."""
    return [STREAMS.stop_step(steps, step, r) for r in range(0, FAKE_UPDATES, reuse)]


def _labels(index: tuple[int, ...], batch: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(STREAMS.rng("labels", *index).integers(1000, size=batch)).to(device)
