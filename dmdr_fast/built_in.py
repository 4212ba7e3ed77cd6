"""What comes with the package and has a name that may stand where a configuration has a path."""

from __future__ import annotations

from pathlib import Path

_SCENES = Path(__file__).parent / "scenes"
PIPELINES = {"scenes": _SCENES / "pretrained"}
PROMPTS = {"scenes": _SCENES / "prompts.txt", "scenes_eval": _SCENES / "eval_prompts.txt"}


def pipeline(name: str | Path) -> str:
    """The folder of a built-in pipeline; another folder or hub id as it is."""
    return str(PIPELINES.get(str(name), name))


def prompts(name: str | Path) -> Path:
    """The file of built-in prompts; another path as it is."""
    return PROMPTS.get(str(name), Path(name))
