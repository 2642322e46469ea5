"""The commit hook lets good messages through and says what is wrong with the others; run by git itself as well."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("commit_message.py")
ROOT = SCRIPT.parents[1]
_spec = importlib.util.spec_from_file_location("commit_message", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
commit_message = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(commit_message)

PRODUCT, PAGE = ["sglp_deploy/plan.py"], ["docs/cli.md"]
GOOD = "segmentation: break ties at the earliest cut\n\nEqual losses gave another plan on another machine.\n"


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (GOOD, PRODUCT),
        ("# a comment of git\n\n" + GOOD, PRODUCT),
        ("docs: say what a certificate covers\n", PAGE),
        ("planners, evidence: measure what is asked for\n\nWhy.\n", PRODUCT),
        ("Merge branch 'main'\n", PRODUCT),
        (f"onnx: {'x' * 66}\n\nWhy.\n", PRODUCT),
    ],
)
def test_a_good_message_passes(message: str, changed: list[str]) -> None:
    assert commit_message.faults(message, changed) == []


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("\n# only a comment\n", "the message is empty"),
        (f"onnx: {'x' * 67}\n\nWhy.\n", "the subject has 73 characters"),
        ("fix things\n\nWhy.\n", "the subject names no area"),
        ("onnx: fix\nWhy.\n", "no blank line follows the subject"),
        ("onnx: share one trace\n", "there is no body"),
        ("onnx: share one trace\n\nCo-authored-by: A B <a@example.org>\n", "there is no body"),
        ("onnx: share one trace\n# ------------------------ >8 ------------------------\ndiff\n", "there is no body"),
    ],
)
def test_a_bad_message_is_told_what_is_wrong(message: str, fault: str) -> None:
    found = commit_message.faults(message, PRODUCT)
    assert [words.partition(";")[0] for words in found] == [fault]


def test_git_refuses_a_bad_message_and_takes_a_good_one(tmp_path: Path) -> None:
    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert git("init", "-q").returncode == 0
    hook = tmp_path / ".git" / "hooks" / "commit-msg"
    hook.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SCRIPT}" "$1"\n')
    hook.chmod(0o755)
    (tmp_path / "bench" / "sglp_bench").mkdir(parents=True)
    (tmp_path / "bench" / "sglp_bench" / "new.py").write_text("")
    git("add", ".")
    refused = git("commit", "-m", "bench: measure power")
    assert refused.returncode != 0
    assert "commit message: there is no body; the change of behaviour has a reason" in refused.stderr
    assert git("commit", "-m", "bench: measure power", "-m", "Watts decide on a phone.").returncode == 0


def test_the_hook_is_declared_for_messages() -> None:
    declared = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert "tests/commit_message.py" in declared
    assert "stages: [commit-msg]" in declared
    assert "default_install_hook_types: [pre-commit, commit-msg]" in declared
