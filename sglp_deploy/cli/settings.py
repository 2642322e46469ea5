"""What a run can be asked to do: one definition that flags, keys of ``sglp.toml``, checks and schema are made from.

It is plain data.  Help reads it and must answer at once.  So what checks the values (:mod:`sglp_deploy.cli.config`) is
apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, NamedTuple

DTYPES: Final = ("fp32", "fp16", "bf16")

MOST_THREADS: Final = 4096  # runtimes end the process where the system gives no more

NO_REPAIR: Final = "none"  # in place of a repair's name

Option = bool | int | float | str

# Keys of [plan] and flags that became options of the planner, with their names there.
MOVED: Final = {
    "criterion": "criterion",
    "segments": "n_segments",
    "profile": "profile",
    "estimator": "estimator",
    "quota": "quota",
}


class Setting(NamedTuple):
    """What is said of one field of :class:`Settings`.

    Attributes:
        table: Its table in ``sglp.toml``.
        key: Its key there.
        text: What it means, for help and for the schema (there ``hint`` wins).
        least: The least value of a number.
        most: The greatest.
        choices: The only values, where they are few and known.
        metavar: What stands for its value in help.
        hint: What is read, for an error message.
    """

    table: str
    key: str
    text: str
    least: int | None = None
    most: int | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    hint: str = ""


# Any: what it returns stands for a value of the field's type, as dataclasses.field does.
def _setting(table: str, key: str, default: Any, text: str, **more: Any) -> Any:
    metadata = {"setting": Setting(table, key, text, **more)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def _limit(key: str, text: str) -> Any:
    more = f"{text}, times the unpruned model's (1.5x)"
    return _setting("accept", key, None, more, metavar="LIMIT", hint='a text like "1.5x"')


# Only the fields: RunConfig, which is checked, has the methods, and help need not wait for them.
@dataclass(frozen=True, init=False, repr=False, eq=False)
class Settings:
    """Everything a run needs; each field is a flag of the command line and a key of ``sglp.toml``.

    ``to`` names the artifacts; a name is a format's, or one of the user's own, whose ``options`` then say which
    ``format`` it is.
    """

    model: str = _setting("model", "path", "", "checkpoint folder, .gguf file, or hub identifier when online")
    device: str = _setting("model", "device", "cpu", "cpu, cuda or cuda:N")
    dtype: str = _setting("model", "dtype", "auto", "element type; auto is as stored", choices=("auto", *DTYPES))
    threads: int | None = _setting(
        "model", "threads", None, "CPU threads (default: the runtime's choice)", least=1, most=MOST_THREADS
    )
    trust_remote_code: bool = _setting("model", "trust_remote_code", False, "run code that comes with it")
    allow_pickle: bool = _setting("model", "allow_pickle", False, "accept weights stored as pickle")

    # How many layers go; exactly one of the three.  Their ranges depend on the model and are checked with it.
    drop: int | float | None = _setting("plan", "drop", None, "layers to remove, or a share (0.2)", metavar="N")
    keep: int | None = _setting("plan", "keep", None, "layers to keep", metavar="N")
    max_parameters: int | None = _setting(
        "plan", "max_parameters", None, "parameters the pruned model may have", metavar="N"
    )
    method: str = _setting("plan", "method", "sglp", "planner, see 'sglp-deploy plugins'")
    calibration: str | None = _setting(
        "plan", "calibration", None, "text, .jsonl, hf:DATASET or builtin (default)", metavar="TEXT"
    )
    calibration_tokens: int = _setting("plan", "calibration_tokens", 16_384, "token budget", least=8, metavar="N")
    sequence_length: int = _setting("plan", "sequence_length", 256, "tokens in a row", least=8, metavar="N")
    batch_size: int = _setting("plan", "batch_size", 4, "rows in a minibatch", least=1, metavar="N")
    rows: str = _setting("plan", "rows", "rms", "normalise rows before they are compared", choices=("rms", "raw"))
    skip_positions: int = _setting("plan", "skip_positions", 1, "leading positions left out", least=0, metavar="N")
    preserve_pattern: bool = _setting(
        "plan", "preserve_pattern", False, "remove whole periods of the layer pattern (local, local, global, ...) only"
    )
    plan_options: Mapping[str, Option] = _setting(
        "plan",
        "options",
        {},
        "an option of the planner; may be repeated",
        metavar="KEY=VALUE",
        hint="a table [plan.options] of texts, numbers, true or false",
    )

    repair: str = _setting(
        "repair",
        "method",
        "refit",
        "what makes up for removed layers: refit, local, linear, scale or none",
        metavar="NAME",
    )
    repair_tokens: int = _setting("repair", "tokens", 32_768, "token budget of the repair", least=8, metavar="N")
    repair_options: Mapping[str, Option] = _setting(
        "repair",
        "options",
        {},
        "an option of the repair; may be repeated",
        metavar="KEY=VALUE",
        hint="a table [repair.options] of texts, numbers, true or false",
    )

    heal_tokens: int | None = _setting(
        "heal", "tokens", None, "tokens to train on after the repair, repetitions counted (1M, 500K)", metavar="N"
    )
    heal_minutes: int | float | None = _setting(
        "heal", "minutes", None, "minutes to train for after the repair, over all resumes", metavar="M"
    )
    heal_text: tuple[str, ...] = _setting(
        "heal",
        "text",
        (),
        "texts to heal on in equal shares: a path, hf:DATASET, builtin, general or written; may be repeated (default: "
        "the calibration text and these three)",
        metavar="TEXT",
    )
    heal_options: Mapping[str, Option] = _setting(
        "heal",
        "options",
        {},
        "an option of healing; may be repeated",
        metavar="KEY=VALUE",
        hint="a table [heal.options] of texts, numbers, true or false",
    )

    to: tuple[str, ...] = _setting("export", "to", ("onnx",), "formats to make", metavar="FORMATS")
    options: Mapping[str, Mapping[str, Option]] = _setting(
        "export",
        "options",
        {},
        "an option of a format, plan.KEY=VALUE of the planner, repair.KEY=VALUE or heal.KEY=VALUE; may be repeated",
        metavar="FORMAT.KEY=VALUE",
        hint="a table [export.options.NAME] of texts, numbers, true or false",
    )

    workload: str = _setting("bench", "workload", "demo", "name of a workload")

    text: str | None = _setting("evaluate", "text", None, "text to judge quality on (default: held-out built-in prose)")
    evaluation_tokens: int = _setting("evaluate", "tokens", 16_384, "token budget for quality", least=8)
    evaluation_chunk: int = _setting("evaluate", "chunk", 512, "tokens in a chunk of that text", least=8)

    tasks: tuple[str, ...] = _setting(
        "evaluate", "tasks", (), "questions to judge by: FILE.jsonl, last-word:FILE, lm-eval:NAME", metavar="TASKS"
    )
    tasks_limit: int | None = _setting(
        "evaluate", "tasks_limit", None, "items of each task, the first ones (default: all)", least=1, metavar="N"
    )
    sample_tokens: int = _setting(
        "evaluate",
        "sample_tokens",
        48,
        "tokens of the greedy sample, dense beside pruned; 0: none",
        least=0,
        metavar="N",
    )

    # Limits of the verdict, on the worse end of each figure's interval.
    accept_perplexity: str | None = _limit("perplexity", "most the pruned model's perplexity may be")
    accept_prefill: str | None = _limit("prefill", "least the speed of prefill must be")
    accept_decode: str | None = _limit("decode", "least the speed of decoding must be")
    accept_memory: str | None = _limit("memory", "most the peak memory may be")
    accept_size: str | None = _limit("size", "most the artifact's files may be")
    accept_parity: str | None = _setting(
        "accept", "parity", None, "whether every certificate must have passed", choices=("passed",), metavar="passed"
    )
    accept_tasks: Mapping[str, str] = _setting(
        "accept",
        "tasks",
        {},
        "least a task's figure must be: piqa=0.95x or piqa=-0.03; may be repeated",
        metavar="NAME=LIMIT",
        hint='a table [accept.tasks] of limits like "0.95x" (times the unpruned model\'s) or "-0.03" (more than it)',
    )

    output: str = _setting("run", "output", "runs/run", "run folder")
    seed: int = _setting("run", "seed", 0, "seed", least=0, most=2**63 - 1)


SETTINGS: Final[Mapping[str, Setting]] = {item.name: item.metadata["setting"] for item in fields(Settings)}
DEFAULTS: Final[Mapping[str, Any]] = {item.name: item.default for item in fields(Settings)}
# As they are declared: "int | None" and so on.
TYPES: Final[Mapping[str, str]] = {item.name: str(item.type) for item in fields(Settings)}
BUDGET: Final = ("drop", "keep", "max_parameters")


def tables() -> dict[str, dict[str, str]]:
    """Table to key in the file to field."""
    found: dict[str, dict[str, str]] = {}
    for name, setting in SETTINGS.items():
        found.setdefault(setting.table, {})[setting.key] = name
    return found
