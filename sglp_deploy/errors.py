"""Every failure this project can foresee, as one tree, so a caller can catch what it can answer.

::

    SGLPError
    |-- ConfigError            a value is wrong before any work; lists all faults at once
    |-- UnsupportedModelError  no adapter matches, or a layer cannot be removed
    |-- CalibrationError       empty set, non-finite activations, a constant layer
    |-- PlanError              budget cannot be met; or the plan is for another model
    |-- ExportError
    |   |-- ExporterNotFoundError
    |   |-- MissingDependencyError
    |   `-- BackendError       a runtime failed; the cause is chained
    |-- ArtifactError          file missing, digest differs, unknown schema
    |-- ParityError            carries the ParityReport
    |-- StorageError           a file could not be written; nothing under its final name was touched
    `-- BenchmarkError
        `-- IncomparableResultsError   names the keys that differ

A message says what is wrong, why, and what to do next, in one line: ``what; why; what next``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SGLPError(Exception):
    """Base of every failure this project foresees; the command line prints it without a traceback."""


class ConfigError(SGLPError):
    """A value is wrong and no work has been done yet; ``faults`` lists every one of them."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__(" / ".join(self.faults))


class UnsupportedModelError(SGLPError):
    """No adapter recognises the model, or the model has a layer that cannot be removed safely."""


class CalibrationError(SGLPError):
    """The calibration text or the activations it produced cannot support a plan."""


class PlanError(SGLPError):
    """The budget cannot be met, or the plan belongs to another model."""


class ExportError(SGLPError):
    """An export failed; nothing was left under the artifact's final name."""


class ExporterNotFoundError(ExportError):
    """No exporter has that name; the message offers the nearest one and the whole list."""


class MissingDependencyError(ExportError):
    """An exporter's runtime is not installed; the message names the extra that brings it."""


class BackendError(ExportError):
    """A runtime failed while building or running an artifact; its own exception is chained."""


class ArtifactError(SGLPError):
    """An artifact on disk is incomplete, altered, or written by a schema this version does not know."""


class ParityError(SGLPError):
    """An artifact does not compute what it was meant to; ``report`` (a ``ParityReport``) says where."""

    # Any: the class of the report lies above this module, and an import of it, even for typing alone, closes a circle.
    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


class StorageError(SGLPError):
    """A file could not be written (a full disk, no permission); no half-made file was left."""


class BenchmarkError(SGLPError):
    """A measurement could not be taken."""


class IncomparableResultsError(BenchmarkError):
    """Two results may not be compared; ``keys`` names what differs between them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = list(keys)
        super().__init__(
            f"the two results differ in {', '.join(self.keys)}; a ratio between them would mix causes; "
            "measure both in one run with the same workload"
        )
