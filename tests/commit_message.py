"""The commit hook for messages: ``python tests/commit_message.py FILE`` exits with 1 and says what to change.

A subject has an area and at most 72 characters; a change of what the packages do has a body that says why.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LONGEST = 72
# "onnx: ...", "planners, evidence: ..."; also what git itself writes.
SUBJECT = re.compile(r"[A-Za-z0-9_.][\w./, -]{0,40}: \S")
TRAILER = re.compile(r"[A-Z][A-Za-z-]+: \S")
SCISSORS = "# ------------------------ >8 ------------------------"
OF_GIT = ("Merge ", "Revert ", "fixup! ", "squash! ")
# What changes behaviour; documents, tests and pictures do not.
BEHAVIOUR = ("sglp_deploy/", "exporters/", "bench/sglp_bench/", "pyproject.toml", "Makefile", ".ci/")


def faults(message: str, changed: Sequence[str]) -> list[str]:
    """What is wrong with a message, each as "what; why; what next"; nothing when it will do.

    Args:
        message: As git gives it to the hook, comments included.
        changed: Paths of the files the commit changes.
    """
    message = message.partition(SCISSORS)[0]  # below it git shows what is committed
    lines = [line.rstrip() for line in message.splitlines() if not line.startswith("#")]
    while lines and not lines[0]:
        lines.pop(0)
    if not lines:
        return ["the message is empty; nobody could find the commit again; write a subject"]
    subject, body = lines[0], [line for line in lines[1:] if line and not TRAILER.match(line)]
    if subject.startswith(OF_GIT):
        return []
    found = []
    if len(subject) > LONGEST:
        found.append(f"the subject has {len(subject)} characters; lists cut it off; write at most {LONGEST}")
    if not SUBJECT.match(subject):
        found.append("the subject names no area; a log is read by area; write 'area: what changes'")
    if len(lines) > 1 and lines[1]:
        found.append("no blank line follows the subject; git takes both for the subject; leave one")
    if not body and any(path.startswith(BEHAVIOUR) for path in changed):
        found.append("there is no body; the change of behaviour has a reason; write it below the subject")
    return found


def main(arguments: Sequence[str]) -> int:
    """Check the message in the file named first."""
    staged = subprocess.run(["git", "diff", "--cached", "--name-only"], capture_output=True, text=True, check=True)
    found = faults(Path(arguments[0]).read_text(encoding="utf-8"), staged.stdout.split())
    for fault in found:
        print(f"commit message: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
