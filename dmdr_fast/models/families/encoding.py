"""A pipeline's own text encoders, behind what the text cache asks for: an identity, lengths, embeddings."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dmdr_fast.models.families import loading
from dmdr_fast.models.families.base import Family

log = logging.getLogger(__name__)

# Of a large weights file: no two trained encoders agree in all of them, and reading them takes no time.
SAMPLES, SAMPLE_BYTES = 64, 4096


class TextEncoder:
    """The text encoders of ``family``'s pipeline, loaded when ``encode`` first needs them.

    Prompts go through the pipeline's ``encode_prompt`` in batches of ``family.encode_batch``, the last one filled with
    empty prompts: an embedding's bits do not depend on which prompts it was computed with.

    Args:
        dtype: of the encoders' weights and of the embeddings.
        device: where they run; embeddings come back to the CPU.
    """

    def __init__(self, family: Family, *, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.family, self.dtype, self.device = family, dtype, torch.device(device)
        self._pipeline: Any = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What an embedding depends on besides the prompt, as JSON: encoders and tokenizers by content (a hub id by its
        commit), pipeline class, length and dtype."""
        index = self._read_index()
        identity = {"pipeline": index["_class_name"], "length": self.family.length, "dtype": str(self.dtype)}
        if not loading.is_local(self.family.path):
            commit = loading.resolve(self.family.path, "model_index.json", self.family.revision).parent.name
            return identity | {"hub": self.family.path, "commit": commit}
        folders = sorted(name for name in index if name.startswith(("text_encoder", "tokenizer")))
        root = Path(self.family.path).expanduser()
        return identity | {"files": {name: _fingerprints(root / name) for name in folders}}

    @property
    def limit(self) -> int:
        """Tokens that a prompt may have; CLIP beside a longer encoder (SD3, FLUX.1) reads the first 77, as in the
        pipeline."""
        return self.family.length

    def count(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, uncut. Loads tokenizers only; ValueError where they cannot be loaded."""
        return self.family.count_tokens(self._tokenizers, prompts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, negative: bool = False) -> list[dict[str, Tensor]]:
        """One entry per prompt, on the CPU, without a batch dimension.

        ``negative`` prompts may differ: SDXL's empty one is all zeros where its pipeline says so.
        """
        if self._pipeline is None:
            self._pipeline = self._load().to(self.device)
        size, entries = self.family.encode_batch, []
        zero = negative and self._pipeline.config.get("force_zeros_for_empty_prompt", False)
        for start in range(0, len(prompts), size):
            part = list(prompts[start : start + size])
            filled = part + [""] * (size - len(part))
            encoded = self._pipeline.encode_prompt(filled, **self.family.encode_arguments())
            for index, prompt in enumerate(part):
                entry = self.family.read_encoded(encoded, index)
                blank = zero and not prompt
                entries.append({k: (torch.zeros_like(v) if blank else v).cpu().clone() for k, v in entry.items()})
        return entries

    def release(self) -> None:
        """Give the encoders' memory back; ``encode`` would load them again."""
        self._pipeline = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _read_index(self) -> dict[str, Any]:
        return loading.read_json(self.family.path, "model_index.json", self.family.revision)

    @cached_property
    def _tokenizers(self) -> Any:
        return self._load(encoders=False)

    def _load(self, *, encoders: bool = True) -> Any:
        """The pipeline without network and VAE, and without text encoders where none is asked for."""
        from diffusers import DiffusionPipeline

        path = self.family.path
        index = self._read_index()
        folders = [name for name in index if name.startswith("text_encoder")]
        absent: dict[str, None] = dict.fromkeys([self.family.folder, "vae", *([] if encoders else folders)])
        if encoders:
            for name in folders:
                if not (index[name] or [None])[0]:
                    raise ValueError(f"pipeline {path}: it was saved without {name}; give a pipeline that has it")
                loading.check_weights(path, name)
            log.info("loading the text encoders of %s (%s)", path, ", ".join(folders))
        try:
            return DiffusionPipeline.from_pretrained(
                path,
                revision=self.family.revision,
                torch_dtype=self.dtype,
                variant=loading.local_variant(path, *folders) if encoders else None,
                **absent,
            )
        except (OSError, ValueError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"pipeline {path}: its text encoders and tokenizers cannot be loaded ({loading.first_line(error)})"
            ) from error


def _fingerprints(folder: Path) -> dict[str, list[Any]]:
    """name -> [bytes, digest of the content]; of a large file the digest of evenly spaced samples."""
    return {
        str(file.relative_to(folder)): [file.stat().st_size, _digest(file)]
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def _digest(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        if size <= 2 * SAMPLES * SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            for sample in range(SAMPLES):
                stream.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]
