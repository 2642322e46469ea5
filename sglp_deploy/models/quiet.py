"""Keep other libraries off our output: their notes are for people who call them, and stdout is ours alone."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back progress bars, warnings, log lines below ERROR and whatever is printed; restore all of it after.

    What is held back is advice on how the library was called, never the reason of a failure: those are exceptions.
    ``torch.onnx`` prints its progress to standard output, where a caller of ours may expect a JSON document.
    """
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    transformers_logging.disable_progress_bar()
    # For all loggers at once: transformers names some of its loggers by file path, outside its own tree.
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()
