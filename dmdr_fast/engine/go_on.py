"""The command of a run, and the one that goes on with it: the launcher's own, as it was given."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

LAUNCHERS = ("deepspeed", "torchrun", "accelerate", "srun", "mpirun", "mpiexec", "dmdr-train")
MODULES = ("deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch", "dmdr_fast.launch")
OF_FILES = ("--hostfile", "-hostfile", "-H", "--config_file", "--deepspeed_hostfile")  # flags whose value may be a path
OURS = ("--num_gpus", "--num_accelerators", "--master_port")  # dmdr-train's flags, which stand among the run's


def resume_command(run_dir: Path) -> str:
    """One line for the shell, to be run anywhere on this machine: folder, environment, launcher, script, run."""
    return _command(["--config", str((run_dir / "config.yaml").resolve()), "--resume", "auto"])


def given_command() -> str:
    """The line that started this process, in the same form."""
    return _command(_own_arguments())


def _command(run: Sequence[str]) -> str:
    script = Path(sys.argv[0]).resolve()
    launcher = next(filter(None, (launcher_words(words, script) for words in _processes())), None)
    given = {n: v for n, v in os.environ.items() if n == "DS_ACCELERATOR" or n.startswith("DMDR_FAST_")}
    environment = [f"{name}={shlex.quote(value)}" for name, value in sorted(given.items())]
    words = " ".join([*environment, shlex.join([*(launcher or _by_hand(script)), *run])])
    return f"cd {shlex.quote(str(Path.cwd()))} && {words}"  # the configuration may have relative paths


def launcher_words(words: Sequence[str], script: Path) -> list[str] | None:
    """The command up to the script where ``words`` are a launcher's that starts ``script``; paths are absolute."""
    program, rest = _program(words)
    if program is None:
        return None
    if Path(program[-1]).name in ("dmdr-train", "dmdr_fast.launch"):
        return [*program, *_own_flags(rest)]
    at = next((i for i, word in enumerate(rest) if word.endswith(".py") and Path(word).resolve() == script), None)
    return None if at is None else [*program, *_absolute(rest[:at]), str(script)]


def _program(words: Sequence[str]) -> tuple[list[str] | None, Sequence[str]]:
    """(launcher, its arguments); None for another program."""
    if not words:
        return None, words
    first = 1 if Path(words[0]).name.startswith("python") else 0
    options = next((i for i, word in enumerate(words[first:], first) if not word.startswith("-") or word == "-m"), None)
    if options is None:
        return None, words
    if words[options] == "-m" and first:
        known = len(words) > options + 1 and words[options + 1] in MODULES
        return ([words[0], "-m", words[options + 1]] if known else None), words[options + 2 :]
    name = Path(words[options]).name
    if name not in LAUNCHERS:
        return None, words
    found = shutil.which(name)
    same = found is not None and Path(found).resolve() == Path(words[options]).resolve()
    return [name if same or words[options] == name else words[options]], words[options + 1 :]


def _absolute(flags: Sequence[str]) -> list[str]:
    found = []
    for before, word in zip(["", *flags], flags, strict=False):
        name, equals, value = word.partition("=")
        if equals and name in OF_FILES and Path(value).exists():
            word = f"{name}={Path(value).resolve()}"
        elif before in OF_FILES and Path(word).exists():
            word = str(Path(word).resolve())
        found.append(word)
    return found


def _own_flags(words: Sequence[str]) -> list[str]:
    found = []
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word in OURS:
            found += [word, after]
        elif word.partition("=")[0] in OURS:
            found.append(word)
    return found


def _by_hand(script: Path) -> list[str]:
    """Where no launcher is to be seen, as on another node than its own: one rank's, or one that starts as many."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if "SLURM_PROCID" in os.environ and ranks > 1:
        return ["srun", "--ntasks", str(ranks), sys.executable, str(script)]
    if ranks == 1:
        return [sys.executable, str(script)]
    here = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    nodes = ["--num_nodes", str(ranks // here)] if ranks > here else []
    return ["deepspeed", *nodes, "--num_gpus", str(here), str(script)]


def _processes() -> Iterator[list[str]]:
    """Command lines of this process's ancestors, then of the machine's others; none where there is no /proc."""
    above, pid = [], os.getppid()
    while pid > 1:
        above.append(pid)
        pid = _parent(pid)
    others = sorted(int(p.name) for p in Path("/proc").glob("[0-9]*"))
    for pid in dict.fromkeys([*above, *others]):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:
            continue
        if pid in above or _is_of_this_run(words):
            yield words


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _is_of_this_run(words: Sequence[str]) -> bool:
    """Whether a launcher was given this process's own arguments (over ssh it is no ancestor)."""
    own = _own_arguments()
    return bool(own) and list(words[-len(own) :]) == own


def _own_arguments() -> list[str]:
    """What this process was given, without what DeepSpeed's launcher adds."""
    return [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
