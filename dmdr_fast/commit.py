"""The commit of a checkout, for what a run writes down of itself."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit(folder: Path, *paths: Path, mark: str = "-dirty") -> str | None:
    """The commit that the Python files of ``folder`` are of, ``mark`` behind it where files have changed since.

    Looked at are the tracked files of ``paths``, or all. None where the folder is in no git repository, as an installed
    package is: one that is installed inside of another project is not its own.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *(map(str, paths) if paths else [":/"]))
        return git("rev-parse", "--short=12", "HEAD") + (mark if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
