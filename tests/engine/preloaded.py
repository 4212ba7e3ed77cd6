"""What runs import late, imported once in the server that they are forked from; the last module of its list."""

import gc

import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  calls torch.compile as it is imported
from diffusers import (  # noqa: F401
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast  # noqa: F401

# ZeRO-3 collects garbage for every engine: without this each run would walk (and copy) all that was imported.
gc.collect()
gc.freeze()
