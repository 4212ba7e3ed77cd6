"""A rank's place from the variables of srun, mpirun and mpiexec: one run of N ranks, or one line."""

import pytest

from dmdr_fast.errors import UserError
from dmdr_fast.placement import first_host, take

SLURM = {"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[003-004]"}
SLURM |= {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
WHERE = {"MASTER_ADDR": "far", "MASTER_PORT": "23000"}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")


def taken(environ):
    environ = dict(environ)
    take(environ)
    return environ


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (SLURM, ("5", "8", "1", "gpu003")),
        (SLURM | WHERE, ("5", "8", "1", "far")),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, ("1", "4", "1", "127.0.0.1")),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"} | WHERE, ("1", "4", "1", "far")),
        (PMI, ("1", "2", "1", "127.0.0.1")),
        (SLURM | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | WHERE, ("0", "2", "0", "far")),
    ],
    ids=["srun", "srun, address given", "mpirun", "mpirun, several nodes", "mpiexec", "torchrun under srun"],
)
def test_one_run_of_all_ranks(environ, place):
    found = taken(environ)
    assert tuple(found[name] for name in NAMES) == place
    assert found["MASTER_PORT"] == "23000" or 20_000 <= int(found["MASTER_PORT"]) < 32_000
    others = {name: "0" for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK") if name in environ}
    local = {
        name: "0" for name in ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID") if name in environ
    }
    assert taken(environ | others | local)["MASTER_PORT"] == found["MASTER_PORT"]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},  # the script of sbatch
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
    ],
)
def test_a_single_process_is_left_alone(environ):
    assert taken(environ) == environ


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "MASTER_ADDR: missing; mpirun over several nodes"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID: not set by mpiexec"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS: expected a number; got 'many'"),
        ({"RANK": "0"}, "WORLD_SIZE: not set beside RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | WHERE, "RANK: expected a number; got 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | WHERE, "RANK 2, LOCAL_RANK 0, WORLD_SIZE 2 do not fit"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(environ, words):
    with pytest.raises(UserError, match=words):
        taken(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu7", "gpu7"), ("gpu[003-010,12],login1", "gpu003"), ("a,b", "a"), ("n[1,4]-ib", "n1-ib"), ("x-[2-3]", "x-2")],
)
def test_the_first_of_slurm_s_list_of_hosts(nodes, first):
    assert first_host(nodes) == first
