"""What the machine does while it trains: host memory, and utilisation, power, energy of this rank's GPU."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable
from typing import Any

import psutil
import torch

log = logging.getLogger(__name__)


class Telemetry:
    """Reads NVML and the host when asked; no thread runs in between.

    GPU figures are the board's, so they include other processes on it. A machine without NVML, and a figure
    that the board does not report (utilisation of a MIG slice, energy before Volta), is left out, with one
    logged line; nothing here raises once training runs.

    Args:
        device: this rank's device; the GPU figures are left out when it is not CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._process = psutil.Process()
        self._unavailable: set[str] = set()
        self._nvml: Any
        self._gpu: Any
        self._nvml, self._gpu = _open_gpu(device) if device.type == "cuda" else (None, None)
        self._energy_at_start = self._gpu_figure("energy", lambda n, gpu: n.nvmlDeviceGetTotalEnergyConsumption(gpu))

    def sample(self, samples: int) -> dict[str, float]:
        """The figures now, by their names in the logs.

        Args:
            samples: how many samples this rank has trained on since this object was made.

        Returns:
            Always ``host_memory_bytes`` and ``host_peak_memory_bytes`` (resident set of this process). With a
            GPU also ``gpu_utilisation_percent``, ``gpu_power_watts``, ``gpu_memory_bytes``,
            ``gpu_energy_joules`` since this object was made and, once ``samples`` is positive,
            ``gpu_joules_per_1000_samples``.
        """
        figures = self._host_figures()
        if self._gpu is None:
            return figures
        readings = {
            "gpu_utilisation_percent": lambda n, gpu: float(n.nvmlDeviceGetUtilizationRates(gpu).gpu),
            "gpu_power_watts": lambda n, gpu: n.nvmlDeviceGetPowerUsage(gpu) / 1e3,  # NVML: milliwatts
            "gpu_memory_bytes": lambda n, gpu: float(n.nvmlDeviceGetMemoryInfo(gpu).used),
        }
        for name, read in readings.items():
            if (value := self._gpu_figure(name, read)) is not None:
                figures[name] = value
        energy = self._gpu_figure("energy", lambda n, gpu: n.nvmlDeviceGetTotalEnergyConsumption(gpu))
        if energy is not None and self._energy_at_start is not None:
            figures["gpu_energy_joules"] = (energy - self._energy_at_start) / 1e3  # NVML: millijoules
            if samples > 0:
                figures["gpu_joules_per_1000_samples"] = figures["gpu_energy_joules"] * 1000 / samples
        return figures

    def _host_figures(self) -> dict[str, float]:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        figures = {"host_peak_memory_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
        try:
            figures["host_memory_bytes"] = float(self._process.memory_info().rss)
        except (psutil.Error, OSError) as error:
            self._say_once("host_memory_bytes", error)
        return figures

    def _gpu_figure(self, name: str, read: Callable) -> float | None:
        if self._gpu is None or name in self._unavailable:
            return None
        try:
            return read(self._nvml, self._gpu)
        except self._nvml.NVMLError as error:
            self._say_once(name, error)
            return None

    def _say_once(self, name: str, error: Exception) -> None:
        if name not in self._unavailable:
            self._unavailable.add(name)
            log.warning("telemetry: %s is not available here: %s", name, error)


def _open_gpu(device: torch.device):
    """(the pynvml module, this device's NVML handle), or (None, None).

    Found by UUID: CUDA numbers the devices it was shown, NVML all there are.
    """
    try:
        import pynvml
    except ImportError as error:
        log.warning("telemetry: no GPU figures: %s", error)
        return None, None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError as error:
        log.warning("telemetry: no GPU figures: %s", error)
        return None, None
