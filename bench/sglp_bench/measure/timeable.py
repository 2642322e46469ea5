"""Whether a time of an artifact would mean anything here: its own runner is asked, never a list of formats.

So a third party's format is measured as soon as its runner can do what the workload asks.
"""

from __future__ import annotations

from sglp_bench.workloads.protocol import BenchmarkWorkload
from sglp_deploy import registry
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import ArtifactError, ConfigError, MissingDependencyError
from sglp_deploy.protocols import Runner


def reason_not_timed(artifact: ExportArtifact, workload: BenchmarkWorkload) -> str | None:
    """Why ``artifact`` cannot be measured by ``workload`` on this machine, or None when it can.

    Its registered exporter opens a runner, which is asked and never entered: no weight is loaded.

    Raises:
        ExporterNotFoundError: If no exporter has the artifact's format.
    """
    try:
        exporter = registry.exporter(artifact.format)
        runner = exporter.open(artifact, device=workload.device, threads=workload.threads)
    except (ArtifactError, ConfigError, MissingDependencyError) as error:
        return str(error)
    return refusal(runner, artifact.format, workload)


def refusal(runner: Runner, artifact_format: str, workload: BenchmarkWorkload) -> str | None:
    """Why times of ``runner``, opened and not yet entered, would not be those of ``artifact_format``; else None."""
    if not_timed := getattr(runner, "not_timed", ""):
        return f"the runner of format {artifact_format!r} is not timed; {not_timed}"
    if stands_in_for := getattr(runner, "stands_in_for", ""):
        # An empty description is one that is known only after entering.
        what = getattr(runner, "description", "") or type(runner).__name__
        return (
            f"what runs on {workload.device} is {what}; a time of it would be filed under {stands_in_for}; "
            "benchmark on the device the artifact is for"
        )
    if unmet := workload.unmet_by(runner):
        return f"the runner of format {artifact_format!r} {unmet}"
    return None
