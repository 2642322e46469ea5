"""One run as one file to keep and one page to read: ``report.json`` is the contract, ``report.html`` only renders it.

Everything is taken from the JSON of the other files.  So a report can be made again years later from a run folder, on a
machine that has neither the model nor the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sglp_bench import shapes
from sglp_bench.judge.accept import verdict
from sglp_bench.judge.compare import VERSIONS as COMPARISON_VERSIONS
from sglp_bench.judge.compare import Comparison
from sglp_bench.judge.consistent import refuse_contradiction
from sglp_bench.report.facts import Json, cards, measurement, missing, section
from sglp_bench.result import VERSIONS as RESULT_VERSIONS
from sglp_bench.result import BenchmarkResult
from sglp_deploy import _io
from sglp_deploy.artifact import MANIFEST
from sglp_deploy.errors import ArtifactError
from sglp_deploy.parity.certificate import ParityReport
from sglp_deploy.plan import PruningPlan
from sglp_deploy.shapes import files
from sglp_deploy.tasks.quality_file import read_quality

SCHEMA = "report/1"  # history: 1 = first
_VERSIONS = {
    "comparison": COMPARISON_VERSIONS,
    "result": RESULT_VERSIONS,
}  # else: the first
_READERS: Mapping[str, Callable[[Json], object]] = {
    "artifact": partial(
        files.refuse_mistyped, files.Artifact, what="the manifest of an artifact", then="export it again"
    ),
    "comparison": Comparison.from_json,
    "result": BenchmarkResult.from_json,
}
_OURS = ("artifact/", "parity/", "comparison/", "result/")


class RunReport:
    """What one run found, ready to be saved or shown.

    Every argument may be an object with ``to_json()`` or its JSON; a sequence may also be an object keyed by name.  Any
    of them may be None or empty: the report then says what was not measured.

    Args:
        plan: ``plan/3``, or an older one.
        artifacts: ``artifact/1`` each, or ``{"name", "manifest", "digest"}``.
        parity: ``parity/2`` (or ``parity/1``) each.
        comparisons: ``comparison/2`` each (or ``comparison/1``); one that still has its raw samples brings them along.
        quality: ``quality/2`` (or ``quality/1``).
        results: ``result/2`` (or ``result/1``) by the name of the comparison, or in the same order.
        provenance: ``{"versions", "machine", "command", "created", "seed", "stages"}``, each optional.
        title: Heading of the page; made from the model and its depth when omitted.
        checkpoint: ``{"parameters", "dense_parameters"}`` of the pruned checkpoint.
        limits: What must be met; see :func:`sglp_bench.judge.accept.check_limits`.
    """

    def __init__(
        self,
        plan: Any,
        artifacts: Any = (),
        parity: Any = (),
        comparisons: Any = (),
        quality: Any = None,
        results: Any = None,
        provenance: Any = None,
        title: str | None = None,
        checkpoint: Any = None,
        limits: Mapping[str, Any] | None = None,
    ) -> None:
        value: Json = {
            "schema": SCHEMA,
            "title": title,
            "plan": _plain(plan),
            "artifacts": [_artifact(name, item) for name, item in _named(artifacts)],
            "parity": [
                {**item, "name": item.get("name") or name or item.get("format") or "artifact"}
                for name, raw in _named(parity)
                if isinstance(item := _plain(raw), dict)
            ],
            "quality": _plain(quality),
            "provenance": _plain(provenance),
            "checkpoint": _plain(checkpoint),
        }
        if plan := section(value, "plan"):
            value["plan"] = {"n_layers": len(plan.get("keep", [])) + len(plan.get("drop", [])), **plan}
        value["measurements"] = _measurements(value, comparisons, results)
        value["title"] = title or _title(value)
        value["claims"] = [
            {"name": item["name"], "metric": row["metric"], **row["claim"]}
            for item in value["measurements"]
            for row in item["rows"]
            if row["claim"]
        ]
        value["accept"] = verdict(limits, value) if limits else None
        value["cards"] = cards(value)
        value["missing"] = missing(value)
        self._value: Json = _plain(value)

    def to_json(self) -> Json:
        """The content of ``report.json``."""
        return dict(self._value)

    def save(self, out_dir: str | Path) -> Path:
        """Write ``report.json`` and then ``report.html`` into ``out_dir``, each atomically; returns the page's path.

        Raises:
            StorageError: If they cannot be written; older files stay as they were.
        """
        from sglp_bench.report.page import render_html  # the template engine loads only where a page is made

        folder = Path(out_dir)
        page = render_html(self._value)  # before anything is written: a fault here must not leave half a report
        _io.write_json(folder / "report.json", self._value)
        _io.write_text(folder / "report.html", page)
        return folder / "report.html"

    @classmethod
    def load(cls, path: str | Path) -> RunReport:
        """Read ``report.json``.

        Raises:
            ArtifactError: If the file is missing, is not JSON, is of an unknown schema, or lacks a section.
        """
        value = _io.read_json(Path(path), "report")
        shapes.refuse_mistyped(shapes.Report, value, str(path), "make the report again")
        report = cls.__new__(cls)
        report._value = value
        return report

    @classmethod
    def from_run_folder(cls, path: str | Path) -> RunReport:
        """Make the report of a run folder from its files alone; files that are not there are reported as not measured.

        What can be worked out again is not believed: whether a certificate passed, what the raw samples give, and
        whether a file is the one its stage wrote.

        Raises:
            ArtifactError: If the folder is missing, or a file in it is not what its name says, or was changed since the
                run wrote it.
        """
        root = Path(path)
        if not root.is_dir():
            raise ArtifactError(f"{root} is not a folder; a run folder was expected; check the path")
        run = _run_record(root / "run.json")
        _check_unchanged(root, run)
        comparisons, compared = _folder_of(root, "bench/*/comparison.json", "comparison")
        results, measured = _folder_of(root, "bench/*/result.json", "result")
        for name in compared.keys() & measured.keys():
            refuse_contradiction(compared[name], measured[name])
        return cls(
            plan=PruningPlan.load(root / "plan.json") if (root / "plan.json").is_file() else None,
            artifacts=_folder_of(root, "checkpoint/manifest.json", "artifact")[0]
            | _folder_of(root, "artifacts/*/manifest.json", "artifact")[0],
            parity={
                file.stem: ParityReport.load(file)
                for file in sorted((root / "parity").glob("*.json"))
                if not _is_of_another_program(file)
            },
            comparisons=comparisons,
            quality=read_quality(root / "quality.json") if (root / "quality.json").is_file() else None,
            results=results,
            provenance=_provenance(run),
            title=run.get("title"),
            checkpoint=run.get("checkpoint"),
            limits=section(run, "accept"),
        )


def _plain(value: Any) -> Any:
    """JSON values of anything: ``to_json()`` where there is one; a number JSON cannot hold becomes null."""
    if hasattr(value, "to_json"):
        value = value.to_json()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _named(items: Any) -> Iterable[tuple[str, Any]]:
    """(name or "", item) from a sequence, or from an object keyed by name."""
    if isinstance(items, Mapping):
        return [(str(name), item) for name, item in items.items()]
    return [("", item) for item in items or ()]


def _artifact(name: str, item: Any) -> Json:
    value = _plain(item)
    manifest = value.get("manifest", value)
    path = getattr(item, "path", None)
    return {
        "name": value.get("name") or name or (path.name if path else manifest.get("format") or "artifact"),
        "manifest": manifest,
        "digest": value.get("digest") or _io.sha256_json(manifest),
    }


def _measurements(value: Json, comparisons: Any, results: Any) -> list[Json]:
    given = list(_named(comparisons))
    by_name = dict(_named(results)) if isinstance(results, Mapping) else {}
    in_order = [] if isinstance(results, Mapping) else list(results or ())
    found = []
    for index, (name, item) in enumerate(given):
        comparison = _plain(item)
        candidate = section(section(comparison, "arms"), str(comparison.get("candidate")))
        name = name or str(section(candidate, "artifact").get("format") or comparison.get("candidate") or index + 1)
        raw = by_name.get(name) or (in_order[index] if index < len(in_order) else getattr(item, "result", None))
        found.append(measurement(name, comparison, _plain(raw), section(value, "plan"), value["parity"]))
    return sorted(found, key=lambda item: item["kind"] != "depth")  # what pruning gave comes first


def _title(value: Json) -> str:
    plan = section(value, "plan")
    model = str(section(plan, "model").get("id") or "A model")
    return f"{model}: {plan['n_layers']} to {len(plan['keep'])} layers" if plan.get("keep") else model


def _run_record(path: Path) -> Json:
    if not path.is_file():
        return {}
    value = _io.read_json(path, "run", (1, 2))
    files.refuse_mistyped(files.Run, value, str(path), "run again")
    return value


def _folder_of(root: Path, pattern: str, kind: str) -> tuple[dict[str, Json], dict[str, Any]]:
    """The files by the names of their folders: their content, and what their reader makes of it."""
    versions = _VERSIONS.get(kind, (1,))
    found, read = {}, {}
    for file in sorted(root.glob(pattern)):
        if not _is_of_another_program(file):
            value = _io.read_json(file, kind, versions)
            read[file.parent.name] = _READERS[kind](value)  # refuses what is not as it was written
            found[file.parent.name] = value
    return found, read


def _check_unchanged(root: Path, run: Json) -> None:
    """Refuse files that are not the ones whose digests ``run.json`` has.

    Raises:
        ArtifactError: Naming the first such file.
    """
    stages = run.get("stages")
    for name, stage in stages.items() if isinstance(stages, Mapping) else ():
        outputs = stage.get("outputs") if isinstance(stage, Mapping) and name != "report" else None
        for output, digest in outputs.items() if isinstance(outputs, Mapping) else ():
            try:
                place = _io.inside(root, str(output))
                manifest = place / MANIFEST
                if place.is_file():
                    found = _io.sha256_file(place)
                elif manifest.is_file():
                    found = _io.sha256_json(_io.read_json(manifest, "artifact"))
                else:
                    continue  # reported as not measured
            except (OSError, ValueError) as error:
                raise ArtifactError(f"run.json names the output {output!r}; {error}; run again") from error
            if found != digest:
                raise ArtifactError(
                    f"{place} is not what the stage {name!r} of this run wrote; a report would quote what nobody "
                    "measured; restore it, or run again"
                )


def _is_of_another_program(file: Path) -> bool:
    """Whether it is sound JSON without a schema of ours; a damaged file may be ours, and is reported."""
    value = _io.json_of(file)
    if value is None:
        return False
    schema = value.get("schema") if isinstance(value, dict) else None
    return not str(schema).startswith(_OURS)


def _provenance(run: Json) -> Json | None:
    if not run:
        return None
    found = {**section(run, "provenance")}
    for name in ("versions", "machine", "command", "created", "seed"):
        found.setdefault(name, run.get(name))
    stages = run.get("stages")
    if isinstance(stages, Mapping):
        stages = [{"name": name, **stage} for name, stage in stages.items() if isinstance(stage, Mapping)]
    found.setdefault("stages", stages)
    return found
