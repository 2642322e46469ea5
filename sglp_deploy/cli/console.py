"""What a person sees: progress on standard error, results and tables on standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from sglp_deploy._names import printable


class Console:
    """Output of one command.

    Args:
        quiet: No progress.
        as_json: Finish with one line of JSON on standard output.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self._as_json = as_json
        self._bar: tqdm[Any] | None = None
        self._stage = ""
        self._told_to_stop = False

    def progress(self, stage: str, done: int, total: int) -> None:
        """Draw a bar for ``stage``; a new stage closes the old bar.

        Raises:
            KeyboardInterrupt: If the command was told to stop.
        """
        self._stop_if_told()
        if self.quiet:
            return
        if stage != self._stage or self._bar is None:
            self.close()
            # A bar redrawn ten times a second fills a log file.
            interval = 0.1 if sys.stderr.isatty() else 5.0
            self._bar = tqdm(total=total, desc=stage, file=sys.stderr, mininterval=interval)
            self._stage = stage
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def note(self, line: str) -> None:
        """One line about what is going on, on standard error.

        Raises:
            KeyboardInterrupt: If the command was told to stop.
        """
        self._stop_if_told()
        if not self.quiet:
            self.close()
            print(printable(line), file=sys.stderr, flush=True)

    def stop(self, *_signal: object) -> None:
        """Unwind as Ctrl-C does; the handler of the signals that end a command.

        An exception that a signal raises within a callback of a library is printed there and forgotten.  So it is
        raised once more at the next thing that is said.
        """
        self._told_to_stop = True
        raise KeyboardInterrupt

    def _stop_if_told(self) -> None:
        if self._told_to_stop:
            self._told_to_stop = False  # once: what is said while things are cleared up must not end it
            raise KeyboardInterrupt

    def warn(self, line: str) -> None:
        """One line a user should read even when quiet."""
        self.close()
        print(f"warning: {printable(line)}", file=sys.stderr, flush=True)

    def alarm(self, line: str) -> None:
        """One line that spoils the answer: in red on a terminal, and in words everywhere."""
        self.close()
        red, plain = ("\033[1;31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
        print(f"{red}{printable(line)}{plain}", file=sys.stderr, flush=True)

    def result(self, text: str, value: Any) -> None:
        """The command's answer, for people and, with ``--json``, for programs."""
        self.close()
        print(printable(text))
        if self._as_json:
            print(json.dumps(value, allow_nan=False))  # ASCII, so that no terminal's encoding can break it
        sys.stdout.flush()  # a reader that has gone is noticed here and not at the interpreter's exit

    def close(self) -> None:
        """Finish the bar that is open, if any."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] | None = None) -> str:
    """Plain text columns; numbers are given as they should read."""
    lines = [[str(cell) for cell in row] for row in rows]
    if header:
        lines.insert(0, list(header))
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines if column < len(line)) for column in range(max(map(len, lines)))]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines]
    if header:
        out.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(out)
