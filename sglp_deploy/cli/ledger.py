"""What a run folder remembers: one writer at a time, each finished stage with its inputs and outputs, no leftovers.

It is kept apart from the stages themselves.  So what makes a run resumable can be read in one place.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from sglp_deploy import _io, registry
from sglp_deploy.artifact import MANIFEST, ExportArtifact
from sglp_deploy.errors import ArtifactError, ConfigError
from sglp_deploy.evidence.documents import read_text
from sglp_deploy.isolation import lock
from sglp_deploy.overlay import OVERLAY_FILE
from sglp_deploy.planners.registry import PLANNER_GROUP, PLANNERS
from sglp_deploy.tasks import asked

RUN_FILE = "run.json"
UNREADABLE = f"{RUN_FILE}.unreadable"  # a damaged one, set aside
SCHEMA = "run/2"  # history: 1 = first; 2 = a stage keeps the answer to a question about its outputs

DECISION = "decision"
DECIDED = f"{DECISION}/plan.json"  # the plan as it was before its repair, or before healing where there is none
REPAIRED = "repaired/plan.json"  # the plan as it was before healing
HEALING = "healing"  # where a training stands, while it lasts
ASIDE = "aside"  # artifacts somebody has changed; nothing reads them
_BEFORE = (DECIDED, REPAIRED)

# Every name a run writes at the top of its folder; anything else there belongs to somebody.
_LAYOUT = {RUN_FILE, "plan.json", OVERLAY_FILE, "quality.json", DECISION}
_LAYOUT |= {"repaired", ASIDE, HEALING, "checkpoint", "artifacts", "parity", "bench", "report"}

# Where a killed run can have left a temporary name, and nowhere else: the folder may hold a user's own files too.
_LEFTOVERS = (
    ".run.json.*.tmp",
    ".plan.json.*.tmp",
    f".{OVERLAY_FILE}.*.tmp",
    f"{DECISION}/.*.tmp",
    "repaired/.*.tmp",
    f"{HEALING}/.*.tmp",
    ".quality.json.*.tmp",
    ".checkpoint.*.partial",
    ".checkpoint.*.old",
    "artifacts/.*.partial",
    "artifacts/.*.old",
    "parity/.*.tmp",
    "bench/*/.*.tmp",
    "bench/all/blocks/.*.tmp",
    "report/.*.tmp",
)


@dataclass
class Stage:
    """What ``run.json`` remembers of one stage.

    Attributes:
        key: Digest of everything that decides the stage's result.
        state: "running", "done" or "failed" (then ``note`` says why).
        elapsed_s: Wall time when it last ran.
        outputs: Path in the run folder to the digest it had when the stage ended.
        product: What the next stages depend on: equal for equal results, whatever the wall times in the files.
        note: "kept" when the last run did not need to run it.
        answer: What was found out about the outputs (``text``), and the digest of what decided it (``key``).
    """

    key: str
    state: str
    elapsed_s: float = 0.0
    outputs: dict[str, str] = field(default_factory=dict)
    product: str = ""
    note: str = ""
    answer: dict[str, str | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    def is_whole(self) -> bool:
        """Whether what is read field by field has the type that was written; a damaged file's stage may not."""
        return isinstance(self.outputs, dict) and isinstance(self.answer, dict)

    def intact(self, root: Path, outputs: Iterable[str]) -> bool:
        """Whether every output still has the digest it had when the stage ended."""
        try:
            return all(self.outputs[output] == output_digest(root / output) for output in outputs)
        except (ArtifactError, OSError, KeyError):
            return False


def set_aside_unreadable(root: Path) -> str | None:
    """Move a ``run.json`` that cannot be read out of the way of the new one; the name it has now, or None."""
    file = root / RUN_FILE
    if not file.is_file():
        return None
    try:
        _io.read_json(file, "run", (1, 2))
    except ArtifactError:
        aside, number = root / UNREADABLE, 1
        while aside.exists():
            number += 1
            aside = root / f"{UNREADABLE}-{number}"
        file.replace(aside)
        return aside.name
    return None


def read_stages(root: Path) -> dict[str, Stage]:
    """The stages of an earlier run; none when its file is missing, damaged or of another version.

    Nothing in a file that cannot be trusted is believed: every stage then runs again.
    """
    try:
        value = _io.read_json(root / RUN_FILE, "run", (1, 2))
        stages = {name: Stage(**stage) for name, stage in value["stages"].items()}
    except (ArtifactError, KeyError, TypeError, AttributeError):
        return {}
    return {name: stage for name, stage in stages.items() if stage.is_whole()}


def output_digest(path: Path) -> str:
    """Of a file its bytes; of an artifact folder its manifest, after every file was checked against it.

    Raises:
        ArtifactError: If an artifact is incomplete or altered.
        OSError: If the file is missing.
    """
    return ExportArtifact.load(path).digest if path.is_dir() else _io.sha256_file(path)


def model_digest(model: str) -> str:
    """Digest of a model's files, or of its hub identifier (whose content is then trusted not to change)."""
    path = Path(model)
    if path.is_file():
        return _io.sha256_file(path)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
        return _io.sha256_json([[file.name, _io.sha256_file(file)] for file in files])
    return _io.sha256_json(["hub", model])


def text_digest(given: str | None) -> str:
    """Of a text file its bytes, so its content decides and not its name; otherwise the name itself."""
    path = Path(given or "builtin")
    if path.is_file():
        return _io.sha256_file(path)
    if path.is_fifo():
        return _io.sha256_json(read_text(path, "text"))
    return given or "builtin"


def counted(name: str, value: Any) -> Any:
    """The setting ``name`` as it decides a stage: of files their content."""
    if name in ("calibration", "text"):
        return text_digest(value)
    if name == "heal_text":
        return [text_digest(text) for text in value]
    if name == "tasks":
        found = [asked.split(request) for request in value]
        return [[kind, Path(what).stem, text_digest(what)] for kind, what in found]
    return value


def provider(group: str, name: str) -> str:
    """The distribution and version behind a third party's plugin; "built-in" for ours, whose names nobody takes."""
    if name in {PLANNER_GROUP: PLANNERS, registry.GROUP: registry.BUILTIN}.get(group, {}):
        return "built-in"
    for entry in metadata.entry_points(group=group, name=name):
        if entry.dist is not None:
            return f"{entry.dist.name}=={entry.dist.version}"
    return "built-in"


@contextmanager
def run_folder(root: Path) -> Iterator[None]:
    """Hold ``root`` as the only run in it; made if missing, cleared of what a killed run left.

    Raises:
        ConfigError: If it is a file, holds somebody's files, or another run holds it.
        StorageError: If it cannot be written.
    """
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file; a run needs a folder; choose another --output")
    if root.is_dir() and not any((root / name).is_file() for name in (RUN_FILE, UNREADABLE)):
        others = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
        # Weights without a run are somebody's; what else a run writes is made again from the model.
        if strangers := [name for name in others if name not in _LAYOUT or name == OVERLAY_FILE]:
            raise ConfigError(
                f"{root} holds {strangers[0]} and no {RUN_FILE}; a run would mix its files with others; choose another "
                "--output"
            )
    with _io.storage_errors(root):
        try:
            root.mkdir(parents=True, exist_ok=True)
        except NotADirectoryError as error:
            raise ConfigError(f"{root} lies below a file; a run needs a folder; choose another --output") from error

    def busy() -> None:
        raise ConfigError(
            f"another run is writing to {root}; two would mix their files; wait for it, or choose another --output"
        )

    with ExitStack() as stack:
        with _io.storage_errors(root):
            stack.enter_context(lock.held(root / ".lock", busy=busy))
        _sweep(root)
        yield


def _sweep(root: Path) -> None:
    # Nothing else can own these while we hold the lock.
    for pattern in _LEFTOVERS:
        for left in root.glob(pattern):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def set_aside(root: Path, output: str) -> str | None:
    """Move an artifact that somebody has changed, or put files into, out of the way of the one to be written.

    Returns:
        Where it lies now, within ``root``; None where there is nothing that is not ours.
    """
    folder = root / output
    return move_aside(root, output) if folder.is_dir() and _io.foreign_files(folder) else None


def move_aside(root: Path, output: str) -> str:
    """Move a file or folder of a run below ``aside/``; where it lies now, within ``root``."""
    place = root / ASIDE / output
    number = 1
    while place.exists():
        number += 1
        place = root / ASIDE / f"{output}-{number}"
    with _io.storage_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / output, place)  # the artifacts may lie on another disk
    return place.relative_to(root).as_posix()


def remove_strangers(root: Path, outputs: Iterable[str]) -> list[tuple[str, str | None]]:
    """Remove plans, artifacts, certificates and measurements of earlier runs that are no output of this one.

    They were made by another plan or format, and the report reads whatever of ours lies in the folder.  An artifact
    that somebody has changed is set aside.  What only has such a name, and is not of ours, stays.

    Returns:
        Their paths within ``root``, and where they were moved to; None for those removed.
    """
    wanted = [root / output for output in outputs]
    earlier = [file for plan in _BEFORE for file in (root / plan, (root / plan).with_name(OVERLAY_FILE))]
    found = {file for file in earlier if file.is_file()} | {*root.glob(HEALING), *root.glob(OVERLAY_FILE)}
    found |= {file.parent for file in root.glob("artifacts/*/manifest.json") if _io.has_schema(file, "artifact/")}
    found |= {file for file in root.glob("parity/*.json") if _io.has_schema(file, "parity/")}
    for name in ("result", "comparison"):
        found |= {file for file in root.glob(f"bench/*/{name}.json") if _io.has_schema(file, f"{name}/")}
    found |= {*root.glob("bench/all/blocks")}
    damaged = {
        file.parent if file.name == MANIFEST else file
        for pattern in ("artifacts/*/manifest.json", "parity/*.json", "bench/*/result.json", "bench/*/comparison.json")
        for file in root.glob(pattern)
        if _io.json_of(file) is None
    }
    gone: list[tuple[str, str | None]] = []
    for path in sorted(found | damaged):
        if any(want.is_relative_to(path) for want in wanted):
            continue
        name = path.relative_to(root).as_posix()
        if path in damaged:  # whoever wrote it; the report would stop at it
            moved: str | None = move_aside(root, name)
        else:
            moved = set_aside(root, name) if path.parent == root / "artifacts" else None
        if moved is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        gone.append((name, moved))
    for folder in (*((root / plan).parent for plan in _BEFORE), *root.glob("bench/*")):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return gone
