"""Folders and hub ids that a run names, looked at once, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dmdr_fast.built_in import PIPELINES
from dmdr_fast.errors import UserError

REFUSED = (401, 403, 404)  # HTTP: no such repository, or one that this user may not read
TIMEOUT = 10.0  # seconds


def is_hub_id(name: str) -> bool:
    """Whether ``name`` (ORG/NAME, or NAME) is to be asked of the hub: it is no path, and nothing that lies here.

    A built-in name is not.

    Raises:
        FileNotFoundError: it can only be a path, and there is nothing.
    """
    try:
        if name in PIPELINES or Path(name).expanduser().exists():
            return False
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise FileNotFoundError(f"{name[:80]!r} is no path ({error})") from None
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no such folder: {name}")
    return True


def check_hub(names: Mapping[str, tuple[str, str | None]]) -> None:
    """Ask the hub for each (id, revision), by the key that names it; one request, no second try.

    Without a hub, or with HF_HUB_OFFLINE, its cache must have them all; then the loaders do not ask either, who would
    try five times each.

    Raises:
        UserError: the hub does not have one, or cannot be reached and one is not in its cache.
    """
    from huggingface_hub import HfApi, constants

    unreachable = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    for key, (name, revision) in names.items():
        if unreachable is None:
            try:
                HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
                continue
            except Exception as error:  # the hub's errors have no common base
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                if getattr(getattr(error, "response", None), "status_code", None) in REFUSED:
                    raise UserError(
                        f"{key}: the hub does not give {name} ({reason}); check the name, the revision and the access "
                        "token, or give a local folder"
                    ) from None
                unreachable = f"the hub cannot be reached ({reason})"
        if not _is_cached(name, Path(constants.HF_HUB_CACHE)):
            raise UserError(f"{key}: {unreachable} and its cache lacks {name}; give a local folder, or connect")
    if unreachable is not None and not constants.HF_HUB_OFFLINE:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for reward workers; this process has read it already
        constants.HF_HUB_OFFLINE = True


def _is_cached(name: str, cache: Path) -> bool:
    snapshots = cache / f"models--{name.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())
