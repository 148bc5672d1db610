"""Where captured data wait: plans for a budget, and places that give back what was put into them."""

from __future__ import annotations

import dataclasses
import errno
import gc
import math
import mmap
import os
import re
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qdiff import memory, places
from qdiff.calibrate import calibrate
from qdiff.capture import UnitData
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.memory import (
    Boundary,
    BudgetError,
    FileRate,
    FileRates,
    Kept,
    MemoryBudget,
    MemoryPlan,
    PlacesPool,
    Sizes,
    connection_origins,
    measure,
    samples_at_once,
)
from qdiff.pinned import Arena
from qdiff.places import Collector, File, Scratch, Shelf, fetched, is_filed, released, unpacked

from .conftest import calibration_set, noisy_inputs, with_grids, wrapped

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = Sizes(features=1000, units={"small": 100, "large": 400})
ROWS = 50


def plan(budget: MemoryBudget, device: torch.device = CPU, **options: object) -> MemoryPlan:
    sizes = options.pop("sizes", SIZES)
    return MemoryPlan.make(sizes, ROWS, budget, device, **({"chunk": 10, "compact": False} | options))


def alike(rate: float) -> FileRates:
    """Of files that lie on the disk and in memory."""
    return FileRates(FileRate(rate, rate), FileRate(rate, rate))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process itself takes nothing: budgets are for captured data only."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    monkeypatch.setattr(memory, "_LOADED_LATER", 0)
    monkeypatch.setattr(memory, "STAGING_BYTES", 0)


@pytest.fixture
def gpu(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as far as plans can tell: 7000 bytes in use, plenty free."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    monkeypatch.setattr(memory, "_SMALLEST_CHUNK", 1)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("host_bytes", "place"), [(10**6, "host"), (239_999, "partly"), (240_000, "host")])
def test_on_a_cpu_features_lie_in_memory_where_there_is_room(host_bytes: int, place: str) -> None:
    """Both networks' features, 2 x 50 x 1000, and the largest unit's data, 50 x 400, in half the budget."""
    made = plan(MemoryBudget(host_bytes=host_bytes))
    assert (made.features, made.feature_bytes) == (place, 100_000)
    assert made.gpu_rows("large") == ROWS


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_the_nearest_place_with_room() -> None:
    assert plan(MemoryBudget(), CUDA).features == "gpu"
    tight = plan(MemoryBudget(gpu_bytes=100_000, host_bytes=10**6), CUDA)
    assert tight.features == "host"
    assert tight.gpu_rows("small") == tight.gpu_rows("large") == ROWS
    assert plan(MemoryBudget(gpu_bytes=100_000, host_bytes=100_000), CUDA).features == "host"
    assert plan(MemoryBudget(gpu_bytes=100_000, host_bytes=99_999), CUDA).features == "partly"


@pytest.mark.usefixtures("gpu")
def test_rows_on_the_host_need_room_beside_the_features() -> None:
    budget = MemoryBudget(gpu_bytes=22_200, host_bytes=100_000 + 20 * 400)
    made = plan(budget, CUDA)
    assert made.largest_far == 20 * 400
    assert made.features == "host"
    assert made.arena_bytes == 100_000 + 20 * 400  # all of the budget, of what would be a little more
    assert plan(dataclasses.replace(budget, host_bytes=budget.host_bytes - 1), CUDA).features == "partly"


@pytest.mark.usefixtures("gpu")
def test_files_need_room_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows that have none are an error."""
    budget = MemoryBudget(gpu_bytes=20_600, host_bytes=4000, folder=tmp_path)
    made = plan(budget, CUDA)
    filed = made.far_bytes("large") - made.pinned_rows("large") * 400
    assert made.features == "partly"
    assert made.file_bytes == filed > 0
    free = {tmp_path: filed}
    monkeypatch.setattr("qdiff.memory.free_file_bytes", free.__getitem__)
    assert plan(budget, CUDA).features == "partly"
    free[tmp_path] -= 1
    with pytest.raises(
        BudgetError, match=re.escape(f"{tmp_path} has room for 0.0; free some there, raise --cali_host_gb")
    ):
        plan(budget, CUDA)


def test_not_all_that_is_free_is_for_captured_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=1000)

    monkeypatch.setattr("shutil.disk_usage", usage)
    assert memory.free_file_bytes(tmp_path) == memory.free_file_bytes(None) == 800
    assert asked == [tmp_path, Path(tempfile.gettempdir())]


@pytest.mark.usefixtures("alone")
def test_features_lie_in_files_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both networks, where memory has none. The set itself is there anyway."""
    route = (Boundary(2), Boundary(20), Boundary(30), Boundary(10))
    sizes = Sizes(30, {"unit": 100}, route)
    for room, filed in ((10**9, [0, 2, 2, 2]), (299, [0, 1, 0, 2]), (99, [0] * 4)):
        monkeypatch.setattr("qdiff.memory.free_file_bytes", lambda folder, room=room: room)
        made = MemoryPlan.make(sizes, 10, MemoryBudget(host_bytes=0), torch.device("cpu"), chunk=2, compact=False)
        assert [quantized.filed + full.filed for quantized, full in made.kept()] == filed
        assert made.file_bytes <= room


def test_the_process_itself_counts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: 2 * 10**9)
    monkeypatch.setattr(memory, "_LOADED_LATER", 10**9)
    assert plan(MemoryBudget(host_bytes=3_240_000_000)).features == "host"
    assert plan(MemoryBudget(host_bytes=3_000_239_999)).features == "partly"
    assert not caplog.records
    assert plan(MemoryBudget(host_bytes=2_900_000_000)).features == "partly"
    assert "without any captured data" in caplog.text


# Connections 3, 30 and 10 wide; the second stage's unit has 4 rows on the host; the last stage joins the first one.
ROUTE = (
    Boundary(2),
    Boundary(20, (0,), ("unit",)),
    Boundary(20, (3, 0)),
    Boundary(10, (3, 30, 0)),
    Boundary(10, (3, 30, 10), origin=3),
    Boundary(40, (3, 30), origin=2),
    Boundary(10, (3,), origin=1),
)


def route_plan(host_bytes: float, far: int = 4) -> MemoryPlan:
    unit = 100
    return MemoryPlan(
        rows=10,
        chunk=2,
        features="partly",
        feature_bytes=0,
        unit_gpu_bytes=(10 - far) * unit,
        unit_host_bytes=int(host_bytes),
        host_bytes=int(host_bytes * memory._ARENA_SLACK) + 1,
        sizes=Sizes(53, {"unit": unit}, ROUTE),
        compact=False,
        on_gpu=True,
    )


@pytest.mark.usefixtures("gpu")
def test_what_waits_beside_the_features_has_its_room() -> None:
    """The set as it starts, and the rounding variables of finished units; on a CPU both are there anyway."""
    budget, sizes = MemoryBudget(gpu_bytes=27_000, host_bytes=10**6), dataclasses.replace(SIZES, start=70)
    assert plan(budget, CUDA).host_bytes == 10**6
    assert plan(budget, CUDA, aside_bytes=30).host_bytes == 10**6 - 30
    assert plan(budget, CUDA, sizes=sizes).feature_bytes == 100_000 + 70 * ROWS
    assert plan(budget, CPU, sizes=sizes).feature_bytes == 100_000
    tight = plan(dataclasses.replace(budget, host_bytes=50_000), CUDA, sizes=sizes)
    assert (tight.features, tight.host_bytes) == ("partly", 50_000 - 70 * ROWS)


def test_rounding_variables_wait_on_the_host_where_the_gpu_has_a_limit() -> None:
    qnn = with_grids()
    weights = sum(layer.weight.numel() for unit in qnn.units() for layer in unit.layers())
    assert memory.bytes_set_aside(qnn, MemoryBudget(gpu_bytes=1)) == 4 * weights
    assert memory.bytes_set_aside(qnn, MemoryBudget(host_bytes=1)) == memory.bytes_set_aside(qnn, None) == 0


def test_with_room_for_everything_everything_is_kept() -> None:
    made = route_plan(10_000)
    assert all(kept.trunk and all(kept.skips) for networks in made.kept() for kept in networks)
    assert made.passes() == 0
    assert made.arena_bytes == int(memory._ARENA_SLACK * (2 * 10 * 73))  # before the last but one, of both networks


def test_what_is_kept_where_there_is_little_room() -> None:
    """660 bytes: 400 are the unit's rows, 200 a feature map; then small connections first, of both networks."""
    made = route_plan(660)
    quantized, full = zip(*made.kept(), strict=True)
    nothing = Kept(False, (False,))
    assert full[1] == nothing  # 400 + 200 + 200
    assert quantized[1] == Kept(True, (True,))
    assert quantized[2] == Kept(True, (True, True))
    assert full[2] == Kept(False, (False, False))  # it is there first, beside the rows and the other one's 200 before
    assert quantized[3] == Kept(True, (True, True, True))  # 200 + 60 + 300
    assert full[3] == Kept(True, (True, False, True))
    assert quantized[4] == full[4] == Kept(True, (True, False, True))  # 200 + 60 + 200
    assert quantized[5] == Kept(True, (True, False))
    assert full[5] == Kept(False, (False, False))  # twice 400
    assert quantized[6] == full[6] == Kept(True, (True,))  # of full precision again: the way there began at the set
    # full[1] and full[2]: 1 and 2 stages; quantized[5] and full[5]: up to the connection (2), and all the way (5)
    assert made.passes() == pytest.approx((1 + 2 + 2 + 5) / 7)


def test_features_lie_in_files_where_these_are_quicker() -> None:
    """With 660 bytes of the host, as above, and room for 1000 in files."""
    in_memory = route_plan(660)
    made = dataclasses.replace(in_memory, pass_seconds=1.0, file_room=1000)
    quantized, full = zip(*made.kept(), strict=True)
    assert [kept.filed for kept in quantized] == [False, False, False, False, False, False, False]
    assert [kept.filed for kept in full] == [False, True, True, False, False, True, False]
    assert full[1] == Kept(True, (True,), True, (True,))  # the connection is the feature map itself
    assert full[2] == Kept(True, (True, True), True, (True, True))
    assert full[3] == Kept(True, (True, True, True), False, (True, True, False))  # what is in files stays there
    assert quantized[4] == Kept(True, (True, True, True), False, (False, True, False))  # left the host
    assert full[5] == Kept(True, (True, False), True, (True, False))  # 1000 - 300 - 400 - 30: no room for 300
    assert made.passes() == pytest.approx(2 / 7)  # the connection that full[5] has not
    assert made.file_bytes == 300 + 400 + 30
    assert made.feature_seconds() == pytest.approx(2 + 2 / 7)  # the way that both networks go anyway, and files beside
    slower = dataclasses.replace(made, file_rate=FileRate(10_000.0, 20_000.0))
    assert slower.kept() == made.kept()
    written = (0, 200, 200, 0, 300, 400, 0)  # full[1], full[2], a connection of quantized[4], full[5]
    read = (0, 200, 200, 0, 0, 700, 30)  # these, that one, and the one that the last stage joins; others are there
    assert slower._travelling(slower.kept()) == pytest.approx(
        [a / 10_000 + b / 20_000 for a, b in zip(written, read, strict=True)]
    )
    assert in_memory.feature_seconds() == 0.0  # a pass takes no time
    assert "in files or computed anew where not" in str(made)
    assert dataclasses.replace(made, file_room=399).kept()[5][1].filed is False
    slow = dataclasses.replace(made, pass_seconds=1e-9)
    assert slow.kept() == in_memory.kept()


def test_files_and_computing_anew_go_on_side_by_side() -> None:
    """One network's features come from a file while the other's are computed, where both ways take as long."""
    route = (Boundary(1), Boundary(50), Boundary(50), Boundary(50))
    made = dataclasses.replace(
        route_plan(0),
        sizes=Sizes(50, {"unit": 0}, route),
        pass_seconds=40.0,
        file_rate=FileRate(50, 50),
        file_room=10**6,
    )
    # A network's features take 20 s in files. Anew they take 10, 20 and 30, beside 20 for the stage itself.
    assert [quantized.filed + full.filed for quantized, full in made.kept()] == [0, 1, 1, 2]
    assert made.feature_seconds() == 20 + (20 + 10) + (20 + 20) + 40
    quick = dataclasses.replace(made, file_rate=FileRate(5000, 5000))
    assert [quantized.filed + full.filed for quantized, full in quick.kept()] == [0, 2, 2, 2]
    assert quick.passes() == 0
    assert quick.feature_seconds() == 4 * 20


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("free", "cached"),
    [
        (10**9, True),
        (7300, True),  # what lies in files in any case, where there is room on the disk
        (7299, False),
        (0, False),
    ],
)
def test_files_for_which_the_system_has_memory_are_quick(
    free: int, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = MemoryBudget(gpu_bytes=12_000, host_bytes=1000)
    monkeypatch.setattr(memory, "free_file_bytes", lambda folder: 10**10)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 1000 + math.ceil(free / memory._CACHE_SHARE))
    slow, quick = FileRate(200.0, 200.0), FileRate(1e5, 1e5)
    monkeypatch.setattr(memory, "file_rates", lambda folder: FileRates(slow, quick))
    sizes = Sizes(53, {"unit": 100}, ROUTE)
    made = plan(budget, CUDA, sizes=sizes, stage_seconds=lambda count: [1.0] * len(ROUTE))
    assert made.features == "partly"
    assert made.cached is cached
    assert made.file_rate == (quick if cached else slow)
    assert made.file_bytes <= (free if cached else 10**10)
    assert ("for which the system has memory" in str(made)) is cached


def test_rows_for_which_there_is_no_room_lie_in_a_file() -> None:
    made = route_plan(398)
    assert made.pinned_rows("unit") == 3
    assert made.largest_far == 300
    assert made.kept()[1] == (Kept(False, (False,)),) * 2
    assert route_plan(400).pinned_rows("unit") == 4
    assert route_plan(400).largest_far == 400
    reading = dataclasses.replace(made, batch=2, unit_host_bytes=9 * 1000, rows=200)  # 194 rows are far
    assert reading.ring_rows == 60
    assert reading.pinned_rows("unit") == 83 - 60
    assert reading.largest_far == 8300


def test_plans_say_what_lies_in_files() -> None:
    assert "1 of 1 units partly in files" in str(route_plan(398))
    assert "file" not in str(route_plan(400))


def test_pinned_memory_that_is_not_to_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(size: int) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(memory, "Arena", refused)
    with pytest.raises(BudgetError, match=r"pinned memory .*out of memory.*--cali_host_gb"):
        memory.Storage(route_plan(660))


def test_one_phase_leaves_its_pinned_memory_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "Arena", lambda size: Arena(size, pinned=False))
    pool = PlacesPool()
    assert pool.arena(0) is None
    first = pool.arena(2**20)
    assert pool.arena(2**19) is first
    assert pool.arena(2**20) is first
    assert pool.pinned_bytes == first.size == 2**20
    piece = first.empty((5,), torch.float32).fill_(3)
    second = pool.arena(2**19)  # something lies in the first one still
    assert second is not first
    assert pool.pinned_bytes == 2**19
    assert bool((piece == 3).all())
    larger = pool.arena(2**20)
    assert larger is not second
    pool.close()
    assert pool.pinned_bytes == 0


def test_pinned_memory_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in use by the process, and there for the next phase."""
    monkeypatch.setattr(memory, "Arena", lambda size: Arena(size, pinned=False))
    monkeypatch.setattr(memory, "_LOADED_LATER", 0)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 3 * 10**6 + limited.pool.pinned_bytes)
    limited = MemoryBudget(host_bytes=5 * 10**6)
    before = memory._host_room(limited, 0)
    limited.pool.arena(2**20)
    assert memory._host_room(limited, 0) == before == 2 * 10**6
    assert memory._host_room(limited, 10**6) == 10**6  # what goes to files and comes from them on the way to a GPU


def test_connections_come_from_the_latest_stage_that_left_one() -> None:
    qnn = with_grids()
    stages = qnn.model.stages()
    origins = connection_origins(stages)
    sizes = measure(qnn, tuple(x[:1] for x in noisy_inputs(1)), compact=False)
    assert [b.origin for b in sizes.boundaries] == origins
    assert [n is not None for n in origins] == [stage.joins for stage in stages]
    left = [number + 1 for number, stage in enumerate(stages) if stage.leaves]
    assert [n for n in origins if n is not None] == left[::-1]
    assert [path for b in sizes.boundaries for path in b.units] == [unit.path for unit in qnn.units()]
    assert max(b.trunk + sum(b.skips) for b in sizes.boundaries) == sizes.features


@pytest.mark.usefixtures("gpu")
def test_of_a_units_rows_as_many_are_near_as_fit() -> None:
    made = plan(MemoryBudget(gpu_bytes=27_000, host_bytes=10**6), CUDA)  # 20 000 beside what is in use
    assert made.chunk == 2  # of 10, halved until 4 x 400 x chunk is less than a quarter
    room = 20_000 - 4 * 400 * 2
    assert made.gpu_rows("large") == room // 400
    assert made.gpu_rows("small") == ROWS
    assert "1 of 2 units wholly on the GPU" in str(made)


@pytest.mark.usefixtures("gpu")
def test_wide_layers_take_room_while_samples_pass() -> None:
    """A gated layer's output, twice as wide as its two halves, is there with these and with what goes in and out."""
    budget = MemoryBudget(gpu_bytes=87_000, host_bytes=10**6)
    sizes = dataclasses.replace(SIZES, widest=2000)
    made = MemoryPlan.make(sizes, ROWS, budget, CUDA, chunk=10, compact=False)
    assert made.chunk == 2  # (2 x 2000 + 400) x 5 is more than a quarter of 80 000
    features = 2 * ROWS * 1000 * (made.features == "gpu")
    assert made.unit_gpu_bytes == 80_000 - 4400 * 2 - features


@pytest.mark.usefixtures("gpu")
def test_what_learning_takes_is_set_aside() -> None:
    budget = MemoryBudget(gpu_bytes=27_000, host_bytes=10**6)
    room = plan(budget, CUDA).unit_gpu_bytes
    assert plan(budget, CUDA, learning_bytes=3000).unit_gpu_bytes == room - 3000


@pytest.mark.usefixtures("gpu")
def test_passes_may_take_what_learning_takes_anyway() -> None:
    budget = MemoryBudget(gpu_bytes=27_000, host_bytes=10**6)
    made = plan(budget, CUDA, batch=2)
    assert made.chunk == 5  # 4 x 400 x 5 is less than the 16 x 400 x 2 of learning, 4 x 400 x 10 is not
    assert made.unit_gpu_bytes == 20_000 - 16 * 400 * 2


@pytest.mark.usefixtures("gpu")
def test_units_of_a_stage_are_captured_together_where_they_fit() -> None:
    made = plan(MemoryBudget(gpu_bytes=27_000, host_bytes=10**6), CUDA)
    assert made.together(["small", "small"])
    assert made.together(["large"])
    assert not made.together(["large", "small"])


def test_what_learning_takes() -> None:
    """Rounding variables and finished weights stay; both are there after a calibration and were not before."""
    qnn = wrapped(QuantConfig(4, split=True))
    numbers = [sum(layer.weight.numel() for layer in unit.layers()) for unit in qnn.units()]
    before = sum(p.numel() for p in qnn.parameters())
    assert memory.learning_bytes(qnn, weights=True) == 4 * (2 * sum(numbers) + 6 * max(numbers))
    aside = memory.learning_bytes(qnn, weights=True, variables_stay=False)
    assert aside == 4 * (sum(numbers) + 6 * max(numbers))
    assert memory.learning_bytes(qnn, weights=False) == 0
    calibrate(qnn, calibration_set(2), CalibrationConfig(iters=1, batch_size=2))
    modules = [layer for unit in qnn.units() for layer in unit.layers()]
    variables = sum(q.alpha.numel() for layer in modules for q, _ in layer.weight_quantizers())
    assert variables + sum(layer.baked_weight.numel() for layer in modules) == 2 * sum(numbers)
    assert before >= sum(numbers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_limit_is_kept_and_gone_afterwards() -> None:
    device = torch.device("cuda")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()  # by tests before this one: graphs and workspaces
    budget = MemoryBudget(gpu_bytes=before + 2**28)
    with memory.gpu_limit(budget, device):
        kept = torch.empty(3 * 2**26, dtype=torch.uint8, device=device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**29, dtype=torch.uint8, device=device)
        del kept
        assert torch.cuda.memory_reserved() > before
        memory.give_back_unused(device)
        assert torch.cuda.memory_reserved() < before + 2**26
    torch.empty(2**29, dtype=torch.uint8, device=device)
    limit = memory.gpu_limit(budget, device)
    with pytest.raises(BudgetError, match="--cali_gpu_gb"), limit:
        torch.empty(2**30, dtype=torch.uint8, device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_units_leave_nothing_behind_on_a_gpu() -> None:
    """Between two calibrations of the same network, workspaces of libraries included."""
    allocated = []
    for _ in range(3):
        qnn = wrapped(QuantConfig(4, 8, quant_act=True, split=True)).cuda()
        calibrate(qnn, calibration_set(8), CalibrationConfig(iters=12, iters_a=12, batch_size=4))
        del qnn
        gc.collect()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[2] == allocated[1]


@pytest.mark.usefixtures("gpu")
def test_a_budget_below_what_computing_takes_is_refused() -> None:
    with pytest.raises(BudgetError, match="--cali_gpu_gb"):
        plan(MemoryBudget(gpu_bytes=8000), CUDA)


def test_what_is_measured() -> None:
    qnn, inputs = with_grids(), noisy_inputs(2)
    sizes, half = (measure(qnn, tuple(x[:1] for x in inputs), compact=compact) for compact in (False, True))
    assert sizes.units.keys() == {unit.path for unit in qnn.units()}
    assert sizes.units["conv_in"] == 4 * (3 + 32) * 8 * 8
    assert half.units["conv_in"] == sizes.units["conv_in"] // 2
    assert sizes.features > 4 * 32 * 8 * 8
    assert sizes.features / 2 <= half.features < sizes.features  # timesteps stay as they are


@pytest.mark.parametrize("side", [8, 16])
def test_attention_maps_are_measured(side: int) -> None:
    qnn = with_grids()
    sample = (torch.randn(1, 3, side, side), torch.ones(1))
    seen = []
    for quantizer in (q for path, q in qnn.act_quantizers().items() if path.endswith("act_quantizer_w")):
        quantizer.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    with torch.no_grad(), qnn.quant_state(True, True):
        qnn(*sample)
    assert measure(qnn, sample, compact=False).attention_map == 4 * max(seen)


@pytest.mark.usefixtures("gpu")
def test_attention_maps_limit_how_many_samples_pass_at_once() -> None:
    sizes = dataclasses.replace(SIZES, attention_map=4000)
    made = MemoryPlan.make(sizes, ROWS, MemoryBudget(gpu_bytes=87_000), CUDA, chunk=10, compact=False, maps=True)
    assert made.chunk == 1  # 4 x 4000 x 2 is more than a quarter of 80 000
    fused = MemoryPlan.make(sizes, ROWS, MemoryBudget(gpu_bytes=87_000), CUDA, chunk=10, compact=False)
    assert fused.chunk == 10  # 4 x 400 x 10 is less


@pytest.mark.usefixtures("gpu")
def test_learning_from_attention_maps_leaves_less_room_for_data() -> None:
    sizes = dataclasses.replace(SIZES, attention_map=4000)

    def room(batch: int) -> int:
        budget = MemoryBudget(gpu_bytes=87_000)
        made = MemoryPlan.make(sizes, ROWS, budget, CUDA, chunk=10, compact=False, maps=True, batch=batch)
        return made.unit_gpu_bytes

    assert room(1) == 80_000 - 6 * 4000
    assert room(2) == 80_000 - 6 * 4000 * 2


@pytest.mark.usefixtures("gpu")
def test_of_a_large_map_only_a_part_takes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGEST_MAP", 4000)
    monkeypatch.setattr(memory, "PART_OF_MAP", 1000)
    sizes = dataclasses.replace(SIZES, attention_map=4000, heads=8)

    def made(batch: int) -> MemoryPlan:
        budget = MemoryBudget(gpu_bytes=87_000)
        return MemoryPlan.make(sizes, ROWS, budget, CUDA, chunk=10, compact=False, maps=True, batch=batch)

    assert made(1).chunk == 10  # 4 x 4000 x 10 / 8 is less than what learning takes
    assert made(4).unit_gpu_bytes == 80_000 - 16 * 400 * 4
    assert made(1).unit_gpu_bytes == 80_000 - 6 * 4000  # whole


def test_ranges_are_searched_on_fewer_samples_at_once_where_maps_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    qnn, sample = with_grids(), noisy_inputs(1)
    assert samples_at_once(qnn, sample, most=256) == 256
    map_bytes = measure(qnn, sample, compact=False).attention_map
    monkeypatch.setattr(memory, "_MAPS_AT_ONCE", 4 * map_bytes * 5 + 1)
    assert samples_at_once(qnn, sample, most=256) == 5
    monkeypatch.setattr(memory, "_MAPS_AT_ONCE", 1)
    assert samples_at_once(qnn, sample, most=256) == 1


def test_free_memory_is_found() -> None:
    assert 10 * 2**20 < memory.free_host_bytes() < 2**46


# Places.


PLACE_OF_OTHERS = {"host": "file", "file": "host"}


@pytest.mark.parametrize("place", PLACE_OF_OTHERS)
@pytest.mark.parametrize("compact", [False, True])
def test_shelves_give_back_what_was_put_on_them(place: str, compact: bool, tmp_path: Path) -> None:
    scratch = {"host": None, "file": Scratch(tmp_path)}
    shelf, other = (
        Shelf("partly", compact=compact, scratch=scratch[where]) for where in (place, PLACE_OF_OTHERS[place])
    )
    x = torch.randn(3, 4, 5, 6).half().float().contiguous(memory_format=torch.channels_last)
    kept = shelf.keep(x)
    assert kept.dtype == (torch.float16 if compact else torch.float32)
    there = fetched(kept, torch.device("cpu"))
    assert torch.equal(unpacked(there), x)
    assert there.is_contiguous(memory_format=torch.channels_last)
    assert shelf.keep(kept) is kept
    moved = other.keep(kept)  # out of a file too
    assert is_filed(moved) != is_filed(kept)
    assert torch.equal(fetched(moved, torch.device("cpu")), there)
    t = torch.tensor([999.0, 1.0])
    assert torch.equal(shelf.keep(t), t)
    assert not list(tmp_path.iterdir())  # files have no name: a killed process leaves none behind


def test_a_file_of_features_is_used_again(tmp_path: Path) -> None:
    """What is gone leaves its room to others, joined with what is free beside it."""
    scratch = Scratch(tmp_path, files=1)
    pages = [torch.full((1, mmap.PAGESIZE // 4), float(value)) for value in range(4)]
    filed = [scratch.store(x) for x in pages[:3]]
    assert [x.piece.lanes.base // mmap.PAGESIZE for x in filed] == [0, 1, 2]
    for x in filed:
        x.piece.written()
    del filed[:2], x
    two = scratch.store(torch.cat(pages[2:]))
    assert two.piece.lanes.base == 0
    assert torch.equal(fetched(two, torch.device("cpu")), torch.cat(pages[2:]))
    assert torch.equal(fetched(filed[0], torch.device("cpu")), pages[2])
    assert scratch.store(pages[0]).piece.lanes.base == 3 * mmap.PAGESIZE


def test_rows_lie_at_the_end_of_the_file_and_features_at_its_beginning(tmp_path: Path) -> None:
    page, scratch = mmap.PAGESIZE, Scratch(tmp_path, files=1)
    scratch.reserve(8 * page)
    filed = scratch.store(torch.ones(1, page // 4))
    rows = File(3 * page, scratch)
    mapped = rows.mapped(3 * page // 4, torch.float32)
    rows.write(0, torch.arange(3 * page // 4).float())
    rows.written()
    assert (filed.piece.lanes.base, rows.piece(0, 1).lanes.base, scratch.size) == (0, 5 * page, 8 * page)
    assert torch.equal(mapped, torch.arange(3 * page // 4).float())
    del rows
    assert scratch.section(5 * page).lanes.base == 8 * page  # a tensor is still mapped there
    del mapped
    assert scratch.section(5 * page).lanes.base == page


def test_a_file_for_which_there_is_no_room_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch(tmp_path, files=1)
    section = scratch.section(mmap.PAGESIZE)
    reserve = os.posix_fallocate

    def half(handle: int, offset: int, size: int) -> None:
        reserve(handle, offset, size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", half)
    with pytest.raises(OSError, match="No space left"):
        scratch.section(8 * mmap.PAGESIZE)
    assert os.fstat(section.lanes.handles[0]).st_size == scratch.size == mmap.PAGESIZE


def test_a_file_grows_by_no_more_than_it_has_to(tmp_path: Path) -> None:
    page, scratch = mmap.PAGESIZE, Scratch(tmp_path, files=1)
    sections = [scratch.section(2 * page) for _ in range(2)]
    del sections[1]
    assert scratch.section(3 * page).lanes.base == 2 * page
    assert scratch.size == 5 * page
    scratch.reserve(4 * page)
    assert scratch.size == 5 * page


def test_files_are_given_back_beside_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch(tmp_path, files=2)
    section = scratch.section(1)
    handles, slow, close = section.lanes.handles, threading.Event(), os.close

    def wait_and_close(handle: int) -> None:
        if handle in handles:
            slow.wait()
        close(handle)

    monkeypatch.setattr(os, "close", wait_and_close)
    del scratch
    assert all(map(os.fstat, handles))  # a section holds them
    del section  # returns, though closing takes long
    assert all(map(os.fstat, handles))
    threading.Timer(0.05, slow.set).start()
    memory.free_file_bytes(tmp_path)  # asks for room that is there again
    for handle in handles:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)


def test_one_phase_leaves_its_file_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = PlacesPool()
    first = pool.scratch(tmp_path, 2**20)
    assert pool.scratch(tmp_path, mmap.PAGESIZE) is first
    assert pool.file_bytes == first.size == 2**20

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        assert pool.scratch(tmp_path, 2**21).size == first.size  # what has room comes in yet
    other = tmp_path / "other"
    other.mkdir()
    assert pool.scratch(other, 0) is not first
    pool.close()
    assert pool.file_bytes == 0


@pytest.mark.parametrize("files", [1, 2, 3])
@pytest.mark.parametrize("values", [1, 700, 1024, 1025, 2048, 5000, 9217])
def test_stripes_go_to_files_in_turn(files: int, values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By calls at any place, and as memory."""
    monkeypatch.setattr(places, "_ROWS_STRIPE", mmap.PAGESIZE)  # 1024 values
    scratch, x = Scratch(tmp_path, files=files), torch.arange(values).float()
    others = [File(4 * values, scratch) for _ in range(2)]
    rows = File(4 * values, scratch)
    middle = values // 3
    rows.write(4 * middle, x[middle:])
    rows.write(0, x[:middle])
    for other in others:
        other.write(0, -x)
        other.written()
    rows.written()
    mapped = rows.mapped(values, torch.float32)
    assert torch.equal(mapped, x)
    for start in (0, middle, values - 1):
        out = torch.empty(values - start)
        rows.read(4 * start, out)
        assert torch.equal(out, x[start:])
        assert torch.equal(fetched(mapped[start:], CPU), x[start:])
    mapped.add_(1)
    rows.read(0, out := torch.empty(values))
    assert torch.equal(out, x + 1)
    used = [len(set(os.pread(handle, 2**20, 0))) > 1 for handle in scratch._handles]
    assert sum(used) >= min(files, 1 + values // 1024)


def test_small_sections_go_to_files_in_turn_too(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, files=3)
    first = {scratch.section(10).lanes.handles[0] for _ in range(3)}
    assert first == set(scratch._handles)


def test_values_beyond_half_precision_stay_in_full() -> None:
    x = torch.tensor([[1.0, 70_000.0]])
    assert torch.equal(Shelf("host", compact=True).keep(x), x)


def test_a_full_disk_is_an_error_and_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as error:
        File(16, Scratch(tmp_path))
    assert error.value.filename == str(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("near", [0, 1, 4, 5, 7])
@pytest.mark.parametrize("pinned", [None, 0, 1, 2])
def test_collected_rows_lie_near_and_far(near: int, pinned: int | None, tmp_path: Path) -> None:
    x, t = torch.randn(7, 2, 3, 3), torch.arange(7)
    collector = Collector(7, near, compact=False, pinned=pinned, ring=5, scratch=Scratch(tmp_path))
    for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
        collector.add((x[part], t[part]))
    rows = collector.parts()
    far = 7 - near if pinned is None else min(pinned, 7 - near)
    assert [len(part[0]) for part in rows] == [near, far, 7 - near - far, far + (5 if near + far < 7 else 0)]
    for number, whole in enumerate((x, t)):
        assert torch.equal(torch.cat([part[number] for part in rows[:3]]), whole)
        assert torch.equal(rows.room[number][:far], rows.far[number])


def test_a_collector_widens_when_it_must(tmp_path: Path) -> None:
    collector = Collector(4, 2, compact=True, pinned=1, scratch=Scratch(tmp_path))
    collector.add((torch.ones(2, 2),))
    collector.add((torch.tensor([[1e5, 2.0], [3.0, 4.0]]),))
    (near,), (far,), (filed,), _ = collector.parts()
    assert torch.cat([near, far, filed]).tolist() == [[1, 1], [1, 1], [1e5, 2], [3, 4]]


@pytest.mark.parametrize("near", [0, 4, 7])
@pytest.mark.parametrize("pinned", [None, 0, 2])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_rows_become_others_where_they_lie(near: int, pinned: int | None, chunk: int, tmp_path: Path) -> None:
    x, t = torch.randn(7, 2, 3, 3), torch.arange(7)
    collector = Collector(7, near, compact=False, pinned=pinned, ring=5, scratch=Scratch(tmp_path))
    collector.add((x, t))
    before = collector.parts()
    old = x.clone()

    def step(start: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert torch.equal(tensors[0], old[start : start + chunk])
        assert torch.equal(tensors[1], t[start : start + chunk])
        return (2 * tensors[0]).flatten(2).transpose(1, 2), torch.full((len(tensors[0]), 1), float(start))

    collector.become(step, chunk)
    after = collector.parts()
    expected = (2 * old).flatten(2).transpose(1, 2), (torch.arange(7) // chunk * chunk)[:, None].float()
    for number, whole in enumerate(expected):
        assert torch.equal(torch.cat([part[number] for part in after[:3]]), whole)
    for part, earlier in zip(after[:3], before[:3], strict=True):
        assert part[0].data_ptr() == earlier[0].data_ptr()
    assert [len(part[0]) for part in after] == [len(part[0]) for part in before]  # the ring too


def test_rows_that_become_too_large_for_half_precision_widen(tmp_path: Path) -> None:
    collector = Collector(4, 2, compact=True, pinned=1, scratch=Scratch(tmp_path))
    collector.add((torch.tensor([[1.0], [2.0], [3.0], [4.0]]),))
    collector.become(lambda start, tensors: (tensors[0] * (1.0 if start == 0 else 1e5),), 1)
    (near,), (far,), (filed,), _ = collector.parts()
    assert torch.cat([near, far, filed]).tolist() == [[1], [2e5], [3e5], [4e5]]


@pytest.mark.parametrize("block", [2**24, 64])
def test_files_are_written_in_blocks(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdiff.block_io.BLOCK", block)
    x = torch.randn(3, 5, 7)
    file = File(4 * (2 + x.numel()), Scratch(tmp_path))
    file.write(8, x.flatten())
    file.written()
    out = torch.empty(5, 3, 7).permute(1, 0, 2)  # dense, in another order of axes
    file.read(8, out)
    assert torch.equal(out.permute(1, 0, 2).reshape(-1), x.flatten())
    mapped = file.mapped(2 + x.numel(), torch.float32)
    assert torch.equal(mapped[2:], x.flatten())
    assert is_filed(mapped[5:])
    assert not is_filed(x)
    assert not list(tmp_path.iterdir())


def test_a_file_that_has_become_short_is_an_error(tmp_path: Path) -> None:
    file = File(64, Scratch(tmp_path))
    with pytest.raises(OSError, match="Input/output") as error:
        file.read(32, torch.empty(mmap.PAGESIZE // 4))
    assert error.value.filename == str(tmp_path)


def test_what_could_not_be_written_is_an_error_for_who_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    scratch = Scratch(tmp_path)
    monkeypatch.setattr(os, "pwrite", broken)
    filed = scratch.store(torch.ones(2, 3))
    with pytest.raises(OSError, match="Input/output") as error:
        fetched(filed, torch.device("cpu"))
    assert error.value.filename == str(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_what_lies_in_files_is_not_the_processs_memory(tmp_path: Path) -> None:
    """Written and read, 64 MB; the contents stay."""
    x = torch.arange(16 * 2**20, dtype=torch.float32)
    before = memory.resident_bytes()
    file = File(4 * x.numel(), Scratch(tmp_path))
    file.write(0, x)
    file.written()
    kept = file.mapped(x.numel(), torch.float32)
    assert memory.resident_bytes() - before < 2**24
    assert torch.equal(kept, x)
    assert memory.resident_bytes() - before > 2**25  # as a process sees it that reads and does not let go
    released(kept)
    assert memory.resident_bytes() - before < 2**24
    rows = kept.view(256, -1)
    data = UnitData((rows[:0],), rows[:0], UnitData((rows,), rows))
    for number in torch.arange(256).split(8):
        (found,), target = data.rows(number, torch.device("cpu"))
        assert torch.equal(found, x.view(256, -1)[number])
        assert torch.equal(target, found)
        del found, target
    assert memory.resident_bytes() - before < 2**25
    assert torch.equal(kept, x)


def test_a_full_disk_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that needs no file is made all the same."""
    asked = []
    monkeypatch.setattr(memory, "file_rates", lambda folder: asked.append(folder) or alike(1e9))
    budget = MemoryBudget(host_bytes=1000, folder=tmp_path)
    for room in (memory._PROBE_BYTES - 1, memory._PROBE_BYTES):
        monkeypatch.setattr(memory, "free_file_bytes", lambda folder, room=room: room)
        assert plan(budget).chunk
    assert asked == [tmp_path]
    assert plan(budget).chunk  # the next phase's, and it is not timed again
    assert asked == [tmp_path]
    budget.pool.close()
    assert plan(budget).chunk
    assert asked == [tmp_path] * 2


def test_a_disks_rate_is_measured(tmp_path: Path) -> None:
    rates = memory.file_rates(tmp_path)
    assert all(1e6 < value < 1e12 for rate in rates for value in rate)
    assert rates.cached.written >= rates.disk.written
    assert not list(tmp_path.iterdir())
    assert FileRate(2.0, 4.0).seconds(8.0, 3) == 4 + 6


def test_missing_rows_are_noticed() -> None:
    collector = Collector(4, 4, compact=False)
    collector.add((torch.ones(3, 2),))
    with pytest.raises(RuntimeError, match="3 of 4"):
        collector.parts()


# The result does not depend on it.


PLACES = {
    "features in host memory": (None, 1e9),
    "room, computed anew where not": (MemoryBudget(host_bytes=1000), 1.0),  # where files are slow
    "as far as there is room": (MemoryBudget(host_bytes=300_000), 1.0),
    "in files or computed anew where not": (MemoryBudget(host_bytes=1000), 1e9),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("timed", [False, True])
def test_a_budget_changes_nothing_but_the_place(
    timed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    data = calibration_set(6)
    config = QuantConfig(4, 8, quant_act=True, split=True)
    if timed:
        steps = tuple(sorted(set(data.t.tolist())))
        config = dataclasses.replace(config, timed_ranges="all", timesteps=steps)
    for place, (budget, rate) in PLACES.items():
        monkeypatch.setattr("qdiff.memory.file_rates", lambda folder, rate=rate: alike(rate))
        budget = budget and dataclasses.replace(budget, folder=tmp_path)
        qnn = wrapped(config)
        with caplog.at_level("INFO", "qdiff"):
            calibrate(qnn, data, CalibrationConfig(iters=3, iters_a=3, batch_size=4), budget=budget)
        assert place in caplog.text
        caplog.clear()
        results.append(qnn.state_dict())
    for other in results[1:]:
        assert results[0].keys() == other.keys()
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_on_the_host_teach_a_gpu_the_same() -> None:
    results = []
    for gpu_rows in (None, 5):
        with pytest.MonkeyPatch.context() as patch:
            if gpu_rows is not None:
                patch.setattr(MemoryPlan, "gpu_rows", lambda self, path, rows=gpu_rows: rows)
            qnn = wrapped(QuantConfig(4, 8, quant_act=True, split=True)).cuda()
            config = CalibrationConfig(iters=25, iters_a=25, batch_size=4, precision="fp32", deterministic=True)
            reports = calibrate(qnn, calibration_set(16), config)
            results.append([report.loss_after for report in reports])
    assert results[1] == pytest.approx(results[0], rel=1e-4)
