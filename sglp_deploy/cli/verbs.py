"""What each verb does: a few lines over the public functions, and the words that go to the user."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_deploy.cli.config import RunConfig
from sglp_deploy.cli.console import Console, table
from sglp_deploy.cli.exits import Exit
from sglp_deploy.cli.settings import BUDGET
from sglp_deploy.errors import ArtifactError, ConfigError, StorageError

if TYPE_CHECKING:
    from sglp_deploy.artifact import ExportArtifact
    from sglp_deploy.parity.certificate import ParityReport


def run_plan(arguments: argparse.Namespace, console: Console) -> int:
    """``plan``: measure the layers and write plan.json."""
    from sglp_deploy.cli import session

    session.check_output_file(arguments.output)
    session.check_overlay_place(arguments.output)
    if arguments.drop_layers is not None:
        plan = session.plain_compressor(arguments, console).plan_by_hand(arguments.drop_layers)
    else:
        config = _config(arguments)
        compressor = session.compressor(config, console)
        plan = session.make_plan(compressor, config, keep_matrix=not arguments.no_matrix)
    plan.save_overlay(Path(arguments.output).parent)  # first: a plan whose weights are missing is of no use
    plan.save(arguments.output)
    from sglp_deploy.cli.show import describe

    console.result(describe(plan.to_json()) + f"\n\nwritten to {arguments.output}", plan.to_json())
    return Exit.DONE


def run_repair(arguments: argparse.Namespace, console: Console) -> int:
    """``repair``: change kept weights so that they make up for the removed layers, where that helps."""
    from sglp_deploy.cli import session
    from sglp_deploy.cli.show import repair_lines
    from sglp_deploy.repairs.registry import read_options

    folder = Path(arguments.output)
    session.check_repaired_place(folder, arguments.plan)
    plan = session.read_plan(arguments.plan, arguments.overlay)
    options = arguments.repair_options or {}
    read_options(arguments.method, options)  # an unknown name is refused before the model is loaded
    session.settle_connection(console, arguments.model, arguments.calibration)
    calibration = session.calibration_set(arguments)
    compressor = session.plain_compressor(arguments, console)
    plan = compressor.repair(plan, arguments.method, calibration=calibration, options=options)
    written = session.save_repaired(plan, folder)
    value = plan.to_json()
    lines = [*repair_lines(value), f"written to {' and '.join(map(str, written))}"]
    console.result("\n".join(lines), value)
    return Exit.DONE


def run_heal(arguments: argparse.Namespace, console: Console) -> int:
    """``heal``: train the kept layers towards the unpruned model, where that helps."""
    from sglp_deploy.cli import session
    from sglp_deploy.cli.show import repair_lines
    from sglp_deploy.healing.launch import own_device, started_together
    from sglp_deploy.healing.options import read_heal_options

    folder, rank = Path(arguments.output), started_together()[0]
    arguments.device = own_device(arguments.device or "cpu")
    console.quiet = console.quiet or rank > 0  # of several processes one speaks and writes
    session.check_repaired_place(folder, arguments.plan)
    plan = session.read_plan(arguments.plan, arguments.overlay)
    given = {key: getattr(arguments, key) for key in ("sequence_length", "batch_size", "seed")}
    given |= {"tokens": arguments.heal_tokens, "minutes": arguments.heal_minutes, **(arguments.heal_options or {})}
    options = read_heal_options({key: value for key, value in given.items() if value is not None})
    session.settle_connection(console, arguments.model, *arguments.heal_text or ())
    corpus = session.heal_corpus(arguments.heal_text or (), plan, console, options.tokens)
    compressor = session.plain_compressor(arguments, console)
    plan = compressor.heal(plan, corpus=corpus, options=options, folder=folder / "healing")
    if rank > 0:
        return Exit.DONE
    written = session.save_repaired(plan, folder)
    value = plan.to_json()
    lines = [*repair_lines(value), f"written to {' and '.join(map(str, written))}"]
    console.result("\n".join(lines), value)
    return Exit.DONE


def run_materialize(arguments: argparse.Namespace, console: Console) -> int:
    """``materialize``: write the shallower checkpoint."""
    from sglp_deploy.cli import session
    from sglp_deploy.models import ModelSource
    from sglp_deploy.models.side_files import left_behind

    session.check_output_folder(arguments.output)
    plan = session.read_plan(arguments.plan, arguments.overlay)
    compressor = session.plain_compressor(arguments, console)
    folder = compressor.save(plan, arguments.output)
    left = left_behind(ModelSource.from_json(compressor.source), compressor.model, plan.n_layers)
    lines = [f"{len(plan.keep)} of {plan.n_layers} layers written to {folder}; loaded back bit for bit"]
    lines += [f"{name} stays behind; it {why}" for name, why in left.items()]
    facts = {"path": str(folder), "n_layers": len(plan.keep), "plan_digest": plan.digest(), "left_behind": dict(left)}
    console.result("\n".join(lines), facts)
    return Exit.DONE


def run_export(arguments: argparse.Namespace, console: Console) -> int:
    """``export``: write an artifact folder."""
    from sglp_deploy import registry
    from sglp_deploy.cli import session
    from sglp_deploy.cli.show import describe

    session.check_output_folder(arguments.output)
    plan = session.read_plan(arguments.plan, arguments.overlay) if arguments.plan else None
    registry.exporter(arguments.to)  # an unknown name is refused before the model is loaded
    compressor = session.plain_compressor(arguments, console)
    options = dict(arguments.option or ())
    artifact = compressor.export(plan or compressor.keep_all(), arguments.to, arguments.output, **options)
    console.result(describe(artifact.to_json()) + f"\n\nwritten to {artifact.path}", artifact.to_json())
    return Exit.DONE


def run_verify(arguments: argparse.Namespace, console: Console) -> int:
    """``verify``: compare an artifact with its reference; exit 3 when they differ."""
    from sglp_deploy.artifact import ExportArtifact
    from sglp_deploy.cli import session
    from sglp_deploy.cli.show import describe

    session.check_output_file(arguments.output)
    artifact = ExportArtifact.load(arguments.artifact)
    session.use_recorded_model(arguments, artifact)
    text = session.own_text(arguments.text, max_tokens=8_192)
    report = session.plain_compressor(arguments, console).verify(
        artifact, overlay=arguments.overlay, text=text, threads=arguments.threads
    )
    if arguments.output:
        report.save(arguments.output)
    _keep_certificate(report, artifact, console, written=arguments.output)
    console.result(describe(report.to_json()), report.to_json())
    return Exit.DONE if report.passed else Exit.PARITY


def _keep_certificate(report: ParityReport, artifact: ExportArtifact, console: Console, *, written: str | None) -> None:
    """Leave the certificate in the artifact's folder, where ``bench`` looks for it."""
    from sglp_bench.judge.certificates import CERTIFICATE

    try:
        report.save(artifact.path / CERTIFICATE)
    except StorageError as error:
        advice = f"give bench --certificate {written}" if written else "verify again with -o FILE"
        console.warn(f"the certificate is not kept with the artifact; {error}; to benchmark it, {advice}")


def run_bench(arguments: argparse.Namespace, console: Console) -> int:
    """``bench``: time an artifact, paired against another one when it is given; certified ones only."""
    from sglp_bench.measure.harness import benchmark_pair, run_arms
    from sglp_bench.workloads.generate import Workload
    from sglp_deploy.artifact import ExportArtifact
    from sglp_deploy.cli import session
    from sglp_deploy.cli.show import describe
    from sglp_deploy.parity.certificate import ParityReport

    session.check_output_file(Path(arguments.output) / "result.json")
    workload = Workload.named(arguments.workload, device=arguments.device, threads=arguments.threads)
    candidate = ExportArtifact.load(arguments.artifact)
    certificates = [ParityReport.load(file) for file in arguments.certificate or ()]

    def progress(done: int, total: int, text: str) -> None:
        del text
        console.progress("bench", done, total)

    options: dict[str, Any] = {
        "out_dir": arguments.output,
        "progress": progress,
        "certificates": certificates,
        "unverified": arguments.unverified,
    }
    if arguments.against is None:
        result = run_arms({"artifact": candidate}, workload, control=False, **options)
        _say_unverified(console, {label: arm.artifact for label, arm in result.arms.items()})
        console.result(describe(result.to_json()), result.to_json())
        return Exit.DONE
    comparison = benchmark_pair(
        ExportArtifact.load(arguments.against),
        candidate,
        workload,
        control=not arguments.no_control,
        **options,
    )
    _say_unverified(console, {label: arm["artifact"] for label, arm in comparison.arms.items()})
    console.result(describe(comparison.to_json()), comparison.to_json())
    return Exit.DONE


def _say_unverified(console: Console, arms: Mapping[str, Mapping[str, Any]]) -> None:
    from sglp_bench.judge.certificates import unverified_note

    for label, artifact in arms.items():
        if note := unverified_note(label, artifact):
            console.alarm(f"{note}; these are times of something that may not be the model")


def run_evaluate(arguments: argparse.Namespace, console: Console) -> int:
    """``evaluate``: perplexity of a model on text and what it gets in tasks; with a plan, the pruned one beside it."""
    from sglp_deploy import _io
    from sglp_deploy.cli import session
    from sglp_deploy.cli.show import describe
    from sglp_deploy.tasks.asked import read_tasks

    session.check_output_file(arguments.output)
    plan = session.read_plan(arguments.plan, arguments.overlay) if arguments.plan else None
    tasks = read_tasks(arguments.tasks, limit=arguments.tasks_limit)
    session.settle_connection(console, arguments.model, arguments.text, tasks=arguments.tasks)
    text = session.held_out_set(arguments.text, max_tokens=arguments.tokens, sequence_length=arguments.chunk)
    compressor = session.plain_compressor(arguments, console)
    if plan is not None:
        value = compressor.evaluate(plan, text, tasks=tasks, sample_tokens=arguments.sample_tokens)
    else:
        value = session.perplexity_alone(compressor, text, console)
        if tasks:
            value["tasks"] = compressor.evaluate_tasks(tasks)
    if arguments.output:
        _io.write_json(Path(arguments.output), value)
    console.result(describe(value), value)
    return Exit.DONE


def run_report(arguments: argparse.Namespace, console: Console) -> int:
    """``report``: render what a run folder holds."""
    from sglp_bench.report.run_report import RunReport

    folder = Path(arguments.folder)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("run.json", "plan.json")):
        raise ArtifactError(f"{folder} holds neither run.json nor plan.json; it is no run folder; check the path")
    report = RunReport.from_run_folder(folder)
    page = report.save(arguments.output or folder / "report")
    console.result(f"report written to {page}", {"path": str(page)})
    return Exit.DONE


def run_run(arguments: argparse.Namespace, console: Console) -> int:
    """``run``: every stage, skipping those whose inputs have not changed."""
    from sglp_deploy.cli.pipeline import Pipeline
    from sglp_deploy.healing.launch import started_together

    if (size := started_together()[1]) > 1:
        raise ConfigError(
            f"run was started as {size} processes; they would write into one folder; start heal with torchrun, and run "
            "without it"
        )
    config = _config(arguments)
    outcome = Pipeline(config, console, arguments.command).run()
    console.result(outcome.text, outcome.value)
    return outcome.exit_code


def run_show(arguments: argparse.Namespace, console: Console) -> int:
    """``show``: any of our files as a table."""
    from sglp_deploy.cli.show import describe, read

    value = read(Path(arguments.file))
    console.result(describe(value), value)
    return Exit.DONE


def run_plugins(arguments: argparse.Namespace, console: Console) -> int:
    """``plugins``: every exporter and planner, usable or not."""
    del arguments
    from sglp_deploy import registry
    from sglp_deploy.planners.registry import planner_names

    lines: list[dict[str, Any]] = [
        {"kind": "exporter", "name": line.name, "version": line.version, "origin": line.origin, "reason": line.reason}
        for line in registry.plugins()
    ]
    planners = [_planner_line(name) for name in planner_names()]
    lines += planners
    rows = [
        (
            line["kind"],
            line["name"],
            line["version"],
            "no" if line["reason"] else "yes",
            line["reason"] or line["origin"],
        )
        for line in lines
    ]
    text = table(rows, ("kind", "name", "version", "usable", "from, or why not"))
    for name in registry.shadowed():
        text += f"\nleft out: {name} takes the name of a built-in exporter"
    described = [
        (line["name"], line["source"], ", ".join(f"{key}={value}" for key, value in line["options"].items()) or "none")
        for line in planners
        if not line["reason"]
    ]
    text += "\n\n" + table(described, ("planner", "source", "options and their defaults"))
    console.result(text, lines)
    return Exit.DONE


def _planner_line(name: str) -> dict[str, Any]:
    from sglp_deploy.cli.ledger import provider
    from sglp_deploy.planners.registry import PLANNER_GROUP, planner

    line: dict[str, Any] = {
        "kind": "planner",
        "name": name,
        "version": "",
        "origin": provider(PLANNER_GROUP, name),
        "reason": None,
        "source": "",
        "options": {},
    }
    try:
        found = planner(name)
        made = found.Options()
    except Exception as error:  # noqa: BLE001  # a plugin may fail in any way; it is reported, not hidden
        return line | {"reason": f"broken: {error}"}
    # As a user would write them: a default that JSON does not know is a text too.
    options = {item.name: str(getattr(made, item.name)) for item in fields(found.Options)}
    return line | {"source": found.source, "options": options}


def run_env(arguments: argparse.Namespace, console: Console) -> int:
    """``env``: the isolated environments."""
    from sglp_deploy.isolation import environments

    if arguments.action == "list":
        lines = [
            {"name": name, "state": environments.state(name), "size": spec.size, "why": spec.why}
            for name, spec in environments.ENVIRONMENTS.items()
        ]
        rows = [(line["name"], line["state"], line["size"], line["why"]) for line in lines]
        console.result(table(rows, ("environment", "state", "size", "because")), lines)
    elif arguments.action == "create":
        python = environments.create(arguments.name, say=console.note, force=arguments.force)
        console.result(f"{arguments.name} is ready; its interpreter is {python}", {"python": str(python)})
    else:
        gone = [str(folder) for folder in environments.remove(arguments.name)]
        console.result(f"removed {', '.join(gone) or 'nothing; it was not there'}", {"removed": gone})
    return Exit.DONE


def run_doctor(arguments: argparse.Namespace, console: Console) -> int:
    """``doctor``: what works here and what does not."""
    del arguments
    from sglp_deploy.cli.doctor import examine

    findings = examine()
    text = table([(item["state"], item["what"], item["detail"]) for item in findings], ("state", "what", "detail"))
    console.result(text, findings)
    return Exit.DONE


def run_schema(arguments: argparse.Namespace, console: Console) -> int:
    """``schema``: what an editor checks a sglp.toml by."""
    del arguments
    from sglp_deploy.cli.config import schema

    console.result(json.dumps(schema(), indent=2), schema())
    return Exit.DONE


def _config(arguments: argparse.Namespace) -> RunConfig:
    """Flags that were given, over ``sglp.toml`` when the model argument is one, over the defaults."""
    known = {item.name for item in fields(RunConfig)}
    given: dict[str, Any] = {key: value for key, value in vars(arguments).items() if key in known and value is not None}
    if "heal_text" in given:  # a flag that may be repeated makes a list
        given["heal_text"] = tuple(given["heal_text"])
    if str(arguments.model).endswith(".toml"):
        del given["model"]
        # A budget flag replaces the file's budget, whatever kind that is.
        if any(key in given for key in BUDGET):
            given = {**dict.fromkeys(BUDGET), **given}
        return RunConfig.load(arguments.model, **given)
    return RunConfig(**given)
