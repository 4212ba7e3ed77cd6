"""The shared cache: built once, verified on every hit, never left half-built."""

import hashlib
import json
import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from dmdr_fast.cache import cache_root, cached
from dmdr_fast.errors import UserError


def writer(text: str, calls: list):
    def build(directory: Path) -> None:
        calls.append(text)
        (directory / "nested").mkdir()
        (directory / "nested" / "value.txt").write_text(text)

    return build


def test_cache_root_is_the_variable_then_the_users_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("DMDR_FAST_CACHE", str(tmp_path / "named"))
    assert cache_root() == tmp_path / "named"
    monkeypatch.delenv("DMDR_FAST_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "dmdr_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "dmdr_fast"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_root() == tmp_path / "Library" / "Caches" / "dmdr_fast"


def test_builds_once_per_key_and_names_the_entry_by_the_keys_canonical_json(tmp_path):
    calls = []
    first = cached("teacher", {"steps": 3, "lr": 0.1}, writer("a", calls), root=tmp_path)
    again = cached("teacher", {"lr": 0.1, "steps": 3}, writer("b", calls), root=tmp_path)
    other = cached("teacher", {"lr": 0.1, "steps": 4}, writer("c", calls), root=tmp_path)
    assert first == again != other and calls == ["a", "c"]
    digest = hashlib.sha256(b'{"lr":0.1,"steps":3}').hexdigest()
    assert first == tmp_path / f"teacher-{digest[:16]}"
    assert (first / "nested" / "value.txt").read_text() == "a"
    assert json.loads((first / "key.json").read_text()) == {"lr": 0.1, "steps": 3}


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "nested" / "value.txt").write_text("altered"),
        lambda entry: (entry / "nested" / "value.txt").unlink(),
        lambda entry: (entry / "checksums.json").write_text('{"nested/val'),
        lambda entry: (entry / "checksums.json").write_text("[]"),
        lambda entry: (entry / "key.json").write_text('{"seed":1}'),
    ],
)
def test_a_broken_entry_is_built_again_with_a_line_that_says_so(tmp_path, caplog, damage):
    calls = []
    entry = cached("reward", {"seed": 0}, writer("good", calls), root=tmp_path)
    damage(entry)
    with caplog.at_level(logging.WARNING):
        assert cached("reward", {"seed": 0}, writer("good", calls), root=tmp_path) == entry
    assert calls == ["good", "good"]
    assert "is broken" in caplog.text and str(entry) in caplog.text
    assert (entry / "nested" / "value.txt").read_text() == "good"


def test_a_failed_build_leaves_nothing_and_the_next_one_clears_what_a_killed_one_left(tmp_path):
    def fails(directory):
        (directory / "half").write_text("x")
        raise RuntimeError("the build's own error")

    with pytest.raises(RuntimeError, match="the build's own error"):
        cached("reward", {}, fails, root=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]

    entry = cached("reward", {}, writer("a", []), root=tmp_path)
    killed = tmp_path / f".{entry.name}.12345"
    killed.mkdir()
    (entry / "nested" / "value.txt").unlink()
    cached("reward", {}, writer("a", []), root=tmp_path)
    assert not killed.exists()


def build_slowly(root: str) -> str:
    def build(directory: Path) -> None:
        time.sleep(0.3)
        with (Path(root) / "builds").open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        (directory / "value").write_text("1")

    return str(cached("shared", {"seed": 0}, build, root=Path(root)))


def test_ranks_that_ask_at_the_same_time_build_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(build_slowly, [str(tmp_path)] * 2, chunksize=1)
    assert first == second
    assert len((tmp_path / "builds").read_text().split()) == 1


def test_a_hit_needs_no_write(tmp_path, monkeypatch):
    entry = cached("reward", {"seed": 0}, writer("a", []), root=tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert cached("reward", {"seed": 0}, refuse, root=tmp_path) == entry
    with pytest.raises(UserError, match="Permission denied"):
        cached("reward", {"seed": 1}, refuse, root=tmp_path)


def test_an_unwritable_cache_and_wrong_arguments_are_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the cache .*file/cache: Not a directory.*DMDR_FAST_CACHE"):
        cached("reward", {}, writer("a", []), root=tmp_path / "file" / "cache")
    with pytest.raises(ValueError, match="kind: expected letters"):
        cached("../reward", {}, writer("a", []), root=tmp_path)
    with pytest.raises(ValueError, match="wrote no file"):
        cached("reward", {}, lambda directory: None, root=tmp_path)
