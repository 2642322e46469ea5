"""``sglp.toml``: every fault of a file at once, and flags that win over it."""

from __future__ import annotations

import importlib
import json
import os
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import cli_runs
from sglp_deploy.cli import config as config_module
from sglp_deploy.cli import ledger, verbs
from sglp_deploy.cli import main as main_module
from sglp_deploy.cli.config import Export, RunConfig
from sglp_deploy.cli.main import main
from sglp_deploy.errors import ConfigError
from sglp_deploy.evidence.documents import documents_of

WHOLE = """
[model]
path = "models/smollm2"
device = "cuda:1"
dtype = "bf16"
threads = 3
trust_remote_code = true
allow_pickle = true

[plan]
drop = 6
method = "sglp"
calibration = "calib.txt"
calibration_tokens = 1000
sequence_length = 128
batch_size = 2
rows = "raw"
skip_positions = 0

[plan.options]
criterion = "taylor"
n_segments = 4

[repair]
method = "local"
tokens = 4000

[repair.options]
epochs = 3

[export]
to = ["onnx", "vllm"]

[bench]
workload = "smoke"

[evaluate]
text = "heldout.txt"
tokens = 2000
chunk = 64
tasks = ["piqa.jsonl", "last-word:ends.txt"]
tasks_limit = 9
sample_tokens = 0

[accept]
perplexity = "1.5x"
prefill = "1.1x"
decode = "1.2x"
memory = "0.9x"
size = "0.8x"
parity = "passed"

[accept.tasks]
piqa = "-0.03"

[run]
output = "runs/demo"
seed = 7
"""


def toml(folder: Path, content: str) -> Path:
    file = folder / "sglp.toml"
    file.write_text(content)
    return file


def faults(folder: Path, content: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        RunConfig.load(toml(folder, content))
    return error.value.faults


def test_every_key_of_the_file_reaches_its_field(tmp_path: Path) -> None:
    found = RunConfig.load(toml(tmp_path, WHOLE))
    assert found == RunConfig(
        model="models/smollm2",
        output="runs/demo",
        device="cuda:1",
        dtype="bf16",
        threads=3,
        trust_remote_code=True,
        allow_pickle=True,
        drop=6,
        method="sglp",
        plan_options={"criterion": "taylor", "n_segments": 4},
        calibration="calib.txt",
        calibration_tokens=1000,
        sequence_length=128,
        batch_size=2,
        rows="raw",
        skip_positions=0,
        repair="local",
        repair_tokens=4000,
        repair_options={"epochs": 3},
        to=("onnx", "vllm"),
        workload="smoke",
        text="heldout.txt",
        evaluation_tokens=2000,
        evaluation_chunk=64,
        tasks=("piqa.jsonl", "last-word:ends.txt"),
        tasks_limit=9,
        sample_tokens=0,
        accept_perplexity="1.5x",
        accept_prefill="1.1x",
        accept_decode="1.2x",
        accept_memory="0.9x",
        accept_size="0.8x",
        accept_parity="passed",
        accept_tasks={"piqa": "-0.03"},
        seed=7,
    )


def test_every_field_is_a_key_of_the_file_and_a_flag_of_run() -> None:
    keys = {field for table in config_module._TABLES.values() for field in table.values()}
    assert keys == {item.name for item in fields(RunConfig)}
    flags = vars(main_module.build_parser().parse_args(["run", "m"]))
    assert keys <= flags.keys()


def test_the_example_in_the_documentation_of_the_module_is_accepted(tmp_path: Path) -> None:
    text = (config_module.__doc__ or "").partition("::\n")[2]
    found = RunConfig.load(toml(tmp_path, "\n".join(line.strip() for line in text.splitlines())))
    assert (found.model, found.drop, found.to) == ("models/smollm2", 6, ("onnx", "vllm", "onnx-int8"))
    assert found.exports()[2] == Export("onnx-int8", "onnx", {"precision": "int8"})


def test_the_example_in_the_manual_is_accepted(tmp_path: Path) -> None:
    manual = (cli_runs.ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    found = RunConfig.load(toml(tmp_path, manual.partition("```toml\n")[2].partition("```")[0]))
    assert (found.model, found.drop, found.to) == ("models/smollm2", 6, ("onnx", "vllm"))
    for table, keys in config_module._TABLES.items():
        assert f"[{table}]" in manual
        for key in keys:
            assert f"{key} = " in manual, f"docs/cli.md does not name {key}"
    second = manual.split("```toml\n")[2].partition("```")[0]
    found = RunConfig.load(toml(tmp_path, f"model.path = 'm'\nplan.drop = 1\n{second}"))
    assert found.exports() == (Export("onnx", "onnx", {}), Export("onnx-int8", "onnx", {"precision": "int8"}))


@pytest.mark.parametrize(("budget", "field", "value"), [("drop = 0.2", "drop", 0.2), ("keep = 24", "keep", 24)])
def test_each_budget_can_be_given(budget: str, field: str, value: float, tmp_path: Path) -> None:
    assert getattr(RunConfig.load(toml(tmp_path, f"model.path = 'm'\nplan.{budget}")), field) == value


def test_all_faults_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "sglp.toml"
    found = faults(
        tmp_path,
        """
[model]
pth = "m"
threads = 0
[plan]
drop = 1
keep = 2
segments = 4
keep_pattern = true
batch_size = "four"
[plan.options]
criterion = "tailor"
quotas = "global"
n_segments = "five"
[export]
to = "onnx"
[benchmark]
workload = "smoke"
""",
    )
    assert found == [
        f"{file}: [model] has no key 'pth'; nothing reads it; did you mean 'path'? its keys are path, device, dtype, "
        "threads, trust_remote_code, allow_pickle",
        f"{file}: [plan] batch_size = 'four' is of the wrong kind; a whole number is read; change it",
        f"{file}: [plan] segments is no key any more; it is an option of the planner; write n_segments = ... under "
        "[plan.options]",
        f"{file}: [plan] has no key 'keep_pattern'; nothing reads it; did you mean 'preserve_pattern'? its keys are "
        "drop, keep, max_parameters, method, calibration, calibration_tokens, sequence_length, batch_size, rows, "
        "skip_positions, preserve_pattern, options",
        f"{file}: [export] to = 'onnx' is of the wrong kind; a list of texts is read; change it",
        f"{file}: 'benchmark' is not a table of sglp.toml; nothing reads it; did you mean 'bench'? the tables are "
        "model, plan, repair, heal, export, bench, evaluate, accept, run",
        "no model is given; there is nothing to prune; pass MODEL or set path under [model]",
        "the budget sets drop and keep; one number decides how many layers go; pass exactly one of drop, keep, "
        "max_parameters",
        "unknown option of planner 'sglp' 'quotas'; nothing is registered under that name; did you mean 'quota'? the "
        "choices are criterion, estimator, n_segments, profile, quota",
        "n_segments='five' does not fit planner 'sglp'; int | nothing is read; correct the value",
        "unknown criterion 'tailor'; nothing is registered under that name; did you mean 'taylor'? the choices are "
        "block-influence, grad-norm, grad-norm-output, grad-norm-weight-sum, taylor",
        "threads=0 is too small; nothing could be computed; pass 1 or more",
    ]


def test_the_command_line_prints_each_fault_on_a_line_and_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = toml(tmp_path, "model.path = 'm'\nplan.drop = 1\nplan.rows = 'cooked'\nrun.seed = -1")
    assert main(["run", str(file), "-q"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "error: unknown rows 'cooked'; nothing is registered under that name; choose one of raw, rms",
        "error: seed=-1 is too small; nothing could be computed; pass 0 or more",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[model", "is not TOML; "),
        ("model = 3", "'model' is not a table of sglp.toml"),
        ("[model]\npath = 'm'\ntrust_remote_code = 1", "true or false is read"),
        ("[plan]\ndrop = true", "a number is read"),
        ("[plan]\nkeep = 2.5", "a whole number is read"),
        ("[export]\nto = [1]", "a list of texts is read"),
        ("[export]\nto = []", "no export format is given; nothing would be deployed; pass --to onnx"),
        ("[model]\npath = 3", "text is read"),
        ("[model]\npath = 'm'", "the budget sets nothing"),
    ],
)
def test_a_wrong_file_is_refused(content: str, words: str, tmp_path: Path) -> None:
    assert any(words in fault for fault in faults(tmp_path, content))


def test_a_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "no.toml"
    assert main(["run", str(file)]) == 1
    assert capsys.readouterr().err == f"error: {file} cannot be read; No such file or directory; check the path\n"


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third party's planner with options of its own, installed."""
    site = tmp_path / "site"
    (site / "theirplanner-1.0.dist-info").mkdir(parents=True)
    (site / "theirplanner-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tp\nVersion: 1.0\n")
    (site / "theirplanner-1.0.dist-info" / "entry_points.txt").write_text(
        "[sglp_deploy.planners]\ntheirs = theirplanner:Planner\n"
    )
    (site / "theirplanner.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Options:\n    criterion: str = 'own'\n    strength: float = 0.5\n"
        "    careful: bool = False\n"
        "class Planner:\n    name = 'theirs'\n    source = 'nobody 2020'\n    Options = Options\n"
        "    def decide(self, evidence, budget, options):\n        raise NotImplementedError\n"
    )
    monkeypatch.syspath_prepend(str(site))


THEIRS = {"criterion": "of theirs", "strength": 0.25, "careful": True}


def test_a_third_party_s_method_has_options_of_its_own(theirs: None) -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'thiers'; .*did you mean 'theirs'"):
        RunConfig(model="m", drop=1, method="thiers", plan_options=THEIRS)
    assert RunConfig(model="m", drop=1, method="theirs", plan_options=THEIRS).plan_options == THEIRS
    flags = ["--option", "plan.criterion=of theirs", "--option", "plan.strength=0.25", "--option", "plan.careful=true"]
    assert given("m", "--drop", "1", "--method", "theirs", *flags).plan_options == THEIRS
    with pytest.raises(ConfigError, match=r"option of planner 'theirs' 'quota'; .* careful, criterion, strength"):
        RunConfig(model="m", drop=1, method="theirs", plan_options={"quota": "global"})


def test_another_planner_does_not_get_the_options_that_the_file_gives_its_own(theirs: None, tmp_path: Path) -> None:
    file = str(toml(tmp_path, WHOLE))
    assert given(file, "--method", "theirs").plan_options == {}
    assert given(file, "--method", "theirs", "--option", "plan.strength=1").plan_options == {"strength": 1}
    assert given(file, "--method", "sglp").plan_options == {"criterion": "taylor", "n_segments": 4}


def test_a_broken_planner_is_listed_with_the_reason_and_breaks_nothing(
    theirs: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "-q", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    line = next(line for line in json.loads(out[-1]) if line["name"] == "theirs")
    assert line["source"] == "nobody 2020"
    assert line["options"] == {"criterion": "own", "strength": "0.5", "careful": "False"}
    assert any("criterion=own, strength=0.5, careful=False" in row for row in out)
    assert any("criterion=grad-norm, n_segments=None, profile=row_sum" in row for row in out)
    (tmp_path / "site" / "theirplanner-1.0.dist-info" / "entry_points.txt").write_text(
        "[sglp_deploy.planners]\ntheirs = theirplanner:Gone\n"
    )
    importlib.invalidate_caches()
    assert main(["plugins", "-q", "--json"]) == 0
    line = next(line for line in json.loads(capsys.readouterr().out.splitlines()[-1]) if line["name"] == "theirs")
    assert line["reason"].startswith("broken: ")
    assert "Gone" in line["reason"]


# -------------------------------------------------------------------------------------------------------- flags over it


def given(*arguments: str) -> RunConfig:
    return verbs._config(main_module.build_parser().parse_args(["run", *arguments]))


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = str(toml(tmp_path, WHOLE))
    assert given(file) == RunConfig.load(file)
    option = ("--option", "plan.criterion=grad-norm")
    changed = given(file, "--to", "torch, onnx", "--seed", "1", "-o", "elsewhere", *option)
    assert changed.to == ("torch", "onnx")
    assert (changed.seed, changed.output) == (1, "elsewhere")
    assert changed.plan_options == {"criterion": "grad-norm", "n_segments": 4}
    assert (changed.model, changed.drop, changed.text) == ("models/smollm2", 6, "heldout.txt")


@pytest.mark.parametrize(
    ("flags", "budget"),
    [
        (["--keep", "20"], (None, 20, None)),
        (["--drop", "0.2"], (0.2, None, None)),
        (["--max-parameters", "1000"], (None, None, 1000)),
    ],
)
def test_a_budget_flag_replaces_the_file_s_budget_whatever_its_kind(
    flags: list[str], budget: tuple[float | None, ...], tmp_path: Path
) -> None:
    found = given(str(toml(tmp_path, WHOLE)), *flags)
    assert (found.drop, found.keep, found.max_parameters) == budget


def test_a_flag_can_mend_what_is_wrong_in_the_file(tmp_path: Path) -> None:
    file = str(
        toml(tmp_path, "model.path = 'm'\nplan.drop = 1\nplan.options.criterion = 'nonsense'\nplan.rows = 'cooked'")
    )
    mended = given(file, "--option", "plan.criterion=taylor", "--rows", "raw")
    assert (mended.plan_options, mended.rows) == ({"criterion": "taylor"}, "raw")


TWO_EXPORTS = """
model.path = 'm'
plan.drop = 1
[export]
to = ["onnx", "small", "tensorrt"]
[export.options.small]
format = "onnx"
precision = "int8"
block_size = 64
[export.options.tensorrt]
target = "sm_86"
"""


def test_each_export_has_its_own_options_and_a_flag_wins_over_the_file_s(tmp_path: Path) -> None:
    file = str(toml(tmp_path, TWO_EXPORTS))
    assert RunConfig.load(file).exports() == (
        Export("onnx", "onnx", {}),
        Export("small", "onnx", {"precision": "int8", "block_size": 64}),
        Export("tensorrt", "tensorrt", {"target": "sm_86"}),
    )
    flags = ["--option", "small.block_size=32", "--option", "small.symmetric=false", "--option", "onnx.opset=21"]
    assert given(file, *flags).exports() == (
        Export("onnx", "onnx", {"opset": 21}),
        Export("small", "onnx", {"precision": "int8", "block_size": 32, "symmetric": False}),
        Export("tensorrt", "tensorrt", {"target": "sm_86"}),
    )
    assert given(file, "--to", "tensorrt").exports() == (Export("tensorrt", "tensorrt", {"target": "sm_86"}),)
    assert given("m", "--drop", "1", "--option", "onnx.precision=fp16").options == {"onnx": {"precision": "fp16"}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"to": ("onnx",), "options": {"onxx": {"opset": 21}}}, "'onxx', which is not exported"),
        ({"to": ("onnx", "a/b")}, "'a/b' cannot name an export"),
        ({"to": ("onnx-baseline",)}, "'onnx-baseline' cannot name an export"),
        ({"to": ("all",)}, "'all' cannot name an export"),  # where a benchmark works
        ({"to": ("plan",)}, "'plan' cannot name an export"),  # whose options are the planner's
        ({"to": ("repair",)}, "'repair' cannot name an export"),  # the same
        ({"to": ("torch",), "options": {"torch": {"format": "onnx"}}}, "'torch' takes no options"),
    ],
)
def test_exports_that_cannot_be_named_or_told_apart_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig(model="m", drop=1, **settings)


@pytest.mark.parametrize("wrong", ["options = 3", "options.onnx = 'int8'", "options.onnx.precision = [8]"])
def test_options_of_the_wrong_kind_are_refused(wrong: str, tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, f"model.path = 'm'\nplan.drop = 1\n[export]\n{wrong}")
    assert "[export] options" in fault
    assert "a table [export.options.NAME]" in fault


@pytest.mark.parametrize("wrong", ["options = 3", "options.criterion = ['taylor']", "options.criterion.a = 1"])
def test_options_of_the_planner_of_the_wrong_kind_are_refused(wrong: str, tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, f"model.path = 'm'\n[plan]\ndrop = 1\n{wrong}")
    assert "[plan] options" in fault
    assert "a table [plan.options] of texts, numbers, true or false is read" in fault


@pytest.mark.parametrize("wrong", ["precision=int8", ".precision=int8", "onnx.=int8", "onnx.precision"])
def test_an_option_that_names_no_format_is_a_wrong_command_line(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        given("m", "--drop", "1", "--option", wrong)
    assert ended.value.code == 2
    assert "KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4), ("-4", -4), ("0.25", 0.25), ("1e-3", 0.001), ("true", True), ("False", False),
        ("taylor", "taylor"), ("a=b", "a=b"), ("", ""), ("nan", "nan"), ("inf", "inf"),
        ("1_000", "1_000"), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_a_value_on_the_command_line_is_a_number_true_or_false_or_a_text(text: str, value: Any) -> None:
    (found,) = given("m", "--drop", "1", "--option", f"onnx.key={text}").options["onnx"].values()
    assert (found, type(found)) == (value, type(value))


def test_a_value_of_the_wrong_kind_is_refused_without_a_file_too() -> None:
    with pytest.raises(ConfigError, match="batch_size='four' is of the wrong kind; a whole number is read; change it"):
        RunConfig(model="m", drop=1, batch_size="four")


def test_the_schema_for_editors_is_the_one_in_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    kept = (cli_runs.ROOT / "docs" / "sglp.schema.json").read_text(encoding="utf-8")
    assert capsys.readouterr().out == kept, "write it again: sglp-deploy schema > docs/sglp.schema.json"
    tables = json.loads(kept)["$defs"]
    assert {table: list(found["properties"]) for table, found in tables.items()} == {
        table: list(keys) for table, keys in config_module._TABLES.items()
    }
    assert tables["model"]["properties"]["threads"]["minimum"] == 1
    assert tables["plan"]["properties"]["rows"]["enum"] == ["rms", "raw"]


def test_without_a_file_the_defaults_hold() -> None:
    assert given("m", "--drop", "2") == RunConfig(model="m", drop=2)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "sglp.toml").write_bytes(b"\xef\xbb\xbf" + b'[model]\npath = "m"\n[plan]\ndrop = 1\n')
    assert RunConfig.load(tmp_path / "sglp.toml").model == "m"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_the_text_of_a_pipe_decides_a_stage_and_can_still_be_read(tmp_path: Path) -> None:
    digests = []
    for number, text in enumerate(("one text", "another", "one text")):
        pipe = tmp_path / str(number)
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_text, args=(text,))
        writer.start()
        digests.append(ledger.text_digest(str(pipe)))
        writer.join()
        assert documents_of(pipe) == [text]
    assert digests[0] == digests[2] != digests[1]
