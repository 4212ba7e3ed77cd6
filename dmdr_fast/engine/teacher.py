"""Training a small flow-matching teacher first, where the recipe says so (digits); kept in a cache shared by runs."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from dmdr_fast import cache
from dmdr_fast.config import Config
from dmdr_fast.data.digits import load_digits
from dmdr_fast.engine.sit_model import build_network, resolve_weights

WARM_UP = 100  # steps of linear warm-up of the learning rate


def teacher_weights(config: Config) -> Path:
    """The file of the teacher's weights: the named one, or one trained on ``teacher.train.data`` and cached.

    Every rank may call: the first to come trains, the others wait for the cache's lock.
    """
    if config.teacher.weights is not None:
        return resolve_weights(config.teacher.weights)
    key = {"model": config.model.model_dump(), "train": config.teacher.train.model_dump(), "torch": torch.__version__}
    folder = cache.cached("teacher", key, lambda target: train_teacher(config, target / "teacher.safetensors"))
    return folder / "teacher.safetensors"


def train_teacher(config: Config, path: Path) -> None:
    """Flow matching on the data: E |v(x_t, t, y) - (eps - x0)|^2, t logit-normal; the EMA's weights are written.

    AdamW, linear warm-up and cosine decay of the learning rate, labels dropped to the null class for CFG.
    Deterministic on a given device and thread count: seeded by ``teacher.train.seed``.
    """
    settings = config.teacher.train
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        network = build_network(config).to(device).train()
        rng = torch.Generator().manual_seed(settings.seed)
        images, labels = load_digits()
        trained = [p for p in network.parameters() if p.requires_grad]
        average = [p.detach().clone() for p in trained]
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, settings.steps))
        for _ in tqdm(range(settings.steps), desc="teacher", unit="step", mininterval=2.0):
            rows = torch.randint(len(images), (settings.batch_size,), generator=rng)
            x0, y = images[rows], labels[rows]
            dropped = torch.rand(len(rows), generator=rng) < settings.label_dropout
            y = torch.where(dropped, network.null_condition(y), y)
            t = torch.sigmoid(torch.randn(len(rows), generator=rng))
            noise = torch.randn(x0.shape, generator=rng)
            x0, y, t, noise = (v.to(device) for v in (x0, y, t, noise))
            x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
            loss = F.mse_loss(network(x_t, t, y), noise - x0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            torch._foreach_lerp_(average, [p.detach() for p in trained], 1.0 - settings.ema)
    with torch.no_grad():
        for parameter, mean in zip(trained, average, strict=True):
            parameter.copy_(mean)
    save_file({n: p.detach().cpu().contiguous() for n, p in network.named_parameters()}, path)


def _learning_rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
