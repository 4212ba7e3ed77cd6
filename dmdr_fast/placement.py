"""A process's place among the ranks of its run, from the variables of torchrun, Slurm or an MPI launcher."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import MutableMapping

from dmdr_fast.errors import UserError

# Of each launcher: rank, ranks in all, rank on this node, ranks on this node. SLURM_STEP_NUM_TASKS is srun's own: in a
# batch script SLURM_NTASKS is set too, around a single process.
LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    "mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(20_000, 32_000)  # below those that Linux hands out by itself


def take(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set :data:`NEEDED` where srun or an MPI launcher started this process as one of several; torchrun and DeepSpeed
    have set them. A process without any of it is left alone: the only rank of its run.

    Raises:
        UserError: variables that are missing, no numbers, or do not fit together.
    """
    if "RANK" not in environ:
        for launcher, names in LAUNCHERS.items():
            if names[0] in environ and _number(environ, names[1], "1") > 1:
                environ["RANK"] = environ[names[0]]  # an error is said by rank 0 alone
                environ.update(_place(launcher, names, environ))
                break
        else:
            return
    missing = [name for name in NEEDED if not environ.get(name)]
    if missing:
        raise UserError(f"{missing[0]}: not set beside RANK; start through deepspeed, torchrun or srun, or unset RANK")
    rank, world_size, local_rank = (_number(environ, name) for name in NEEDED[:3])
    if not (0 <= rank < world_size and 0 <= local_rank <= rank):
        given = f"RANK {rank}, LOCAL_RANK {local_rank}, WORLD_SIZE {world_size}"
        raise UserError(f"{given} do not fit together; start through deepspeed, torchrun or srun, or unset RANK")


def _place(launcher: str, names: tuple[str, ...], environ: MutableMapping[str, str]) -> dict[str, str]:
    rank, world_size, local_rank, local_size = names
    for name in names[:3]:
        if name not in environ:
            raise UserError(f"{name}: not set by {launcher}; start through deepspeed or torchrun instead")
    place = {"RANK": environ[rank], "WORLD_SIZE": environ[world_size], "LOCAL_RANK": environ[local_rank]}
    if local_size:
        place["LOCAL_SIZE"] = environ.get(local_size, "1")
    job = environ.get("PMIX_NAMESPACE")
    if launcher == "srun":
        address = first_host(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or "localhost")
        job = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    elif place["LOCAL_SIZE"] == place["WORLD_SIZE"]:
        address, job = "127.0.0.1", job or str(os.getppid())
    elif "MASTER_ADDR" in environ:
        address = environ["MASTER_ADDR"]
    else:
        raise UserError(
            f"MASTER_ADDR: missing; {launcher} over several nodes needs the host of rank 0 in it, for all ranks "
            "(mpirun -x MASTER_ADDR=HOST, mpiexec -genv MASTER_ADDR HOST)"
        )
    port = 29_500 if job is None else PORTS[zlib.crc32(job.encode()) % len(PORTS)]  # the same on all ranks
    return place | {
        "MASTER_ADDR": environ.get("MASTER_ADDR", address),
        "MASTER_PORT": environ.get("MASTER_PORT", str(port)),
    }


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: ``node[003-010,12],login1`` -> ``node003``."""
    first = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodes)
    assert first is not None  # each part may be empty
    return "".join(first.groups(""))


def _number(environ: MutableMapping[str, str], name: str, default: str = "") -> int:
    text = environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}: expected a number; got {text!r}") from None
