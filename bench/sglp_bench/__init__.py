"""Measure artifacts against their unpruned baseline and report what was gained.

Names are loaded on first use (PEP 562).  So the timing worker starts without anything it does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "BenchmarkResult": "sglp_bench.result",
    "Comparison": "sglp_bench.judge.compare",
    "RunReport": "sglp_bench.report.run_report",
    "Workload": "sglp_bench.workloads.generate",
    "benchmark_pair": "sglp_bench.measure.harness",
    "compare_results": "sglp_bench.judge.compare",
    "reason_not_timed": "sglp_bench.measure.timeable",
    "run_arms": "sglp_bench.measure.harness",
}

__all__ = [
    "BenchmarkResult",
    "Comparison",
    "RunReport",
    "Workload",
    "benchmark_pair",
    "compare_results",
    "reason_not_timed",
    "run_arms",
]

if TYPE_CHECKING:
    from sglp_bench.judge.compare import Comparison, compare_results
    from sglp_bench.measure.harness import benchmark_pair, run_arms
    from sglp_bench.measure.timeable import reason_not_timed
    from sglp_bench.report.run_report import RunReport
    from sglp_bench.result import BenchmarkResult
    from sglp_bench.workloads.generate import Workload


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
