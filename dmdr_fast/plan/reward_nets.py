"""The networks of a run's rewards on the meta device: the published ones, those at a ``path``, and a user's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmdr_fast import ops
from dmdr_fast.errors import UserError
from dmdr_fast.plan.networks import META
from dmdr_fast.plan.workload import RewardNet
from dmdr_fast.rewards.digits import digits_cnn
from dmdr_fast.rewards.digits_held_out import RowsAndColumnsGRU
from dmdr_fast.rewards.registry import KINDS, is_differentiable, prepare_reward, weights_of_reward
from dmdr_fast.scenes.verifier import ARCHITECTURES

PUBLISHED = json.loads((Path(__file__).parent / "rewards.json").read_text())
# Of rewards that come with the package, weights included.
EMBEDDED: dict[str, Callable[[], nn.Module]] = {
    "digits": digits_cnn,
    "digits_held_out": RowsAndColumnsGRU,
    "scenes": ARCHITECTURES["verifier"],
    "scenes_right": ARCHITECTURES["verifier"],
    "scenes_held_out": ARCHITECTURES["held_out_verifier"],
}
# The argument that names a network's configuration. ImageReward's checkpoint has none.
CONFIGURED = {"clip_score": "path", "pickscore": "path", "hps": "clip", "aesthetic": "clip", "classifier": "path"}
STATE = "state its GB per GPU by --reward-gb"


@dataclass(frozen=True)
class MetaReward:
    """A reward without storage. ``score``: images [B, 3, H, W] -> [B], None where it cannot be traced.

    weights: bytes. note: one line about what is not counted, or counted as something else.
    """

    score: Callable[[Tensor], Tensor] | None
    weights: int
    note: str = ""


def meta_reward(net: RewardNet, image: tuple[int, ...] = (3, 64, 64)) -> MetaReward:
    """What can be known of a reward of images [C, H, W] without its weights.

    Raises:
        UserError: a kind or options that a run would refuse.
    """
    options = json.loads(net.options)
    try:
        if net.kind not in KINDS and not is_differentiable(net.kind):
            note = f"reward {net.kind}: scores in a process of its own, which is not counted; if it uses these GPUs, "
            return MetaReward(None, 0, note + STATE)
        reward_class, arguments = prepare_reward(net.kind, net.path, None, options, num_classes=net.num_classes)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from None
    if net.kind in EMBEDDED:
        return _module_reward(EMBEDDED[net.kind])
    if net.kind not in KINDS:
        return _own(net.kind, reward_class, arguments, image)
    places = weights_of_reward(reward_class, arguments)
    place = places[CONFIGURED.get(net.kind, "path")]
    dtype, size = arguments.get("dtype", torch.float32), arguments.get("size")
    published = PUBLISHED[net.kind]
    default = weights_of_reward(reward_class, {}).get(CONFIGURED.get(net.kind, "path"))
    if place == default or published["source"].startswith(place):
        return _published(net.kind, dtype, size)
    try:
        if net.kind == "image_reward":
            raise OSError("its sizes are in its weights alone")
        return _configured(net.kind, place, dtype, size)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        found = _published(net.kind, dtype, size)
        reason = str(error).strip().splitlines()[0]
        note = f"reward {net.kind}: no configuration at {place} ({reason}); counted as {published['source']}"
        return MetaReward(found.score, found.weights, note)


def size_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _published(kind: str, dtype: torch.dtype, size: int | None) -> MetaReward:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = PUBLISHED[kind]
    with META:
        model = CLIPVisionModel._from_config(CLIPVisionConfig(**sizes["vision"]), attn_implementation="sdpa")
    model = model.to(dtype).requires_grad_(False).eval()
    weights = size_of(model) + sizes["text_parameters"] * dtype.itemsize
    return MetaReward(_sees(model, size or sizes["vision"]["image_size"], lambda p: model(p).pooler_output), weights)


def _configured(kind: str, place: str, dtype: torch.dtype, size: int | None) -> MetaReward:
    """The model of transformers that the configuration in a local folder, or in the hub's cache, describes."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(Path(place).expanduser()), local_files_only=True)
    with META:
        if kind == "classifier":
            model = transformers.AutoModelForImageClassification.from_config(config)
            size = size or 224
        else:
            model = transformers.CLIPModel._from_config(config, attn_implementation="sdpa")
            size = config.vision_config.image_size
    model = model.to(dtype).requires_grad_(False).eval()
    if kind == "classifier":
        return MetaReward(_sees(model, size, lambda p: model(p).logits), size_of(model))
    unread = (model.text_model, model.text_projection) if kind == "aesthetic" else ()
    weights = size_of(model) - sum(size_of(module) for module in unread)

    def features(pixels: Tensor) -> Tensor:
        found = model.get_image_features(pixel_values=pixels)
        return getattr(found, "pooler_output", found)

    return MetaReward(_sees(model, size, features), weights)


def _sees(model: nn.Module, size: int, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``call`` behind the preprocessing."""
    half, dtype = (0.5, 0.5, 0.5), next(model.parameters()).dtype
    return lambda images: call(ops.preprocess_reward(images, size, half, half).to(dtype)).float().flatten(1).sum(1)


def _module_reward(build: Callable[[], nn.Module]) -> MetaReward:
    with META:
        model = build().requires_grad_(False).eval()
    return MetaReward(lambda images: model(images.float()).flatten(1).sum(1), size_of(model))


def _own(kind: str, reward_class: type, arguments: dict[str, Any], image: tuple[int, ...]) -> MetaReward:
    """A user's differentiable class, built and run on the meta device if it lets itself be."""
    try:
        with META:
            reward = reward_class(**arguments)
        if not isinstance(reward, nn.Module):
            raise TypeError("it is no nn.Module")
        if any(not t.is_meta for t in (*reward.parameters(), *reward.buffers())):
            raise TypeError("its constructor loads weights")
    except Exception as error:  # whatever a user's constructor raises where there is no storage
        return MetaReward(None, 0, f"reward {kind}: not counted ({_said(error)}); {STATE}")
    reward.requires_grad_(False).eval()

    def score(images: Tensor) -> Tensor:
        labels = torch.zeros(len(images), dtype=torch.int64, device=META)
        return reward(images, labels=labels, prompts=["a prompt"] * len(images))

    try:
        with torch.no_grad():
            score(torch.empty(1, *image, device=META))
    except Exception as error:
        note = f"reward {kind}: its weights are counted, its activations are not ({_said(error)}); {STATE}"
        return MetaReward(None, size_of(reward), note)
    return MetaReward(score, size_of(reward))


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
