"""The kinds of workload by the name that files hold; adding one is its module and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglp_bench.workloads.generate import Workload
from sglp_bench.workloads.protocol import BenchmarkWorkload
from sglp_deploy.errors import ConfigError

_READERS: dict[str, Callable[[Mapping[str, Any]], BenchmarkWorkload]] = {
    Workload.kind: Workload.from_json,
}


def workload_from_json(value: Mapping[str, Any]) -> BenchmarkWorkload:
    """The workload that ``to_json`` of any kind wrote; one without a kind is of before there were several.

    Raises:
        ConfigError: If the kind is unknown, or a field is unknown or out of range.
    """
    kind = value.get("kind", Workload.kind)
    if kind not in _READERS:
        raise ConfigError(
            f"workload kind {kind!r} is unknown; this version knows {', '.join(_READERS)}; "
            "read the file with the version that wrote it"
        )
    return _READERS[kind](value)
