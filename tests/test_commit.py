"""Which version a report says that a run was of."""

import subprocess

from dmdr_fast.commit import commit


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_commit_is_that_of_the_packages_own_files(tmp_path):
    package, installed = tmp_path / "package", tmp_path / "environment" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    assert commit(package) is None
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("environment\n")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is not the commit")
    head = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert commit(package) == head
    (package / "__init__.py").write_text("changed")
    assert commit(package) == f"{head}-dirty"
    assert commit(installed) is None  # of another project's environment


def test_the_commit_needs_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None
