"""What makes a run resumable: a stage is kept while its key and its outputs hold.

A stage's key is the digest of everything that decides its result: the settings it reads, what the stages before it
produced, and the versions of the packages that compute it.  Its outputs are checked too.  A file that was damaged or
deleted makes its stage run again.  The stages after it follow only if it then comes out different.  No stage is known
here by its name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglp_deploy import _io
from sglp_deploy.cli import ledger
from sglp_deploy.errors import SGLPError


@dataclass
class Engine:
    """The stages of one run in one folder.

    Attributes:
        root: The run folder.
        versions: Of the packages that every stage's result depends on.
        describe: What ``run.json`` says beside the stages, asked each time it is written.
        prepare: Called before a stage that has to run; cheap when called again.
        note: Says one line to the user.
        counted_as: Outputs that count by something else than their bytes, with the function that gives it.
        stages: By name; those of the earlier run until this run has come to them.
        order: Names of the stages this run has come to.
    """

    root: Path
    versions: Mapping[str, str]
    describe: Callable[[], Mapping[str, Any]]
    prepare: Callable[[], None]
    note: Callable[[str], None]
    counted_as: Mapping[str, Callable[[Path], str]] = field(default_factory=dict)
    stages: dict[str, ledger.Stage] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder as the only run in it, with the stages of the run before.

        Raises:
            ConfigError: If it is a file, holds somebody's files, or another run holds it.
            StorageError: If it cannot be written.
        """
        with ledger.run_folder(self.root):
            if aside := ledger.set_aside_unreadable(self.root):
                self.note(f"{ledger.RUN_FILE} cannot be read; kept as {aside}, and every stage runs again")
            self.stages = ledger.read_stages(self.root)
            yield

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        upstream: Sequence[str],
        outputs: Sequence[str],
        work: Callable[[], Sequence[str] | None],
    ) -> str:
        """Run ``work`` unless it was done with the same inputs and its outputs are intact.

        Args:
            name: Of the stage, and its entry in ``run.json``.
            settings: What it reads, as JSON.
            upstream: Products of the stages it depends on.
            outputs: What it writes, by path in the run folder.
            work: Writes them, and returns what it wrote beside them, which only it can know.

        Returns:
            The product: equal for equal results.

        Raises:
            SGLPError: What ``work`` raises; the stage then has failed, and ``run.json`` says why.
        """
        key = _io.sha256_json([name, dict(settings), list(upstream), dict(self.versions)])
        self.order.append(name)
        before = self.stages.get(name)
        kept = before is not None and before.key == key and before.state == "done"
        if before is not None and kept and before.intact(self.root, {*outputs, *before.outputs}):
            before.note = "kept"
            self.note(f"{name}: kept, its inputs have not changed")
            return before.product
        self.prepare()
        self.note(f"{name} ...")
        started = time.perf_counter()
        self.stages[name] = ledger.Stage(key, "running")
        self.save()
        try:
            more = work() or ()
            elapsed = time.perf_counter() - started
            digests = {output: ledger.output_digest(self.root / output) for output in (*outputs, *more)}
            product = self._product(digests)
        except Exception as error:
            words = str(error) if isinstance(error, SGLPError) else f"{type(error).__name__}: {error}"
            self.stages[name] = ledger.Stage(key, "failed", time.perf_counter() - started, note=words)
            self.save()
            raise
        self.stages[name] = ledger.Stage(key, "done", elapsed, digests, product)
        self.save()
        self.note(f"{name}: done in {elapsed:.1f} s")
        return product

    def answer(self, name: str, settings: Mapping[str, Any], ask: Callable[[], str | None]) -> str | None:
        """What ``ask`` says of a finished stage's outputs; asked again only when these or ``settings`` have changed.

        For a question that is cheap to keep and dear to ask, because asking loads a runtime.
        """
        stage = self.stages[name]
        key = _io.sha256_json([stage.key, stage.product, dict(settings)])
        if stage.answer.get("key") != key:
            stage.answer = {"key": key, "text": ask()}
            self.save()
        return stage.answer.get("text")

    def done(self, name: str) -> bool:
        """Whether that stage has come to its end, in this run or the one before."""
        stage = self.stages.get(name)
        return stage is not None and stage.state == "done"

    def outputs(self) -> list[str]:
        """What the stages that this run has come to have written, by path in the run folder."""
        return [output for name in self.order if name in self.stages for output in self.stages[name].outputs]

    def forget_others(self, *later: str) -> None:
        """Drop the stages of earlier runs that this one has not come to, except those that come ``later``."""
        self.stages = {name: stage for name, stage in self.stages.items() if name in (*self.order, *later)}

    def save(self) -> None:
        """Write ``run.json``."""
        # Stages that this run has not come to yet stay, or a run interrupted here would forget them.
        later = [name for name in self.stages if name not in self.order]
        names: Iterable[str] = (name for name in [*self.order, *later] if name in self.stages)
        stages = {name: self.stages[name].to_json() for name in names}
        _io.write_json(self.root / ledger.RUN_FILE, {"schema": ledger.SCHEMA, **self.describe(), "stages": stages})

    def _product(self, digests: Mapping[str, str]) -> str:
        """What later stages depend on."""
        facts = dict(digests)
        for output, count in self.counted_as.items():
            if output in facts:
                facts[output] = count(self.root / output)
        return _io.sha256_json(facts)
