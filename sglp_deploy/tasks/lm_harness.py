"""Tasks of lm-eval (the extra ``eval``) on the model in memory: its prompts, its metrics, our intervals.

lm-eval brings hundreds of tasks, most of which download their data; one written to a YAML file may name local files.
The harness returns what each item got, so two models are compared item by item here too.
"""

from __future__ import annotations

import copy
import io
import logging
import random
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sglp_deploy import _io
from sglp_deploy.errors import ConfigError, MissingDependencyError
from sglp_deploy.tasks.asked import LM_EVAL, is_task_file
from sglp_deploy.tasks.scores import Scores

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sglp_deploy.tasks.base import Progress

_SEED: Final = 1234  # lm-eval's own, which draws the examples before a question
_QUOTED: Final = "acc_norm"  # the metric that is quoted, where a task has it


@dataclass(frozen=True)
class HarnessTask:
    """One task of lm-eval.

    Attributes:
        name: Its name there, or its file's without the ending.
        source: Its name, or the file.
        limit: How many of its first items; all when None.
    """

    name: str
    source: str
    limit: int | None

    @classmethod
    def read(cls, what: str, limit: int | None = None) -> HarnessTask:
        """A task by its name, or by its YAML file; the harness itself is loaded when it is asked.

        Raises:
            MissingDependencyError: If lm-eval is not installed.
            ConfigError: If there is no such file.
        """
        if is_task_file(what) and not Path(what).is_file():
            raise ConfigError(f"task file {what} cannot be read; No such file or directory; check the path")
        if find_spec("lm_eval") is None:
            raise MissingDependencyError(
                f"lm-eval:{what} needs lm-eval; it is not installed; pip install 'sglp-deploy[eval]', or give "
                "questions as JSON lines, which need nothing"
            )
        return cls(Path(what).stem if is_task_file(what) else what, what, limit)

    def scores(
        self,
        module: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Scores:
        """Every metric of the task that has a number for each item; those of a whole text (perplexity) have none.

        Raises:
            UnsupportedModelError: If it is no decoder language model.
            ConfigError: If the harness has no such task, cannot get its data, or the task has no metric by item.
        """
        from sglp_deploy.models.library import evaluating
        from sglp_deploy.tasks import require
        from sglp_deploy.tasks.language import LanguageTask

        del progress  # the harness has bars of its own
        require(LanguageTask(), module)
        state, drawn = random.getstate(), np.random.get_state()  # the harness seeds both
        try:
            with evaluating(module), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                found = self._asked(module, tokenizer, batch_size)
        except Exception as error:  # lm-eval raises its own, datasets', urllib's and builtin errors
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"lm-eval:{self.source} cannot be asked; {first}; check the name and the connection, or give a task "
                "file that names local data"
            ) from error
        finally:
            random.setstate(state)
            np.random.set_state(drawn)
        return self._scores(found)

    def _asked(self, module: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> dict[str, Any]:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        # A copy, because the harness gives a tokenizer without padding one.
        model = HFLM(pretrained=module, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        loaded = TaskManager(include_defaults=not is_task_file(self.source)).load([self.source])
        if len(loaded["tasks"]) != 1:
            names = ", ".join(sorted(loaded["tasks"])[:8])
            raise ValueError(
                f"it is a group of {len(loaded['tasks'])} tasks ({names}, ...), and one is asked at a time"
            )
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        random.seed(0)
        np.random.seed(_SEED)
        found: dict[str, Any] = evaluate(
            lm=model, task_dict=loaded, limit=self.limit, bootstrap_iters=0, log_samples=True
        )
        return found

    def _scores(self, found: dict[str, Any]) -> Scores:
        (name,) = found["samples"]
        samples = found["samples"][name]
        # A task that reads its answers in several ways has a sample for each; the first way is taken.
        items = sorted((each for each in samples if each["filter"] == samples[0]["filter"]), key=_number)
        metrics = [key for key in items[0]["metrics"] if all(_is_number(item[key]) for item in items)]
        if not metrics:
            raise ConfigError(
                f"lm-eval:{self.source} has no metric that is a number for each item; two models could not be compared "
                "item by item; choose another task"
            )
        metrics.sort(key=lambda key: key != _QUOTED)
        better = found["higher_is_better"].get(name, {})
        configured = found["configs"][name]
        return Scores(
            values={key: np.array([float(item[key]) for item in items]) for key in metrics},
            labels={key: key for key in metrics},
            facts={
                "kind": LM_EVAL,
                "source": self.source,
                "digest": _io.sha256_json([[item["doc_hash"], item["target_hash"]] for item in items]),
                "chance": None,
                "version": f"lm-eval {metadata.version('lm_eval')}, task version {found['versions'].get(name)}",
                "n_shots": configured.get("num_fewshot"),
                "filter": samples[0]["filter"],
            },
            lower_is_better=frozenset(key for key in metrics if better.get(key) is False),
        )


def _number(item: dict[str, Any]) -> int:
    return int(item["doc_id"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and bool(np.isfinite(value))
