"""Where this process runs: its rank, its device, and the few collective decisions of a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dmdr_fast.errors import UserError


@dataclass(frozen=True)
class Runtime:
    """One rank of the run. Collectives on ``control`` go through gloo: they never wait for the device."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None  # None on a single rank

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line from rank 0."""
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; the same answer on all ranks."""
        if self.control is None:
            return flag
        votes = torch.tensor([int(flag)])
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.control)
        return bool(votes)

    def gather(self, value: object) -> list:
        """Every rank's (picklable, small) value, in rank order."""
        if self.control is None:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a tensor on the device."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a tensor on the device."""
        return self.sum(values) / self.world_size

    def nanmean(self, values: torch.Tensor) -> torch.Tensor:
        """The same over the ranks where an element is a number; nan where it is none on any."""
        known = ~values.isnan()
        total, count = self.sum(torch.stack([torch.where(known, values, 0.0), known.to(values.dtype)]))
        return total / count

    def concatenate(self, part: torch.Tensor) -> torch.Tensor:
        """All ranks' equal-shaped parts, concatenated along the first dimension in rank order."""
        if self.world_size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.world_size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def global_batch(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole global batch, in its own order, of one equal-shaped part per micro-batch of each rank."""
        return torch.cat([self.concatenate(part) for part in parts])


def start() -> Runtime:
    """Join the run that the launcher set up, or be its only rank when there is no launcher.

    Raises:
        UserError: the ranks do not meet, or are more than the GPUs.
    """
    import deepspeed

    # DeepSpeed 0.19 calls collectives under names that torch 2.13 has renamed: nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if "RANK" not in os.environ:
        # Port 0: the store listens on one that is free, and nobody else has to know it.
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
    rank, world_size, local_rank = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        local_rank = _device_of(local_rank)
        torch.cuda.set_device(local_rank)
    # On CPUs DeepSpeed would compile a shared-memory all-reduce at start-up, half a minute, for inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    except dist.DistError as error:
        raise UserError(_no_meeting(str(error))) from None
    control = dist.new_group(backend="gloo") if world_size > 1 else None
    return Runtime(rank, world_size, torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"), control)


def _device_of(local_rank: int) -> int:
    """The GPU of a rank. One that sees a single GPU has that one: Slurm hands them out so (--gpus-per-task)."""
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise UserError(f"LOCAL_RANK: {local_rank}, but {count} GPUs are visible here; start one rank per GPU")
    if count == 1:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed's own choice of device
        return 0
    return local_rank


def _no_meeting(reason: str) -> str:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in reason:
        return f"--master_port: {port} is in use on this machine; give the launcher another one (MASTER_PORT)"
    first = reason.strip().splitlines()[0]
    return f"the {os.environ['WORLD_SIZE']} ranks did not meet at {address}, --master_port {port}: {first}"
