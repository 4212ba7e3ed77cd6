"""Inception FID, inception score, precision and recall of images on disk, as torch-fidelity computes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dmdr_fast.data.images import read_cropped
from dmdr_fast.errors import UserError

EXTRACTOR = "inception-v3-compat"  # the network of the TensorFlow original, its resizing included
LAYERS = {"isc": "logits_unbiased", "fid": "2048", "prc": "2048"}
LEAST_DRAWN, LEAST_REAL = 10, 4  # the score's ten splits; a third neighbour
COLUMNS = {
    "frechet_inception_distance": "FID",
    "inception_score_mean": "inception score",
    "precision": "precision",
    "recall": "recall",
}


def check_installed() -> None:
    """Whether torch-fidelity is there.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError("--real: it needs torch-fidelity; pip install 'dmdr_fast[fid]', or leave --real out")


def check_weights(weights: Path | None) -> None:
    """Whether the network can be built of ``weights``, or of those that torch-fidelity fetches into torch.hub's cache.

    Raises:
        UserError: it cannot.
    """
    from torch_fidelity.utils import create_feature_extractor

    try:
        create_feature_extractor(
            EXTRACTOR,
            sorted(set(LAYERS.values())),
            cuda=False,
            feature_extractor_weights_path=None if weights is None else str(weights),
            verbose=False,
        )
    except Exception as error:  # torch.load raises whatever a file leads it to, and so does a network
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        wanted = "give the file of torch-fidelity's weights with --inception"
        if weights is None:
            raise UserError(f"--real: Inception's weights cannot be fetched ({reason}); {wanted}") from None
        raise UserError(f"--inception: {weights} is no such file ({reason}); {wanted}") from None


def inception_metrics(
    images: Sequence[Path],
    real: Sequence[Path],
    size: tuple[int, int],
    *,
    weights: Path | None,
    device: torch.device,
    cache: Path,
) -> dict[str, float]:
    """FID, inception score, precision and recall (k = 3) in the feature spaces of Inception v3.

    Args:
        images, real: files of generated and of real images, at least ``LEAST_DRAWN`` and ``LEAST_REAL``.
        size: height and width of the generated ones; a real one is resized to cover it and cropped around its centre.
        weights: a file of torch-fidelity's weights; None: those that it has fetched.
        device: where the network runs.
        cache: an empty folder, or one of earlier calls with the same ``real``, whose features are kept there.

    Source: Heusel et al. 2017 (arXiv 1706.08500), Salimans et al. 2016 (arXiv 1606.03498), Kynkäänniemi et al. 2019
    (arXiv 1904.06991), there with VGG-16 in place of Inception, whose pool3 the ADM evaluation suite takes as we do.
    """
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=_Images(images, size),
        input2=_Images(real, size),
        input2_cache_name="real",
        cache_root=str(cache),
        feature_extractor=EXTRACTOR,
        feature_extractor_weights_path=None if weights is None else str(weights),
        cuda=device.type == "cuda",
        save_cpu_ram=True,  # precision and recall part by part: 50,000 x 50,000 distances are 10 GB
        verbose=False,
        **dict.fromkeys(LAYERS, True),
        **{f"feature_layer_{metric}": layer for metric, layer in LAYERS.items()},
    )
    return {column: float(found[name]) for name, column in COLUMNS.items()}


class _Images(Dataset[Tensor]):
    """Image files as uint8 [3, height, width]."""

    def __init__(self, files: Sequence[Path], size: tuple[int, int]) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(read_cropped(self.files[index], *self.size).copy()).permute(2, 0, 1)
