"""Schedules against their closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from dmdr_fast.algorithm.schedules import (
    RenoiseLaw,
    cosine_decay,
    real_score_lora_scale,
    renoise_beta,
    shift_time,
    timestep_grid,
)


def test_cosine_falls_from_one_through_a_half_to_zero_and_stays():
    assert cosine_decay(0, 100) == 1.0
    assert cosine_decay(50, 100) == pytest.approx(0.5)
    assert cosine_decay(25, 100) == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert cosine_decay(100, 100) == cosine_decay(10**6, 100) == cosine_decay(0, 0) == 0.0


def test_dynadg_scale_is_the_paper_s_cosine():
    assert real_score_lora_scale(0, initial=0.75, dynamic_step=10000) == 0.75
    assert real_score_lora_scale(2500, initial=0.75, dynamic_step=10000) == pytest.approx(
        0.75 * (1 + math.cos(math.pi / 4)) / 2
    )
    assert real_score_lora_scale(10000, initial=0.75, dynamic_step=10000) == 0.0


def test_dynars_goes_from_beta_4_15_to_uniform():
    assert renoise_beta(0, alpha0=4.0, beta0=1.5, dynamic_step=200) == (4.0, 1.5)
    assert renoise_beta(100, alpha0=4.0, beta0=1.5, dynamic_step=200) == pytest.approx((2.5, 1.25))
    assert renoise_beta(200, alpha0=4.0, beta0=1.5, dynamic_step=200) == (1.0, 1.0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_shift_keeps_the_ends_and_multiplies_the_noise_to_data_ratio(shift):
    t = np.linspace(0.05, 0.95, 7)
    shifted = shift_time(t, shift)
    np.testing.assert_allclose(shifted / (1 - shifted), shift * t / (1 - t))
    assert shift_time(0.0, shift) == 0.0 and shift_time(1.0, shift) == 1.0


def test_grid_runs_from_one_to_zero():
    assert timestep_grid(1) == (1.0, 0.0)
    assert timestep_grid(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert timestep_grid(2, shift=3.0) == (1.0, 0.75, 0.0)


@pytest.mark.parametrize(
    ("law", "step", "cdf"),
    [
        (RenoiseLaw("dyna_rs", dynamic_step=100, t_min=0.0, t_max=1.0), 0, stats.beta(4.0, 1.5).cdf),
        (RenoiseLaw("dyna_rs", dynamic_step=100, t_min=0.0, t_max=1.0), 50, stats.beta(2.5, 1.25).cdf),
        (RenoiseLaw("dyna_rs", dynamic_step=100, t_min=0.0, t_max=1.0), 100, stats.uniform().cdf),
        (RenoiseLaw("uniform", t_min=0.02, t_max=0.98), 0, stats.uniform(0.02, 0.96).cdf),
        (
            RenoiseLaw("logit_normal", mean=0.5, std=2.0, t_min=0.0, t_max=1.0),
            0,
            lambda t: stats.norm(0.5, 2.0).cdf(np.log(t / (1 - t))),
        ),
        (
            RenoiseLaw("uniform", t_min=0.0, t_max=1.0, shift=3.0),
            0,
            lambda t: t / (3.0 - 2.0 * t),
        ),
    ],
)
def test_renoise_times_follow_their_law(law, step, cdf):
    drawn = law.draw(np.random.Generator(np.random.Philox(7)), 20_000, step)
    assert drawn.dtype == np.float32
    assert stats.kstest(drawn.astype(np.float64), cdf).pvalue > 1e-3


def test_one_time_per_batch_where_asked():
    drawn = RenoiseLaw("uniform", per="batch").draw(np.random.Generator(np.random.Philox(7)), 5, 0)
    assert drawn.shape == (5,) and len(set(drawn.tolist())) == 1
