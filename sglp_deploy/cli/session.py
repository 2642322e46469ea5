"""From options to a Compressor; shared by the verbs that hold a model.

torch and transformers are imported by the functions that need them.  So a verb can refuse at once what cannot work.
"""

from __future__ import annotations

import argparse
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_deploy import _io
from sglp_deploy._names import may_be_hub_id
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.cli.config import RunConfig
from sglp_deploy.cli.console import Console
from sglp_deploy.cli.settings import DTYPES, MOST_THREADS
from sglp_deploy.errors import CalibrationError, ConfigError, StorageError, UnsupportedModelError
from sglp_deploy.evidence.text import BUILTIN, CalibrationSet
from sglp_deploy.healing.texts.parts import GENERAL, WRITTEN, default_parts
from sglp_deploy.overlay import HEAL, OVERLAY_FILE
from sglp_deploy.plan import PruningPlan
from sglp_deploy.tasks.asked import needs_connection, read_tasks

if TYPE_CHECKING:
    from sglp_deploy.compressor import Compressor

_CONNECT_S = 5.0
_MOST_TOKENS = 1_000_000  # read of a dataset to heal on, where only time bounds it


def calibration_set(given: RunConfig | argparse.Namespace, max_tokens: int | None = None) -> CalibrationSet:
    """The calibration text that a run or flags ask for; ``max_tokens`` of it where another number is meant."""
    return CalibrationSet.parse(
        given.calibration,
        max_tokens=max_tokens or given.calibration_tokens,
        sequence_length=given.sequence_length,
        batch_size=given.batch_size,
        seed=given.seed,
    )


def own_text(given: str | None, **options: Any) -> CalibrationSet | None:
    """The text a user gave to judge by, or None when the built-in held-out prose is meant."""
    # Parsed as calibration text, "builtin" would be the share that plans are made from.
    return None if given in (None, BUILTIN) else CalibrationSet.parse(given, **options)


def held_out_set(given: str | None, **options: Any) -> CalibrationSet:
    """The text to judge by: the user's, or the built-in held-out prose."""
    return own_text(given, **options) or CalibrationSet.builtin_held_out(**options)


def evaluation_set(config: RunConfig) -> CalibrationSet:
    """The held-out text a run judges quality on."""
    return held_out_set(
        config.text, max_tokens=config.evaluation_tokens, sequence_length=config.evaluation_chunk, seed=config.seed
    )


def check_texts(config: RunConfig) -> None:
    """Read what a run will need much later, so that a wrong path is refused at once; datasets are left alone.

    Raises:
        ConfigError: If a file is missing or unreadable, or a task's file is wrong.
        CalibrationError: If it holds no text.
    """
    for given, make in ((config.calibration, calibration_set), (config.text, evaluation_set)):
        if not (given or "").startswith("hf:"):
            make(config)
    _named_texts([text for text in config.heal_text if not text.startswith("hf:")])
    read_tasks(config.tasks, limit=config.tasks_limit)


def judged(
    made: Compressor, config: RunConfig, plan: PruningPlan, repaired: PruningPlan | None = None
) -> dict[str, Any]:
    """Quality as a run asks for it: perplexity, tasks and a sample; ``repaired`` is the plan before healing."""
    tasks = read_tasks(config.tasks, limit=config.tasks_limit)
    text = evaluation_set(config)
    return made.evaluate(plan, text, repaired=repaired, tasks=tasks, sample_tokens=config.sample_tokens)


def compressor(config: RunConfig, console: Console) -> Compressor:
    """A Compressor for planning: the calibration text is read before the model, because it fails faster."""
    _set_threads(config.threads)
    settle_connection(console, config.model, config.calibration, config.text, *config.heal_text, tasks=config.tasks)
    calibration = calibration_set(config)
    return _load(
        console,
        config.model,
        calibration=calibration,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        rows=config.rows,
        skip_positions=config.skip_positions,
    )


def plain_compressor(arguments: argparse.Namespace, console: Console) -> Compressor:
    """A Compressor for the verbs that take a plan that is already made."""
    _set_threads(arguments.threads)
    settle_connection(console, arguments.model, getattr(arguments, "text", None))
    return _load(
        console,
        arguments.model,
        device=arguments.device or "cpu",
        dtype=arguments.dtype or "auto",
        trust_remote_code=bool(arguments.trust_remote_code),
        allow_pickle=bool(arguments.allow_pickle),
        stack=getattr(arguments, "stack", None),
    )


def _load(console: Console, model: str, **options: Any) -> Compressor:
    from sglp_deploy.compressor import Compressor

    console.note(f"loading {model}")
    return Compressor.from_pretrained(model, progress=console.progress, **options)


def perplexity_alone(made: Compressor, text: CalibrationSet, console: Console) -> dict[str, Any]:
    """What ``evaluate`` says of one model."""
    from sglp_deploy.models.samples import table_of_positions
    from sglp_deploy.tasks import task_of

    task = task_of(made.model)
    batches = text.at_most(table_of_positions(made.model)).encode(made.tokenizer)
    found = task.evaluate(made.model, batches, progress=lambda done, total: console.progress("evaluate", done, total))
    return {
        "schema": "perplexity/1",
        "model": made.source,
        "text": text.source,
        "text_digest": batches.digest,
        "chunk_tokens": int(batches.input_ids.shape[1]),
        "n_tokens": int(found.predictions.sum()),
        **found.to_json(),
    }


def make_plan(made: Compressor, config: RunConfig, *, keep_matrix: bool = True) -> PruningPlan:
    """The plan a run asks for."""
    return made.plan(
        drop=config.drop,
        keep=config.keep,
        max_parameters=config.max_parameters,
        method=config.method,
        preserve_pattern=config.preserve_pattern,
        keep_matrix=keep_matrix,
        options=config.plan_options,
    )


def repaired_plan(made: Compressor, config: RunConfig, plan: PruningPlan, console: Console) -> PruningPlan:
    """The plan with the repair a run asks for; as it was, with the reason and a warning, where there is none."""
    # Read anew: of a dataset only as much is at hand as the plan needed.
    calibration = calibration_set(config, config.repair_tokens)
    try:
        found = made.repair(plan, config.repair, calibration=calibration, options=config.repair_options)
    except (CalibrationError, UnsupportedModelError) as error:
        # A run asks for a repair by default: text that is enough for a plan must not stop it there.
        found = replace(plan, compensation={"refused": [{"repair": config.repair, "why": str(error)}]})
    for refused in (found.compensation or {}).get("refused", ()):
        console.warn(f"the plan is not repaired; {refused['repair']} was refused: {refused['why']}; the run goes on")
    return found


def healed_plan(made: Compressor, config: RunConfig, plan: PruningPlan, console: Console, folder: Path) -> PruningPlan:
    """The plan with the healing a run asks for; as it was, with the reason and a warning, where it does not help.

    Raises:
        SGLPError: If it cannot be done.  Other than a repair it is done only where somebody asks for it, so a run does
            not go on without it.
    """
    parts = _named_texts(config.heal_text, config.heal_tokens) if config.heal_text else None
    found = made.heal(plan, corpus=parts, options=config.healing(), folder=folder)
    for refused in (found.compensation or {}).get("refused", ()):
        if refused["repair"] == HEAL:
            console.warn(f"the plan is not healed; {refused['why']}; the run goes on")
    return found


def _named_texts(texts: Sequence[str], tokens: int | None = None) -> list[CalibrationSet | str]:
    """Texts by name; of a dataset as much is read as ``tokens`` need, or a million."""
    most = max(tokens or _MOST_TOKENS, 8)
    return [
        text if text in (BUILTIN, GENERAL, WRITTEN) else CalibrationSet.parse(text, max_tokens=most) for text in texts
    ]


def heal_corpus(
    texts: Sequence[str], plan: PruningPlan, console: Console, tokens: int | None = None
) -> list[CalibrationSet | str] | None:
    """The texts a user names for healing, or those of the default mix; None where that is the Compressor's own.

    Raises:
        ConfigError: If a text is missing or unreadable.
        CalibrationError: If it holds no text.
    """
    if texts:
        return _named_texts(texts, tokens)
    source = str((plan.calibration or {}).get("source") or BUILTIN)
    if source.startswith(BUILTIN):
        return None
    if not Path(source).is_file():
        console.note(f"{source}, which the plan was made from, is not at hand; healing goes without it")
        return None
    return [*default_parts(CalibrationSet.from_text(source))]


def read_plan(file: str, overlay: str | None) -> PruningPlan:
    """The plan in ``file`` with the weights it changes: those in ``overlay``, or beside it when None.

    Raises:
        ArtifactError: If there is no such plan or overlay.
        PlanError: If the plan names an overlay that is not at hand, or none and one is given.
    """
    plan = PruningPlan.load(file)
    if overlay is not None:
        plan = plan.with_weights_from(overlay)
    plan.require_weights()  # before a model is loaded for it
    return plan


def use_recorded_model(arguments: argparse.Namespace, artifact: ExportArtifact) -> None:
    """Fill in the model and the element type an artifact was made from, where the user names none.

    Raises:
        ConfigError: If the model has moved or was never recorded.
    """
    if not arguments.model:
        model = str(artifact.model.get("id") or "")
        if not model:
            raise ConfigError(
                f"{artifact.path} does not say which model it came from; nothing to compare; pass --model"
            )
        # A hub identifier has one slash and no file behind it; anything else must be there.
        if not Path(model).exists() and (model.count("/") != 1 or model.endswith(".gguf")):
            raise ConfigError(
                f"{model} is not there; {artifact.path} was made from it; pass --model with its present place"
            )
        arguments.model = model
    recorded = artifact.details.get("model_precision", artifact.precision)
    if not arguments.dtype and recorded in DTYPES:
        # Loaded in another type, the model would not be the one the artifact was made from.
        arguments.dtype = recorded


def settle_connection(console: Console, model: str, *texts: str | None, tasks: Sequence[str] = ()) -> None:
    """Decide once whether the hub can be reached, before its client retries for half a minute.

    Args:
        console: Told when there is no connection.
        model: A path or a hub identifier.
        texts: Paths, or datasets (``hf:...``).
        tasks: What models are judged by; some have datasets behind them.
    """
    datasets = any((text or "").startswith("hf:") for text in texts) or any(map(needs_connection, tasks))
    remote = datasets or (not Path(model).exists() and may_be_hub_id(model))
    if not remote or os.environ.get("HF_HUB_OFFLINE"):
        return
    from huggingface_hub import constants

    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_CONNECT_S).close()
    except urllib.error.HTTPError:  # it answered
        return
    except (OSError, ValueError) as error:
        console.note(f"{endpoint} cannot be reached ({getattr(error, 'reason', error)}); only cached files are used")
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that are started from here
        constants.HF_HUB_OFFLINE = True  # for this one: the variable was read when the package was imported


def check_output_folder(path: str | Path) -> None:
    """Refuse, before any work, a folder that cannot be written or whose replacement would destroy somebody's files.

    Raises:
        ConfigError: If it is a file, the current folder, or holds files that are not an artifact or checkpoint of ours.
        StorageError: If it cannot be written.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; a folder is written there; choose another --output")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ConfigError(f"{folder} holds the current folder; it would be replaced; choose another --output")
    _io.refuse_foreign(folder)
    _check_writable(folder)


def check_output_file(path: str | Path | None) -> None:
    """Refuse, before any work, a file that cannot be written.

    Raises:
        ConfigError: If it is a folder.
        StorageError: If it cannot be written.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise ConfigError(f"{path} is a folder; a file is written there; add a file name to --output")
    _check_writable(Path(path))


def check_overlay_place(path: str | Path) -> None:
    """Refuse, before any work, to plan where the weights of another plan lie; those of the new one would replace them.

    Raises:
        ConfigError: If there are such weights and ``path`` is not the plan that names them.
    """
    beside = Path(path).absolute().with_name(OVERLAY_FILE)
    if not beside.exists():
        return
    try:
        there = _io.parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = None
    if not (isinstance(there, dict) and there.get("overlay")):
        raise ConfigError(
            f"{beside} holds the weights of another plan; those of a new plan would replace them; write the plan into "
            "another folder"
        )


def check_repaired_place(folder: Path, plan: str) -> None:
    """Refuse, before any work, a folder that cannot take a repaired plan, or where that would destroy something.

    Args:
        folder: For ``plan.json`` and the weights it changes.
        plan: File of the plan that is repaired.

    Raises:
        ConfigError: If it is a file, a run's folder, holds that plan itself, or the weights of another one.
        StorageError: If it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; a folder for plan.json is written there; choose another --output")
    file = folder / "plan.json"
    if file.exists() and file.resolve() == Path(plan).resolve():
        raise ConfigError(f"{file} is the plan that is repaired; it would be replaced; choose another --output")
    if (folder / "run.json").is_file():
        raise ConfigError(f"{folder} is the folder of a run; its plan would be replaced; choose another --output")
    check_output_file(file)
    check_overlay_place(file)


def save_repaired(plan: PruningPlan, folder: Path) -> list[Path]:
    """Write ``plan.json`` and the weights it changes into ``folder``; weights of the plan it replaces go."""
    weights = plan.save_overlay(folder)  # first: a plan whose weights are missing is of no use
    plan.save(folder / "plan.json")
    if weights is None:
        (folder / OVERLAY_FILE).unlink(missing_ok=True)
    return [folder / "plan.json", *([] if weights is None else [weights])]


def _check_writable(path: Path) -> None:
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ConfigError(f"{path} lies below {above}, which is a file; nothing can be written there; change --output")
    if not os.access(above, os.W_OK):
        raise StorageError(f"cannot write {path}; {above} is read-only here; choose another --output")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise ConfigError(
                f"threads={threads} is not between 1 and {MOST_THREADS}; a runtime would end with it; pass --threads "
                "1 or more, or leave it out"
            )
        import torch

        torch.set_num_threads(threads)
