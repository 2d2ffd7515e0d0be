"""Count the multiply-adds (MACs) and parameters of any network, layer by layer."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paperlib.complexity.conventions import Convention, totals
from paperlib.complexity.formulas import check_size
from paperlib.complexity.recorder import Layer, MacRecorder
from paperlib.complexity.values import NumbersOnCpu, list_tensors, without_data
from paperlib.inference import HOOK_NUMBERS, raise_if_hidden, without_compiler
from paperlib.tables import align_columns
from paperlib.validation import check_module

_IMAGE = (1, 3, 224, 224)


@dataclass(frozen=True)
class Profile:
    """The cost of one forward pass.

    Attributes:
        model: class name of the network.
        input_shapes: one shape per input.
        layers: one row per counted operation or norm, and for parameters that belong to
            none of them.
        counts: the counts on which conventions differ, by the names in
            `paperlib.complexity.conventions.COUNTS`.
        uncounted: calls of the operators that may multiply and add, but have no
            formula, by operator; see `profile`.

    Example:
        >>> from torch import nn
        >>> from paperlib.complexity import profile
        >>> layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        >>> counted = profile(nn.Sequential(*layers), input_shape=(1, 3, 8, 8))
        >>> print(counted.table())
        Sequential, input 1×3×8×8
        layer  kind    output     MACs  parameters
        0      conv    1×8×6×6   7,776         224
        3      linear  1×10      2,880       2,890
        total                   10,656       3,114
        >>> max(counted.layers, key=lambda layer: layer.macs).name
        '0'
        >>> counted
        Profile(Sequential: 10,656 MACs, 3,114 parameters)

    Source: Howard et al., arXiv:1704.04861v1, Sec. 3 and 4 ("Mult-Adds": convolutions
        and the fully connected layer).
    Departures: matrix products and attention, which are not in the paper, are counted
        as well.
    Test: test_complexity.py::test_mobilenet_of_timm
    """

    model: str
    input_shapes: list[tuple[int, ...]]
    layers: list[Layer]
    counts: Mapping[str, int]
    uncounted: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Profile({self.model}: {self.macs:,} MACs, {self.params:,} parameters"
            f"{self._missing('; ')})"
        )

    def _missing(self, separator: str) -> str:
        calls = ", ".join(f"{name} ×{count}" for name, count in self.uncounted.items())
        return f"{separator}not counted: {calls}" if calls else ""

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions, linear layers, products and attention."""
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> int:
        """Twice `macs`: a multiplication and an addition each."""
        return 2 * self.macs

    @property
    def params(self) -> int:
        """Elements of all parameters, used or not, shared ones once."""
        return sum(layer.params for layer in self.layers)

    def table(self, costly_only: bool = False, depth: int | None = None) -> str:
        """Format the layers as a table, one per line and the totals last.

        Operators that were not counted are named below the totals.

        Args:
            costly_only: omit rows without MACs; the totals remain those of the whole
                network.
            depth: sum the layers of each module at this depth of the names: with 1,
                one row per child of the network. Its kind lists the kinds of the
                module's layers that have MACs, its output is that of the last layer.

        Raises:
            ValueError: if `depth` is not a positive integer.

        Example:
            >>> from torch import nn
            >>> from paperlib.complexity import profile
            >>> block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.ReLU())
            >>> network = nn.Sequential(block, nn.Flatten(), nn.Linear(288, 10))
            >>> print(profile(network, (1, 3, 8, 8)).table(depth=1))
            Sequential, input 1×3×8×8
            layer  kind                  output     MACs  parameters
            0      conv, pointwise conv  1×8×6×6  10,080         296
            2      linear                1×10      2,880       2,890
            total                                 12,960       3,186

        Source: Howard et al., arXiv:1704.04861v1, Tables 1 and 2, whose columns these
            are.
        Departures: none.
        Test: test_complexity.py::test_table
        """
        rows = [("layer", "kind", "output", "MACs", "parameters")]
        rows += [
            (
                layer.name or self.model,
                layer.kind,
                "×".join(map(str, layer.output_shape)),
                f"{layer.macs:,}",
                f"{layer.params:,}",
            )
            for layer in (self.layers if depth is None else self._group(depth))
            if layer.macs or not costly_only
        ]
        rows.append(("total", "", "", f"{self.macs:,}", f"{self.params:,}"))
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.input_shapes)
        table = align_columns(rows, "<<<>>") + self._missing("\n")
        return f"{self.model}, input {shapes}\n{table}"

    def _group(self, depth: int) -> list[Layer]:
        """Sum the layers of each module at a depth, in the order of first use."""
        check_size(depth, "depth")
        modules: dict[str, list[Layer]] = defaultdict(list)
        for layer in self.layers:
            modules[".".join(layer.name.split(".")[:depth])].append(layer)
        return [
            Layer(
                name,
                ", ".join({layer.kind: 0 for layer in layers if layer.macs})
                or layers[-1].kind,
                # Unused parameters have no output.
                next((x.output_shape for x in reversed(layers) if x.output_shape), ()),
                sum(layer.macs for layer in layers),
                sum(layer.params for layer in layers),
            )
            for name, layers in modules.items()
        ]

    def conventions(self) -> list[Convention]:
        """Total the same run by every counting convention.

        Source: counting conventions of the paper and of ten tools; see
            `paperlib.complexity.conventions.totals`.
        Departures: see `paperlib.complexity.conventions.totals`.
        Test: test_complexity.py::test_conventions_reproduce_the_peers
        """
        return totals(self.counts)


def profile(
    model: nn.Module,
    input_shape: Sequence[int] | Sequence[Sequence[int]] = (1, 3, 224, 224),
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    *,
    inputs: Any = None,
    rules: Mapping[Any, Callable[..., int]] | None = None,
) -> Profile:
    """Count the multiply-adds and parameters of one forward pass, layer by layer.

    A copy of the model runs on tensors without data: nothing is allocated on a device,
    and no weight is copied or moved. It runs in eval mode, on a thread of its own. The
    model itself, with its modes, hooks and buffers, is only read, so other threads may
    run it meanwhile. Its hooks act on the copy.

    If `forward` reads values, as in `lengths.tolist()` or `if x.sum() > 0`, the
    operations that lead to them are executed on the CPU, on copies of the weights and
    inputs. Constants, parameters and buffers thus have their values; what depends on
    the input has values only with `inputs`, and random numbers have none. Every tensor
    names the CPU as its device.

    The counts are those of the whole batch: twice the images, twice the MACs.
    Multiplications by the zeros of a padding count, as in the paper's formula, and
    those of a transposed convolution count before the output is cropped.

    Args:
        model: any network.
        input_shape: shape of the input, batch first; a list of shapes for several
            inputs, in the order of forward's arguments.
        dtype: of the input, or a list with one dtype per input; by default that of the
            model's weights. For token ids: torch.long.
        inputs: the arguments of forward, with real tensors, instead of `input_shape`
            and `dtype`: a tuple for positional arguments, a dictionary for keyword
            arguments, a tensor for the only argument. A forward whose only argument is
            a list needs `([a, b],)`, one whose only argument is a dictionary
            `({"x": a},)`.
        rules: multiply-adds of operators without a formula, by operator
            (`torch.ops.library.name`): a function that receives the operator's
            arguments, each tensor replaced by its shape, and the keyword `out_shape`,
            the shape of the result. `torch.utils.flop_counter.register_flop_formula`
            expects the same signature, but FLOPs.

    Returns:
        the counts. `Profile.uncounted` names the operators that may multiply and add,
        but have no formula: those of other libraries than PyTorch and torchvision, and
        PyTorch's own such as Fourier transforms and matrix decompositions.

    Raises:
        ValueError: for a size that is not a positive integer; a ScriptModule; an
            nn.DataParallel over several devices; a model that cannot be copied, such
            as a lazy module that has never run, or has sparse or quantised weights; a
            list as `inputs`; and a forward that fails on such an input (with its error
            message).

    Example:
        >>> from paperlib.complexity import profile
        >>> from paperlib.mobilenet import MobileNetV1
        >>> counted = profile(MobileNetV1(), input_shape=(1, 3, 224, 224))
        >>> f"{counted.macs / 1e6:.1f} million MACs, {counted.params:,} parameters"
        '568.7 million MACs, 4,231,976 parameters'

        With real tensors, here two sentences of 4 and 2 words, padded to 4:

        >>> import torch
        >>> from torch import nn
        >>> class Sentences(nn.LSTM):
        ...     def forward(self, words, lengths):
        ...         packed = nn.utils.rnn.pack_padded_sequence(words, lengths)
        ...         return super().forward(packed)
        >>> words, lengths = torch.zeros(4, 2, 5), torch.tensor([4, 2])
        >>> profile(Sentences(5, 8), inputs=(words, lengths)).macs
        2496
        >>> profile(Sentences(5, 8), inputs={"words": words, "lengths": lengths}).macs
        2496

        An operator that is not counted, until it has a rule:

        >>> class FFT(nn.Module):
        ...     def forward(self, x):
        ...         return torch.fft.rfft(x)
        >>> profile(FFT(), (1, 64))
        Profile(FFT: 0 MACs, 0 parameters; not counted: aten::_fft_r2c ×1)
        >>> def count_fft(shape, *options, out_shape):
        ...     return 2 * shape[-1] * (shape[-1].bit_length() - 1)
        >>> profile(FFT(), (1, 64), rules={torch.ops.aten._fft_r2c: count_fft}).macs
        768

    Source: counting convention of Howard et al., arXiv:1704.04861v1, Sec. 3.1 (Eq. 2, 4
        and 5), for every operation.
    Departures: matrix products and attention count too; `Profile.conventions` totals
        the run by other conventions.
    Test: test_complexity.py::test_agrees_with_flop_counter
    """
    _check_model(model)
    if not isinstance(rules or {}, Mapping):
        raise ValueError(f"rules={rules!r:.80}; expected {{operator: function}}")
    if inputs is None:
        shapes = _parse_shapes(input_shape)
        dtypes = _parse_dtypes(dtype, len(shapes), model)
        inputs = tuple(
            torch.empty(shape, dtype=kind, device="meta")
            for shape, kind in zip(shapes, dtypes, strict=True)
        )
    elif input_shape != _IMAGE or dtype is not None or isinstance(inputs, list):
        raise ValueError(
            f"inputs of type {type(inputs).__name__}, input_shape = {input_shape!r} and"
            f" dtype = {dtype!r}; expected inputs alone, as a tuple of positional"
            " arguments, a dict of keyword arguments or one tensor; for one argument"
            " that is a list pass ([a, b],)"
        )
    # A new thread has none of the caller's dispatch modes, autocast, default device or
    # gradient mode.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_record, model, inputs, rules or {}).result()


@torch.inference_mode()
def _record(
    model: nn.Module, inputs: Any, rules: Mapping[Any, Callable[..., int]]
) -> Profile:
    copied = _copy_to_meta(model, list(model.parameters())).eval()
    are_keywords = isinstance(inputs, Mapping)
    kwargs = dict(inputs) if are_keywords else {}
    # A named tuple, such as a PackedSequence, is one argument.
    args = () if are_keywords else inputs if type(inputs) is tuple else (inputs,)
    tensors = list_tensors((args, kwargs))
    args, kwargs, activations = _copy_to_meta((args, kwargs, tensors), tensors)
    for activation in activations:
        activation.parameter_names = None
    recorder = MacRecorder(copied, rules)
    shapes = [tuple(tensor.shape) for tensor in tensors]
    try:
        with without_compiler(), recorder, NumbersOnCpu():
            copied(*args, **kwargs)
    except Exception as error:
        message = _failure_message(error, model, shapes, *recorder.running[-1])
        raise ValueError(message) from error
    layers = recorder.finish()
    counts = {
        **recorder.counts,
        "macs": sum(layer.macs for layer in layers),
        "norm_params": sum(layer.params for layer in layers if layer.kind == "norm"),
    }
    return Profile(
        type(model).__name__, shapes, layers, counts, dict(recorder.uncounted)
    )


def _copy_to_meta(value: Any, tensors: list[Tensor]) -> Any:
    """Copy a model with its parameters, or arguments, to the meta device."""
    try:
        # Parameters copy themselves without asking the mode.
        memo = {id(tensor): without_data(tensor) for tensor in tensors}
        # A dictionary cannot be copied while it changes: other threads may add or
        # remove hooks of this library.
        with HOOK_NUMBERS, NumbersOnCpu(), _MetaCopies():
            return copy.deepcopy(value, memo)
    except Exception as error:
        is_model = isinstance(value, nn.Module)
        what = f"this {type(value).__name__}" if is_model else "inputs"
        raise ValueError(
            f"{what} cannot be copied ({type(error).__name__}: {error}); expected what"
            " copy.deepcopy accepts, with dense tensors; pass the module inside a"
            " wrapper (for DistributedDataParallel its .module), remove the attribute"
            " that cannot be copied, and convert sparse and quantised tensors with"
            " .to_dense() and .dequantize()"
        ) from error


class _MetaCopies(TorchFunctionMode):
    """Makes copy.deepcopy copy tensors to the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__:
            return without_data(args[0])
        return func(*args, **(kwargs or {}))


def _check_model(model: nn.Module) -> None:
    check_module(model)
    for name, module in model.named_modules():
        raise_if_hidden(module, f"layer {name!r}" if name else "the model")


def _parse_shapes(input_shape: Sequence) -> list[tuple[int, ...]]:
    is_list = isinstance(input_shape, Sequence) and any(
        isinstance(item, Sequence) for item in input_shape
    )
    shapes = input_shape if is_list else [input_shape]
    are_shapes = all(isinstance(shape, Sequence) for shape in shapes)
    if list_tensors(input_shape) or not are_shapes or not input_shape:
        raise ValueError(
            f"input_shape = {input_shape!r}; expected a shape such as (1, 3, 224, 224),"
            " or a list of shapes; pass one shape per input, or tensors as inputs="
        )
    return [
        tuple(check_size(side, "a size in input_shape") for side in shape)
        for shape in shapes
    ]


def _parse_dtypes(dtype: Any, inputs: int, model: nn.Module) -> list[torch.dtype]:
    if dtype is None:
        weights = (
            parameter.dtype
            for parameter in model.parameters()
            if parameter.is_floating_point()
        )
        dtype = next(weights, torch.get_default_dtype())
    dtypes = list(dtype) if isinstance(dtype, (list, tuple)) else [dtype] * inputs
    if len(dtypes) != inputs or not all(
        isinstance(kind, torch.dtype) for kind in dtypes
    ):
        raise ValueError(
            f"dtype = {dtype!r} for {inputs} input(s);"
            " expected a torch.dtype for all, or a list with one per input;"
            " pass torch.long for token ids, torch.float32 for images"
        )
    return dtypes


def _failure_message(
    error: Exception,
    model: nn.Module,
    shapes: list[tuple[int, ...]],
    name: str,
    module: nn.Module,
) -> str:
    layer = f"layer {name!r}, " if name else ""
    where = f"{layer}{type(module).__name__}({module.extra_repr()})"
    shape = ", ".join(map(str, shapes))
    reason = f"{type(error).__name__}: {str(error).rstrip('.')}"
    return (
        f"{type(model).__name__} failed on input of shape {shape} in {where}."
        f" The error was: {reason}. Pass input_shape as forward expects it,"
        " batch first, and dtype=torch.long for token ids, or real tensors as inputs="
        " if forward reads the values of its activations or accepts other arguments;"
        " a forward that reads random numbers, or differentiates its activations,"
        " cannot be profiled"
    )
