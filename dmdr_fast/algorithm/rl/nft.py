"""NFT: the generator comes to denoise a sample that beat its group better, and one that lost worse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dmdr_fast.algorithm.rl.grouped import Grouped
from dmdr_fast.algorithm.rl.method import Setting, option

if TYPE_CHECKING:
    from dmdr_fast.algorithm.rl.experience import Experience
    from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class NFT(Grouped):
    """NFT: forward-process RL, advantages weight a denoising loss of the generator's own samples."""

    name = "nft"

    beta: float = option(1.0, "b, how far v+ and v- lie from the old prediction.", gt=0)
    times: Literal["grid", "renoise"] = option(
        "grid", "Times at which samples are denoised: the student's own grid, or the renoise law."
    )

    def graded_forwards(self, student_steps: int) -> int:
        return 1

    def problems(self, setting: Setting) -> Iterator[str]:
        yield from super().problems(setting)
        if setting.prediction != "flow":
            yield (
                f"rl.method: nft is of flow matching and {setting.family.upper()} predicts {setting.prediction}; "
                "take refl or dpo"
            )

    def collect(self, update: Update) -> Experience:
        from dmdr_fast.algorithm.rl.forward_process import collect

        return collect(self, update)
