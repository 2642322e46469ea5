"""llama.cpp by its C interface, in the interpreter of its own environment; speaks the protocol of ``worker_loop``.

The package ``xllamacpp`` carries a whole llama.cpp in one library and exports its C functions.  Its Python side gives
probabilities of a server.  The C functions give the logits themselves.
"""

import collections
import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ["SGLP_WORKER_LOOP"])

import numpy as np
from worker_loop import serve

_F32, _F16 = 0, 1  # ggml's numbers for element types
_OFF = 0  # of flash attention
_ROOM = 256  # tokens a sequence may grow by before its cache is made anew; llama.cpp rounds up to this
_PIECE = 512  # tokens handed over at once: what it computes at once by default
_LINES: collections.deque[str] = collections.deque(maxlen=400)


class _ModelSettings(ctypes.Structure):
    # The rest is passed on as llama.cpp made it; longer than its own, which by value is harmless in both directions.
    _fields_ = (("devices", ctypes.c_void_p), ("rest", ctypes.c_uint8 * 504))


class _ContextSettings(ctypes.Structure):
    """``llama_context_params`` up to the last entry that is set here; the rest is passed on as llama.cpp made it."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("recurrent_and_outputs", ctypes.c_uint32 * 3),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("context_type", ctypes.c_int32),
        ("rope_scaling_type", ctypes.c_int32),
        ("pooling_type", ctypes.c_int32),
        ("attention_type", ctypes.c_int32),
        ("flash_attn_type", ctypes.c_int32),
        ("rope_freq_base", ctypes.c_float),
        ("rope_freq_scale", ctypes.c_float),
        ("yarn", ctypes.c_float * 4),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("callback", ctypes.c_void_p * 2),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 400),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


# What an untouched _ContextSettings says in the release this was written for; another order of entries would not.
_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "context_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "type_k": _F16,
    "type_v": _F16,
}
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_POINTER, _POINTER)),
    "llama_version": (ctypes.c_char_p, ()),
    "llama_model_default_params": (_ModelSettings, ()),
    "llama_context_default_params": (_ContextSettings, ()),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, _ModelSettings)),
    "llama_init_from_model": (_POINTER, (_POINTER, _ContextSettings)),
    "llama_free": (None, (_POINTER,)),
    "llama_model_n_layer": (_INT, (_POINTER,)),
    "llama_model_n_ctx_train": (_INT, (_POINTER,)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
    "llama_n_ctx_seq": (ctypes.c_uint32, (_POINTER,)),
    "llama_n_seq_max": (ctypes.c_uint32, (_POINTER,)),
    "llama_n_threads": (_INT, (_POINTER,)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_clear": (None, (_POINTER, ctypes.c_bool)),
    "llama_decode": (_INT, (_POINTER, _Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_POINTER, _INT)),
    "llama_tokenize": (_INT, (_POINTER, ctypes.c_char_p, _INT, _POINTER, _INT, ctypes.c_bool, ctypes.c_bool)),
}
_state: dict[str, Any] = {}


def _log(_level: int, text: bytes, _data: Any) -> None:
    _LINES.append(text.decode("utf-8", "replace"))


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_log)  # must outlive the library's use


def start(file: str, threads: int, exact: bool) -> Mapping[str, Any]:
    """Load a GGUF file.

    Args:
        file: Its path.
        threads: CPU threads.
        exact: Keep the cache in float32 and leave flash attention off; else llama.cpp's own choice (float16).
    """
    library = _library()
    settings = library.llama_context_default_params()
    for name, expected in _DEFAULTS.items():
        if getattr(settings, name) != expected:
            raise RuntimeError(
                f"xllamacpp {metadata.version('xllamacpp')} arranges llama.cpp's settings otherwise than the release "
                f"this was written for ({name} reads {getattr(settings, name)!r}, not {expected!r})"
            )
    loading = library.llama_model_default_params()
    if loading.devices is not None:
        raise RuntimeError("xllamacpp arranges llama.cpp's model settings otherwise than the release this is for")
    # A build for GPUs takes all there are by itself; an empty list, ended by a null, leaves it the CPU.
    nothing = (ctypes.c_void_p * 1)(None)
    loading.devices = ctypes.addressof(nothing)
    model = library.llama_model_load_from_file(file.encode(), loading)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {file}; {_last_words()}")
    vocabulary = library.llama_model_get_vocab(model)
    _state.update(
        library=library,
        model=model,
        vocabulary=vocabulary,
        words=library.llama_vocab_n_tokens(vocabulary),
        threads=threads,
        exact=exact,
        context=None,
        lengths=[],
        rows=[],
    )
    return {
        "llama_cpp": library.llama_version().decode(),
        "xllamacpp": metadata.version("xllamacpp"),
        "layers": library.llama_model_n_layer(model),
        "vocab": _state["words"],
        "trained_context": library.llama_model_n_ctx_train(model),
    }


def prefill(rows: list[list[int]], every_position: bool) -> Mapping[str, Any]:
    """Forget what came before and run ``rows``; logits of every position (rows concatenated), or of each row's last."""
    longest = max(map(len, rows))
    if _state["context"] is None or longest >= _state["room"] or len(rows) != _state["sequences"]:
        _new_context(len(rows), longest)
    library = _state["library"]
    library.llama_memory_clear(library.llama_get_memory(_state["context"]), True)
    _state["rows"] = [list(row) for row in rows]
    return {"logits": _run(rows, [0] * len(rows), every_position)}


def decode(tokens: list[int]) -> Mapping[str, Any]:
    """One more token for each row; logits (rows, vocab)."""
    rows = _state["rows"]
    starts = [len(row) for row in rows]
    for row, token in zip(rows, tokens, strict=True):
        row.append(token)
    if max(starts) + 1 > _state["room"]:
        _new_context(len(rows), max(starts) + 1)
        return {"logits": _run(rows, [0] * len(rows), False)}
    return {"logits": _run([[token] for token in tokens], starts, False)}


def tokenize(text: str) -> Mapping[str, Any]:
    """The tokens of ``text`` without any added ones."""
    raw = text.encode()
    tokens = np.empty(len(raw) + 8, dtype=np.int32)
    count = _state["library"].llama_tokenize(
        _state["vocabulary"], raw, len(raw), tokens.ctypes.data, len(tokens), False, True
    )
    if count < 0:
        raise RuntimeError(f"llama.cpp cannot split a text of {len(raw)} bytes into tokens; {_last_words()}")
    return {"tokens": tokens[:count].tolist()}


def _library() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("xllamacpp, which carries llama.cpp, is not installed in this environment")
    library = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("*.so"))))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(ctypes.cast(_LOG, _POINTER), None)
    library.llama_backend_init()
    return library


def _new_context(sequences: int, longest: int) -> None:
    library = _state["library"]
    if _state["context"] is not None:
        library.llama_free(_state["context"])
        _state["context"] = None
    settings = library.llama_context_default_params()
    room = -(-(longest + _ROOM) // _ROOM) * _ROOM
    settings.n_ctx, settings.n_seq_max = room * sequences, sequences
    settings.n_threads = settings.n_threads_batch = _state["threads"]
    if _state["exact"]:
        settings.flash_attn_type = _OFF
        settings.type_k = settings.type_v = _F32
    _LINES.clear()
    context = library.llama_init_from_model(_state["model"], settings)
    if not context:
        raise RuntimeError(f"llama.cpp has no room for {sequences} sequences of {room} tokens; {_last_words()}")
    took = (library.llama_n_seq_max(context), library.llama_n_ctx_seq(context), library.llama_n_threads(context))
    if took != (sequences, room, _state["threads"]):
        raise RuntimeError(f"llama.cpp took other settings than it was given: {took} for {sequences, room}")
    # It says so in its log only; a cache of the other type would be believed to be this one.
    kinds = [line for line in _LINES if "K (" in line]
    wanted = "K (f32)" if _state["exact"] else "K (f16)"
    if not all(wanted in line for line in kinds):
        raise RuntimeError(f"llama.cpp made another cache than {wanted}: {kinds[0].strip()}")
    _state.update(context=context, room=room, sequences=sequences)


def _run(rows: list[list[int]], starts: list[int], every_position: bool) -> np.ndarray:
    """Logits of the new tokens ``rows``, which follow ``starts`` tokens in each sequence."""
    library, context, words = _state["library"], _state["context"], _state["words"]
    token = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
    if token.size and (token.min() < 0 or token.max() >= words):
        raise ValueError(f"token {int(token.max())} is not among the {words} words of this model")
    place = np.concatenate([np.arange(len(row), dtype=np.int32) + at for row, at in zip(rows, starts, strict=True)])
    row = np.repeat(np.arange(len(rows), dtype=np.int32), [len(each) for each in rows])
    wanted = np.ones(len(token), dtype=np.int8)
    if not every_position:
        wanted[:-1] = row[:-1] != row[1:]
    one = np.ones(len(token), dtype=np.int32)
    rows_at = (row.ctypes.data + 4 * np.arange(len(token))).astype(np.uintp)  # each token's list of one sequence
    found = np.empty((int(wanted.sum()), words), dtype=np.float32)
    done = 0
    for first in range(0, len(token), _PIECE):
        part = slice(first, first + _PIECE)
        batch = _Batch(
            len(token[part]),
            token[part].ctypes.data,
            None,
            place[part].ctypes.data,
            one[part].ctypes.data,
            rows_at[part].ctypes.data,
            wanted[part].ctypes.data,
        )
        status = library.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama.cpp failed with {status} on {batch.n_tokens} tokens; {_last_words()}")
        for index in np.flatnonzero(wanted[part]):
            found[done] = np.ctypeslib.as_array(library.llama_get_logits_ith(context, int(index)), (words,))
            done += 1
    return found


def _last_words() -> str:
    lines = [line.strip() for line in "".join(_LINES).splitlines() if line.strip()]
    print("\n".join(lines[-12:]), flush=True)
    said = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return (said or lines or ["it said nothing"])[0]


if __name__ == "__main__":
    serve({"start": start, "prefill": prefill, "decode": decode, "tokenize": tokenize})
