"""Trace a model for ExecuTorch with torch.export: one sequence at a time, a cache of fixed length inside the program.

What XNNPACK cannot take splits a program into many small ones.  Each of them is copied in and out of.  The trace
therefore says a few things in the words it does take.  A mean, a rotation of halves and a normalisation become products
with constants.  Grouped attention does without repeated keys.  The mathematics are the model's own.  The certificate
says so.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sglp_deploy.errors import BackendError, UnsupportedModelError
from sglp_deploy.models import quiet_libraries
from sglp_deploy.models.samples import main_input, sample_inputs
from sglp_deploy.parity.cache import CacheSizes, key_value_sizes
from sglp_deploy.parity.reference import main_output

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

_ATTENTION = "sglp_one_sequence"
# Functions of transformers' modelling files that turn a vector by exchanging its halves or neighbours.
_ROTATIONS = ("rotate_half", "rotate_every_two")
# The ways to ask for a mean over the last axis that keeps the axis.
_OVER_LAST: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = (
    ((-1,), {"keepdim": True}),
    ((-1, True), {}),
    ((), {"dim": -1, "keepdim": True}),
)


def trace_decoder(module: PreTrainedModel, max_tokens: int) -> tuple[ExportedProgram, tuple[CacheSizes, ...]]:
    """Trace ``module`` with a key-value cache of ``max_tokens`` tokens in buffers of the program.

    Args:
        module: A decoder language model in float32.
        max_tokens: Longest sequence, prompt and what is generated together.

    Returns:
        The program, with inputs ``input_ids`` (1, n), ``cache_position`` (n,) and ``logits_to_keep`` (k,), all int64
        with n and k from 1 to ``max_tokens``, and the output ``logits`` (1, k, vocabulary); and what each caching
        layer keeps of a token.

    Raises:
        UnsupportedModelError: If its layers keep something else than keys and values, or it takes no such inputs.
        BackendError: If torch cannot trace it.
    """
    sizes = key_value_sizes(module)
    if isinstance(sizes, str):
        raise UnsupportedModelError(
            f"{type(module).__name__} has no cache that a program could hold in buffers of fixed size; {sizes}; deploy "
            "the checkpoint instead (--to torch or --to vllm)"
        )
    for name in ("position_ids", "logits_to_keep"):
        if name not in inspect.signature(module.forward).parameters:
            raise UnsupportedModelError(
                f"{type(module).__name__} takes no {name}, which a program for one sequence needs; export it to onnx"
            )
    many = torch.export.Dim.AUTO(min=1, max=max_tokens)
    return _trace(
        module,
        lambda: _Decoder(module, sizes, max_tokens),
        (torch.arange(5)[None], torch.arange(5), torch.tensor([0, -1])),
        ({1: many}, {0: many}, {0: many}),
    ), sizes


def trace_forward(module: nn.Module, max_tokens: int) -> tuple[ExportedProgram, dict[str, torch.Tensor], str]:
    """Trace one forward pass of ``module`` on one row; a row of tokens may have 1 to ``max_tokens``.

    Returns:
        The program, the inputs it was traced with by name and in its order, and the name of its output.

    Raises:
        UnsupportedModelError: If it takes neither an image nor tokens.
        BackendError: If torch cannot trace it.
    """
    name = main_input(module)
    if name not in ("input_ids", "pixel_values", "x"):
        raise UnsupportedModelError(
            f"{type(module).__name__} takes {name}; this exporter takes images and text only; export it to onnx or "
            "openvino"
        )
    inputs = sample_inputs(module, rows=1, tokens=24)
    varying = {1: torch.export.Dim.AUTO(min=1, max=max_tokens)} if name == "input_ids" else {}
    with torch.no_grad(), quiet_libraries():
        output, _ = main_output(module(**inputs))
    program = _trace(
        module,
        lambda: _Forward(module, tuple(inputs)),
        tuple(inputs.values()),
        (tuple(dict(varying) for _ in inputs),),  # one entry, for all that `*values` takes
    )
    return program, inputs, output


class _Decoder(nn.Module):
    """The model with its cache in buffers; writes the new keys and values where ``cache_position`` says."""

    def __init__(self, module: PreTrainedModel, sizes: tuple[CacheSizes, ...], length: int) -> None:
        super().__init__()
        self.module = module
        self.layers = len(sizes)
        for index, size in enumerate(sizes):
            self.register_buffer(f"key_{index}", torch.zeros(1, size.heads, length, size.key_size))
            self.register_buffer(f"value_{index}", torch.zeros(1, size.heads, length, size.value_size))

    def forward(
        self, input_ids: torch.Tensor, cache_position: torch.Tensor, logits_to_keep: torch.Tensor
    ) -> torch.Tensor:
        """Logits (1, k, vocabulary) of the positions ``logits_to_keep`` among the new tokens."""
        from transformers import Cache

        layers = [
            _layer(getattr(self, f"key_{index}"), getattr(self, f"value_{index}"), cache_position)
            for index in range(self.layers)
        ]
        found = self.module(
            input_ids=input_ids,
            position_ids=cache_position[None],
            past_key_values=Cache(layers=layers),
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        return cast("torch.Tensor", found.logits)


class _Forward(nn.Module):
    """One row in, the model's main output out; inputs by their order."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """The main output of the model."""
        options: dict[str, Any] = dict(zip(self.names, values, strict=True))
        if "use_cache" in inspect.signature(self.module.forward).parameters:
            options["use_cache"] = False
        return main_output(self.module(**options))[1]


def _layer(keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> Any:
    """A layer of transformers' static cache over buffers of ours."""
    from transformers.cache_utils import StaticLayer

    class Layer(StaticLayer):  # type: ignore[misc]  # transformers has no types here
        """All layers have full length, sliding ones too: the mask applies the window."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            del args, kwargs
            keys.index_copy_(2, positions, key_states)
            values.index_copy_(2, positions, value_states)
            return keys, values

        def get_seq_length(self, *args: Any) -> torch.Tensor:
            del args
            return positions[0]

    made = Layer(max_cache_len=keys.shape[2])
    made.keys, made.values, made.is_initialized = keys, values, True
    return made


def _trace(
    module: nn.Module,
    wrap: Callable[[], nn.Module],
    inputs: tuple[torch.Tensor, ...],
    varying: tuple[Any, ...],
) -> ExportedProgram:
    if getattr(module, "_supports_sdpa", False):
        try:
            with _attention(cast("PreTrainedModel", module), _ATTENTION):
                return _export(module, wrap(), inputs, varying)
        except _UnknownAttention:
            pass  # the family's own attention does more than the common one; it is traced as it stands
    if not hasattr(module, "set_attn_implementation"):  # not from transformers
        return _export(module, wrap(), inputs, varying)
    with _attention(cast("PreTrainedModel", module), "eager"):
        return _export(module, wrap(), inputs, varying)


def _export(
    module: nn.Module, wrapped: nn.Module, inputs: tuple[torch.Tensor, ...], varying: tuple[Any, ...]
) -> ExportedProgram:
    words = _XnnpackWords(wrapped.eval())
    axes = [tuple(wanted) for wanted in (varying[0] if isinstance(varying[0], tuple) else varying)]
    try:
        with quiet_libraries(), torch.no_grad(), words, words.rotations(module), _experts(module):
            wrapped(*inputs)  # makes the constants, which must exist before the trace
            program = torch.export.export(wrapped, inputs, dynamic_shapes=varying, strict=False)
    except _UnknownAttention:
        raise
    except Exception as error:
        raise _not_traced(error) from error
    _refuse_burnt_sizes(program, axes)
    return program


def _refuse_burnt_sizes(program: ExportedProgram, axes: Sequence[Sequence[int]]) -> None:
    """Tracing fixes a size without a word where the model computes with it in Python."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    names = set(program.graph_signature.user_inputs)
    given = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    for node, wanted in zip(given, axes, strict=True):
        for axis in wanted:
            size = node.meta["val"].shape[axis]
            if is_concrete_int(size):  # a symbol whose one value is known is no int
                raise BackendError(
                    f"tracing burnt the size {size} of axis {axis} of {node.name} into the program; it would compute "
                    "something else, or nothing, at any other size; export the model to onnx or openvino"
                )


class _UnknownAttention(Exception):  # a decision, not a failure
    """The attention function was given something that the common form of attention has no place for."""


class _XnnpackWords(TorchFunctionMode):
    """Says in products with constants what XNNPACK has no operator for; the constants are buffers of ``owner``.

    XNNPACK takes a mean over image axes only, and neither slices nor normalises rows of varying number.  ExecuTorch
    1.5.1 gives it every GELU as the exact one, whatever ``approximate`` says, which is 4e-4 off: that one is spelt out.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func``, or what stands for it."""
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.mean, torch.mean) and (args[1:], kwargs) in _OVER_LAST:
            return self._mean(args[0])
        if func is nn.functional.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is nn.functional.gelu and kwargs.get("approximate") == "tanh":
            return _gelu_by_tanh(args[0])
        return func(*args, **kwargs)

    @contextmanager
    def rotations(self, module: nn.Module) -> Iterator[None]:
        """Replace the rotations of the modelling files ``module`` comes from, which are linear, by their matrices."""
        files = {sys.modules[type(part).__module__] for part in module.modules()}
        found = [(file, name, getattr(file, name)) for file in files for name in _ROTATIONS if hasattr(file, name)]
        for file, name, function in found:
            setattr(file, name, self._as_product(name, function))
        try:
            yield
        finally:
            for file, name, function in found:
                setattr(file, name, function)

    def _as_product(self, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def rotate(x: torch.Tensor) -> torch.Tensor:
            size = x.shape[-1]
            matrix = self._constant(f"{name}_{size}", lambda: function(torch.eye(size)).T.contiguous())
            return nn.functional.linear(x, matrix)

        return rotate

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-1]
        if x.dtype != torch.float32:
            return x.mean(-1, keepdim=True)
        return nn.functional.linear(x, self._constant(f"mean_{size}", lambda: torch.full((1, size), 1 / size)))

    def _layer_norm(
        self, x: torch.Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> torch.Tensor:
        if len(shape) != 1:
            return torch.layer_norm(x, shape, weight, bias, eps)
        centred = x - self._mean(x)
        normal = centred * torch.rsqrt(self._mean(centred * centred) + eps)
        normal = normal if weight is None else normal * weight
        return normal if bias is None else normal + bias

    def _constant(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        name = f"constant_{name}"
        if not hasattr(self._owner, name):
            self._owner.register_buffer(name, make())
        return cast("torch.Tensor", getattr(self._owner, name))


def _gelu_by_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its approximation with tanh (Hendrycks and Gimpel, arXiv:1606.08415)."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))))


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one sequence; heads that share keys are rows of one product, so that no key is repeated.

    Args:
        module: The attention module.
        query: (1, heads, n, size).
        key: (1, shared heads, m, size).
        value: (1, shared heads, m, value size).
        attention_mask: (1, 1, n, m), added; None when everything is seen.
        scaling: Of the products; one over the root of the size when omitted.
        dropout: Ignored; this is inference.
        softcap: Bound that the products are squeezed into.
        others: Anything else a family passes.

    Returns:
        (1, n, heads, value size), and no attention weights.
    """
    del dropout
    strange = [name for name in ("s_aux", "position_bias") if others.get(name) is not None]
    if strange or query.shape[0] != 1 or (attention_mask is None and getattr(module, "is_causal", False)):
        raise _UnknownAttention(", ".join(strange) or "rows of windows, or no mask")
    _, heads, new, size = query.shape
    shared = key.shape[1]
    packed = (query * (size**-0.5 if scaling is None else scaling)).contiguous().view(shared, -1, size)
    scores = torch.bmm(packed, key.squeeze(0).transpose(1, 2))
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(heads, new, -1)
    if attention_mask is not None:
        scores = scores + attention_mask.squeeze(0)
    weights = torch.softmax(scores, -1).view(shared, heads // shared * new, -1)
    mixed = torch.bmm(weights, value.squeeze(0)).view(1, heads, new, value.shape[-1])
    return mixed.transpose(1, 2).contiguous(), None


@contextmanager
def _attention(module: PreTrainedModel, name: str) -> Iterator[None]:
    """Give ``module``, which may be the user's, another attention function for a while."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    before = module.config._attn_implementation
    module.set_attn_implementation(name)
    try:
        yield
    finally:
        module.set_attn_implementation(before)


@contextmanager
def _experts(module: nn.Module) -> Iterator[None]:
    """Run experts as batched products while tracing: ExecuTorch has no grouped one, and a loop cannot be traced."""
    can = getattr(module, "_can_set_experts_implementation", None)
    if can is None or not can():
        yield
        return
    model = cast("PreTrainedModel", module)
    before = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _not_traced(error: Exception) -> BackendError:
    """The failure of a trace in one line, by its first cause: torch wraps what went wrong in general advice."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = (str(cause).strip() or "no message").splitlines()[0]
    return BackendError(
        f"the model cannot be traced for ExecuTorch; {type(cause).__name__}: {reason}; export it to onnx or openvino, "
        "or run again with -v for the whole trace"
    )
