"""The flags of each verb; those that set something of a run are made from its definition (:mod:`.settings`).

Every default of a run lives in the definition.  So a file and the flags agree.  A flag that is not given is None.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from sglp_deploy.cli.settings import BUDGET, DEFAULTS, MOVED, SETTINGS, TYPES

PLAN: Final = "plan"
# Whose option it is, where options of formats are given too, to the setting that holds it.
_OWNERS: Final = {PLAN: "plan_options", "repair": "repair_options", "heal": "heal_options"}

Value = int | float | bool | str

_LOADING = ("device", "dtype", "threads", "trust_remote_code", "allow_pickle")
# Settings of [plan] that are no budget, and the seed; the options are a flag of another kind in each verb.
_PLANNING = (
    *(name for name in SETTINGS if SETTINGS[name].table == "plan" and name not in (*BUDGET, "plan_options")),
    "seed",
)
_OUTPUT = ("-o", "--output")


def add(verb: str, parser: argparse.ArgumentParser) -> None:
    """Add what ``verb`` takes."""
    _ARGUMENTS[verb](parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse what argparse cannot express; ends the process with a usage error."""
    if moved := getattr(arguments, "moved", None):
        of_run = f"{PLAN}." if arguments.verb == "run" else ""
        now = " ".join(f"--option {of_run}{MOVED[flag]}={value}" for flag, value in moved)
        parser.error(f"{', '.join(f'--{flag}' for flag, _ in moved)}: an option of the planner now; write {now}")
    if arguments.verb == "export" and arguments.baseline == bool(arguments.plan):
        parser.error("export takes a plan or --baseline, one of the two")
    if arguments.verb == "export" and arguments.baseline and arguments.overlay:
        parser.error("--overlay goes with a plan; the baseline changes no weights")
    if arguments.verb == "evaluate" and not arguments.plan and (arguments.overlay or arguments.sample_tokens):
        parser.error("--overlay and --sample-tokens go with a plan; the model alone is judged")
    if arguments.verb == "env" and (arguments.action == "list") == (arguments.name is not None):
        parser.error(f"env {arguments.action} takes {'no name' if arguments.action == 'list' else 'a NAME'}")
    by_hand = getattr(arguments, "drop_layers", None) is not None
    if getattr(arguments, "stack", None) and not by_hand:
        parser.error("--stack goes with --drop-layers; planning by measurement is for models with one stack")
    if by_hand and any(getattr(arguments, name) is not None for name in BUDGET):
        parser.error("--drop-layers names the layers; leave --drop, --keep and --max-parameters out")
    if by_hand and arguments.plan_options:
        parser.error("--drop-layers names the layers; no planner would read --option; leave it out")
    if (
        arguments.verb in ("plan", "run")
        and not by_hand
        and not arguments.model.endswith(".toml")
        and all(getattr(arguments, name) is None for name in BUDGET)
    ):
        parser.error(f"{arguments.verb} needs a budget: one of --drop, --keep, --max-parameters")


# ------------------------------------------------------------------------------------------------------------ the verbs


def _plan(parser: argparse.ArgumentParser) -> None:
    _model(parser, help=f"{SETTINGS['model'].text}; or a sglp.toml that names one")
    _planning(parser, option="plan_options", read=_text_option)
    parser.add_argument(*_OUTPUT, default="plan.json", help="file to write (default: %(default)s)")
    parser.add_argument("--drop-layers", type=_layers, metavar="I,J", help="remove these layers, measuring nothing")
    parser.add_argument("--stack", help="encoder or decoder, for a model that has both (with --drop-layers)")
    parser.add_argument("--no-matrix", action="store_true", help="leave the similarity matrix out of the file")


def _repair(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("plan", help="plan.json")
    _overlay(parser)
    text = "refit, local, linear or scale (default: %(default)s)"
    _set(parser, "repair", "--method", dest="method", default=DEFAULTS["repair"], help=text)
    _set(parser, "calibration")
    default = DEFAULTS["repair_tokens"]
    _set(parser, "repair_tokens", "--calibration-tokens", dest="calibration_tokens", default=default)
    for name in ("sequence_length", "batch_size", "seed"):
        _set(parser, name, default=DEFAULTS[name])
    _options(parser, "repair_options", _text_option)
    parser.add_argument(*_OUTPUT, required=True, help="folder for plan.json and the weights it changes")


def _heal(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("plan", help="plan.json")
    _overlay(parser)
    _healing(parser, "--")
    for name in ("sequence_length", "batch_size", "seed"):
        _set(parser, name)
    _options(parser, "heal_options", _text_option)
    text = "folder for plan.json, the weights it changes and, meanwhile, the state of the training"
    parser.add_argument(*_OUTPUT, required=True, help=text)


def _healing(parser: argparse._ActionsContainer, prefix: str) -> None:
    """Budget and texts; a text may hold a comma only in a flag of its own."""
    for name, read in (("heal_tokens", _amount), ("heal_minutes", float)):
        _set(parser, name, f"{prefix}{SETTINGS[name].key}", type=read)
    _set(parser, "heal_text", f"{prefix}text", action="append", type=str, help=SETTINGS["heal_text"].text)


def _materialize(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("plan", help="plan.json")
    _overlay(parser)
    parser.add_argument(*_OUTPUT, required=True, help="folder to write")


def _export(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("plan", nargs="?", help="plan.json; left out with --baseline")
    parser.add_argument("--to", default="onnx", metavar="FORMAT", help="see 'sglp-deploy plugins' (default: onnx)")
    parser.add_argument(
        "--option", action="append", type=_option, metavar="KEY=VALUE", help="an option of that format; may be repeated"
    )
    parser.add_argument("--baseline", action="store_true", help="keep every layer")
    _overlay(parser)
    parser.add_argument(*_OUTPUT, required=True, help="folder to write")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", help="artifact folder")
    parser.add_argument("--model", help="the unpruned model, when it has moved since the export")
    _overlay(parser)
    parser.add_argument("--text", help="text for the prompts (default: built-in prose)")
    parser.add_argument(*_OUTPUT, help="file to write as well (parity.json is left in the artifact's folder)")
    _loading(parser)


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", help="artifact folder")
    parser.add_argument("--against", metavar="DIR", help="the baseline's artifact folder")
    parser.add_argument(
        "--certificate", action="append", metavar="FILE", help="a parity.json that lies elsewhere; may be repeated"
    )
    parser.add_argument(
        "--unverified", action="store_true", help="measure what is not certified; marked in every output"
    )
    parser.add_argument("--workload", default="decode-small", help="name of a workload (default: %(default)s)")
    parser.add_argument("--no-control", action="store_true", help="leave out the A/A control")
    _set(parser, "device", default=DEFAULTS["device"])
    _set(parser, "threads", help="threads of the runtime (default: its own choice)")
    parser.add_argument(*_OUTPUT, required=True, help="folder for result.json and comparison.json")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("plan", nargs="?", help="plan.json: judge the pruned model beside the unpruned one")
    _overlay(parser)
    _set(parser, "text", help="text file, .jsonl or hf:DATASET (default: held-out built-in prose)")
    for name in ("evaluation_tokens", "evaluation_chunk"):
        flag = SETTINGS[name].key
        _set(parser, name, f"--{flag}", dest=flag, default=DEFAULTS[name])
    _set(parser, "tasks", default=DEFAULTS["tasks"])
    _set(parser, "tasks_limit")
    _set(parser, "sample_tokens", default=0, help="tokens of a greedy sample, dense beside pruned (default: none)")
    parser.add_argument(*_OUTPUT, help="file to write")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="run folder")
    parser.add_argument(*_OUTPUT, help="folder to write (default: FOLDER/report)")


def _run(parser: argparse.ArgumentParser) -> None:
    _model(parser, help="model, or a sglp.toml that names one")
    _planning(parser, option="options", read=_named_option)
    for name in SETTINGS:
        table = SETTINGS[name].table
        if table in ("repair", "export", "bench", "evaluate", "accept") and not TYPES[name].startswith("Mapping"):
            _set(parser, name)
    _healing(parser, "--heal-")
    setting = SETTINGS["accept_tasks"]
    parser.add_argument(
        "--accept-tasks", action=_Options, type=_text_option, metavar=setting.metavar, help=setting.text
    )
    _set(parser, "output", *_OUTPUT)


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="plan.json, manifest.json, parity.json, an artifact or run folder, ...")


def _env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["create", "list", "remove"], help="what to do")
    parser.add_argument("name", nargs="?", help="see 'sglp-deploy env list'")
    parser.add_argument("--force", action="store_true", help="make it again although it is ready")


def _nothing(parser: argparse.ArgumentParser) -> None:
    del parser


_ARGUMENTS: Final[dict[str, Callable[[argparse.ArgumentParser], None]]] = {
    "plan": _plan,
    "repair": _repair,
    "heal": _heal,
    "materialize": _materialize,
    "export": _export,
    "verify": _verify,
    "bench": _bench,
    "evaluate": _evaluate,
    "report": _report,
    "run": _run,
    "show": _show,
    "plugins": _nothing,
    "env": _env,
    "doctor": _nothing,
    "schema": _nothing,
}


# ------------------------------------------------------------------------------------------------------------ in common


def _model(parser: argparse.ArgumentParser, **changes: Any) -> None:
    parser.add_argument("model", **{"help": SETTINGS["model"].text, **changes})
    _loading(parser)


def _overlay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overlay", metavar="FILE", help="weights the plan changes, when they are not beside it")


def _loading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loading")
    for name in _LOADING:
        _set(group, name)


def _planning(parser: argparse.ArgumentParser, *, option: str, read: Callable[[str], tuple[Any, ...]]) -> None:
    group = parser.add_argument_group("planning")
    budget = group.add_mutually_exclusive_group()
    for name in BUDGET:
        _set(budget, name)
    for name in _PLANNING:
        _set(group, name)
    parser.set_defaults(plan_options=None, repair_options=None, heal_options=None, options=None)
    _options(parser, option, read)
    for flag in MOVED:
        parser.add_argument(
            f"--{flag}", dest="moved", action="append", type=partial(_pair, flag), help=argparse.SUPPRESS
        )


def _options(parser: argparse.ArgumentParser, name: str, read: Callable[[str], tuple[Any, ...]]) -> None:
    setting = SETTINGS[name]
    parser.add_argument("--option", dest=name, action=_Options, type=read, metavar=setting.metavar, help=setting.text)


def _set(parser: argparse._ActionsContainer, name: str, *flags: str, **changes: Any) -> None:
    """The flag that sets ``name`` of a run."""
    setting, default = SETTINGS[name], DEFAULTS[name]
    given: dict[str, Any] = {"dest": name, "default": None, "help": setting.text}
    declared = TYPES[name].removesuffix(" | None")
    if declared == "bool":
        given["action"] = "store_true"
    else:
        if isinstance(default, tuple):
            given["help"] += ", comma-separated or given again"
            given["action"] = _More
        said = (",".join(default) or None) if isinstance(default, tuple) else default
        given |= {"type": _READ[declared], "metavar": setting.metavar}
        given["help"] += f" (default: {said})" if said is not None else ""
        given |= {"choices": setting.choices} if setting.choices else {}
    parser.add_argument(*(flags or (f"--{name.replace('_', '-')}",)), **{**given, **changes})


class _More(argparse.Action):
    """Collect lists: a flag that is given again adds to what it said before."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add ``values``, a tuple."""
        del parser, option_string
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), *values))


class _Options(argparse.Action):
    """Collect options into dictionaries: those of planner and repair, and those of formats by their names."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Put one option where it belongs; a later one wins."""
        del parser, option_string
        *owner, key, value = values
        name = _OWNERS.get(owner[0], self.dest) if owner else self.dest
        found: dict[str, Any] = dict(getattr(namespace, name) or {})
        if not owner or name in _OWNERS.values():
            found[key] = value
        else:
            found[owner[0]] = {**found.get(owner[0], {}), key: value}
        setattr(namespace, name, found)


def _count_or_share(text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of layers (6) nor a share of them (0.2)")


def _amount(text: str) -> int:
    """A whole number, with K or M for thousands and millions (1M, 1.5M, 200_000)."""
    factor = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    try:
        number = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens (500K, 1M, 200_000)")
    return int(number)


def _option(text: str) -> tuple[str, Value]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is no option; write KEY=VALUE (precision=fp16)")
    return key, _value(value)


def _text_option(text: str) -> tuple[str, str]:
    """The value stays a text: the types of the planner or the repair say how it is read."""
    _option(text)
    key, _, value = text.partition("=")
    return key, value


def _named_option(text: str) -> tuple[str, str, Value]:
    key, value = _option(text)
    if key.partition(".")[0] in _OWNERS:
        key, value = _text_option(text)
    name, _, key = key.rpartition(".")
    if not name or not key:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not say whose option it is; write FORMAT.KEY=VALUE, plan.KEY=VALUE for the planner, "
            "repair.KEY=VALUE for the repair, or heal.KEY=VALUE for healing"
        )
    return name, key, value


def _value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        # Python also reads "1_000" and "nan"; a text that only looks so is not changed.
        if "_" not in text and math.isfinite(number):
            return number
    return text


def _pair(flag: str, value: str) -> tuple[str, str]:
    return flag, value


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layer numbers (2,5,7)") from None


_READ: Final[dict[str, Callable[[str], Any]]] = {
    "str": str,
    "int": int,
    "int | float": _count_or_share,
    "tuple[str, ...]": _names,
}
