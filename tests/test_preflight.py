"""What can be told before anything is loaded is told then: packages, folders, arguments, the hub."""

import http.server
import json
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from PIL import Image

from dmdr_fast import cli, preflight
from dmdr_fast.engine.inputs import build_evaluation
from dmdr_fast.errors import UserError
from dmdr_fast.hub import check_hub

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def parsed(tmp_path, *flags, recipe="digits"):
    return cli.parse(["--config", str(CONFIGS / f"{recipe}.yaml"), "--run_dir", str(tmp_path / "run"), *flags])[0]


def refused(tmp_path, *flags, recipe="digits"):
    config = parsed(tmp_path, *flags, recipe=recipe)
    with pytest.raises(UserError) as raised:
        preflight.check(config)
    return str(raised.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--reward.held_out", "[{kind: classifier, path: /no/where}]"], "held_out: classifier: path: no such"),
        (["--reward.terms", "[{kind: aesthetic, options: {clip: a/b/c}}]"], "aesthetic: clip: no such folder"),
        (["--reward.held_out", "[{kind: pickscore, name: p}]"], "reward.held_out: p reads prompts, and a"),
        (["--reward.terms", "[{kind: classifier}]"], "reward.terms: classifier: expected path"),
        (["--reward.terms", "[{kind: hps, options: {typo: 1}}]"], "reward.terms: hps: its constructor does not take"),
        (["--reward.terms", "[{kind: hps, options: {dtype: fp8}}]"], "options.dtype: expected one of fp32, bf16, fp16"),
        (["--eval.data", "no/where"], "eval.data: no such folder: no/where"),
        (["--eval.data", "/", "--eval.features", "./no"], "eval.features: no such folder: ./no"),
        (["--teacher.weights", "a\0b"], "teacher.weights: no such file"),
        (["--teacher.weights", "a" * 5000], "teacher.weights: no such file"),
        (["--run_dir", "\0"], "run_dir: \0 cannot be written"),
    ],
)  # fmt: skip
def test_told_before_loading(tmp_path, flags, words):
    assert words in refused(tmp_path, *flags)


def test_rewards_of_labels_are_told_of_prompts(tmp_path):
    line = refused(tmp_path, "--reward.held_out", "[{kind: classifier, path: /tmp}]", recipe="scenes")
    assert line.startswith("reward.held_out: classifier reads labels, and a model of prompts has none")


def test_a_method_that_no_update_uses_is_not_looked_at(tmp_path):
    config = parsed(tmp_path, "--train.generator_steps", "500", "--rl.method", "grpo", "--rl.grpo.group_size", "7")
    preflight.check(config)  # 64 samples
    short = ("--train.generator_steps", "60", "--rl.kl_weight", "1", "--reward.terms", "[{kind: scenes_right}]")
    config = parsed(tmp_path, *short, recipe="scenes")
    preflight.check(config)  # no gradient
    assert config.reference_kind is None


def test_too_few_images_for_precision_and_recall_are_told_before_training(tmp_path):
    with pytest.raises(UserError, match=r"eval.samples: 3; precision and recall against eval.data need 4 or more"):
        refused(tmp_path, "--eval.samples", "3")
    parsed(tmp_path, "--eval.samples", "3", "--eval.data", "null")
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    with pytest.raises(UserError, match=r"eval.data: 3 image\(s\) in .*; give 4 or more"):
        build_evaluation(parsed(tmp_path, "--eval.data", str(tmp_path), "--eval.features", "a/b"))


def test_an_evaluation_of_what_is_no_image_is_told_before_training(tmp_path):
    """Latents of four channels without their decoder."""
    words = ["--model.channels", "4", "--teacher.weights", "latent.pt", "--rl.method", "none", "--reward.terms", "[]"]
    words += ["--reward.held_out", "[]", "--eval.data", "null", "--eval.features", "null"]
    parsed(tmp_path, *words)  # nothing is evaluated
    with pytest.raises(UserError, match=r"model.channels: 4; without a decoder the evaluation shows 1 \(grey\) or 3"):
        parsed(tmp_path, *words, "--eval.every", "10")


def test_a_package_that_is_missing_is_told_before_loading(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    assert refused(tmp_path, "--log.wandb", "mine") == (
        "log.wandb: wandb is not installed; pip install wandb, or leave log.wandb out"
    )


def test_rewards_of_scenes_are_told_of_other_prompts_and_sizes(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("below a blue three: a white nine\na fox\n")
    flags = ("--data.prompts", str(prompts), "--teacher.pipeline", str(tmp_path), "--reward.terms", "[{kind: scenes}]")
    with pytest.raises(UserError, match=r"model.resolution: 1024; reward.terms: scenes are of 16 x 16 pixels, set it"):
        refused(tmp_path, *flags, recipe="sd35_large")
    line = refused(tmp_path, *flags, "--reward.held_out", "[]", "--model.resolution", "16", recipe="sd35_large")
    assert f"data.prompts: {prompts}: prompt 'a fox' describes no scene" in line and "the reward scenes reads" in line


def test_the_evaluation_on_scenes_is_told_of_other_prompts_and_sizes(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    flags = ("--reward.terms", "[]", "--reward.held_out", "[]", "--rl.method", "none")
    line = refused(tmp_path, *flags, "--eval.prompts", str(prompts), recipe="scenes")
    assert line.startswith(f"eval.prompts: {prompts}: prompt 'a fox'") and "eval.features scenes read" in line
    for key in ("data", "features"):
        with pytest.raises(UserError, match=rf"eval.{key}: scenes are made of prompts, model.family sit makes images"):
            refused(tmp_path, "--eval.data", "digits", f"--eval.{key}", "scenes")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and a hub that nothing can reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def test_an_unreachable_hub_is_told_once_and_at_once(tmp_path, cache):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    began = time.monotonic()
    line = refused(tmp_path, "--data.prompts", str(prompts), recipe="sd35_large")
    assert time.monotonic() - began < 10  # the imports
    assert "the hub cannot be reached" in line and "its cache lacks" in line


def test_with_all_in_the_cache_the_hub_is_not_needed(cache):
    names = {"teacher.pipeline": ("org/teacher", None), "decoder.path": ("org/vae", None)}
    (cache / "models--org--teacher" / "snapshots" / "1a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"decoder.path: the hub cannot be reached .* its cache lacks org/vae"):
        check_hub(names)
    (cache / "models--org--vae" / "snapshots" / "1a").mkdir(parents=True)
    check_hub(names)
    assert constants.HF_HUB_OFFLINE  # the loaders do not try again


def test_a_repository_that_the_hub_does_not_have(cache, monkeypatch):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"error": "Repository not found"}).encode()
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match=r"teacher.pipeline: the hub does not give org/nothing"):
            check_hub({"teacher.pipeline": ("org/nothing", None)})
        server.shutdown()
