"""Telemetry against a fake NVML whose readings are known."""

import logging
import mmap
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from dmdr_fast.engine import runtime
from dmdr_fast.engine.telemetry import Telemetry


class FakeNVML:
    """As much of pynvml as the telemetry reads, in NVML's units; ``broken`` names calls that fail."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken=()):
        self.broken = set(broken)
        self.energy_mj = 5_000_000
        self.asked_uuid = None

    def _read(self, call, value):
        if call in self.broken:
            raise self.NVMLError(f"{call}: Not Supported")
        return value

    def nvmlInit(self):
        self._read("nvmlInit", None)

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked_uuid = uuid
        return self._read("nvmlDeviceGetHandleByUUID", "handle")

    def nvmlDeviceGetUtilizationRates(self, gpu):
        assert gpu == "handle"
        return self._read("utilisation", SimpleNamespace(gpu=87, memory=12))

    def nvmlDeviceGetPowerUsage(self, gpu):
        return self._read("power", 412_500)

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return self._read("memory", SimpleNamespace(total=80 << 30, used=7 << 30, free=73 << 30))

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        return self._read("energy", self.energy_mj)


@pytest.fixture
def with_nvml(monkeypatch):
    """Installs a fake pynvml and one CUDA device with a UUID."""

    def install(**kwargs):
        nvml = FakeNVML(**kwargs)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"1234-{device.index}")
        )
        return nvml

    return install


CUDA = torch.device("cuda", 3)


def test_gpu_figures_in_their_units_and_energy_since_start(with_nvml):
    nvml = with_nvml()
    telemetry = Telemetry(CUDA)
    assert nvml.asked_uuid == "GPU-1234-3"
    nvml.energy_mj += 90_000
    figures = telemetry.sample(samples=0)
    assert figures["gpu_utilisation_percent"] == 87
    assert figures["gpu_power_watts"] == 412.5
    assert figures["gpu_memory_bytes"] == 7 * 2**30
    assert figures["gpu_energy_joules"] == 90
    assert "gpu_joules_per_1000_samples" not in figures
    nvml.energy_mj += 60_000
    assert telemetry.sample(samples=600)["gpu_joules_per_1000_samples"] == 250
    assert all(type(value) is float for value in figures.values())


def test_a_figure_the_board_does_not_report_is_left_out_and_said_once(with_nvml, caplog):
    with_nvml(broken={"utilisation", "energy"})
    with caplog.at_level(logging.WARNING):
        telemetry = Telemetry(CUDA)
        names = [set(telemetry.sample(10)) for _ in range(3)]
    assert names == [{"gpu_power_watts", "gpu_memory_bytes", "host_memory_bytes", "host_peak_memory_bytes"}] * 3
    assert sorted(r.getMessage().split()[1] for r in caplog.records) == ["energy", "gpu_utilisation_percent"]


def test_a_gpu_lost_while_training_does_not_stop_it(with_nvml):
    nvml = with_nvml()
    telemetry = Telemetry(CUDA)
    telemetry.sample(1)
    nvml.broken = {"utilisation", "power", "memory", "energy"}
    assert set(telemetry.sample(2)) == {"host_memory_bytes", "host_peak_memory_bytes"}


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_without_a_driver_or_on_an_unknown_device_only_the_host_is_read(with_nvml, caplog, broken):
    with_nvml(broken={broken})
    with caplog.at_level(logging.WARNING):
        assert set(Telemetry(CUDA).sample(1)) == {"host_memory_bytes", "host_peak_memory_bytes"}
    assert "no GPU figures" in caplog.text


def test_without_pynvml_only_the_host_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import raises ImportError
    assert set(Telemetry(CUDA).sample(1)) == {"host_memory_bytes", "host_peak_memory_bytes"}


def test_host_memory_is_this_processs_resident_set_and_the_peak_stays():
    telemetry = Telemetry(torch.device("cpu"))
    before = telemetry.sample(1)
    with mmap.mmap(-1, 2**27) as held:  # not from the heap, which may have as much that is free and resident
        for page in range(0, 2**27, mmap.PAGESIZE):
            held[page] = 1
        during = telemetry.sample(1)
    assert during["host_memory_bytes"] - before["host_memory_bytes"] > 100 * 2**20
    after = telemetry.sample(1)
    assert after["host_peak_memory_bytes"] >= during["host_memory_bytes"] * 0.99
    assert after["host_peak_memory_bytes"] < psutil.virtual_memory().total


def test_a_process_that_cannot_be_read_does_not_stop_training(monkeypatch):
    telemetry = Telemetry(torch.device("cpu"))

    def refuse(self):
        raise psutil.AccessDenied()

    monkeypatch.setattr(psutil.Process, "memory_info", refuse)
    assert set(telemetry.sample(1)) == {"host_peak_memory_bytes"}


def test_a_metric_that_some_ranks_lack_is_the_mean_of_the_others(monkeypatch):
    """Diversity, where the samples of a rank are all of different classes."""
    nan, other = float("nan"), torch.tensor([1.0, 4.0, float("nan"), float("nan")])
    ranks = runtime.Runtime(0, 2, torch.device("cpu"), None)
    both = torch.stack([other.nan_to_num(), (~other.isnan()).float()])
    monkeypatch.setattr(runtime.dist, "all_reduce", lambda mine: mine.add_(both))
    found = ranks.nanmean(torch.tensor([3.0, nan, 5.0, nan]))
    torch.testing.assert_close(found, torch.tensor([2.0, 4.0, 5.0, nan]), equal_nan=True)
