"""DeepSpeed's JSON: known keys by type, "auto" is ours, what the configuration owns is refused with the key to set."""

import json

import pytest

from dmdr_fast import cli
from dmdr_fast.deepspeed_json import read_deepspeed_json
from dmdr_fast.errors import UserError


@pytest.fixture
def read(tmp_path):
    """read(JSON text or value, *flags) -> the keys that come on top of ours."""

    def keys(content, *flags):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_deepspeed_json(cli.parse([*flags, "--deepspeed.config", str(path)])[0])

    return keys


def zero(**keys):
    return {"zero_optimization": keys}


WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.5, "warmup_max_lr": 0.5, "warmup_num_steps": 10}}
BF16, STAGE3, SHARED_ALL = ("--deepspeed.dtype", "bf16"), ("--deepspeed.stage", "3"), ("--sharing", "shared_all")
ADAMW = {"optimizer": {"type": "AdamW"}}


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ("[1]", (), ["must hold keys and values, got [1]"]),
        ("null", (), ["must hold keys and values, got null"]),
        ("{", (), ["is not a readable JSON file"]),
        ('{"aio": {}, "aio": {}}', (), ["aio is in it twice"]),
        ("[" * 100_000, (), ["is not a readable JSON file"]),
        ({"zero_optimisation": {"stage": 3}}, (), ["zero_optimisation: unknown key", "mean zero_optimization?"]),
        (zero(prefetch_bucket_size=1), (), ["did you mean zero_optimization.stage3_prefetch"]),
        ({"scheduler": WARMUP}, (), ["scheduler", "optimizer.generator.warmup_steps, optimizer.fake.warmup_steps"]),
        ({"bf16": {"enabled": True}}, (), ["bf16.enabled: true", "set deepspeed.dtype"]),
        ({"bf16": {"enabled": False}}, BF16, ["bf16.enabled: false", "set deepspeed.dtype"]),
        ({"fp16": {"enabled": True}}, (), ["fp16.enabled: true", "set deepspeed.dtype"]),
        (zero(stage=2), (), ["zero_optimization.stage: 2", "set deepspeed.stage"]),
        (zero(stage=0), STAGE3, ["zero_optimization.stage: 0", "set deepspeed.stage"]),
        (zero(stage=True), (), ["zero_optimization.stage: expected int; got true"]),
        ({"zero_optimization": True}, (), ["zero_optimization: expected a group of keys; got true"]),
        (zero(reduce_bucket_size=-1), (), ["reduce_bucket_size: expected int > 0; got -1"]),
        (zero(reduce_bucket_size=1.5), (), ["reduce_bucket_size: expected int > 0; got 1.5"]),
        (zero(overlap_comm="yes"), (), ["overlap_comm: expected true | false; got \"yes\""]),
        ({"zero_allow_untested_optimizer": False}, (), ["zero_allow_untested_optimizer: false"]),
        ({"gradient_clipping": 0.5}, (), ["gradient_clipping: 0.5", "set optimizer.clip"]),
        ({"gradient_clipping": True}, (), ["gradient_clipping: expected float; got true"]),
        ({"train_batch_size": 64}, (), ["train_batch_size: 64", "set train.micro_batch_size and train.gradient_acc"]),
        ({"train_micro_batch_size_per_gpu": 3}, (), ["set train.micro_batch_size and leave"]),
        ({"activation_checkpointing": {}}, (), ["activation_checkpointing: set memory.activation"]),
        ({"activation_checkpointing": {"cpu": True}}, (), ["activation_checkpointing: set memory.activation"]),
        ({"optimizer": {"params": {"torch_adam": True}}}, (), ["optimizer.type: missing; expected AdamW"]),
        ({"optimizer": {"type": "Lion"}}, (), ["optimizer.type: expected AdamW; got \"Lion\""]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, (), ["optimizer.params.lr: 1", "optimizer.fake.lr"]),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.1, "x"]}}}, (), ["optimizer.params.betas: expected"]),
        (ADAMW, ("--optimizer.kind", "adamw_8bit"), ["optimizer: set beside optimizer.kind adamw_8bit"]),
        (ADAMW, (*SHARED_ALL, "--student.lora.rank", "4"), ["optimizer: the adapters of sharing shared_all"]),
        (zero(offload_param={"device": "cpu"}), (), ["offload_param: needs deepspeed.stage 3"]),
        (zero(offload_optimizer={"device": "cpu"}), (), ["needs deepspeed.stage 2 or 3, which is 0"]),
        (zero(offload_param={"device": "nvme"}), STAGE3, ["offload_param.nvme_path: missing"]),
        (zero(offload_param={"device": "gpu"}), STAGE3, ["device: expected none | cpu | nvme"]),
    ],
    ids=lambda v: (v if isinstance(v, str) else json.dumps(v))[:50] if isinstance(v, (dict, str)) else "",
)  # fmt: skip
def test_what_cannot_be_is_one_line_that_says_what_to_set(read, content, flags, words):
    with pytest.raises(UserError) as raised:
        read(content, *flags)
    line = str(raised.value)
    assert line.startswith("deepspeed.config: ") and "\n" not in line
    for word in words:
        assert word in line


FP16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
AUTO = {
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "auto"}},
    "scheduler": "auto",
}
OPTIMIZER_AUTO = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "torch_adam": True}}}


@pytest.mark.parametrize(
    ("content", "flags", "kept"),
    [
        ({}, (), {}),
        (AUTO, ("--deepspeed.stage", "2"), {"zero_optimization": {}}),
        (OPTIMIZER_AUTO, (), {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}),
        ({"optimizer": {"type": "auto"}}, (), {}),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, BF16, {"bf16": {}, "fp16": {}}),
        ({"gradient_clipping": 1, "zero_allow_untested_optimizer": True}, (), {}),
        ({"fp16": FP16}, (), {"fp16": {name: value for name, value in FP16.items() if name != "enabled"}}),
        ({"fp16": {"enabled": True}}, ("--deepspeed.dtype", "fp16"), {"fp16": {}}),
        (zero(reduce_bucket_size=5e8), (), zero(reduce_bucket_size=500_000_000)),
        (zero(offload_param={"device": "cpu"}), STAGE3, zero(offload_param={"device": "cpu"})),
    ],
)  # fmt: skip
def test_auto_and_the_same_again_are_ours_and_the_rest_is_passed_on(read, content, flags, kept):
    assert read(content, *flags) == kept
