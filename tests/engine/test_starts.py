"""``student.weights`` and ``fake.weights``: a role starts from another run, a file, or another trainer's checkpoint."""

import deepspeed
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from dmdr_fast.cli import parse
from dmdr_fast.engine import runtime
from dmdr_fast.engine.checkpoint import stored_role
from dmdr_fast.engine.pipeline_model import PipelineModel
from dmdr_fast.engine.sit_model import build_network
from dmdr_fast.engine.starts import read_starts
from dmdr_fast.errors import UserError
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.lora_export import diffusers_lora
from tests.tiers import sampled

from .conftest import SMALL
from .pipeline_runs import config_of
from .test_errors import refused

FINAL = "final/generator.safetensors"
STILL = ["--train.cold_start_steps", "1", "--train.generator_steps", "1", "--optimizer.generator.lr", "1e-30"]
STILL += ["--optimizer.fake.lr", "1e-30"]


@pytest.fixture(scope="module")
def other(run, tmp_path_factory):
    """Another run, whose generator and fake score have moved."""
    folder = tmp_path_factory.mktemp("starts") / "other"
    code, _, err = run(["--train.cold_start_steps", "2", "--train.generator_steps", "3", "--run_dir", folder])
    assert code == 0, err
    return folder


def same(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=0, atol=1e-12) for n in a)


@pytest.mark.parametrize(
    "place", sampled(["checkpoints/step_00000002", "", "cold_start", "cold_start/generator.safetensors"])
)
def test_a_run_starts_from_another_run(run, other, tmp_path, place):
    checkpoint = other / "checkpoints" / ("step_00000003" if place == "" else "step_00000002")
    starts = ["--student.weights", other / place, "--fake.weights", checkpoint]
    code, _, err = run([*STILL, *starts, "--run_dir", tmp_path / "run"])
    assert code == 0, err
    want = load_file(other / (FINAL if place == "" else "cold_start/generator.safetensors"))
    assert same(load_file(tmp_path / "run" / FINAL), want)
    fake = stored_role(tmp_path / "run" / "checkpoints" / "step_00000001", "fake").whole()
    assert same(fake, stored_role(checkpoint, "fake").whole())
    if place == "":  # it goes on without them, and refuses others
        code, out, err = run([*STILL, *starts, "--run_dir", tmp_path / "run", "--train.generator_steps", "2"])
        assert code == 0 and "step 1" in out, err
        line = refused(*run([*STILL, *starts[:2], "--run_dir", tmp_path / "run"])[::2])
        assert "fake.weights '" in line and "this run has None" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--student.weights", "nowhere"], ["student.weights: no such file or folder: nowhere"]),
        (["--fake.weights", "final"], ["fake.weights: ", "holds no adapter"]),
        (["--fake.weights", "run", "--lora.rank", "3"], ["fake.weights: ", "expected [32, 3], got [32, 4]"]),
        (["--student.weights", "final", "--student.lora.rank", "2"], ["student.weights: ", "holds no adapter"]),
        (["--student.weights", "final", "--model.depth", "3"], ["student.weights: ", "lacks blocks.2."]),
    ],
    ids=lambda v: v[-2].strip("-") if str(v[0]).startswith("--") else "",
)
def test_what_does_not_fit_is_one_line(run, other, tmp_path, arguments, words):
    places = {"final": other / FINAL, "run": other}
    line = refused(*run([*STILL, *[places.get(w, w) for w in arguments], "--run_dir", tmp_path])[::2])
    for word in words:
        assert word in line


class Reference(torch.nn.Module):
    """The names of the DMDR reference's SiT with its adapter on q and v, rank 3."""

    def __init__(self, network):
        super().__init__()
        for name, parameter in network.named_parameters():
            self._put(name, parameter.detach().clone())
        draw = torch.Generator().manual_seed(1)
        for block in range(2):
            for part, shape in (("QA", (32, 3)), ("QB", (3, 32)), ("VA", (32, 3)), ("VB", (3, 32))):
                self._put(f"blocks.{block}.attn.lora.lora_{part}", torch.randn(shape, generator=draw))

    def _put(self, name, value):
        *path, leaf = name.split(".")
        module = self
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(value, requires_grad="lora" in name))


def test_the_references_own_checkpoint(tmp_path):
    """Written by DeepSpeed at stage 2, as its trainer does: q + s (q A_q) B_q and v + s (v A_v) B_v of qkv's output."""
    ranks = runtime.start()
    config = parse([*SMALL, "--lora.form", "post_projection", "--run_dir", str(tmp_path)])[0]
    network = build_network(config)
    reference = Reference(network)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    settings["zero_allow_untested_optimizer"] = True
    trained = [p for p in reference.parameters() if p.requires_grad]
    engine = deepspeed.initialize(
        model=reference, model_parameters=trained, optimizer=torch.optim.AdamW(trained), config=settings
    )[0]
    engine.save_checkpoint(str(tmp_path), tag="pytorch_model", save_latest=False)
    file = tmp_path / "pytorch_model" / "mp_rank_00_model_states.pt"
    named = {"student": {"weights": str(file)}, "fake": {"weights": str(file)}}
    config = config.model_copy(update={n: getattr(config, n).model_copy(update=v) for n, v in named.items()})
    start = read_starts(config, ranks)["fake"]
    adapter = add_lora(network, "fake", rank=3, targets=["attn.qkv"], form="post_projection")
    start.fill(adapter, 1.0)
    adapter.set_scale(2.0)
    x, qkv = torch.randn(5, 32), network.blocks[1].attn.qkv
    q, k, v = torch.nn.functional.linear(x, qkv.weight, qkv.bias).chunk(3, -1)
    lora = reference.get_submodule("blocks.1.attn.lora")
    q = q + 2.0 * q @ (lora.lora_QA @ lora.lora_QB)
    v = v + 2.0 * v @ (lora.lora_VA @ lora.lora_VB)
    torch.testing.assert_close(qkv(x), torch.cat([q, k, v], -1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="holds weights and an adapter beside them"):
        read_starts(config, ranks)["generator"].over(dict)


@pytest.mark.parametrize("names", ["ours", "PEFT", "diffusers", "with alphas"])
def test_an_adapter_starts_from_a_file_of_another_maker(tmp_path, names):
    """A pipeline's generator, as an adapter at scale 0.5 and merged into whole weights, from four kinds of file."""
    ranks = runtime.start()
    config = config_of("z_image", tmp_path, tmp_path / "run", student__lora__rank=2)
    model, cpu = PipelineModel.open(config), torch.device("cpu")
    network = model.load(cpu)
    adapter = add_lora(network, "made", rank=2, targets=model.lora_targets)
    draw = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    values = {n.removeprefix("transformer."): p.detach().clone() for n, p in adapter.named_parameters()}
    file = tmp_path / "adapter.safetensors"
    if names == "ours":
        save_file({f"transformer.{n}": t for n, t in values.items()}, file, metadata={"lora_scale": "1.5"})
    elif names == "PEFT":
        layers = sorted({n.rpartition(".")[0] for n in values})
        net = peft.get_peft_model(
            model.load(cpu).transformer, peft.LoraConfig(r=2, lora_alpha=3, target_modules=layers)
        )
        for name, parameter in net.named_parameters():
            if ".lora_" in name:
                own = name.removeprefix("base_model.model.").removesuffix(".default.weight")
                parameter.data.copy_(values[own].T)
        net.save_pretrained(tmp_path / "peft")
        file = tmp_path / "peft" / "adapter_model.safetensors"
    elif names == "diffusers":
        save_file({f"transformer.{n}": t for n, t in diffusers_lora(adapter, 1.5).items()}, file)
    else:
        layers = sorted({n.rpartition(".")[0] for n in values})
        alpha = {f"transformer.{layer}.alpha": torch.tensor(3.0) for layer in layers}  # 3 / rank 2 = 1.5
        save_file({f"transformer.{n}.weight": t.T.contiguous() for n, t in values.items()} | alpha, file)
    config = config.model_copy(update={"student": config.student.model_copy(update={"weights": str(file)})})
    start = read_starts(config, ranks)["generator"]
    other = add_lora(model.load(cpu), "generator", rank=2, targets=model.lora_targets)
    start.fill(other, 0.5)
    got = {n.removeprefix("transformer."): p.detach() for n, p in other.named_parameters()}
    for layer in {n.rpartition(".")[0] for n in values}:
        a, b = (values[f"{layer}.lora_{f}"] for f in "AB")
        delta = 0.5 * got[f"{layer}.lora_A"] @ got[f"{layer}.lora_B"]
        torch.testing.assert_close(delta, 1.5 * a @ b)
    merged = model.load(cpu, start).state_dict()
    layer = sorted({n.rpartition(".")[0] for n in values})[0]
    plain = model.load(cpu).state_dict()[f"transformer.{layer}.weight"]
    want = plain + 1.5 * (values[f"{layer}.lora_A"] @ values[f"{layer}.lora_B"]).T
    torch.testing.assert_close(merged[f"transformer.{layer}.weight"], want, rtol=1e-5, atol=1e-6)


def test_a_run_without_a_checkpoint_is_no_start(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    config = parse([*SMALL, "--fake.weights", str(tmp_path), "--run_dir", str(tmp_path / "run")])[0]
    with pytest.raises(UserError, match="has no checkpoint yet"):
        read_starts(config, runtime.start())
