"""Records for tests."""

from swacompile.tuning.config import Config
from swacompile.tuning.cpu_rule import CpuTilesRule
from swacompile.tuning.record import Origin, Provenance, Status, TuningRecord
from swacompile.workload import Workload

HERE = Provenance(device="test device", threads=1, revision=CpuTilesRule().revision(), versions="swacompile 0")
BASE = (
    "cpu_tiles:queries=48,keys=96,score_keys=8,score_vectors=3,output_rows=4,output_vectors=4,row_keys=64,row_heads=4"
)


def config(**changes: int) -> Config:
    return Config.parse(BASE).replaced(changes)


def record(
    median_us: float | None = 100.0,
    *,
    workload: str = "f32-d64-v64-g4-w128-n4096",
    target: str = "x86_64_v4",
    status: Status = Status.OK,
    origin: Origin = Origin.SEARCH,
    rung: int = 2,
    spread: float = 0.01,
    provenance: Provenance = HERE,
    date: str = "2026-01-02T03:04:05Z",
    message: str = "",
    of: Config | None = None,
) -> TuningRecord:
    ok = status is Status.OK
    return TuningRecord(
        target=target,
        workload=Workload.parse(workload),
        config=of or config(),
        status=status,
        origin=origin,
        rung=rung,
        samples=9 if ok else 0,
        median_us=median_us if ok else None,
        spread=spread if ok else None,
        provenance=provenance,
        date=date,
        message=message,
    )
