"""Parse arguments, run one verb, turn failures into one line and an exit code.

Nothing heavy is imported here.  ``--help`` must answer at once.  So a verb is imported when it is chosen.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sglp_deploy import __version__
from sglp_deploy._names import at_home, printable
from sglp_deploy.cli.exits import Exit
from sglp_deploy.errors import ConfigError, IncomparableResultsError, ParityError, SGLPError

if TYPE_CHECKING:
    from sglp_deploy.cli.console import Console

VERBS = {
    "plan": "decide which layers a model can lose",
    "repair": "change kept weights so that they make up for removed layers",
    "heal": "train a pruned model on what the unpruned one says; resumable",
    "materialize": "build the shallower checkpoint a plan describes",
    "export": "export a shallower model, or its unpruned baseline",
    "verify": "certify that an artifact computes what the pruned model should (exit 3 when not)",
    "bench": "measure a certified artifact, paired against another one (exit 4 when not comparable)",
    "evaluate": "perplexity of a model on text, and its right answers in tasks; with a plan, the pruned one beside it",
    "report": "render a run folder as report.json and report.html",
    "run": "plan, repair, heal, export, verify, evaluate, bench and report; resumable (exit 5: a limit missed)",
    "show": "print any of our files as a table",
    "plugins": "list exporters and planners, with the reason when one cannot be used",
    "env": "make, list or remove the isolated environments some runtimes need",
    "doctor": "what is installed, what is missing and why, version conflicts",
    "schema": "print the JSON schema of sglp.toml, for editors",
}

Verb = Callable[[argparse.Namespace, "Console"], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (:class:`sglp_deploy.cli.exits.Exit`).

    Raises:
        SystemExit: With 2 on a usage error, with 0 after ``--help`` and ``--version``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a terminal's encoding may lack a letter of a path; say it all the same
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(given)
    arguments = parser.parse_args([at_home(word) for word in given])  # a shell leaves it behind "=", and in quotes
    from sglp_deploy.cli import flags

    flags.check(parser, arguments)
    arguments.command = shlex.join(["sglp-deploy", *given])
    from sglp_deploy.cli.console import Console  # draws with tqdm, which --help does not need

    console = Console(quiet=arguments.quiet, as_json=arguments.json)
    with _unwinding(console):
        try:
            verb: Verb = getattr(importlib.import_module("sglp_deploy.cli.verbs"), f"run_{arguments.verb}")
            return verb(arguments, console)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # a user never sees a bare traceback
            console.close()  # or the message would end a half-drawn bar
            if arguments.verbose:
                import traceback  # --help does not need it

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
def _unwinding(console: Console) -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C, so that half-made folders are removed and workers are stopped."""
    changed = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in filter(None, (signal.SIGTERM, getattr(signal, "SIGHUP", None))):  # Windows has no SIGHUP
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored, and that stays
                changed[number] = signal.signal(number, console.stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            changed[signal.SIGINT] = signal.signal(signal.SIGINT, console.stop)
    try:
        yield
    finally:
        for number, before in changed.items():
            signal.signal(number, before)


def build_parser(given: Collection[str] | None = None) -> argparse.ArgumentParser:
    """The command line: every verb, and the flags of those named in ``given`` (of all when it is None)."""
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
    for name, text in VERBS.items():
        verb = verbs.add_parser(name, parents=[common], help=text, description=text[0].upper() + text[1:] + ".")
        if given is None or name in given:
            from sglp_deploy.cli import flags  # 'sglp-deploy --help' needs none

            flags.add(name, verb)
    return parser


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
