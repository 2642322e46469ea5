"""What a whole run is asked to do, from ``sglp.toml`` or from flags; read by the command line only.

``sglp.toml`` has one table for each stage::

    [model]
    path = "models/smollm2"        # checkpoint folder, .gguf file or hub id
    device = "cpu"
    dtype = "auto"

    [plan]
    drop = 6                       # or keep = 24, drop = 0.2, max_parameters = 110_000_000
    method = "sglp"
    criterion = "grad-norm"
    calibration = "calib.txt"      # text, .jsonl, hf:DATASET, or "builtin"

    [export]
    to = ["onnx", "vllm", "onnx-int8"]

    [export.options.onnx-int8]     # a second export to the same format, under a name of its own
    format = "onnx"
    precision = "int8"

    [bench]
    workload = "demo"

    [evaluate]
    text = "heldout.txt"

    [run]
    output = "runs/demo"
    seed = 0
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import ConfigError
from sglp_deploy.importance import CRITERIA
from sglp_deploy.planners.budget import QUOTAS, Budget
from sglp_deploy.planners.registry import PLANNERS, planner_names
from sglp_deploy.similarity import ESTIMATORS

DTYPES = ("fp32", "fp16", "bf16")

# Table -> key in the file -> field of RunConfig.
_TABLES: dict[str, dict[str, str]] = {
    "model": {
        "path": "model",
        "device": "device",
        "dtype": "dtype",
        "threads": "threads",
        "trust_remote_code": "trust_remote_code",
        "allow_pickle": "allow_pickle",
    },
    "plan": {
        "drop": "drop",
        "keep": "keep",
        "max_parameters": "max_parameters",
        "method": "method",
        "criterion": "criterion",
        "segments": "n_segments",
        "profile": "profile",
        "estimator": "estimator",
        "quota": "quota",
        "calibration": "calibration",
        "calibration_tokens": "calibration_tokens",
        "sequence_length": "sequence_length",
        "batch_size": "batch_size",
        "rows": "rows",
        "skip_positions": "skip_positions",
        "preserve_pattern": "preserve_pattern",
    },
    "export": {"to": "to", "options": "options"},
    "bench": {"workload": "workload"},
    "evaluate": {"text": "text", "tokens": "evaluation_tokens", "chunk": "evaluation_chunk"},
    "run": {"output": "output", "seed": "seed"},
}


# A name becomes a folder's, and these mean other folders of a run.
_NAME = re.compile(r"(?!all$)(?!.*(?:-baseline|-against-torch)$)[A-Za-z0-9][A-Za-z0-9._-]*")
_FORMAT = "format"  # the option that says which format is behind a name


@dataclass(frozen=True)
class Export:
    """One artifact of a run.

    Attributes:
        name: What the run calls it; its folder's name.
        format: The exporter that makes it.
        options: For that exporter.
    """

    name: str
    format: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs; each field is a flag of the command line and a key of ``sglp.toml``.

    ``to`` names the artifacts; a name is a format's, or one of the user's own, whose ``options`` then say which
    ``format`` it is.
    """

    model: str = ""
    output: str = "runs/run"
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    drop: int | float | None = None
    keep: int | None = None
    max_parameters: int | None = None
    method: str = "sglp"
    criterion: str = "grad-norm"
    n_segments: int | None = None
    profile: str = "row_sum"
    estimator: str = "unbiased"
    quota: str = "proportional"
    calibration: str | None = None
    calibration_tokens: int = 16_384
    sequence_length: int = 256
    batch_size: int = 4
    rows: str = "rms"
    skip_positions: int = 1
    preserve_pattern: bool = False
    to: tuple[str, ...] = ("onnx",)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    workload: str = "demo"
    text: str | None = None
    evaluation_tokens: int = 16_384
    evaluation_chunk: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if not self.model:
            faults.append("no model is given; there is nothing to prune; pass MODEL or set path under [model]")
        try:
            Budget.parse(drop=self.drop, keep=self.keep, max_parameters=self.max_parameters)
        except ConfigError as error:
            faults += error.faults
        if not self.to:
            faults.append("no export format is given; nothing would be deployed; pass --to onnx")
        faults += self._export_faults()
        for name, choices in _choices(self.method).items():
            value = getattr(self, name)
            if value not in choices:
                faults += unknown_name(name, value, choices).faults
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                faults.append(f"{name}={value} is too small; nothing could be computed; pass {least} or more")
        if faults:
            raise ConfigError(faults)

    def exports(self) -> tuple[Export, ...]:
        """What ``to`` names, each once, in that order."""
        return tuple(
            Export(
                name,
                str(self.options.get(name, {}).get(_FORMAT, name)),
                {key: value for key, value in self.options.get(name, {}).items() if key != _FORMAT},
            )
            for name in dict.fromkeys(self.to)
        )

    def _export_faults(self) -> list[str]:
        faults = [
            f"{name!r} cannot name an export; its folder and its benchmark's are called by it; use letters, digits, "
            "'-', '_' and '.', and neither 'all' nor an end in -baseline or -against-torch"
            for name in self.to
            if not _NAME.fullmatch(name)
        ]
        for name in self.options:
            if name not in self.to:
                faults.append(
                    f"options are given for {name!r}, which is not exported; nothing would read them; add it to the "
                    f"formats, which are {', '.join(self.to) or 'none'}"
                )
        if self.options.get("torch"):
            faults.append(
                "'torch' takes no options; it is the checkpoint, which everything is compared with; leave them out"
            )
        return faults

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> RunConfig:
        """Read ``sglp.toml``; ``changes`` (fields given as flags) win over the file, options one by one.

        The file's options for formats that ``changes`` leaves out are not read.

        Raises:
            ConfigError: If the file is missing or malformed, or a table, key or type is wrong; all faults are listed.
        """
        file = Path(path)
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{file} cannot be read; {error.strerror}; check the path") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not TOML; {error}; correct that line") from error
        found, faults = _fields(tables, file)
        of_file = found.pop("options", {})
        options = {name: dict(given) for name, given in of_file.items() if name in changes.get("to", of_file)}
        for name, given in changes.pop("options", {}).items():
            options.setdefault(name, {}).update(given)
        found["options"] = options
        try:
            config = cls(**{**found, **changes})
        except ConfigError as error:
            faults += error.faults
        if faults:
            raise ConfigError(faults)
        return config


# Least value of each number; a budget's range depends on the model and is checked with it.
_LEAST = {
    "threads": 1,
    "n_segments": 1,
    "calibration_tokens": 8,
    "sequence_length": 8,
    "batch_size": 1,
    "skip_positions": 0,
    "evaluation_tokens": 8,
    "evaluation_chunk": 8,
    "seed": 0,
}

_WORDS = {
    "str": "text",
    "int": "a whole number",
    "bool": "true or false",
    "int | float": "a number",
    "tuple[str, ...]": "a list of texts",
    "Mapping[str, Mapping[str, Any]]": "a table [export.options.NAME] of texts, numbers, true or false",
}


def _choices(method: str) -> dict[str, Collection[str]]:
    choices: dict[str, Collection[str]] = {
        "dtype": ("auto", *DTYPES),
        "method": planner_names(),
        "profile": ("row_sum", "rows"),
        "estimator": ESTIMATORS,
        "quota": QUOTAS,
        "rows": ("rms", "raw"),
    }
    # A third party's planner may rank by a score of its own.
    return choices | ({"criterion": CRITERIA} if method in PLANNERS else {})


def _fields(tables: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], list[str]]:
    """What the file sets, by field, and what is wrong with it."""
    faults: list[str] = []
    found: dict[str, Any] = {}
    types = {item.name: str(item.type) for item in fields(RunConfig)}
    for table, content in tables.items():
        known = _TABLES.get(table)
        if known is None or not isinstance(content, dict):
            faults.append(
                f"{file}: {table!r} is not a table of sglp.toml; nothing reads it; the tables are {', '.join(_TABLES)}"
            )
            continue
        for key, value in content.items():
            if key not in known:
                near = get_close_matches(key, known, n=1)
                advice = f"did you mean {near[0]!r}? its" if near else "its"
                faults.append(
                    f"{file}: [{table}] has no key {key!r}; nothing reads it; {advice} keys are {', '.join(known)}"
                )
            elif not _fits(value, types[known[key]]):
                wanted = types[known[key]].removesuffix(" | None")
                faults.append(
                    f"{file}: [{table}] {key} = {value!r} is of the wrong kind; {_WORDS[wanted]} is read; change it"
                )
            else:
                found[known[key]] = tuple(value) if isinstance(value, list) else value
    return found, faults


def _fits(value: Any, declared: str) -> bool:
    if isinstance(value, bool):
        return declared == "bool"
    if isinstance(value, dict):
        return declared.startswith("Mapping") and all(
            isinstance(options, dict) and all(isinstance(option, (str, int, float)) for option in options.values())
            for options in value.values()
        )
    if isinstance(value, list):
        return declared.startswith("tuple") and all(isinstance(item, str) for item in value)
    return type(value).__name__ in declared.split(" | ")
