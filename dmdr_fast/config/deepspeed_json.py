"""The keys that a DeepSpeed JSON may have here, with their types and bounds.

The defaults are DeepSpeed's own and are not passed on: only what a file sets is.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dmdr_fast.config.base import Place

# 5e8 is a float in JSON.
Elements = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)]
Count = Annotated[Elements, Field(ge=0)]
Positive = Annotated[Elements, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class OffloadParameters(_Group):
    """ZeRO-3's parameters on the host or on NVMe."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: Place | None = None
    buffer_count: Count = 5
    buffer_size: Count = 10**8
    max_in_cpu: Count = 10**9
    pin_memory: bool = True


class OffloadOptimizer(_Group):
    """The optimizer's state and step on the host."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: Place | None = None
    buffer_count: Count = 4
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: Share = 1.0


class Zero(_Group):
    """How ZeRO moves what it shards."""

    stage: Elements = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Positive = 5 * 10**8
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Count = 5 * 10**8
    overlap_comm: bool = True
    round_robin_gradients: bool = False
    ignore_unused_parameters: bool = True
    sub_group_size: Count = 10**9
    offload_param: OffloadParameters = OffloadParameters()
    offload_optimizer: OffloadOptimizer = OffloadOptimizer()
    stage3_prefetch_bucket_size: Count = 5 * 10**7
    stage3_param_persistence_threshold: Count = 10**5
    stage3_model_persistence_threshold: Count = 2**63 - 1
    stage3_max_live_parameters: Count = 10**9
    stage3_max_reuse_distance: Count = 10**9
    stage3_module_granularity_threshold: Count = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    stage3_gather_16bit_weights_on_model_save: bool = False
    zero_hpz_partition_size: Positive = 1
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = True
    log_trace_cache_warnings: bool = False


class OptimizerParameters(_Group):
    """What DeepSpeed's AdamW takes beside the numbers of ``optimizer.generator`` and ``optimizer.fake``."""

    lr: float = 0.0
    betas: list[float] = []
    eps: float = 0.0
    weight_decay: float = 0.0
    torch_adam: bool = False
    bias_correction: bool = True
    fp32_optimizer_states: bool = True


class DeepSpeedOptimizer(_Group):
    """DeepSpeed's own AdamW in place of torch's: on the host where the optimizer is offloaded."""

    type: Literal["AdamW"]
    params: OptimizerParameters = OptimizerParameters()


class Enabled(_Group):
    enabled: bool = False


class LossScale(Enabled):
    """fp16: the scale of the losses; ``loss_scale`` 0 is a dynamic one."""

    loss_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    initial_scale_power: Elements = 16
    loss_scale_window: Positive = 1000
    hysteresis: Positive = 1
    consecutive_hysteresis: bool = False
    min_loss_scale: Positive = 1


class AsyncIO(_Group):
    """Reading and writing NVMe."""

    block_size: Positive = 2**20
    queue_depth: Positive = 8
    intra_op_parallelism: Positive = 1
    single_submit: bool = False
    overlap_events: bool = True


class DataTypes(_Group):
    grad_accum_dtype: Literal["fp32", "bf16"] = "fp32"


class FlopsProfiler(_Group):
    enabled: bool = False
    profile_step: Positive = 1
    module_depth: Elements = -1
    top_modules: Positive = 1
    detailed: bool = True
    output_file: Place | None = None


class CommsLogger(_Group):
    enabled: bool = False
    verbose: bool = False
    prof_all: bool = True
    debug: bool = False


class DeepSpeedJSON(_Group):
    """The keys that a DeepSpeed JSON may have here."""

    zero_optimization: Zero = Zero()
    optimizer: DeepSpeedOptimizer | None = None
    bf16: Enabled = Enabled()
    fp16: LossScale = LossScale()
    aio: AsyncIO = AsyncIO()
    data_types: DataTypes = DataTypes()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    comms_logger: CommsLogger = CommsLogger()
    train_batch_size: Elements = 0
    train_micro_batch_size_per_gpu: Elements = 0
    gradient_accumulation_steps: Elements = 0
    gradient_clipping: float = 0.0
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    communication_data_type: Literal["fp32", "bf16", "fp16"] = "fp32"
    prescale_gradients: bool = False
    gradient_predivide_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    steps_per_print: Positive = 10
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
