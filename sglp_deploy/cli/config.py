"""What a whole run is asked to do, from ``sglp.toml`` or from flags; read by the command line only.

``sglp.toml`` has one table for each stage::

    [model]
    path = "models/smollm2"        # checkpoint folder, .gguf file or hub id
    device = "cpu"
    dtype = "auto"

    [plan]
    drop = 6                       # or keep = 24, drop = 0.2, max_parameters = 110_000_000
    method = "sglp"
    calibration = "calib.txt"      # text, .jsonl, hf:DATASET, or "builtin"

    [plan.options]                 # of the planner
    criterion = "grad-norm"

    [repair]
    method = "refit"               # or local, linear, scale; "none" turns it off
    tokens = 32_768                # of the plan's calibration text

    [repair.options]               # of the repair
    attention = true

    [heal]                         # no budget, no healing
    minutes = 15                   # or tokens = 1_000_000, or both
    text = ["mine.txt", "written"] # left out: the plan's text and a general mix

    [heal.options]
    learning_rate = 3e-4

    [export]
    to = ["onnx", "vllm", "onnx-int8"]

    [export.options.onnx-int8]     # a second export to the same format, under a name of its own
    format = "onnx"
    precision = "int8"

    [bench]
    workload = "demo"

    [evaluate]
    text = "heldout.txt"

    tasks = ["piqa.jsonl"]

    [accept]                       # limits; the run ends with exit code 5 where one is missed
    perplexity = "1.5x"
    decode = "1.1x"

    [run]
    output = "runs/demo"
    seed = 0
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from functools import cache, reduce
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from sglp_bench.judge.accept import check_limits
from sglp_deploy._names import at_home, unknown_name
from sglp_deploy.cli.settings import DEFAULTS, MOVED, NO_REPAIR, SETTINGS, TYPES, Settings, tables
from sglp_deploy.errors import ConfigError
from sglp_deploy.healing.options import HealOptions, read_heal_options
from sglp_deploy.planners.budget import Budget
from sglp_deploy.planners.registry import read_options
from sglp_deploy.repairs import registry as repairs
from sglp_deploy.tasks.asked import name_of

_TABLES: Final = tables()

# A name becomes a folder's, and "all" means another folder of a run.  The others are whose options are given too.
_NAME = re.compile(r"(?!(?:all|plan|repair|heal)$)(?!.*(?:-baseline|-against-torch)$)[A-Za-z0-9][A-Za-z0-9._-]*")
_PATHS = {"model", "output", "calibration", "text", "heal_text", "tasks"}  # those in which "~" is the home folder
_FORMAT = "format"  # the option that says which format is behind a name

# What a flag may still mend: the value is judged when the flags are in.
_OF_THE_VALUE = ("literal_error", "greater_than_equal", "less_than_equal")

_WORDS = {
    "str": "text",
    "int": "a whole number",
    "bool": "true or false",
    "int | float": "a number",
    "tuple[str, ...]": "a list of texts",
}


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
class RunConfig(Settings):
    """The settings of a run, checked.

    Raises:
        ConfigError: If a value is wrong; all faults are listed.
    """

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
        try:
            chosen = read_options(self.method, self.plan_options)
            # As the planner reads them: a flag and a file that mean the same are the same to a resumed run.
            read = {key: getattr(chosen, key) for key in self.plan_options}
            object.__setattr__(self, "plan_options", read)
        except ConfigError as error:
            faults += error.faults
        faults += self._repair_faults()
        faults += self._heal_faults()
        faults += self._value_faults()
        faults += check_limits(self.limits)
        asked = [name_of(request) for request in self.tasks]
        faults += [
            f"a limit is given for the task {name!r}, which is not asked; nothing would measure it; the tasks are "
            f"{', '.join(asked) or 'none'}"
            for name in self.accept_tasks
            if name not in asked
        ]
        if faults:
            raise ConfigError(faults)

    @property
    def limits(self) -> dict[str, Any]:
        """The limits of [accept] that are given, by their keys there."""
        given = {key: getattr(self, name) for key, name in _TABLES["accept"].items()}
        return {key: value if isinstance(value, str) else dict(value) for key, value in given.items() if value}

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

    def _repair_faults(self) -> list[str]:
        if self.repair == NO_REPAIR:
            if not self.repair_options:
                return []
            return ["options are given for the repair, which is 'none'; nothing would read them; leave them out"]
        if self.repair not in repairs.REPAIRS:
            return unknown_name("repair", self.repair, (*repairs.REPAIRS, NO_REPAIR)).faults
        if not self.repair_options:
            return []  # a repair's module loads torch, which a run with nothing to do must not wait for
        try:
            chosen = repairs.read_options(self.repair, self.repair_options)
        except ConfigError as error:
            return error.faults
        object.__setattr__(self, "repair_options", {key: getattr(chosen, key) for key in self.repair_options})
        return []

    @property
    def heals(self) -> bool:
        """Whether healing is asked for."""
        return self.heal_tokens is not None or self.heal_minutes is not None

    def healing(self) -> HealOptions:
        """What is asked of healing; a plan's length of rows does not count for it.

        Raises:
            ConfigError: If an option is unknown or wrong.
        """
        given = {"seed": self.seed, **self.heal_options}
        return read_heal_options({**given, "tokens": self.heal_tokens, "minutes": self.heal_minutes})

    def _heal_faults(self) -> list[str]:
        if not self.heals:
            named = [name for name in ("heal_text", "heal_options") if getattr(self, name)]
            return [
                f"{name} is given and healing has no budget; nothing would read it; add minutes = 15 under [heal] "
                "(--heal-minutes 15), or leave it out"
                for name in named
            ]
        if not all(isinstance(each, int | float | None) for each in (self.heal_tokens, self.heal_minutes)):
            return []  # of the wrong kind, which is said of every setting
        try:
            chosen = self.healing()
        except ConfigError as error:
            return error.faults
        object.__setattr__(self, "heal_options", {key: getattr(chosen, key) for key in self.heal_options})
        return []

    def _export_faults(self) -> list[str]:
        faults = [
            f"{name!r} cannot name an export; its folder and its benchmark's are called by it; use letters, digits, "
            "'-', '_' and '.', and none of 'all', 'plan', 'repair' and 'heal' nor an end in -baseline or -against-torch"
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

    def _value_faults(self) -> list[str]:
        given = {
            table: {key: getattr(self, name) for key, name in keys.items() if getattr(self, name) is not None}
            for table, keys in _TABLES.items()
        }
        faults = []
        for (table, key), kind in _errors(given).items():
            name = _TABLES[table][key]
            value, setting = getattr(self, name), SETTINGS[name]
            if kind == "literal_error":
                faults += unknown_name(name, value, setting.choices).faults
            elif kind == "greater_than_equal":
                least = setting.least
                faults.append(f"{name}={value} is too small; nothing could be computed; pass {least} or more")
            elif kind == "less_than_equal":
                faults.append(f"{name}={value} is too large; nothing could work with it; pass {setting.most} or less")
            else:
                faults.append(f"{name}={value!r} is of the wrong kind; {_wanted(name)} is read; change it")
        return faults

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> RunConfig:
        """Read ``sglp.toml``; ``changes`` (fields given as flags) win over the file, options one by one.

        The file's options for formats that ``changes`` leaves out are not read, nor are those of a planner or a repair
        that another one replaces.

        Raises:
            ConfigError: If the file is missing or malformed, or a table, key or type is wrong; all faults are listed.
        """
        file = Path(path)
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"{file} cannot be read; {error.strerror}; check the path") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not TOML; {error}; correct that line") from error
        found, faults = _fields(content, file)
        for name in _PATHS & set(found):
            given = found[name]
            found[name] = tuple(map(at_home, given)) if isinstance(given, tuple) else at_home(given)
        of_file = found.pop("options", {})
        options = {name: dict(given) for name, given in of_file.items() if name in changes.get("to", of_file)}
        for name, given in changes.pop("options", {}).items():
            options.setdefault(name, {}).update(given)
        found["options"] = options
        found["heal_options"] = {**found.get("heal_options", {}), **changes.pop("heal_options", {})}
        for named, its in (("method", "plan_options"), ("repair", "repair_options")):
            name = found.get(named, DEFAULTS[named])
            kept = found.pop(its, {}) if changes.get(named, name) == name else {}
            found[its] = {**kept, **changes.pop(its, {})}
        try:
            config = cls(**{**found, **changes})
        except ConfigError as error:
            faults += error.faults
        if faults:
            raise ConfigError(faults)
        return config


def schema() -> dict[str, Any]:
    """The JSON schema of ``sglp.toml``, by which editors complete and check it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_file_model().model_json_schema()}


@cache
def _file_model() -> type[BaseModel]:
    """What pydantic checks a whole file by: a model of models, one for each table."""
    strict = ConfigDict(strict=True, extra="forbid")
    types = get_type_hints(Settings)
    made: dict[str, Any] = {}
    for table, keys in _TABLES.items():
        of_table: dict[str, Any] = {}
        for key, name in keys.items():
            setting, default = SETTINGS[name], DEFAULTS[name]
            about: dict[str, Any] = {
                "description": setting.hint or setting.text,
                "ge": setting.least,
                "le": setting.most,
            }
            if default is None or default is MISSING:  # of a factory nothing is said in the schema
                about["default_factory"] = lambda: None
            else:
                about["default"] = default
            if isinstance(default, tuple):
                about["strict"] = False  # TOML has lists only
            # TOML has no null.
            kind = Literal[setting.choices] if setting.choices else _without_none(types[name])
            of_table[key] = (kind, Field(**about))
        model = create_model(table, __config__=strict, **of_table)
        made[table] = (model, Field(default_factory=model))
    return create_model("sglp.toml", __config__=strict, **made)


def _without_none(hint: Any) -> Any:
    left = [part for part in get_args(hint) if part is not NoneType]
    return reduce(or_, left) if get_origin(hint) is UnionType else hint


def _errors(content: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """Where a file's content is wrong (table, or table and key), to pydantic's word for the kind of fault."""
    try:
        _file_model().model_validate(content)
    except ValidationError as error:
        found: dict[tuple[str, ...], str] = {}
        for fault in error.errors(include_url=False, include_input=False):
            found.setdefault(tuple(map(str, fault["loc"][:2])), fault["type"])
        return found
    return {}


def _fields(content: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], list[str]]:
    """What the file sets, by field, and what is wrong with its tables, keys and kinds."""
    wrong = {place: kind for place, kind in _errors(content).items() if kind not in _OF_THE_VALUE}
    found = {
        name: tuple(value) if isinstance(value, list) else value
        for table, keys in _TABLES.items()
        if (table,) not in wrong
        for key, name in keys.items()
        if (table, key) not in wrong and (value := content.get(table, {}).get(key)) is not None
    }
    return found, [f"{file}: {_fault(place, content)}" for place in wrong]


def _fault(place: tuple[str, ...], content: Mapping[str, Any]) -> str:
    table, *keys = place
    if not keys:
        near = [] if table in _TABLES else get_close_matches(table, _TABLES, n=1)
        advice = f"did you mean {near[0]!r}? the" if near else "the"
        return f"{table!r} is not a table of sglp.toml; nothing reads it; {advice} tables are {', '.join(_TABLES)}"
    (key,), known = keys, _TABLES[table]
    if key in known:
        value = content[table][key]
        return f"[{table}] {key} = {value!r} is of the wrong kind; {_wanted(known[key])} is read; change it"
    if table == "plan" and key in MOVED:
        return (
            f"[plan] {key} is no key any more; it is an option of the planner; write {MOVED[key]} = ... under "
            "[plan.options]"
        )
    near = get_close_matches(key, known, n=1)
    advice = f"did you mean {near[0]!r}? its" if near else "its"
    return f"[{table}] has no key {key!r}; nothing reads it; {advice} keys are {', '.join(known)}"


def _wanted(name: str) -> str:
    return SETTINGS[name].hint or _WORDS[TYPES[name].removesuffix(" | None")]
