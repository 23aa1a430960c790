"""What devices can do: published peaks by name, measured ones, counters of energy, free memory."""

import sys
import types

import jax
import pytest

from jaxinterp.bench import device


@pytest.mark.parametrize(
    ("kind", "form", "tera", "giga"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4, 3350),
        ("NVIDIA H100 PCIe", "tf32", 378, 2039),
        ("NVIDIA H200", "float32", 67, 4800),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312, 2039),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156, 1555),
        ("Tesla T4", "float32", 8.1, 320),
        ("NVIDIA L4", "bf16", 121, 300),
        ("NVIDIA L40S", "bf16", 362, 864),
        ("TPU v5 lite", "bf16", 197, 819),
        ("TPU v5p", "bf16", 459, 2765),
    ],
)
def test_published_peaks(kind, form, tera, giga):
    found = device.published(kind, form)
    assert found is not None
    assert (found.flops, found.bandwidth, found.source) == (tera * 1e12, giga * 1e9, "published")


def test_a_name_that_holds_another_devices_name():
    assert device.published("NVIDIA GH200 480GB", "bf16") is None


def test_formats_that_a_device_does_not_have():
    assert device.published("Tesla V100-SXM2-16GB", "bf16") is None
    assert device.published("TPU v4", "float32") is None
    assert device.published("cpu", "float32") is None
    with pytest.raises(ValueError, match="form must be one of"):
        device.peak("float16")


def test_a_measured_peak_is_that_of_the_product(monkeypatch):
    """Times are replaced, so that the arithmetic around them is tested, not the machine."""
    monkeypatch.setattr(device, "_best", lambda run: jax.block_until_ready(run()) is not None and 0.5)
    found = device.peak("float32", side=64, megabytes=1)
    assert found == device.Peak(2 * 64**3 / 0.5, 3 * 2**20 / 0.5, "measured")


def test_a_measured_peak_of_this_machine():
    found = device.measured("bf16", jax.devices()[0], side=128, megabytes=1)
    assert 1e7 < found.flops < 1e15
    assert 1e7 < found.bandwidth < 1e13


def test_energy_of_a_cpu(tmp_path):
    for number, start in ((0, 900), (1, 10)):
        zone = tmp_path / f"intel-rapl:{number}"
        zone.mkdir()
        (zone / "energy_uj").write_text(str(start))
        (zone / "max_energy_range_uj").write_text("999")
    inner = tmp_path / "intel-rapl:0:0"  # a part of package 0: counted already
    inner.mkdir()
    (inner / "energy_uj").write_text("5")
    meter = device.energy_meter(powercap=tmp_path)
    assert meter is not None
    assert meter() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("40")  # began again at 0: 100 + 40
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("70")
    (inner / "energy_uj").write_text("500")
    assert meter() == pytest.approx((140 + 60) * 1e-6)


def test_no_counter_of_energy(tmp_path):
    assert device.energy_meter(powercap=tmp_path) is None
    (tmp_path / "intel-rapl:0").mkdir()  # there, but not to be read
    assert device.energy_meter(powercap=tmp_path) is None


def test_energy_of_the_gpus_that_a_process_sees(monkeypatch):
    """NVML numbers all GPUs of the machine; names of those that are visible are numbers or identifiers."""
    used = {3: 1000, "GPU-5": 500, 0: 7, 1: 11}
    fake = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: used[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    meter = device._nvml([0, 1])
    assert meter is not None
    assert meter() == pytest.approx(0.018)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5")
    meter = device._nvml([0, 1])
    assert meter is not None
    assert meter() == pytest.approx(1.5)
    used[3] += 250
    assert meter() == pytest.approx(1.75)
    assert device._nvml([2]) is None


def test_memory(tmp_path):
    used = device.memory_used()
    assert used.of == "process"
    assert 50e6 < used.bytes < 1e12
    proc = tmp_path / "meminfo"
    proc.write_text("MemTotal:       8000 kB\nMemAvailable:       4000 kB\n")
    assert device._available(proc, tmp_path) == 4000 * 1024
    (tmp_path / "memory.max").write_text("3000000")
    (tmp_path / "memory.current").write_text("1000000")
    assert device._available(proc, tmp_path) == 2000000
    (tmp_path / "memory.max").write_text("max")
    assert device._available(proc, tmp_path) == 4000 * 1024
