"""A patched FLUX and a patched Z-Image under ZeRO-3 with every parameter partitioned, for test_zero3. Run as a script.

python zero3_worker.py STORE; exits 0 when outputs and gradients are those of the plain models.
"""

import copy
import os
import sys

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad

import dmdr_fast.patch
from tests.patch.families import FAMILIES, Family, backward, cast, randomised, run

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def main(store: str) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at start-up, for inference only
    deepspeed.init_distributed("gloo")
    for family, weight in (
        (FAMILIES["flux"], "transformer_blocks.0.attn.norm_q.weight"),
        (FAMILIES["z_image"], "layers.0.attention_norm1.weight"),
    ):
        check(family, weight)


def check(family: Family, weight: str) -> None:
    torch.manual_seed(0)
    model = randomised(family.build(1))
    inputs = cast(family.inputs(), torch.float32)
    grad = torch.randn_like(run(model, family, inputs))
    plain = backward(copy.deepcopy(model), family, inputs, grad)

    dmdr_fast.patch(model)
    model.enable_gradient_checkpointing()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=CONFIG)
    # the fused ops read this weight outside of the norm's own forward
    assert model.get_parameter(weight).numel() == 0, "not partitioned"
    output = run(engine, family, inputs)
    torch.testing.assert_close(output, plain["output"])
    engine.backward((output * grad).sum())
    for name, parameter in model.named_parameters():
        if name in plain:
            torch.testing.assert_close(safe_get_full_grad(parameter), plain[name], rtol=1e-3, atol=1e-5, msg=name)


if __name__ == "__main__":
    main(sys.argv[1])
