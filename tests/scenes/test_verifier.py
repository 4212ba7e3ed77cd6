"""The stored verifiers are those that their command makes."""

import torch
from safetensors import safe_open

from dmdr_fast.scenes.captions import Attributes
from dmdr_fast.scenes.data import evaluation_scenes
from dmdr_fast.scenes.verifier import SEEDS, STEPS, WEIGHTS, fit_verifier, load_verifier, shares_right, windows


def test_windows_are_those_of_the_four_halves():
    image = torch.arange(3 * 256, dtype=torch.float32).view(1, 3, 16, 16)
    cut = windows(image, 8).view(4, 9, 3, 8, 8)
    for place in range(9):
        ahead = slice(place, place + 8)
        for half, (rows, columns) in enumerate(
            ((ahead, slice(0, 8)), (ahead, slice(8, 16)), (slice(0, 8), ahead), (slice(8, 16), ahead))
        ):
            assert torch.equal(cut[half, place], image[0, :, rows, columns])


def test_both_read_real_scenes():
    for shares in shares_right(evaluation_scenes(1000, seed=3)).values():
        assert list(shares) == list(Attributes._fields) and min(shares.values()) > 0.97


def test_the_weights_say_what_made_them():
    with safe_open(WEIGHTS, framework="pt") as file:
        said = file.metadata()
    assert said["command"] == "python -m dmdr_fast.scenes.verifier" and said["steps"] == str(STEPS)
    assert {kind: said[f"seed of {kind}"] for kind in SEEDS} == {kind: str(seed) for kind, seed in SEEDS.items()}
    assert WEIGHTS.stat().st_size < 1_000_000


def test_a_fit_leaves_random_state_and_threads_alone_and_moves_towards_the_scenes():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    first, again = (fit_verifier("held_out_verifier", steps=2).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(1), expected) and torch.get_num_threads() == threads
    stored = load_verifier("held_out_verifier").state_dict()
    assert first.keys() == stored.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and tensor.shape == stored[name].shape
