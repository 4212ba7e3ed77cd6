"""Plans on the CPU kernels: a call of a signature that is known gives what a first call gives."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dmdr_fast import ops, reference
from dmdr_fast.ops._library import RAW
from tests.cases import OPS, SEED, valid_calls
from tests.ops.test_transforms import results


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setenv("DMDR_FAST_BACKEND", "cpu")
    forget()


def forget() -> None:
    for raw in RAW.values():
        raw.plans.clear()


def planned() -> int:
    return sum(len(raw.plans) for raw in RAW.values())


def computed(op: str, call: dict) -> list[Tensor]:
    """Results and gradients, as copies."""
    leaves = {name: value.detach().requires_grad_() for name, value in call.items() if name in OPS[op].wrt.split()}
    out = results(getattr(ops, op)(**call | leaves))
    roots = [part for part in out if isinstance(part, Tensor) and part.requires_grad]
    above = [torch.linspace(-1, 1, root.numel()).view(root.shape).to(root) for root in roots]
    grads = torch.autograd.grad(roots, list(leaves.values()), above) if roots else ()
    return [part.detach().clone() for part in (*out, *grads) if isinstance(part, Tensor)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def other_values(call: dict) -> dict:
    """Tensors elsewhere with other numbers, of the same signature."""
    return {
        name: moved(value).mul_(0.7 if value.is_floating_point() else 1) if isinstance(value, Tensor) else value
        for name, value in call.items()
    }


def moved(value: Tensor, by: int = 0) -> Tensor:
    """A copy with the strides and the alignment of ``value``, ``by`` elements further."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    start = by + value.data_ptr() % 16 // value.element_size()
    return torch.zeros(extent + start, dtype=value.dtype).as_strided(value.shape, value.stride(), start).copy_(value)


def cropped(value: Tensor) -> Tensor:
    """Rows with a gap between them."""
    wide = torch.zeros(*value.shape[:-1], value.shape[-1] + 8, dtype=value.dtype)
    wide[..., : value.shape[-1]] = value
    return wide[..., : value.shape[-1]]


def transposed(value: Tensor) -> Tensor:
    """Of which a kernel may want a copy."""
    return value.mT.contiguous().mT if value.dim() > 2 else value


def behind(value: Tensor) -> Tensor:
    """A copy that is not the first thing in its memory."""
    return torch.cat((value.new_zeros(16), value.flatten()))[16:].view(value.shape)


def misaligned(value: Tensor) -> Tensor:
    copy = moved(value, 1)
    assert copy.data_ptr() % 16
    return copy


@pytest.mark.parametrize("layout", [Tensor.contiguous, cropped, transposed, misaligned])
@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_known_signature_with_other_tensors(op, dtype, layout):
    call = {
        name: layout(value) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in valid_calls(dtype)[op].items()
    }
    first = computed(op, call)
    known, other = planned(), other_values(call)
    second = computed(op, other)
    by_plan = ops.explain(op, **call).backend == "cpu" and layout is not transposed
    assert planned() == known and (known > 0 or not by_plan)
    forget()
    same(second, computed(op, other))
    same(first, computed(op, call))


def test_one_tensor_for_two_arguments_and_later_two():
    x, other = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    vector, scale = torch.randn(2, 8), torch.randn(2, 8)
    ops.gated_residual(x, x, vector)
    torch.testing.assert_close(ops.gated_residual(x, other, vector), x + vector.unsqueeze(1) * other)
    ops.layer_norm_modulate(x, vector, vector)
    known = ops.layer_norm_modulate(x, vector, scale)
    forget()
    same([known], [ops.layer_norm_modulate(x, vector, scale)])


@pytest.mark.parametrize("op", sorted(OPS))
def test_meta_tensors_of_a_known_signature(op):
    call = valid_calls()[op]
    computed(op, call)
    # Not at the start of their storage: there the pointer of a meta tensor is not 0.
    tensors = {name: behind(value.to("meta")) for name, value in call.items() if isinstance(value, Tensor)}
    assert all(part.is_meta for part in results(getattr(ops, op)(**call | tensors)) if isinstance(part, Tensor))
    for name in list(tensors)[1:]:
        with pytest.raises(ValueError, match=name):
            getattr(ops, op)(**call | {name: tensors[name]})


def test_a_constant_that_requires_grad_later():
    call = valid_calls()["multi_lora"]
    ops.multi_lora(**call)
    with pytest.raises(ValueError, match="scale: expected a constant"):
        ops.multi_lora(**call | {"scale": call["scale"].requires_grad_()})


@pytest.mark.parametrize("op", sorted(op for op, about in OPS.items() if about.wrt))
def test_backward_twice_through_one_graph(op):
    call = valid_calls()[op]
    leaves = {name: call[name].clone().requires_grad_() for name in OPS[op].wrt.split()}
    for _ in range(2):  # the second time by plan
        out = [part for part in results(getattr(ops, op)(**call | leaves)) if isinstance(part, Tensor)]
        roots = [part for part in out if part.requires_grad]
        above = [torch.randn_like(root) for root in roots]
        once, again = (torch.autograd.grad(roots, list(leaves.values()), above, retain_graph=True) for _ in range(2))
        kept = [grad.clone() for grad in once]
        same(once, again)
        torch.autograd.grad(roots, list(leaves.values()), [2 * grad for grad in above])
        same(once, kept)


def test_two_threads_at_once():
    gate = torch.randn(2, 64)
    tensors = [(torch.randn(2, 40, 64), torch.randn(2, 40, 64)) for _ in range(2)]
    truth = [x + gate.unsqueeze(1) * h for x, h in tensors]
    start, wrong = threading.Barrier(2), []

    def call(index: int) -> None:
        start.wait()
        for _ in range(200):
            if not torch.allclose(ops.gated_residual(*tensors[index], gate), truth[index], atol=1e-6):
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and planned() == 1


def test_the_backend_may_change_between_calls(monkeypatch):
    ran, run = [], reference.run
    monkeypatch.setattr(reference, "run", lambda name, args: ran.append(name) or run(name, args))
    packed = torch.randn(2, 8)
    for backend, by_reference in (("cpu", 0), ("reference", 1), ("cpu", 1), ("auto", 1), ("reference", 2)):
        monkeypatch.setenv("DMDR_FAST_BACKEND", backend)
        ops.silu_mul(packed)
        assert len(ran) == by_reference


@pytest.mark.parametrize("offset", [0, 1, 3, 4097, 2**31 - 1, 2**31, 2**31 + 5, 2**33 + 7])
def test_the_offset_of_noise_is_read_at_every_call(offset):
    x, zero, one = torch.zeros(2, 3, 5), torch.zeros(2), torch.ones(2)
    for start in (0, 1, 2**31, 2**32 + 6):  # plans of other offsets are known
        ops.normal_noise(x, SEED, offset=start)
        ops.renoise(x, zero, one, seed=SEED, offset=start)
    exact = ops.normal_noise(x.double(), SEED, offset=offset)
    for _ in range(2):
        for noise in (ops.normal_noise(x, SEED, offset=offset), ops.renoise(x, zero, one, seed=SEED, offset=offset)):
            torch.testing.assert_close(noise.double(), exact, rtol=0, atol=2e-6)


def test_the_number_of_threads_may_change_between_calls():
    x, weight = torch.randn(4, 64, 128), torch.randn(128)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            first = computed("layer_norm_modulate", {"x": x, "shift": weight, "scale": weight})
            same(first, computed("layer_norm_modulate", {"x": x, "shift": weight, "scale": weight}))
            exact = torch.nn.functional.layer_norm(x.double(), (128,), eps=1e-6) * (1 + weight.double()) + weight
            torch.testing.assert_close(first[0].double(), exact, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", [*sorted(OPS), "renoise of 8 MiB"])
def test_a_plan_keeps_no_tensor_of_its_first_call(op):
    call = valid_calls().get(op)
    if call is None:  # so large that fresh pages are asked for
        op, half = "renoise", torch.full((8,), 0.5)
        call = {"x0": torch.randn(8, 4, 256, 256), "alpha": half, "sigma": half, "seed": SEED}
    call = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}
    kept = [StorageWeakRef(value.untyped_storage()) for value in call.values() if isinstance(value, Tensor)]
    kept += [StorageWeakRef(value.untyped_storage()) for value in computed(op, call)]
    del call
    gc.collect()
    assert all(storage.expired() for storage in kept if storage.cdata)
