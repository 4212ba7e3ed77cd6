"""Paths with ``~``, and text under whatever locale."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from dmdr_fast import cli
from dmdr_fast.config import Config
from dmdr_fast.deepspeed_json import read_deepspeed_json
from dmdr_fast.errors import UserError

from .engine.conftest import TRAIN

KEYS = ("run_dir", "resume", "teacher.weights", "teacher.pipeline", "decoder.path", "data.prompts", "data.cache")
KEYS += ("student.weights", "fake.weights", "deepspeed.config", "eval.prompts", "eval.data", "eval.features")
WHOLE = "teacher: {weights: w.pt}\nrl: {method: none}\n"  # a configuration that lacks nothing
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("key", KEYS)
def test_the_users_folder_in_every_path(home, key):
    section, _, name = key.rpartition(".")
    group = (
        Config.model_fields[section].annotation.model_validate({name: "~/a"})
        if section
        else cli.parse([f"--{key}", "~/a"])[0]
    )
    assert str(getattr(group, name)) == f"{home}/a"
    with pytest.raises(UserError, match=rf"^{key}: nobody's home folder: ~nobody-of-this-name/a; write \./"):
        cli.parse([f"--{key}", "~nobody-of-this-name/a"])


def test_the_users_folder_in_lists_and_files(home, tmp_path, monkeypatch):
    terms = cli.parse(["--reward.terms", '[{kind: "~/r.py:Mine", path: "~/w"}]'])[0].reward.terms
    assert (terms[0].kind, terms[0].path) == (f"{home}/r.py:Mine", f"{home}/w")
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "~/nvme"}}
    (home / "ds").mkdir(parents=True)
    (home / "ds" / "z.json").write_text(json.dumps({"zero_optimization": zero}))
    config = cli.parse(["--deepspeed.stage", "3", "--deepspeed.config", "~/ds/z.json"])[0]
    assert read_deepspeed_json(config)["zero_optimization"]["offload_param"]["nvme_path"] == f"{home}/nvme"
    (home / "run.yaml").write_text(f"{WHOLE}seed: 7\n")
    assert cli.parse(["--config", "~/run.yaml"])[0].seed == 7
    assert cli.user_path("~/out") == home / "out"


def test_no_path_is_forgotten():
    paths = {name for name, field in cli.leaves() if "path" in cli.accepted(field).split()}
    assert paths and paths <= set(KEYS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_yaml_is_unicode_under_any_locale(tmp_path, encoding):
    file = tmp_path / "r.yaml"
    file.write_bytes(
        ("# größer\nteacher: {weights: w.pt}\nrl: {method: none}\ndata: {negative_prompt: 'häßlich 猫'}\n").encode(
            encoding
        )
    )
    words = [sys.executable, str(TRAIN), "--config", str(file), "--data.key", "Überschrift", "--print-config"]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("LC_")} | ASCII
    done = subprocess.run(words, env=environment, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    data = yaml.safe_load(done.stdout.decode())["data"]
    assert (data["negative_prompt"], data["key"]) == ("häßlich 猫", "Überschrift")


def test_a_name_that_the_locale_does_not_have_is_one_line(tmp_path):
    (tmp_path / "r.yaml").write_text("run_dir: 'größer/run'\nmodel: {family: größer}\n", encoding="utf-8")
    words = [sys.executable, str(TRAIN), "--config", str(tmp_path / "r.yaml")]
    for more in ([], ["--model.family", "sit"], ["--model.family", "sit", "--data.prompts", "größer.txt"]):
        done = subprocess.run(
            [*words, *more], env=os.environ | ASCII, capture_output=True, check=False, timeout=60, cwd=tmp_path
        )
        lines = done.stderr.decode("ascii").splitlines()
        assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
