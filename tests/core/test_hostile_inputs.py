"""Damaged files of every kind, ours and others', through the verbs that read them: an answer in words, whatever it is.

``SGLP_FUZZ=200`` draws so many of each kind; continuous integration draws the few it has time for.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import cli_runs
import gguf_files
import tiny
from fuzz import bytes_damaged, damaged, text_damaged
from sglp_bench.judge.certificates import require_certificates
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.cli.main import main
from sglp_deploy.errors import SGLPError
from sglp_deploy.overlay import Overlay
from sglp_deploy.plan import PruningPlan

pytestmark = pytest.mark.filterwarnings("default")  # what a library warns of is no error for a user

_MANY = int(os.environ.get("SGLP_FUZZ", "24"))
_FEW = 4
_LONGEST_S = 60
# What a user may meet: done, an error in words, an artifact that is not certified, a limit missed.
_STATUSES = (0, 1, 2, 3, 5)


@dataclass(frozen=True)
class Target:
    """Files to damage, one at a time, and the commands that read them.

    Attributes:
        files: Where they lie.
        commands: Command lines, without ``-q``.
        damage: The damaged bytes of a file, by seed.
    """

    files: tuple[Path, ...]
    commands: tuple[tuple[str, ...], ...]
    damage: Callable[[int, bytes], bytes] = bytes_damaged
    sound: int = 0  # what the commands end with while nothing is damaged


def _of_json(seed: int, sound: bytes) -> bytes:
    return damaged(seed, sound.decode()).encode(errors="surrogatepass")


def _of_text(seed: int, sound: bytes) -> bytes:
    return text_damaged(seed, sound.decode()).encode(errors="surrogatepass")


def _of_lines(seed: int, sound: bytes) -> bytes:
    """One line of JSON lines damaged as JSON, or the bytes."""
    rng = random.Random(seed)
    lines = sound.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = _of_json(seed, lines[place])
    return b"\n".join(lines) if rng.random() < 0.7 else bytes_damaged(seed, sound)


def _of_toml(seed: int, sound: bytes) -> bytes:
    """One value of a TOML file damaged as JSON would be, or the bytes; TOML has no null."""
    rng = random.Random(seed)
    if rng.random() < 0.3:
        return bytes_damaged(seed, sound)
    try:
        content = json.loads(damaged(seed, json.dumps(tomllib.loads(sound.decode()))))
    except ValueError:
        return bytes_damaged(seed, sound)
    lines = []
    for table, keys in content.items() if isinstance(content, dict) else ():
        if isinstance(keys, dict):
            lines += [f"[{json.dumps(table)}]", *(f"{json.dumps(key)} = {_toml(value)}" for key, value in keys.items())]
        else:
            lines.insert(0, f"{json.dumps(table)} = {_toml(keys)}")
    return "\n".join(lines).encode(errors="surrogatepass")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return '""' if value is None else json.dumps(value)


def _copied_model(factory: pytest.TempPathFactory, folder: Path) -> Path:
    return Path(shutil.copytree(cli_runs.tiny_model(factory), folder / "model"))


def _by_hand(model: Path, folder: Path) -> Path:
    plan = folder / "plan.json"
    assert main(["plan", str(model), "--drop-layers", "1,4", "-q", "-o", str(plan)]) == 0
    return plan


def _checkpoint(names: tuple[str, ...], damage: Callable[[int, bytes], bytes]) -> Callable[..., Target]:
    def make(factory: pytest.TempPathFactory, folder: Path) -> Target:
        model = _copied_model(factory, folder)
        plan = _by_hand(model, folder)
        out = str(folder / "out")
        read = ("materialize", str(model), str(plan), "-o", out)
        decide = ("plan", str(model), "--drop-layers", "1,4", "-o", str(folder / "other.json"))
        return Target(tuple(model / name for name in names), (read, decide), damage)

    return make


def _gguf(factory: pytest.TempPathFactory, folder: Path) -> Target:
    del factory
    module = tiny.model("llama")
    tiny.tokenizer().save_pretrained(folder)
    file = gguf_files.write(folder / "m.gguf", gguf_files.named(module), layers=6)
    return Target((file,), (("plan", str(file), "--drop-layers", "1", "-o", str(folder / "plan.json")),))


def _plan(factory: pytest.TempPathFactory, folder: Path) -> Target:
    model = _copied_model(factory, folder)
    plan = Path(shutil.copy(cli_runs.finished_run(factory) / "plan.json", folder / "plan.json"))
    read = ("materialize", str(model), str(plan), "-o", str(folder / "out"))
    return Target((plan,), (read,), _of_json)


def _overlay(factory: pytest.TempPathFactory, folder: Path) -> Target:
    model = _copied_model(factory, folder)
    plain = PruningPlan.load(_by_hand(model, folder))
    name = "model.layers.0.mlp.down_proj.weight"
    weights = Overlay({name: torch.zeros_like(tiny.model("llama").get_parameter(name))}, [{"repair": "planted"}])
    plan = plain.with_overlay(weights)
    plan.save(folder / "plan.json")
    file = plan.save_overlay(folder)
    assert file is not None
    return Target((file,), (("materialize", str(model), str(folder / "plan.json"), "-o", str(folder / "out")),))


def _calibration(factory: pytest.TempPathFactory, folder: Path) -> Target:
    model = _copied_model(factory, folder)
    file = folder / "text.jsonl"
    rows = [{"text": f"The miller's daughter sold {number} sacks of flour. " * 4} for number in range(12)]
    rows += [{"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Twelve."}]}] * 3
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ("--calibration-tokens", "64", "--sequence-length", "16", "--threads", "1")
    read = ("plan", str(model), "--drop", "1", "--calibration", str(file), *small, "-o", str(folder / "p.json"))
    return Target((file,), (read,), _of_lines)


def _tasks(factory: pytest.TempPathFactory, folder: Path) -> Target:
    model = _copied_model(factory, folder)
    choices, words = folder / "choices.jsonl", folder / "words.jsonl"
    asked = {"question": "What is sold?", "choices": ["flour", "salt"], "answer": 0}
    choices.write_text("".join(json.dumps({**asked, "answer": number % 2}) + "\n" for number in range(6)))
    words.write_text("".join(json.dumps({"text": f"The miller has {number} daughters."}) + "\n" for number in range(6)))
    small = ("--tokens", "64", "--chunk", "32", "--threads", "1", "-o", str(folder / "quality.json"))
    ask = ("evaluate", str(model), "--tasks", f"{choices},last-word:{words}", *small)
    return Target((choices, words), (ask,), _of_lines)


def _settings(factory: pytest.TempPathFactory, folder: Path) -> Target:
    """The model does not exist: a file that is sound after all ends there."""
    del factory
    file = folder / "sglp.toml"
    file.write_text(
        f'[model]\npath = "{folder / "absent"}"\ndtype = "auto"\n[plan]\ndrop = 2\nmethod = "sglp"\nseed = 1\n'
        '[plan.options]\ncriterion = "grad-norm"\n[repair]\nmethod = "refit"\ntokens = 1024\n'
        '[export]\nto = ["onnx", "vllm"]\n[accept]\nperplexity = "1.5x"\n'
    )
    return Target((file,), (("run", str(file), "-o", str(folder / "run")),), _of_toml, sound=1)


def _artifact(factory: pytest.TempPathFactory, folder: Path) -> Target:
    model = _copied_model(factory, folder)
    run = Path(shutil.copytree(cli_runs.finished_run(factory), folder / "run"))
    artifact = run / "artifacts" / "onnx"
    shutil.copy(run / "parity" / "onnx.json", artifact / "parity.json")
    files = tuple(file for file in sorted(artifact.rglob("*")) if file.is_file())
    return Target(files, (("verify", str(artifact), "--model", str(model), "--threads", "1"),), _of_either)


def _of_either(seed: int, sound: bytes) -> bytes:
    try:
        json.loads(sound)
    except ValueError:
        return bytes_damaged(seed, sound)
    return _of_json(seed, sound) if seed % 4 else bytes_damaged(seed, sound)


def _receipt(factory: pytest.TempPathFactory, folder: Path) -> Target:
    del factory
    made = folder / "home" / "environments" / ("optimum-" + "0" * 12)
    (made / "bin").mkdir(parents=True)
    (made / "bin" / "python").symlink_to("/bin/true")
    file = made / "sglp-environment.json"
    facts = {"schema": "environment/1", "name": "optimum", "fingerprint": "0" * 64, "python": "3.11.7"}
    file.write_text(json.dumps({**facts, "packages": ["optimum==1.0", "torch==2.13.0"]}))
    return Target((file,), (("env", "list"), ("show", str(file))), _of_json)


_JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_TARGETS: dict[str, Callable[[pytest.TempPathFactory, Path], Target]] = {
    "checkpoint's JSON": _checkpoint(_JSON_FILES, _of_json),
    "checkpoint's weights": _checkpoint(("model.safetensors",), bytes_damaged),
    "GGUF": _gguf,
    "plan": _plan,
    "overlay": _overlay,
    "calibration": _calibration,
    "tasks": _tasks,
    "sglp.toml": _settings,
    "artifact": _artifact,
    "receipt": _receipt,
}


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    """Raise in what takes longer."""

    def late(_number: int, _frame: object) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _answers(target: Target, seeds: range, capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[int, Path, bytes]]:
    """Damage, ask, and give the damaged file to the caller before it is made sound again."""
    for seed in seeds:
        file = target.files[seed % len(target.files)]
        sound = file.read_bytes()
        broken = target.damage(seed, sound)
        file.write_bytes(broken)
        try:
            for command in target.commands:
                with _within(_LONGEST_S):
                    status = main([*command, "-q"])
                said = capsys.readouterr().err
                where = (seed, file.name, command, said)
                assert status in _STATUSES, where
                assert "fault of sglp-deploy" not in said, where
                assert "Traceback" not in said, where
                assert status in (0, 3, 5) or "error: " in said, where
                assert file.exists(), where
            yield seed, file, broken
        finally:
            file.write_bytes(sound)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cli_runs.quick(monkeypatch)
    monkeypatch.setenv("SGLP_DEPLOY_HOME", str(tmp_path / "home"))


def _all_answered(
    kind: str, seeds: range, factory: pytest.TempPathFactory, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = _TARGETS[kind](factory, folder)
    assert [main([*command, "-q"]) for command in target.commands] == [target.sound] * len(target.commands)
    capsys.readouterr()
    for _seed, _file, _broken in _answers(target, seeds, capsys):
        pass


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("kind", [kind for kind in _TARGETS if kind != "artifact"])
def test_a_damaged_file_is_answered_in_words(
    kind: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _all_answered(kind, range(_FEW), tmp_path_factory, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("kind", _TARGETS)
def test_many_damaged_files_are_answered_in_words(
    kind: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _all_answered(kind, range(1000, 1000 + _MANY), tmp_path_factory, tmp_path, capsys)


def _means_the_same(one: bytes, other: bytes) -> bool:
    """Whether two files hold the same bytes, or JSON of the same value."""
    try:
        return one == other or bool(json.loads(one) == json.loads(other))
    except (ValueError, RecursionError):
        return False


def _counts_as_certified(folder: Path) -> bool:
    """Whether a benchmark would take it; whatever is raised that is not in our words ends the test."""
    try:
        require_certificates({"it": ExportArtifact.load(folder)})
    except SGLPError:
        return False
    return True


@pytest.mark.parametrize("start", [0, pytest.param(10_000, marks=pytest.mark.slow)])
def test_nothing_that_was_changed_counts_as_certified(
    start: int, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    target = _artifact(tmp_path_factory, tmp_path)
    folder = tmp_path / "run" / "artifacts" / "onnx"
    (tmp_path / "run" / "parity" / "onnx.json").unlink()  # or it would stand for the damaged one
    require_certificates({"it": ExportArtifact.load(folder)})
    for seed in range(start, start + (40 if not start else 20 * _MANY)):
        file = target.files[seed % len(target.files)]
        sound = file.read_bytes()
        broken = target.damage(seed, sound)
        if _means_the_same(sound, broken):
            continue
        file.write_bytes(broken)
        counts = _counts_as_certified(folder)
        file.write_bytes(sound)
        assert not counts, (seed, file.name)
