"""Text that the unpruned model writes itself: what it knows and a calibration text may not show.

It is sampled at temperature 1, so it has the model's own distribution, and kept under the user's cache folder.  A model
with a chat template writes conversations as well: it is given what stands before a user's message, and goes on with
the question and then with its answer (Magpie, arXiv:2406.08464).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy.errors import CalibrationError, StorageError
from sglp_deploy.evidence.documents import in_template
from sglp_deploy.evidence.precision import computing, precision_of
from sglp_deploy.evidence.text import CalibrationSet
from sglp_deploy.models.library import evaluating

if TYPE_CHECKING:
    from sglp_deploy.healing.options import HealOptions
    from sglp_deploy.models import LoadedModel

SOURCE: Final = "written by the unpruned model"
_RECIPE = 2  # in the key of what is cached; raise it when what is written changes
_LENGTH = 128  # tokens of a piece
_TOGETHER = 64  # pieces that are written at once
_MARK = "[message]"  # stands for the user's words where a chat template is read

# How texts of many kinds begin.
_OPENINGS = (
    "The", "In", "A", "It", "When", "How to", "What is", "There are", "One of the most", "According to", "During the",
    "After", "He", "She", "I", "We", "You can", "If you", "Many people", "The history of", "In this article,",
    "Scientists have", "Once upon a time", "The company", "On Monday", "The city of", "First,", "To make",
    "Question:", "For example,", "As a result,", "The main idea", "Although", "Children", "Water", "Most",
    "The first", "My", "They", "An important", "Let's", "Today", "Because", "The book", "New", "Some", "This is",
    "Why do",
)  # fmt: skip


def written_text(
    loaded: LoadedModel, options: HealOptions, progress: Callable[[str, int, int], None] | None = None
) -> CalibrationSet:
    """Token ids the model wrote, from the cache where they are there.

    Raises:
        CalibrationError: If no text is asked for.
    """
    if options.written < _LENGTH:
        raise CalibrationError(
            f"written={options.written} tokens are less than one piece of {_LENGTH}; the mix asks for text the model "
            "writes itself; give more, or name other texts"
        )
    pieces = -(-options.written // _LENGTH)
    precision = precision_of(options.precision, loaded.module)
    facts = [_RECIPE, loaded.source.fingerprint, pieces, options.seed, str(precision), torch.__version__]
    file = cache_folder() / f"{_io.sha256_json(facts)[:32]}.npy"
    rows = _read(file, pieces)
    if rows is None:
        rows = write(loaded, pieces, seed=options.seed, precision=precision, progress=progress)
        with contextlib.suppress(StorageError), _io.staged_file(file) as staged, staged.open("wb") as opened:
            np.save(opened, rows, allow_pickle=False)
    return CalibrationSet(tuple(rows), SOURCE)


def cache_folder() -> Path:
    """Where written text is kept."""
    return _io.cache_folder() / "written"


def _read(file: Path, pieces: int) -> NDArray[np.int64] | None:
    try:
        rows = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # not there, or cut off
        return None
    whole = rows.shape == (pieces, _LENGTH) and rows.dtype == np.int64
    return rows if whole else None


def write(
    loaded: LoadedModel,
    pieces: int,
    *,
    seed: int,
    precision: torch.dtype,
    progress: Callable[[str, int, int], None] | None = None,
) -> NDArray[np.int64]:
    """Sample ``pieces`` of 128 tokens each, shape (pieces, 128); the same for the same seed on the same machine."""
    model: Any = loaded.module
    device = next(model.parameters()).device
    openings, chat = _opening_tokens(loaded), _chat_opening(loaded)
    # A length is drawn as often as it has openings, or the few long ones would begin half of all pieces.
    lengths = np.repeat(np.arange(len(openings)), [len(each) for each in openings])
    draws = np.random.default_rng([seed, _RECIPE])
    made: list[NDArray[np.int64]] = []
    generator = torch.Generator(device="cpu").manual_seed(seed)
    with torch.inference_mode(), evaluating(model), computing(device, precision):
        for start in range(0, pieces, _TOGETHER):
            count = min(_TOGETHER, pieces - start)
            if chat is not None and start // _TOGETHER % 2:
                chosen = np.repeat(chat[None], count, 0)
            else:
                # Openings of one length go together, so nothing is padded.
                chosen = openings[int(draws.choice(lengths))]
                chosen = chosen[draws.integers(len(chosen), size=count)]
            made.append(_continued(model, torch.from_numpy(chosen).to(device), generator))
            if progress is not None:
                progress("text of the unpruned model", start + count, pieces)
    return np.concatenate(made)


def _continued(model: Any, tokens: torch.Tensor, generator: torch.Generator) -> NDArray[np.int64]:
    given, past = tokens, None
    while tokens.shape[1] < _LENGTH:
        out = model(input_ids=given, past_key_values=past, use_cache=True)
        past = out.past_key_values
        # One number a row, looked up in the sums of its chances: torch.multinomial draws one for each token there is.
        sums = out.logits[:, -1].double().softmax(-1).cumsum(-1)
        drawn = torch.rand(len(tokens), 1, generator=generator, dtype=torch.float64).to(tokens.device) * sums[:, -1:]
        given = torch.searchsorted(sums, drawn).clamp(max=sums.shape[-1] - 1)
        tokens = torch.cat([tokens, given], 1)
    return tokens.cpu().numpy().astype(np.int64)


def _opening_tokens(loaded: LoadedModel) -> list[NDArray[np.int64]]:
    """Openings by their length in tokens; single tokens of the vocabulary for a model without a tokenizer."""
    if loaded.tokenizer is None:
        model: Any = loaded.module
        vocabulary = model.get_input_embeddings().num_embeddings
        return [np.arange(vocabulary, dtype=np.int64)[:, None]]
    by_length: dict[int, list[list[int]]] = {}
    for words in _OPENINGS:
        ids = list(loaded.tokenizer(words, verbose=False)["input_ids"])
        by_length.setdefault(len(ids), []).append(ids)
    return [np.array(by_length[length], dtype=np.int64) for length in sorted(by_length) if length < _LENGTH]


def _chat_opening(loaded: LoadedModel) -> NDArray[np.int64] | None:
    """What a conversation has before the user's first word; None without a chat template that says so."""
    tokenizer: Any = loaded.tokenizer
    text = in_template([{"role": "user", "content": _MARK}], tokenizer)
    if text is None:
        return None
    before, found, _ = text.partition(_MARK)
    ids = np.array(tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    return ids if found and 0 < len(ids) <= _LENGTH // 2 else None
