"""The prompts of scenes that come with the package: ``python -m dmdr_fast.scenes.prompts`` writes both files again."""

from __future__ import annotations

from dmdr_fast import built_in
from dmdr_fast.algorithm.streams import Streams
from dmdr_fast.scenes.captions import WORDINGS, caption, combinations
from dmdr_fast.scenes.data import evaluation_scenes

EVALUATED = 256


def training_prompts() -> list[str]:
    """Each of the 5,760 combinations that are not held out, once: ``data.prompts: scenes``."""
    scenes, rng = combinations(held_out=False), Streams(0).rng("prompts")
    return [caption(scenes[row], int(rng.integers(len(WORDINGS[0])))) for row in rng.permutation(len(scenes))]


def evaluation_prompts() -> list[str]:
    """By turns one that is not held out and one that is, 256 in all: ``eval.prompts: scenes_eval``."""
    return evaluation_scenes(EVALUATED, seed=1).prompts


def main() -> None:
    """Write the files."""
    for name, prompts in (("scenes", training_prompts()), ("scenes_eval", evaluation_prompts())):
        built_in.PROMPTS[name].write_text("".join(f"{prompt}\n" for prompt in prompts))


if __name__ == "__main__":
    main()
