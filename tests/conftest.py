"""Fixtures every test may use; the factories themselves are in ``tiny.py``."""

from __future__ import annotations

import logging
import os
import signal

import pytest
import torch

# An environment on the machine that runs the tests must not change what they run.
os.environ["SGLP_DEPLOY_HOME"] = os.path.join(os.path.dirname(__file__), "no-environments-here")
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may need a connection


# pytest attaches its log capture to every logger that does not propagate; on this one it makes torch record each step
# of a trace, which then takes half as long again.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models are slower on many threads than on one, and parallel test runs fight over the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _signals_are_not_ignored() -> None:
    """A shell starts background jobs with SIGINT ignored and nohup ignores SIGHUP; tests send both to processes."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
