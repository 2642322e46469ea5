"""Parse arguments, run one verb, turn failures into one line and an exit code.

Nothing heavy is imported here: ``--help`` must answer at once, so a verb is imported when it is chosen.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from sglp_deploy import __version__
from sglp_deploy.cli.exits import Exit
from sglp_deploy.errors import ConfigError, IncomparableResultsError, ParityError, SGLPError

if TYPE_CHECKING:
    from sglp_deploy.cli.console import Console

Verb = Callable[[argparse.Namespace, "Console"], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 well, 1 error, 3 parity, 4 not comparable, 130 interrupted).

    Raises:
        SystemExit: With 2 on a usage error, with 0 after ``--help`` and ``--version``.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    arguments = parser.parse_args(given)
    _check_usage(parser, arguments)
    arguments.command = shlex.join(["sglp-deploy", *given])
    from sglp_deploy.cli.console import Console  # draws with tqdm, which --help does not need

    console = Console(quiet=arguments.quiet, as_json=arguments.json)
    with _unwinding():
        try:
            verb: Verb = getattr(importlib.import_module("sglp_deploy.cli.verbs"), f"run_{arguments.verb}")
            return verb(arguments, console)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # a user never sees a bare traceback
            console.close()  # or the message would end a half-drawn bar
            if arguments.verbose:
                traceback.print_exc()
            return _report(error, arguments.verb)


def _report(error: BaseException, verb: str) -> int:
    """Say what went wrong in one line and return the exit code for it."""
    if isinstance(error, KeyboardInterrupt):
        kept = "finished stages are kept; " if verb == "run" else "nothing half-made is left; "
        _say(f"interrupted; {kept}run the same command again to go on")
        return Exit.INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone (a pager, head); silence the interpreter's own complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.ERROR
    for fault in error.faults if isinstance(error, ConfigError) else [_message(error)]:
        _say(f"error: {_one_line(fault)}")
    if isinstance(error, ParityError):
        return Exit.PARITY
    return Exit.INCOMPARABLE if isinstance(error, IncomparableResultsError) else Exit.ERROR


def _message(error: BaseException) -> str:
    """What, why, what next, for errors of ours and of everything below us."""
    if isinstance(error, SGLPError):
        return str(error)
    words = _one_line(str(error)) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}" if error.filename else "a file"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space" if full else "check the path and its permissions"
        return f"{place} cannot be used; {error.strerror}; {advice} and run the same command again"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in words:
        return f"out of memory; {words}; close other programs, or pass a smaller --batch-size or --dtype bf16"
    return f"{type(error).__name__}: {words}; this is a fault of sglp-deploy; run again with -v and report it"


def _one_line(text: str) -> str:
    """The first line and, where a message brings the last lines of a process, the last of those."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return f"{lines[0]} (last line: {lines[-1]})" if len(lines) > 1 else "".join(lines)


@contextmanager
def _unwinding() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C, so that half-made folders are removed and workers are stopped."""
    changed = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in filter(None, (signal.SIGTERM, getattr(signal, "SIGHUP", None))):  # Windows has no SIGHUP
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored, and that stays
                changed[number] = signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, before in changed.items():
            signal.signal(number, before)


def _check_usage(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse what argparse cannot express."""
    if arguments.verb == "export" and arguments.baseline == bool(arguments.plan):
        parser.error("export takes a plan or --baseline, one of the two")
    if arguments.verb == "env" and (arguments.action == "list") == (arguments.name is not None):
        parser.error(f"env {arguments.action} takes {'no name' if arguments.action == 'list' else 'a NAME'}")
    by_hand = getattr(arguments, "drop_layers", None) is not None
    if getattr(arguments, "stack", None) and not by_hand:
        parser.error("--stack goes with --drop-layers; planning by measurement is for models with one stack")
    if by_hand and any(value is not None for value in (arguments.drop, arguments.keep, arguments.max_parameters)):
        parser.error("--drop-layers names the layers; leave --drop, --keep and --max-parameters out")
    if arguments.verb in ("plan", "run") and not by_hand and not arguments.model.endswith(".toml"):
        budget = (arguments.drop, arguments.keep, arguments.max_parameters)
        if budget == (None, None, None):
            parser.error(f"{arguments.verb} needs a budget: one of --drop, --keep, --max-parameters")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="sglp-deploy",
        description="Make a trained model shallower, export it, prove the export right, measure what was gained.",
    )
    parser.add_argument("--version", action="version", version=f"sglp-deploy {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="show tracebacks")
    common.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")
    common.add_argument("--json", action="store_true", help="the last line of standard output is one JSON document")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, parents=[common], help=text, description=text[0].upper() + text[1:] + ".")

    plan = verb("plan", "decide which layers a model can lose")
    _model(plan)
    _planning(plan)
    plan.add_argument("-o", "--output", default="plan.json", help="file to write (default: %(default)s)")
    plan.add_argument("--drop-layers", type=_layers, metavar="I,J", help="remove these layers, measuring nothing")
    plan.add_argument("--stack", help="encoder or decoder, for a model that has both (with --drop-layers)")
    plan.add_argument("--no-matrix", action="store_true", help="leave the similarity matrix out of the file")

    materialize = verb("materialize", "build the shallower checkpoint a plan describes")
    _model(materialize)
    materialize.add_argument("plan", help="plan.json")
    materialize.add_argument("-o", "--output", required=True, help="folder to write")

    export = verb("export", "export a shallower model, or its unpruned baseline")
    _model(export)
    export.add_argument("plan", nargs="?", help="plan.json; left out with --baseline")
    export.add_argument("--to", default="onnx", metavar="FORMAT", help="see 'sglp-deploy plugins' (default: onnx)")
    export.add_argument(
        "--option", action="append", type=_option, metavar="KEY=VALUE", help="an option of that format; may be repeated"
    )
    export.add_argument("--baseline", action="store_true", help="keep every layer")
    export.add_argument("-o", "--output", required=True, help="folder to write")

    verify = verb("verify", "certify that an artifact computes what the pruned model should (exit 3 when not)")
    verify.add_argument("artifact", help="artifact folder")
    verify.add_argument("--model", help="the unpruned model, when it has moved since the export")
    verify.add_argument("--text", help="text for the prompts (default: built-in prose)")
    verify.add_argument("-o", "--output", help="file to write as well (parity.json is left in the artifact's folder)")
    _loading(verify)

    bench = verb("bench", "measure a certified artifact, paired against another one (exit 4 when not comparable)")
    bench.add_argument("artifact", help="artifact folder")
    bench.add_argument("--against", metavar="DIR", help="the baseline's artifact folder")
    bench.add_argument(
        "--certificate", action="append", metavar="FILE", help="a parity.json that lies elsewhere; may be repeated"
    )
    bench.add_argument(
        "--unverified", action="store_true", help="measure what is not certified; marked in every output"
    )
    bench.add_argument("--workload", default="decode-small", help="name of a workload (default: %(default)s)")
    bench.add_argument("--no-control", action="store_true", help="leave out the A/A control")
    bench.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    bench.add_argument("--threads", type=int, help="threads of the runtime (default: its own choice)")
    bench.add_argument("-o", "--output", required=True, help="folder for result.json and comparison.json")

    evaluate = verb("evaluate", "perplexity of a model on text")
    _model(evaluate)
    evaluate.add_argument("--text", help="text file, .jsonl or hf:DATASET (default: held-out built-in prose)")
    evaluate.add_argument("--tokens", type=int, default=16_384, help="token budget (default: %(default)s)")
    evaluate.add_argument("--chunk", type=int, default=512, help="tokens in a chunk (default: %(default)s)")
    evaluate.add_argument("-o", "--output", help="file to write")

    report = verb("report", "render a run folder as report.json and report.html")
    report.add_argument("folder", help="run folder")
    report.add_argument("-o", "--output", help="folder to write (default: FOLDER/report)")

    run = verb("run", "plan, materialize, export, verify, evaluate, bench and report; resumable")
    run.add_argument("model", help="model, or a sglp.toml that names one")
    _loading(run)
    _planning(run)
    run.add_argument("--to", metavar="FORMATS", help="formats, comma-separated (default: onnx)")
    run.add_argument(
        "--option",
        action="append",
        type=_named_option,
        dest="options",
        metavar="FORMAT.KEY=VALUE",
        help="an option of one of them; may be repeated",
    )
    run.add_argument("--workload", help="name of a workload (default: demo)")
    run.add_argument("--text", help="text to judge quality on (default: held-out built-in prose)")
    run.add_argument("--evaluation-tokens", type=int, help="token budget for quality (default: 16384)")
    run.add_argument("--evaluation-chunk", type=int, help="tokens in a chunk of that text (default: 512)")
    run.add_argument("-o", "--output", help="run folder (default: runs/run)")

    show = verb("show", "print any of our files as a table")
    show.add_argument("file", help="plan.json, manifest.json, parity.json, an artifact or run folder, ...")

    verb("plugins", "list exporters, with the reason when one cannot be used")
    env = verb("env", "make, list or remove the isolated environments some runtimes need")
    env.add_argument("action", choices=["create", "list", "remove"])
    env.add_argument("name", nargs="?", help="see 'sglp-deploy env list'")
    env.add_argument("--force", action="store_true", help="make it again although it is ready")

    verb("doctor", "what is installed, what is missing and why, version conflicts")
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder, .gguf file, or hub identifier when online")
    _loading(parser)


def _loading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loading")
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cpu)")
    group.add_argument("--dtype", choices=["auto", "fp32", "fp16", "bf16"], help="element type (default: as stored)")
    group.add_argument("--threads", type=int, help="CPU threads (default: the runtime's choice)")
    group.add_argument("--trust-remote-code", action="store_true", default=None, help="run code that comes with it")
    group.add_argument("--allow-pickle", action="store_true", default=None, help="accept weights stored as pickle")


def _planning(parser: argparse.ArgumentParser) -> None:
    # Every default lives in RunConfig, so a file and the flags agree.
    group = parser.add_argument_group("planning")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--drop", type=_count_or_share, metavar="N", help="layers to remove, or a share (0.2)")
    budget.add_argument("--keep", type=int, metavar="N", help="layers to keep")
    budget.add_argument("--max-parameters", type=int, metavar="N", help="parameters the pruned model may have")
    group.add_argument("--method", help="planner (default: sglp)")
    group.add_argument("--criterion", help="layer score inside a segment (default: grad-norm)")
    group.add_argument("--segments", type=int, dest="n_segments", metavar="K", help="segments (default: chosen)")
    group.add_argument("--profile", choices=["row_sum", "rows"], help="what is segmented (default: row_sum)")
    group.add_argument("--estimator", help="CKA estimator: unbiased, biased, mean_of_ratios (default: unbiased)")
    group.add_argument("--quota", choices=["global", "proportional"], help="removals per segment")
    group.add_argument("--calibration", metavar="TEXT", help="text, .jsonl, hf:DATASET or builtin (default)")
    group.add_argument("--calibration-tokens", type=int, metavar="N", help="token budget (default: 16384)")
    group.add_argument("--sequence-length", type=int, metavar="N", help="tokens in a row (default: 256)")
    group.add_argument("--batch-size", type=int, metavar="N", help="rows in a minibatch (default: 4)")
    group.add_argument("--rows", choices=["rms", "raw"], help="normalise rows before CKA (default: rms)")
    group.add_argument("--skip-positions", type=int, metavar="N", help="leading positions left out (default: 1)")
    group.add_argument("--seed", type=int, help="seed (default: 0)")
    group.add_argument(
        "--preserve-pattern",
        action="store_true",
        default=None,
        help="remove whole periods of the layer pattern (local, local, global, ...) only",
    )


def _count_or_share(text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of layers (6) nor a share of them (0.2)")


def _option(text: str) -> tuple[str, int | bool | str]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is no option; write KEY=VALUE (precision=fp16)")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    return key, int(value) if value.isdecimal() else value


def _named_option(text: str) -> tuple[str, str, int | bool | str]:
    key, value = _option(text)
    name, _, key = key.rpartition(".")
    if not name or not key:
        raise argparse.ArgumentTypeError(f"{text!r} does not say whose option it is; write FORMAT.KEY=VALUE")
    return name, key, value


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layer numbers (2,5,7)") from None


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
