"""Count the multiply-adds (MACs) and parameters of any network, layer by layer."""

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paperlib.complexity.conventions import Convention, totals
from paperlib.complexity.formulas import _check_size
from paperlib.complexity.recorder import Layer, MacRecorder, _without_data
from paperlib.inference import HOOK_NUMBERS, raise_if_hidden
from paperlib.tables import align_columns


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

    def table(self, costly_only: bool = False) -> str:
        """Format the layers as a table, one per line and the totals last.

        Args:
            costly_only: omit rows without MACs; the totals remain those of the whole
                network.

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
            for layer in self.layers
            if layer.macs or not costly_only
        ]
        rows.append(("total", "", "", f"{self.macs:,}", f"{self.params:,}"))
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.input_shapes)
        return f"{self.model}, input {shapes}\n" + align_columns(rows, "<<<>>")

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
) -> Profile:
    """Count the multiply-adds and parameters of one forward pass, layer by layer.

    A copy of the model runs on tensors without data: nothing is allocated on a device,
    and no weight is copied or moved. It runs in eval mode, on a thread of its own. The
    model itself, with its modes, hooks and buffers, is only read, so other threads may
    run it meanwhile. Its hooks act on the copy.

    The counts are those of the whole batch: twice the images, twice the MACs.
    Multiplications by the zeros of a padding count, as in the paper's formula, and
    those of a transposed convolution count before the output is cropped.

    Args:
        model: any network whose forward accepts tensors and does not branch on their
            values.
        input_shape: shape of the input, batch first; a list of shapes for several
            inputs, in the order of forward's arguments.
        dtype: of the input, or a list with one dtype per input; by default that of the
            model's weights. For token ids: torch.long.

    Raises:
        ValueError: for a size that is not a positive integer; a ScriptModule; an
            nn.DataParallel over several devices; a model that cannot be copied, such
            as a lazy module that has never run; and a forward that fails on such an
            input (with its error message).

    Example:
        >>> from paperlib.complexity import profile
        >>> from paperlib.mobilenet import MobileNetV1
        >>> counted = profile(MobileNetV1(), input_shape=(1, 3, 224, 224))
        >>> f"{counted.macs / 1e6:.1f} million MACs, {counted.params:,} parameters"
        '568.7 million MACs, 4,231,976 parameters'

    Source: counting convention of Howard et al., arXiv:1704.04861v1, Sec. 3.1 (Eq. 2, 4
        and 5), for every operation.
    Departures: matrix products and attention count too; `Profile.conventions` totals
        the run by other conventions.
    Test: test_complexity.py::test_agrees_with_flop_counter
    """
    _check_model(model)
    shapes = _parse_shapes(input_shape)
    dtypes = _parse_dtypes(dtype, len(shapes), model)
    # A new thread has none of the caller's dispatch modes, autocast, default device or
    # gradient mode.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_record, model, shapes, dtypes).result()


@torch.inference_mode()
def _record(
    model: nn.Module, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]
) -> Profile:
    copied = _copy_without_data(model).eval()
    recorder = MacRecorder(copied)
    inputs = [
        torch.empty(shape, dtype=kind, device="meta")
        for shape, kind in zip(shapes, dtypes, strict=True)
    ]
    try:
        with recorder:
            copied(*inputs)
    except Exception as error:
        message = _failure_message(error, model, shapes, *recorder.running[-1])
        raise ValueError(message) from error
    layers = recorder.finish()
    counts = {
        **recorder.counts,
        "macs": sum(layer.macs for layer in layers),
        "norm_params": sum(layer.params for layer in layers if layer.kind == "norm"),
    }
    return Profile(type(model).__name__, shapes, layers, counts)


def _copy_without_data(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device."""
    try:
        # Parameters copy themselves without asking the mode.
        memo = {
            id(parameter): _without_data(parameter) for parameter in model.parameters()
        }
        # A dictionary cannot be copied while it changes: other threads may add or
        # remove hooks of this library.
        with HOOK_NUMBERS, _MetaCopies():
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"this {type(model).__name__} cannot be copied"
            f" ({type(error).__name__}: {error}); expected a model that copy.deepcopy"
            " accepts; pass the module inside a wrapper (for DistributedDataParallel"
            " its .module), or remove the attribute that cannot be copied"
        ) from error


class _MetaCopies(TorchFunctionMode):
    """Makes copy.deepcopy copy tensors to the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__:
            return _without_data(args[0])
        return func(*args, **(kwargs or {}))


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is {model!r}; expected an nn.Module that has been built,"
            " such as MobileNetV1()"
        )
    raise_if_hidden(model, "the model")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{f'layer {name!r}' if name else 'the model'} is a ScriptModule, which"
                " runs outside Python, where layers cannot be distinguished; expected"
                " an nn.Module: pass the nn.Module that it was scripted or traced from"
            )


def _parse_shapes(input_shape: Sequence) -> list[tuple[int, ...]]:
    is_list = isinstance(input_shape, Sequence) and any(
        isinstance(item, Sequence) for item in input_shape
    )
    shapes = input_shape if is_list else [input_shape]
    if not input_shape or not all(isinstance(shape, Sequence) for shape in shapes):
        raise ValueError(
            f"input_shape = {input_shape!r}; expected a shape such as (1, 3, 224, 224),"
            " or a list of shapes; pass one shape per input"
        )
    return [
        tuple(_check_size(side, "a size in input_shape") for side in shape)
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
        " batch first, and dtype=torch.long for token ids; a forward that reads"
        " the values of its activations, or differentiates them, cannot be profiled"
    )
