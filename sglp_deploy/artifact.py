"""What an export leaves behind: a folder whose manifest names every file, its digest, and where it came from."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError

MANIFEST = "manifest.json"
PLAN_FILE = "sglp_plan.json"
CERTIFICATE = _io.CERTIFICATE
BUILT = "built"  # folder in which an artifact's own program builds for a device; its runner checks what lies there
SCHEMA = "artifact/1"  # history: 1 = first

# Element types: the short form, which a manifest calls a precision, and the name of numpy, torch and tensor specs.
ELEMENT_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# What the name of a decoder's cache tensor begins with where it goes in, and where it comes out.
PAST, PRESENT = "past_key_values.", "present."
CACHE_PARTS = ("key", "value")

# What a certificate asks an artifact to have room for: a prompt this many tokens longer than its sliding window, and
# steps through the cache.
BEYOND_WINDOW = 64
DECODE_STEPS = 32


def cache_name(prefix: str, layer: int, part: str) -> str:
    """Name of a cache tensor, for example ``past_key_values.3.key``.

    Args:
        prefix: :data:`PAST` or :data:`PRESENT`.
        layer: Counted over the layers that keep a cache.
        part: One of :data:`CACHE_PARTS`.
    """
    return f"{prefix}{layer}.{part}"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, its element type and its shape, where a string is a symbolic size."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_json(self) -> dict[str, Any]:
        """The form kept in the manifest."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TensorSpec:
        """Inverse of :meth:`to_json`."""
        return cls(value["name"], value["dtype"], tuple(value["shape"]))


@dataclass(frozen=True)
class FileRecord:
    """Digest and size of one file of an artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ExportArtifact:
    """A deployable folder and everything its manifest says about it.

    Attributes:
        path: The folder.
        format: Name of the exporter that made it ("onnx", "vllm", ...); the same exporter opens it.
        files: Relative path to digest and size, for every file except the manifest itself.
        inputs: Inputs of the graph, or empty for a checkpoint.
        outputs: Outputs of the graph, or empty for a checkpoint.
        precision: Element type of the weights, "fp32" for example.
        weight_bytes: Bytes of weights a runtime reads from this folder.
        n_layers: Layers in the artifact.
        plan_digest: Digest of the plan it was made by (see :meth:`sglp_deploy.plan.PruningPlan.digest`).
        model: ``{"id", "fingerprint", "config_digest", "gguf_file"}`` of the model before pruning.
        derived_from: What shared work it came from, for example the digest of the traced layer template.
        producer: Versions of what made it.
        details: Facts of the format itself, for people and tests (free form, JSON).
    """

    path: Path
    format: str
    files: Mapping[str, FileRecord]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    weight_bytes: int
    n_layers: int
    plan_digest: str
    model: Mapping[str, Any]
    derived_from: str | None = None
    producer: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over the manifest without its folder: two folders with equal content have equal digests."""
        return _io.sha256_json(self.to_json())

    @property
    def total_bytes(self) -> int:
        """Bytes on disk, the manifest excluded."""
        return sum(record.bytes for record in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """The content of ``manifest.json``."""
        return {
            "schema": SCHEMA,
            "format": self.format,
            "files": {
                name: {"sha256": record.sha256, "bytes": record.bytes} for name, record in sorted(self.files.items())
            },
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "precision": self.precision,
            "weight_bytes": self.weight_bytes,
            "n_layers": self.n_layers,
            "plan_digest": self.plan_digest,
            "model": dict(self.model),
            "derived_from": self.derived_from,
            "producer": dict(self.producer),
            "details": dict(self.details),
        }

    @classmethod
    def load(cls, path: str | Path, *, check_files: bool = True) -> ExportArtifact:
        """Read an artifact folder and check every file against its digest.

        Args:
            path: The folder that holds ``manifest.json``.
            check_files: Set to False to skip the digests (a second reader in the same run).

        Raises:
            ArtifactError: If the manifest is missing or of an unknown schema, a file is missing or altered, or one lies
                there that it does not list.
        """
        root = Path(path)
        from sglp_deploy.shapes import files  # what checks types loads only where a file is read

        value = _io.read_json(root / MANIFEST, "artifact")
        files.refuse_mistyped(files.Artifact, value, str(root / MANIFEST), "export it again")
        artifact = cls(
            path=root,
            format=value["format"],
            files={name: FileRecord(record["sha256"], record["bytes"]) for name, record in value["files"].items()},
            inputs=tuple(TensorSpec.from_json(spec) for spec in value["inputs"]),
            outputs=tuple(TensorSpec.from_json(spec) for spec in value["outputs"]),
            precision=value["precision"],
            weight_bytes=value["weight_bytes"],
            n_layers=value["n_layers"],
            plan_digest=value["plan_digest"],
            model=value["model"],
            derived_from=value["derived_from"],
            producer=value["producer"],
            details=value["details"],
        )
        for name, record in artifact.files.items():
            file = _io.inside(root, name)
            if not file.is_file():
                raise ArtifactError(f"{file} is missing; the manifest lists it; export the artifact again")
            size = file.stat().st_size
            if size != record.bytes:
                raise ArtifactError(
                    f"{file} has {size} bytes, the manifest says {record.bytes}; the file is damaged; "
                    "export the artifact again"
                )
            if check_files and _io.sha256_file(file) != record.sha256:
                raise ArtifactError(
                    f"{file} differs from its digest in the manifest; the file was altered; export the artifact again"
                )
        for entry in sorted(root.rglob("*")):
            if entry.is_file() and not _may_lie_there(entry.relative_to(root), artifact.files):
                raise ArtifactError(
                    f"{entry} is not in the manifest; a runtime would read it unchecked; move it away, or export the "
                    "artifact again"
                )
        return artifact


def _may_lie_there(name: Path, listed: Mapping[str, FileRecord]) -> bool:
    """Whether a file in an artifact's folder is listed, hidden, built there, the manifest itself or its certificate."""
    if name.as_posix() in listed or name.parts[0] == BUILT or any(part.startswith(".") for part in name.parts):
        return True
    return name in (Path(MANIFEST), Path(CERTIFICATE))  # who reads a certificate says what is wrong with it


@contextmanager
def staged_artifact(out_dir: str | Path) -> Iterator[Path]:
    """A folder to fill with an artifact; it takes the name ``out_dir`` when the block ends without an error.

    An older folder of that name stays until then.  On a failure or an interrupt nothing half-made is left.

    Raises:
        StorageError: If the operating system refuses a write, a full disk included.
    """
    with _io.staged_directory(Path(out_dir)) as folder:
        yield folder


def write_manifest(folder: Path, **facts: Any) -> ExportArtifact:
    """Digest every file in ``folder`` and write its manifest; ``facts`` are the other fields of ``ExportArtifact``.

    Call it inside :func:`staged_artifact`, as the last step before the folder gets its final name.
    """
    files = {
        file.relative_to(folder).as_posix(): FileRecord(_io.sha256_file(file), file.stat().st_size)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder) not in (Path(MANIFEST), Path(CERTIFICATE))
    }
    artifact = ExportArtifact(path=folder, files=files, **facts)
    _io.write_json(folder / MANIFEST, artifact.to_json())
    return artifact


def producer_versions(*packages: str) -> dict[str, str]:
    """Versions of this package, Python and the named distributions that are installed."""
    versions = {"python": platform.python_version()}
    for name in ("sglp-deploy", *packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH has no distribution of its own
            versions[name] = "not installed"
    return versions
