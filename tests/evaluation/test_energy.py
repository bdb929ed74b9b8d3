"""Workloads, the cost figures of the paper, and energy through CodeCarbon."""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from amprune import evaluate
from amprune.errors import EvaluationError, MissingDependencyError
from amprune.evaluation.comparison import standard_error
from amprune.evaluation.energy import MODELLED, Energy, Part, interleaved_energy, part_of
from amprune.evaluation.workload import Costs, check_workload, costs, saving, time_saved
from amprune.settings import Workload

DOCUMENT = Path(__file__).parents[2] / "docs" / "cost.md"


# Workloads


def test_costs_are_those_of_the_whole_period() -> None:
    workload = Workload(tokens_per_day=360_000, days=10, price_per_hour=2, device_power=500, grid_intensity=0.4)
    assert costs(workload, tokens_per_second=50) == Costs(hours=20, money=40, energy_kwh=10, co2_kg=4)


def test_started_hours_are_counted_day_by_day() -> None:
    workload = Workload(tokens_per_day=36_000 * 4.5, days=2, price_per_hour=1, billing="started")
    found = costs(workload, tokens_per_second=10)
    assert (found.hours, found.money) == (9, 10)


def test_a_rounding_error_starts_no_hour() -> None:
    workload = Workload(tokens_per_day=3600 * 0.7, days=1, price_per_hour=1, billing="started")
    found = costs(workload, tokens_per_second=0.7)
    assert found.hours > 1
    assert found.money == 1


@pytest.mark.parametrize("speedup", [1.01, 1.25, 2.0])
def test_a_speedup_saves_the_same_share_of_everything_that_is_billed_exactly(speedup: float) -> None:
    before = costs(Workload(), tokens_per_second=20)
    after = costs(Workload(), tokens_per_second=20 * speedup)
    for field in fields(Costs):
        assert saving(getattr(before, field.name), getattr(after, field.name)) == pytest.approx(time_saved(speedup))


def test_a_slowdown_saves_less_than_nothing() -> None:
    assert time_saved(0.5) == -1
    assert saving(10, 15) == -0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens_per_day", 0),
        ("days", -1),
        ("device_power", math.inf),
        ("price_per_hour", -0.1),
        ("grid_intensity", math.nan),
        ("billing", "monthly"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(EvaluationError, match=f"{name} is .*expected"):
        check_workload(Workload(**{name: value}))


@pytest.mark.parametrize(
    "call",
    [
        lambda: costs(Workload(), tokens_per_second=0),
        lambda: costs(Workload(), tokens_per_second=math.nan),
        lambda: saving(0, 1),
        lambda: saving(1, -1),
        lambda: time_saved(0),
    ],
)
def test_figures_that_make_no_sense_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(EvaluationError, match="expected a finite number"):
        call()


def test_a_free_device_on_a_clean_grid_costs_nothing() -> None:
    found = costs(Workload(price_per_hour=0, grid_intensity=0), tokens_per_second=1)
    assert (found.money, found.co2_kg) == (0, 0)


def test_the_document_gives_every_default_and_its_source() -> None:
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    given = {row.split("|")[1].strip(" `"): row.split("|")[2].strip(" `").replace(",", "") for row in rows}
    defaults = Workload()
    for field in fields(Workload):
        value = getattr(defaults, field.name)
        assert given[field.name] == value if isinstance(value, str) else float(given[field.name]) == value


# The figures of the paper


def percent(share: float) -> float:
    return round(100 * share, 2)


def calculator_co2(hours: float) -> float:
    """Kg of CO2 as the ML CO2 Impact calculator shows them: kWh and kg are each rounded to two decimals."""
    cents = Decimal("0.01")
    kilowatt_hours = Decimal(Workload.device_power * hours / 1000).quantize(cents, ROUND_HALF_UP)
    return float(Decimal(float(kilowatt_hours) * Workload.grid_intensity).quantize(cents, ROUND_HALF_UP))


def test_a_speedup_of_1_25_saves_a_fifth_of_the_time() -> None:
    assert time_saved(1.25) == pytest.approx(0.2, abs=1e-12)


def test_the_cost_saving_follows_from_23_hours_that_are_billed_once_started() -> None:
    workload = Workload(tokens_per_day=23 * 3600 * 100, days=1, billing="started", price_per_hour=0.5)
    before, after = (costs(workload, tokens_per_second=speed) for speed in (100, 125))
    assert (before.hours, after.hours) == (23, pytest.approx(18.4))
    assert percent(saving(before.money, after.money)) == 17.39


def test_of_all_days_of_whole_hours_only_that_of_23_does_so() -> None:
    hits = [hours for hours in range(1, 8761) if percent(saving(hours, math.ceil(round(hours * 0.8, 9)))) == 17.39]
    assert hits == [23]


def test_the_carbon_saving_follows_from_100_hours_in_the_calculator() -> None:
    dense, pruned = calculator_co2(100), calculator_co2(80)
    assert (dense, pruned) == (15.12, 12.1)
    assert percent(saving(dense, pruned)) == 19.97


def test_the_latencies_of_llama_7b_do_so_where_hours_are_rounded() -> None:
    assert round(100 * 2.31 / 2.90) == 80
    assert math.ceil(23 * 2.31 / 2.90) == math.ceil(18.4) == 19


def test_of_100_numbers_of_hours_eight_do_so() -> None:
    hits = [h for h in range(1, 101) if percent(saving(calculator_co2(h), calculator_co2(h * 0.8))) == 19.97]
    assert hits == [47, 48, 49, 50, 51, 52, 99, 100]


@pytest.mark.parametrize(("dense", "pruned", "expected"), [(2.90, 2.31, 20.34), (2.79, 2.34, 16.13)])
def test_neither_figure_follows_from_the_latencies(dense: float, pruned: float, expected: float) -> None:
    assert percent(saving(dense, pruned)) == expected


# Energy, with CodeCarbon played


class Tracker:
    """Says what CodeCarbon would say of a machine where each call takes as many Wh as it generates tokens."""

    made: ClassVar[list["Tracker"]] = []
    used = 0.0

    def __init__(self, **options: Any) -> None:
        from codecarbon.external.ram import RAM

        self.options = options
        self.stopped = False
        self._hardware: list[Any] = [RAM(), cpu("intel_rapl")]
        Tracker.used = 0.0
        Tracker.made.append(self)

    def get_detected_hardware(self) -> None: ...

    def start_task(self) -> None:
        self.before = Tracker.used

    def stop_task(self) -> Any:
        used = (Tracker.used - self.before) / 1000
        energy = {"cpu_energy": 0.75 * used, "ram_energy": 0.25 * used, "gpu_energy": used}
        return SimpleNamespace(**energy, energy_consumed=2 * used, emissions=used)

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("codecarbon.OfflineEmissionsTracker", Tracker)
    Tracker.made.clear()
    yield
    assert all(tracker.stopped for tracker in Tracker.made)
    assert not logging.getLogger("codecarbon").filters


def model(tokens: int, calls: list[int]) -> Callable[[], int]:
    def run() -> int:
        calls.append(tokens)
        Tracker.used += tokens**2
        return tokens

    return run


def measured_energy(run: Callable[[], int], **options: Any) -> Energy:
    return interleaved_energy({"model": run}, **options)["model"]


@pytest.mark.usefixtures("played")
def test_energy_is_that_of_the_parts_in_use() -> None:
    found = measured_energy(model(10, []), device="cpu", blocks=3, block_seconds=1e-9)
    assert found.tokens == 30
    assert (found.watt_hours, found.watt_hours_per_1000_tokens) == pytest.approx((300, 10_000))
    assert found.co2_kg == pytest.approx(0.15)
    assert found.items == pytest.approx((10_000,) * 3)
    assert standard_error(found.items) == pytest.approx(0)
    assert [(part.name, part.measured) for part in found.parts] == [("ram", False), ("cpu", True)]
    assert [part.watt_hours for part in found.parts] == pytest.approx([75, 225])
    assert "RAPL" in found.method
    assert found.note.startswith("75% of the energy was measured")


@pytest.mark.usefixtures("played")
def test_models_take_turns_and_every_other_round_goes_backwards() -> None:
    calls: list[int] = []
    steps: list[int] = []

    @contextmanager
    def watch(description: str, total: int) -> Iterator[Callable[[int], None]]:
        assert (description, total) == ("Measuring energy", 6)
        yield steps.append

    found = interleaved_energy(
        {"dense": model(2, calls), "pruned": model(1, calls)},
        device="cpu",
        blocks=3,
        block_seconds=1e-9,
        progress=watch,
    )
    assert calls == [2, 1, *(2, 1), *(1, 2), *(2, 1)]
    assert steps == [1] * 6
    assert [energy.tokens for energy in found.values()] == [6, 3]
    assert found["dense"].items == pytest.approx((2000,) * 3)


@pytest.mark.usefixtures("played")
def test_one_block_has_no_standard_error() -> None:
    assert standard_error(measured_energy(model(1, []), device="cpu", blocks=1, block_seconds=1e-9).items) is None


@pytest.mark.usefixtures("played")
def test_a_block_lasts_as_long_as_asked() -> None:
    calls: list[int] = []
    found = measured_energy(model(1, calls), device="cpu", blocks=1, block_seconds=0.05)
    assert found.seconds >= 0.05
    assert found.tokens == len(calls) - 1 > 1  # but for the call beforehand


@pytest.mark.usefixtures("played")
def test_nothing_that_sends_or_writes_is_asked_for() -> None:
    measured_energy(model(1, []), device="cpu", country="FRA", blocks=1, block_seconds=1e-9)
    options = Tracker.made[0].options
    assert (options["country_iso_code"], options["tracking_mode"]) == ("FRA", "process")
    assert options["output_methods"] == options["output_handlers"] == []
    assert not Path(options["output_dir"]).exists()


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [("cpu", "1", None), ("cuda", "", ["0"]), ("cuda:1", "", ["1"]), ("cuda:1", "3, 2", ["2"])],
)
def test_the_gpu_is_the_one_that_torch_means(
    monkeypatch: pytest.MonkeyPatch, device: str, visible: str, expected: list[str] | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run = model(1, [])
    if expected is None:
        measured_energy(run, device=device, blocks=1, block_seconds=1e-9)
    else:
        with pytest.raises(EvaluationError, match=f"no power of {device}.*nvidia-ml-py"):
            measured_energy(run, device=device, blocks=1, block_seconds=1e-9)
    assert Tracker.made[0].options["gpu_ids"] == expected


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_gpu_counts_only_where_the_model_runs_on_it(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(Tracker, "get_detected_hardware", lambda self: self._hardware.append(gpu()))
    found = measured_energy(model(10, []), device=device, blocks=1, block_seconds=1e-9)
    assert found.watt_hours == pytest.approx(200 if device == "cuda" else 100)
    assert ("NVML energy counter (H100)" in found.method) == (device == "cuda")


@pytest.mark.usefixtures("played")
def test_an_error_of_the_model_stops_the_tracker() -> None:
    def run() -> int:
        raise ValueError("no such token")

    with pytest.raises(ValueError, match="no such token"):
        measured_energy(run, device="cpu")


@pytest.mark.usefixtures("played")
def test_a_model_that_generates_nothing_is_refused() -> None:
    with pytest.raises(EvaluationError, match="model generated 0 tokens"):
        measured_energy(lambda: 0, device="cpu")


@pytest.mark.usefixtures("played")
def test_no_energy_is_an_error_and_not_a_figure() -> None:
    with pytest.raises(EvaluationError, match=r"found no energy of ram and cpu in .* longer blocks"):
        measured_energy(lambda: 1, device="cpu", block_seconds=1e-9)


@pytest.mark.usefixtures("played")
def test_an_error_of_codecarbon_is_one_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tracker: Tracker) -> None:
        raise PermissionError("energy_uj")

    monkeypatch.setattr(Tracker, "stop_task", refuse)
    with pytest.raises(EvaluationError, match="cannot measure on this machine: energy_uj; run `codecarbon detect`"):
        measured_energy(model(1, []), device="cpu", block_seconds=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "0 blocks"),
        ({"block_seconds": math.inf}, "inf s"),
        ({"block_seconds": 0}, "0 s"),
        ({"country": "Atlantis"}, "no country 'Atlantis'"),
        ({"device": "cuda:first"}, "device is 'cuda:first'"),
    ],
)
def test_arguments_of_no_use_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        measured_energy(lambda: 1, **{"device": "cpu", **options})


def test_no_model_at_all_is_refused() -> None:
    with pytest.raises(EvaluationError, match="at least one"):
        interleaved_energy({}, device="cpu")


def test_codecarbon_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(MissingDependencyError, match=r"needs codecarbon, .* `pip install 'amprune\[evaluate\]'`"):
        evaluate(["nobody/model"], measure=("energy",))


def test_what_codecarbon_swallows_when_it_starts_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(mode: str) -> None:
        raise OSError("the cluster is asleep")

    monkeypatch.setattr("codecarbon.emissions_tracker.warn_on_multi_rank_double_counting", refuse)
    with pytest.raises(EvaluationError, match="the cluster is asleep"):
        measured_energy(lambda: 1, device="cpu")


# What CodeCarbon says of its hardware


def cpu(mode: str, tracking: str = "process") -> Any:
    from codecarbon.external.hardware import CPU

    hardware = CPU(".", "constant", "EPYC", 240, tracking_mode=tracking)
    hardware._mode = mode
    return hardware


def gpu(*, counter: bool = True) -> Any:
    from codecarbon.core.gpu_nvidia import NvidiaGPUDevice
    from codecarbon.external.hardware import GPU

    device = object.__new__(NvidiaGPUDevice)
    device.gpu_index, device._gpu_name, device.last_energy = 0, "H100", object() if counter else None
    hardware = GPU(gpu_ids=None)
    hardware.devices.devices, hardware.num_gpus = [device], 1
    return hardware


@pytest.mark.parametrize(
    ("hardware", "part", "method", "measured"),
    [
        (lambda: cpu("intel_rapl"), "cpu", "RAPL", True),
        (lambda: cpu("cpu_load"), "cpu", "processor time of this process, 240 W", False),
        (lambda: cpu("cpu_load", "machine"), "cpu", "load of the machine, 240 W", False),
        (lambda: cpu("constant"), "cpu", "half of the 240 W", False),
        (lambda: cpu("dreams"), "cpu", "CodeCarbon's dreams model", False),
        (gpu, "gpu", "NVML energy counter", True),
        (lambda: gpu(counter=False), "gpu", "NVML power sampled every second", True),
        (lambda: SimpleNamespace(chip_part="CPU"), "cpu", "sensors of the chip", True),
    ],
)
def test_the_method_is_read_from_the_hardware(
    hardware: Callable[[], Any], part: str, method: str, measured: bool
) -> None:
    found = part_of(hardware())
    assert (found.name, found.measured) == (part, measured)
    assert method in found.method


def test_the_note_says_when_all_is_modelled() -> None:
    parts = (Part("cpu", "a model", False, 1.0), Part("ram", "a model", False, 1.0))
    energy = Energy(tokens=2, seconds=1, co2_kg=0, parts=parts, items=(1.0,))
    assert energy.note == MODELLED
    assert energy.measured_share == 0


# Energy, with CodeCarbon itself

SCRIPT = """
import json, socket, threading, time

def offline(*args, **kwargs):
    raise AssertionError("network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = offline
from amprune.evaluation.energy import interleaved_energy

def run():
    end = time.perf_counter() + 0.1
    while time.perf_counter() < end:
        sum(range(1000))
    return 5

found = interleaved_energy({"a": run, "b": run}, device="cpu", country="BRA", blocks=2, block_seconds=0.75)
print(json.dumps([
    {
        "seconds": energy.seconds,
        "watt_hours": energy.watt_hours,
        "items": energy.items,
        "co2_kg": energy.co2_kg,
        "parts": sorted(part.name for part in energy.parts),
    }
    for energy in found.values()
]), threading.active_count())
"""
CONFIGURATION = """[codecarbon]
electricitymaps_api_token = token
co2_signal_api_token = token
emissions_endpoint = http://localhost:9
output_methods = csv,api
allow_multiple_runs = false
log_level = debug
"""


def test_a_busy_loop_takes_energy_without_network_noise_or_traces(tmp_path: Path) -> None:
    home, folder, temporary = (tmp_path / name for name in ("home", "folder", "temporary"))
    for path in (home, folder, temporary):
        path.mkdir()
    (home / ".codecarbon.config").write_text(CONFIGURATION)
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(temporary), "CODECARBON_LOG_LEVEL": "debug"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    figures, threads = done.stdout.rsplit(" ", 1)
    assert int(threads) == 1
    for found in json.loads(figures):
        assert found["seconds"] >= 1.5
        assert found["watt_hours"] > 0
        assert min(found["items"]) > 0
        assert 1 < found["watt_hours"] * 3600 / found["seconds"] < 2000
        assert found["co2_kg"] > 0
        assert found["parts"] == ["cpu", "ram"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".codecarbon.config"]
