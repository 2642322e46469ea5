"""Ways to get a pruned model wrong, and what the product says to each.

A mutation is planted where it happens in real life: in the process that makes the artifact (``PROCESS``), or in the
files of an artifact that was made right (``CHECKPOINT``, ``ONNX``).  :func:`judge` then goes the way a user goes and
says which check caught it.  ``docs/verification.md`` shows the declared answers as tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from exports import share_traces
from sglp_deploy import CalibrationSet, Compressor, materialize
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import ArtifactError, BackendError, PlanError, SGLPError, UnsupportedModelError
from sglp_deploy.models import LoadedModel, ModelSource, source_of
from sglp_deploy.models.transformers import adapter as hub
from sglp_deploy.parity import ParityReport
from sglp_deploy.plan import PruningPlan
from sglp_exporters.onnx.exporter import OnnxExporter


@dataclass(frozen=True)
class Subject:
    """A family the mutations are planted in.

    Attributes:
        name: Family.
        build: Makes the model.
        keep: Layers that stay.
        twins: Two kept layers (new numbers) of one kind, next to be taken for one another.
        norm: Name of a norm's weight after pruning.
        matrix: Name of a weight matrix after pruning.
        lists: Whether its configuration says something for each layer.
        tied: Whether the output head is the embedding.
    """

    name: str
    build: Callable[[], nn.Module]
    keep: tuple[int, ...]
    twins: tuple[int, int]
    norm: str
    matrix: str
    lists: bool
    tied: bool
    layers: str = "model.layers"


def _zoo(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import zoo

        return next(specimen for specimen in zoo.specimens() if specimen.name == name).build()

    return build


_NORM, _UP = "model.layers.1.post_attention_layernorm.weight", "model.layers.2.mlp.up_proj.weight"
SUBJECTS: tuple[Subject, ...] = (
    Subject("llama", lambda: tiny.model("llama"), (0, 2, 3, 5), (0, 1), _NORM, _UP, lists=False, tied=True),
    Subject("qwen2", lambda: tiny.model("qwen2"), (0, 1, 3, 5), (0, 1), _NORM, _UP, lists=True, tied=True),
    Subject("gemma3", lambda: tiny.model("gemma3"), (0, 2, 5, 6), (1, 2), _NORM, _UP, lists=True, tied=True),
    Subject(
        "gpt_oss",
        _zoo("gpt_oss"),
        (1, 2, 4, 5),
        (1, 2),
        _NORM,
        "model.layers.2.self_attn.o_proj.weight",
        lists=True,
        tied=False,
    ),
    Subject(
        "qwen3_moe",
        _zoo("qwen3_moe"),
        (0, 1, 3, 4, 6),
        (0, 2),
        _NORM,
        "model.layers.2.self_attn.o_proj.weight",
        lists=True,
        tied=False,
    ),
    Subject(
        "gpt2",
        _zoo("gpt2"),
        (0, 2, 3, 5),
        (0, 1),
        "transformer.h.1.ln_2.weight",
        "transformer.h.2.mlp.c_fc.weight",
        lists=False,
        tied=True,
        layers="transformer.h",
    ),
    Subject(
        "modernbert",
        _zoo("modernbert"),
        (0, 2, 3, 5, 6),
        (1, 3),
        "model.layers.1.mlp_norm.weight",
        "model.layers.2.mlp.Wi.weight",
        lists=True,
        tied=True,
    ),
)
BY_NAME: Mapping[str, Subject] = {subject.name: subject for subject in SUBJECTS}


# ------------------------------------------------------------------------------------- where a product's bug would be


def _keep_config(patch: pytest.MonkeyPatch, _subject: Subject) -> None:
    patch.setattr(hub, "apply_changes", lambda config, changes: None)


def _slice_by_position(patch: pytest.MonkeyPatch, subject: Subject) -> None:
    """As a tool does that cuts every list to the new depth: the first entries, and not those of the kept layers."""
    real, depth = hub.config_changes, len(subject.keep)

    def first(entry: Any) -> Any:
        if not isinstance(entry.before, list) or entry.before == entry.after:
            return entry
        if entry.entry == "mlp_only_layers":  # numbers of layers, not one entry for each
            return replace(entry, after=[layer for layer in entry.before if layer < depth])
        return replace(entry, after=entry.before[:depth])

    patch.setattr(hub, "config_changes", lambda *given, **named: tuple(map(first, real(*given, **named))))


def _shift_numbers(patch: pytest.MonkeyPatch, _subject: Subject) -> None:
    real = hub.renumber
    patch.setattr(hub, "renumber", lambda layer, old, new: real(layer, old, new + 1))


def _flip_tie(patch: pytest.MonkeyPatch, _subject: Subject) -> None:
    real = hub.apply_changes

    def flipped(config: Any, changes: Any) -> None:
        real(config, changes)
        config.tie_word_embeddings = not config.tie_word_embeddings

    patch.setattr(hub, "apply_changes", flipped)


def _swap_kept(patch: pytest.MonkeyPatch, subject: Subject) -> None:
    real = hub.pruned_containers

    def swapped(module: Any, stack: Any, keep: Sequence[int], shared: Any) -> Any:
        order = list(keep)
        if len(order) == len(subject.keep):  # an exporter also takes layers one by one, to trace them
            one, other = subject.twins
            order[one], order[other] = order[other], order[one]
        return real(module, stack, order, shared)

    patch.setattr(hub, "pruned_containers", swapped)


def _swap_type(patch: pytest.MonkeyPatch, _subject: Subject) -> None:
    real = hub.apply_changes

    def swapped(config: Any, changes: Any) -> None:
        real(config, changes)
        _other_type(vars(config))

    patch.setattr(hub, "apply_changes", swapped)


def _other_type(config: dict[str, Any]) -> None:
    """Give layer 1 another type, by whichever entry says it."""
    if config.get("mlp_only_layers"):
        config["mlp_only_layers"] = [layer for layer in config["mlp_only_layers"] if layer != 1]
        return
    types = list(config["layer_types"])
    types[1] = "full_attention" if types[1] == "sliding_attention" else "sliding_attention"
    config["layer_types"] = types


def _alter_selected(patch: pytest.MonkeyPatch, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The pruned model gets an altered tensor of its own; the unpruned one keeps the right one."""
    real = materialize.select_layers

    def altered(*given: Any, **named: Any) -> nn.Module:
        pruned = real(*given, **named)
        owner, _, leaf = name.rpartition(".")
        right = pruned.get_parameter(name)
        setattr(pruned.get_submodule(owner), leaf, nn.Parameter(change(right.detach().clone())))
        return pruned

    patch.setattr(materialize, "select_layers", altered)


def _louder(tensor: Any) -> Any:
    return tensor * np.float32(1.01) if isinstance(tensor, np.ndarray) else tensor * 1.01


def _rounded(tensor: Any) -> Any:
    if isinstance(tensor, np.ndarray):
        return torch.from_numpy(tensor.copy()).to(torch.bfloat16).float().numpy()
    return tensor.to(torch.bfloat16).to(tensor.dtype)


PROCESS: Mapping[str, Callable[[pytest.MonkeyPatch, Subject], None]] = {
    "skip the slicer": _keep_config,
    "slice by position": _slice_by_position,
    "shift layer_idx by one": _shift_numbers,
    "flip the tie flag": _flip_tie,
    "swap two layers": _swap_kept,
    "swap one layer type": _swap_type,
    "scale one norm by 1.01": lambda patch, subject: _alter_selected(patch, subject.norm, _louder),
    "cast one weight to bf16": lambda patch, subject: _alter_selected(patch, subject.matrix, _rounded),
}

# -------------------------------------------------------------------------------------------- files of a checkpoint

Weights = dict[str, torch.Tensor]


def _edit_weights(folder: Path, change: Callable[[Weights], None]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config, indent=2))


def _swap_names(names: Sequence[str], layers: str, twins: tuple[int, int]) -> dict[str, str]:
    """Names of two layers' tensors to those of the other."""
    one, other = (f"{layers}.{index}." for index in twins)
    there = {name: other + name.removeprefix(one) for name in names if name.startswith(one)}
    back = {other_name: name for name, other_name in there.items()}
    assert there, names
    assert set(back) <= set(names)
    return there | back


def _swap_stored(folder: Path, subject: Subject) -> None:
    def swap(weights: Weights) -> None:
        moves = _swap_names(list(weights), subject.layers, subject.twins)
        weights.update({moves[name]: weights[name] for name in moves})

    _edit_weights(folder, swap)


def _flip_stored_tie(folder: Path, subject: Subject) -> None:
    _edit_config(folder, lambda config: config.update(tie_word_embeddings=not subject.tied))


def _stored_norm(folder: Path, subject: Subject) -> None:
    _edit_weights(folder, lambda weights: weights.update({subject.norm: _louder(weights[subject.norm])}))


def _stored_cast(folder: Path, subject: Subject) -> None:
    _edit_weights(folder, lambda weights: weights.update({subject.matrix: weights[subject.matrix].to(torch.bfloat16)}))


def _drop_stored(folder: Path, subject: Subject) -> None:
    def drop(weights: Weights) -> None:
        del weights[subject.matrix]

    _edit_weights(folder, drop)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _edit_digest(folder: Path, _subject: Subject) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    name = max(manifest["files"], key=lambda each: manifest["files"][each]["bytes"])
    digest = manifest["files"][name]["sha256"]
    manifest["files"][name]["sha256"] = ("0" if digest[0] != "0" else "1") + digest[1:]
    file.write_text(json.dumps(manifest))


def _edit_plan_digest(folder: Path, _subject: Subject) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["plan_digest"] = "0" * 64
    file.write_text(json.dumps(manifest))


CHECKPOINT: Mapping[str, Callable[[Path, Subject], None]] = {
    "flip the tie flag": _flip_stored_tie,
    "swap two layers": _swap_stored,
    "drop one tensor": _drop_stored,
    "swap one layer type": lambda folder, _subject: _edit_config(folder, _other_type),
    "scale one norm by 1.01": _stored_norm,
    "cast one weight to bf16": _stored_cast,
    "truncate a file": lambda folder, _subject: _truncate(folder / "model.safetensors"),
    "edit a file's digest": _edit_digest,
    "edit the plan's digest": _edit_plan_digest,
}

# ----------------------------------------------------------------------------------------------- files of an ONNX graph


class _Graph:
    """The graph of an artifact; tensors are read and written where they lie, in its file or in the one beside it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "model.onnx"
        self._model = onnx.load(self._file, load_external_data=False)
        self._data = np.memmap(folder / "model.onnx.data", mode="r+")
        self._tensors = {tensor.name: tensor for tensor in self._model.graph.initializer}

    def save(self) -> None:
        """Write the graph; tensors beside it are written already."""
        self._data.flush()
        onnx.save(self._model, self._file)

    def names(self) -> list[str]:
        return list(self._tensors)

    def find(self, name: str) -> str:
        """The stored name of the weight ``name``; a matrix may be stored the other way round, and its name says so."""
        return next(each for each in self._tensors if each.startswith(name))

    def find_norm(self, subject: Subject) -> str:
        """The stored name of the subject's norm; Gemma's hold the 1 that the model adds, under a name of the trace."""
        if subject.norm in self._tensors:
            return subject.norm
        new = int(next(part for part in subject.norm.split(".") if part.isdigit()))
        weight = subject.build().get_parameter(subject.norm.replace(f".{new}.", f".{subject.keep[new]}."))
        folded = 1 + weight.detach().numpy()
        return next(name for name in self._tensors if np.array_equal(self[name], folded))

    def drop(self, name: str) -> None:
        self._model.graph.initializer.remove(self._tensors.pop(name))

    def _place(self, name: str) -> slice | None:
        facts = {entry.key: entry.value for entry in self._tensors[name].external_data}
        start = int(facts.get("offset", 0))
        return slice(start, start + int(facts["length"])) if facts else None

    def __getitem__(self, name: str) -> Any:
        place, tensor = self._place(name), self._tensors[name]
        if place is None:
            return numpy_helper.to_array(tensor).copy()
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return self._data[place].view(kind).reshape(tensor.dims).copy()

    def __setitem__(self, name: str, value: Any) -> None:
        place = self._place(name)
        if place is None:
            self._tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))
        else:
            self._data[place] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _edit_graph(folder: Path, change: Callable[[_Graph], None]) -> None:
    graph = _Graph(folder)
    change(graph)
    graph.save()


def _change_tensor(graph: _Graph, stored: str, change: Callable[[Any], Any]) -> None:
    graph[stored] = change(graph[stored])


def _swap_in_graph(graph: _Graph, subject: Subject) -> None:
    moves = _swap_names(graph.names(), subject.layers, subject.twins)
    values = {name: graph[name] for name in moves}
    for old, new in moves.items():
        graph[new] = values[old]


ONNX: Mapping[str, Callable[[Path, Subject], None]] = {
    "swap two layers": lambda folder, subject: _edit_graph(folder, lambda graph: _swap_in_graph(graph, subject)),
    "drop one tensor": lambda folder, subject: _edit_graph(
        folder, lambda graph: graph.drop(graph.find(subject.matrix))
    ),
    "scale one norm by 1.01": lambda folder, subject: _edit_graph(
        folder, lambda graph: _change_tensor(graph, graph.find_norm(subject), _louder)
    ),
    "cast one weight to bf16": lambda folder, subject: _edit_graph(
        folder, lambda graph: _change_tensor(graph, graph.find(subject.matrix), _rounded)
    ),
    "truncate a file": lambda folder, _subject: _truncate(folder / "model.onnx.data"),
    "edit a file's digest": _edit_digest,
    "edit the plan's digest": _edit_plan_digest,
}


def fix_digests(folder: Path) -> None:
    """Rewrite the manifest so that every file has the digest and size it now has, as an attacker would."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for name, record in manifest["files"].items():
        data = (folder / name).read_bytes()
        record.update(sha256=sha256(data).hexdigest(), bytes=len(data))
    file.write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------------------- the answers

NO_LISTS = "-"  # nothing in this family's configuration says anything for each layer
UNDONE = "right again"  # an edited digest is made right by fixing the digests; nothing else was wrong

ONNX_SUBJECTS = ("llama", "gemma3", "gpt2")
ENCODERS = ("modernbert",)
_WITHOUT_LISTS = {subject.name: NO_LISTS for subject in SUBJECTS if not subject.lists}


def _for_all(answer: str, exceptions: Mapping[str, str] | None = None) -> dict[str, str]:
    return {subject.name: answer for subject in SUBJECTS} | dict(exceptions or {})


# Mutation to family to the check that catches it, the same for a checkpoint and for a graph.
CAUGHT_IN_PROCESS: Mapping[str, Mapping[str, str]] = {
    "skip the slicer": _for_all("depth"),
    "slice by position": _for_all("layer settings", _WITHOUT_LISTS),
    "shift layer_idx by one": _for_all("layer number"),
    "flip the tie flag": _for_all("configuration"),
    "swap two layers": _for_all("numbers"),
    "swap one layer type": _for_all("layer settings", _WITHOUT_LISTS),
    "scale one norm by 1.01": _for_all("numbers"),
    "cast one weight to bf16": _for_all("numbers"),
}
# As the files were left, and with the manifest's digests made to fit them.
CAUGHT_IN_CHECKPOINT: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]] = {
    "flip the tie flag": (
        _for_all("digest", {"gpt_oss": "size", "qwen3_moe": "size"}),
        # An untied head is still in the file, and transformers uses it whatever the flag says; others would not.
        _for_all("load", {"gpt_oss": "bits", "qwen3_moe": "bits"}),
    ),
    "swap two layers": (_for_all("digest"), _for_all("numbers")),
    "drop one tensor": (_for_all("size"), _for_all("load")),
    "swap one layer type": (
        _for_all("size", _WITHOUT_LISTS),
        # Where it says which layers have experts, the tensors no longer fit.
        _for_all("numbers", {**_WITHOUT_LISTS, "qwen3_moe": "load"}),
    ),
    "scale one norm by 1.01": (_for_all("digest"), _for_all("numbers")),
    "cast one weight to bf16": (_for_all("size"), _for_all("numbers")),
    "truncate a file": (_for_all("size"), _for_all("load")),
    "edit a file's digest": (_for_all("digest"), _for_all(UNDONE)),
    "edit the plan's digest": (_for_all("plan digest"), _for_all("plan digest")),
}
CAUGHT_IN_ONNX: Mapping[str, tuple[str, str]] = {
    "swap two layers": ("digest", "numbers"),
    "drop one tensor": ("size", "load"),
    "scale one norm by 1.01": ("digest", "numbers"),
    "cast one weight to bf16": ("digest", "numbers"),
    "truncate a file": ("size", "load"),
    "edit a file's digest": ("digest", UNDONE),
    "edit the plan's digest": ("plan digest", "plan digest"),
}


def tables() -> str:
    """The three tables of ``docs/verification.md``, as Markdown."""
    names = [subject.name for subject in SUBJECTS]
    process = [[name, *(CAUGHT_IN_PROCESS[name][family] for family in names)] for name in CAUGHT_IN_PROCESS]
    checkpoint = [
        [name, *(_both(left[family], fixed[family]) for family in names)]
        for name, (left, fixed) in CAUGHT_IN_CHECKPOINT.items()
    ]
    graph = [[name, *(_both(*CAUGHT_IN_ONNX[name]) for _ in ONNX_SUBJECTS)] for name in CAUGHT_IN_ONNX]
    return "\n\n".join(
        f"### {title}\n\n{_table(['mutation', *columns], rows)}"
        for title, columns, rows in (
            ("In the process", names, process),
            ("In the files of a checkpoint", names, checkpoint),
            ("In the files of an ONNX graph", list(ONNX_SUBJECTS), graph),
        )
    )


def _both(left: str, fixed: str) -> str:
    return left if left == fixed else f"{left}; {fixed}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --------------------------------------------------------------------------------------------------------- the verdict

# What a user sees, by the check that caught the mutation: type of the error and a piece of its message.
REFUSALS: Mapping[str, tuple[type[SGLPError], str]] = {
    "digest": (ArtifactError, r"differs from its digest in the manifest; the file was altered"),
    "size": (ArtifactError, r"bytes, the manifest says \d+; the file is damaged"),
    "plan digest": (PlanError, r"was made by another plan .*; a certificate would be about something else"),
    "load": (BackendError, r"(?:transformers|ONNX Runtime) cannot load .*; .*export"),
    "depth": (UnsupportedModelError, r"has no module list of \d+ layers, as \w+=\d+ says"),
    "layer number": (ArtifactError, r"does not hold its own number .*; it would use another layer's cache"),
    "layer settings": (ArtifactError, r"layer \d+ .* is rebuilt with other settings .*; it would compute something"),
    "configuration": (ArtifactError, r"pruning changed tie_word_embeddings of the configuration from \w+ to \w+"),
}
# Reasons on a certificate that failed.
NUMBERS = re.compile(r"KL|a logit differs|cosine|stable positions choose another token|relative")
BITS = re.compile(r"tensors changed on the way to disk|of the configuration changed on the way|with other settings")


def classify(error: SGLPError) -> str:
    """Name of the check an error comes from."""
    for name, (kind, message) in REFUSALS.items():
        if type(error) is kind and re.search(message, str(error)):
            return name
    return f"unexpected {type(error).__name__}: {error}"


def verdict(report: ParityReport) -> str:
    """Name of what failed a certificate: "numbers", "bits" where only an exact comparison shows it, or "nothing"."""
    if report.passed:
        return "nothing"
    if any(NUMBERS.search(reason) for reason in report.reasons):
        return "numbers"
    if any(BITS.search(reason) for reason in report.reasons):
        return "bits"
    return f"unexpected {report.reasons}"


class Bench:
    """Models, plans and right artifacts, each made once; verifying as a user does, with fewer decoding steps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[str, LoadedModel] = {}
        self._artifacts: dict[tuple[str, str], Path] = {}

    def loaded(self, subject: Subject) -> LoadedModel:
        """The unpruned model."""
        if subject.name not in self._loaded:
            module = subject.build()
            source: ModelSource = source_of(module, subject.name)
            self._loaded[subject.name] = LoadedModel(module, tiny.tokenizer(), source)
        return self._loaded[subject.name]

    def plan(self, subject: Subject) -> PruningPlan:
        """What every artifact here is made by."""
        return tiny.plan_for(self.loaded(subject).module, subject.keep)

    def export(self, subject: Subject, to: str, out: Path) -> ExportArtifact:
        """Make an artifact, as the process is now."""
        return Compressor(self.loaded(subject)).export(self.plan(subject), to, out)

    def artifact(self, subject: Subject, to: str) -> Path:
        """An artifact that was made right."""
        key = (subject.name, to)
        if key not in self._artifacts:
            with pytest.MonkeyPatch.context() as patch:
                share_traces(patch)
                self._artifacts[key] = self.export(subject, to, self._folder / subject.name / to).path
        return self._artifacts[key]

    def verify(self, subject: Subject, folder: Path) -> str:
        """Load the artifact in ``folder`` and certify it; which check stops it, or "nothing"."""
        try:
            artifact = ExportArtifact.load(folder)
            text = CalibrationSet.builtin_held_out(max_tokens=400, sequence_length=200)
            return verdict(Compressor(self.loaded(subject)).verify(artifact, text=text, threads=1))
        except SGLPError as error:
            return classify(error)

    def judge_process(self, name: str, subject: Subject, to: str, out: Path, patch: pytest.MonkeyPatch) -> str:
        """Export and verify with the mutation in force all the while, as a bug of ours would be."""
        PROCESS[name](patch, subject)
        try:
            self.export(subject, to, out)
        except SGLPError as error:
            return classify(error)
        return self.verify(subject, out)


def forget_trace() -> None:
    """The ONNX exporter keeps the trace of the last model; another test's must not be taken for ours."""
    OnnxExporter._template = None
