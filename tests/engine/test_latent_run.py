"""The ImageNet recipe's path at a small size: SiT on VAE latents, a DINOv2 classifier reward, weights from disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "sit_xl_256.yaml"
CLASSES, RESOLUTION = 6, 32


def save_classifier(path, seed):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification

    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, num_labels=CLASSES
    )
    Dinov2ForImageClassification(config).save_pretrained(path)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A VAE with sd-vae's factor 8 and 4 channels, two classifiers, a SiT checkpoint and a folder of images."""
    from diffusers import AutoencoderKL

    from dmdr_fast.models.sit import SiT

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, layers_per_block=1, **blocks
    )
    vae.save_pretrained(root / "vae")
    sit = SiT(input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=CLASSES)
    torch.nn.init.normal_(sit.final_layer.linear.weight, std=0.1)
    torch.save({"ema": sit.state_dict()}, root / "sit.pt")
    save_classifier(root / "reward", 1)
    save_classifier(root / "features", 2)
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
    return root


def arguments(models, run_dir):
    sizes = {"resolution": RESOLUTION, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    flags = {f"model.{k}": v for k, v in sizes.items()} | {
        "run_dir": run_dir,
        "teacher.weights": models / "sit.pt",
        "decoder.path": models / "vae",
        "reward.terms": f"[{{kind: classifier, path: {models / 'reward'}}}]",
        "rl.refl.chunk": 2,
        "train.cold_start_steps": 1,
        "train.generator_steps": 3,
        "train.fake_updates": 2,
        "train.micro_batch_size": 4,
        "lora.rank": 4,
        "deepspeed.stage": 3,
        "eval.samples": 24,
        "eval.batch_size": 8,
        "eval.teacher_steps": 3,
        "eval.data": models / "images",
        "eval.features": models / "features",
        "teacher.sample_cfg_scale": 1.5,
        "export.dtype": "bf16",
        "log.every": 1,
    }
    return ["--config", CONFIG, *(w for k, v in flags.items() for w in (f"--{k}", str(v)))]


def test_latents_vae_classifier_reward_and_evaluation(run, models, tmp_path):
    code, _, err = run(arguments(models, tmp_path), small=False)
    assert code == 0, err
    table = json.loads((tmp_path / "metrics.json").read_text())
    assert list(table) == ["teacher", "teacher_no_cfg", "teacher_n", "cold_start", "dmdr"]
    assert [row["nfe"] for row in table.values()] == [6, 3, 2, 1, 1]
    assert all(row.pop("held_out_reward") is None for row in table.values())
    assert all(np.isfinite(list(row.values())).all() for row in table.values())
    assert {t.dtype for t in load_file(tmp_path / "final/generator.safetensors").values()} == {torch.bfloat16}
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ["reward" in record for record in log] == [False, True, True]
    assert log[1]["reward"] < 0.0  # a log probability
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_a_classifier_of_other_classes_is_refused(run, models, tmp_path):
    words = arguments(models, tmp_path)
    words[words.index("--model.num_classes") + 1] = "7"
    code, _, err = run(words, small=False)
    assert code == 2 and "Traceback" not in err
    assert "model.num_classes to 6" in err


def test_missing_evaluation_features_are_an_error_before_training(run, models, tmp_path):
    words = arguments(models, tmp_path)
    words[words.index("--eval.features") + 1] = str(models / "nothing")
    code, _, err = run(words, small=False)
    assert code == 2 and "Traceback" not in err and "nothing" in err
    assert not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text()
