"""The two seams others implement: an Exporter turns a model into an artifact, a Runner executes one.

Why protocols and not base classes?  A third party's class needs no import from us.  Nothing here can grow behaviour
that a plugin silently inherits.  Changing a signature in this file breaks every plugin.  Think twice.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy._names import unknown_name
from sglp_deploy.errors import ConfigError

if TYPE_CHECKING:
    from sglp_deploy.artifact import ExportArtifact
    from sglp_deploy.materialize import CompressedModel


@runtime_checkable
class Runner(Protocol):
    """Something that executes a model; a context manager that owns its device between enter and exit.

    A runner may also have ``description`` (what ran, for certificates) and ``stands_in_for``: the format's name, when
    it executes the artifact in place of the runtime the format is made for; then it is verified, never benchmarked.
    ``not_timed`` says why a runner of the right runtime is not benchmarked either, and ``allocates_through_torch`` is
    true where torch's count of device memory is the whole of it.
    """

    def __enter__(self) -> Runner:
        """Load the model and make it ready to run."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the model and the device."""
        ...

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once on named arrays."""
        ...

    def synchronize(self) -> None:
        """Return when every result asked for so far exists; a no-op where calls block."""
        ...


@runtime_checkable
class GeneratingRunner(Runner, Protocol):
    """A Runner that can also hold a key-value cache and decode token by token."""

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        all_positions: bool = False,
    ) -> NDArray[np.float32]:
        """Start a sequence: empty the cache, run the prompt, fill the cache.

        Args:
            input_ids: Prompt tokens, shape (batch, seq); shorter prompts are padded on the left.
            attention_mask: 1 for a token, 0 for padding, shape (batch, seq); all ones when omitted.
            all_positions: Return the logits of every position and not only the last.

        Returns:
            Logits, shape (batch, vocab), or (batch, seq, vocab) with ``all_positions``.
        """
        ...

    def decode(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token to every sequence and run it through the cache.

        Args:
            token_ids: shape (batch,).

        Returns:
            Logits for the next token, shape (batch, vocab).
        """
        ...


@dataclass(frozen=True)
class EnvironmentSpec:
    """What goes into one environment.

    Attributes:
        name: What users call it.
        why: Why it cannot share ours, for ``env list``.
        install: Steps of ``pip install`` arguments, in order.
        remove: Packages taken out again afterwards: dependencies that break the others.
        probe: Python statement that must succeed in it; run after creation and for an interpreter a user names.
        size: Rough size on disk, for people.
        stub_metadata: Distributions whose metadata is written by hand, name to version: a rebuild under another name
            is not found by tools that look up the original one.
    """

    name: str
    why: str
    install: tuple[tuple[str, ...], ...]
    probe: str
    size: str
    remove: tuple[str, ...] = ()
    stub_metadata: Mapping[str, str] | None = None

    def fingerprint(self) -> str:
        """Digest of everything that decides the content: the lists, the Python version and the platform."""
        return _io.sha256_json(
            {
                "install": [list(step) for step in self.install],
                "remove": list(self.remove),
                "stub_metadata": dict(self.stub_metadata or {}),
                "python": platform.python_version_tuple()[:2],
                "platform": [platform.system(), platform.machine()],
            }
        )


@dataclass(frozen=True)
class FormatFacts:
    """What a format says of itself without being run: ``facts`` of its exporter, which may be left out.

    Attributes:
        environments: Isolated environments that the format brings; ``env`` lists and makes them.
        environment: Name of the one that makes or runs it, its own or another format's; None for one that needs this
            interpreter only.  A run asks for certificates and times again when that environment has changed.
        cuda_environment: Name of another one that takes its place on a CUDA device.
        packages: Distributions, by the names pip knows, whose versions decide what it makes and how fast that runs; a
            run does its stages again when one has changed.  torch, transformers and numpy decide everything anyway.
    """

    environments: tuple[EnvironmentSpec, ...] = ()
    environment: str | None = None
    cuda_environment: str | None = None
    packages: tuple[str, ...] = ()

    def environment_on(self, device: str) -> EnvironmentSpec | str | None:
        """What makes or runs it on ``device``: an environment of its own, the name of another format's, or None."""
        name = (self.cuda_environment if device.startswith("cuda") else None) or self.environment
        return next((spec for spec in self.environments if spec.name == name), name)


@runtime_checkable
class Exporter(Protocol):
    """Turns a pruned model into an artifact and opens such artifacts again.

    ``open`` accepts at least the keyword options ``device`` ("cpu", "cuda", "cuda:1") and ``threads`` (int or None).
    An exporter that cannot write every element type may have ``check_precision(precision: str) -> None``, which raises
    :class:`sglp_deploy.errors.ConfigError`; a run asks it before it plans.

    An exporter says whether its runtime reads ``layer_types`` by ``layer_type_formula(model_type: str)``: None when it
    does, else a function from a layer's number to the type the runtime takes it for.  One without this method is
    refused for a plan that breaks a pattern of layer types (:func:`sglp_deploy.models.patterns.check_layer_types`).

    ``facts`` (:class:`FormatFacts`) says what the format depends on; one without it depends on this interpreter alone.
    The command line reads it where nothing else of the format is needed, so the exporter's module should import
    nothing heavy before it is used.

    Two more methods make certificates say more.  ``stored_weights(artifact)`` lists what lies in the files
    (:class:`sglp_deploy.parity.diagnosis.StoredTensor`): types are then checked against the manifest, and a failed
    certificate names the tensor.  ``difference(artifact, model) -> str | None`` compares the files with the pruned
    model itself.
    """

    name: str
    requires: tuple[str, ...]

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write an artifact folder for ``model``; atomic, so ``out_dir`` is complete or untouched."""
        ...

    def open(self, artifact: ExportArtifact, **options: Any) -> Runner:
        """A Runner for ``artifact``; nothing is loaded before the Runner is entered."""
        ...


_OPEN_OPTIONS = ("device", "threads")


def check_open_options(exporter: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an exporter's ``open``, refused when one is not among those every exporter takes.

    Raises:
        ConfigError: If an option is unknown, or ``threads`` is not a positive number.
    """
    for name in options:
        if name not in _OPEN_OPTIONS:
            raise unknown_name(f"option of a runner for {exporter!r}", name, _OPEN_OPTIONS)
    threads = options.get("threads")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ConfigError(
            f"threads={threads!r} is not a positive whole number; it counts threads; pass threads=1 or more"
        )
    return dict(options)
