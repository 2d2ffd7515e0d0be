"""Count the multiply-adds (MACs) and parameters of any network, layer by layer."""

import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from paperlib.complexity.conventions import Convention, totals
from paperlib.complexity.formulas import _check_size
from paperlib.complexity.recorder import Layer, MacRecorder, innermost_module
from paperlib.complexity.rules import RULES, default_rule


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
        for layer in self.layers:
            if layer.macs or not costly_only:
                shape = "×".join(map(str, layer.output_shape))
                rows.append(
                    (
                        layer.name or self.model,
                        layer.kind,
                        shape,
                        f"{layer.macs:,}",
                        f"{layer.params:,}",
                    )
                )
        rows.append(("total", "", "", f"{self.macs:,}", f"{self.params:,}"))
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.input_shapes)
        return f"{self.model}, input {shapes}\n" + _align_columns(rows, "<<<>>")

    def conventions(self) -> list[Convention]:
        """Total the same run by every counting convention.

        Source: counting conventions of the paper and of ten tools; see
            `paperlib.complexity.conventions.totals`.
        Departures: see `paperlib.complexity.conventions.totals`.
        Test: test_complexity.py::test_conventions_reproduce_the_peers
        """
        return totals(self.counts)

    def conventions_table(self) -> str:
        """Format the conventions as a table: total, what it counts, who uses it.

        Source: counting conventions of the paper and of ten tools; see
            `paperlib.complexity.conventions.totals`.
        Departures: none.
        Test: test_complexity.py::test_conventions_table
        """
        rows = [("convention", "total", "what it counts", "used by")]
        rows += [
            (row.name, f"{row.total:,}", row.counts, row.used_by)
            for row in self.conventions()
        ]
        return _align_columns(rows, "<><<")


def profile(
    model: nn.Module,
    input_shape: Sequence[int | float | Sequence[int | float]] = (1, 3, 224, 224),
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
) -> Profile:
    """Count the multiply-adds and parameters of one forward pass, layer by layer.

    The model runs on tensors without data, wherever its weights are: nothing is
    allocated on a device and no weight is copied. It is counted as in eval mode, and
    the modes of its modules are restored. Attributes, buffers and hooks that change
    while the model is profiled are restored, whoever changed them. So other threads may
    run a model in eval mode meanwhile, but hooks that they register on it, or remove
    from it, are lost or return when `profile` ends.

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
        ValueError: for a size that is not a positive integer; a ScriptModule; a lazy
            module that has never run; and a forward that fails on such an input (with
            its error message).

    Source: counting convention of Howard et al., arXiv:1704.04861v1, Sec. 3.1 (Eq. 2, 4
        and 5), for every operation.
    Departures: matrix products and attention count too; `Profile.conventions` totals
        the run by other conventions.
    Test: test_complexity.py::test_agrees_with_flop_counter
    """
    modules = _check_modules(model)
    shapes = _parse_shapes(input_shape)
    dtypes = _parse_dtypes(dtype, len(shapes), model)
    recorder = MacRecorder(modules, RULES, default_rule)
    with _isolated(), _restored(modules, recorder):
        inputs = [
            torch.empty(shape, dtype=kind, device="meta")
            for shape, kind in zip(shapes, dtypes, strict=True)
        ]
        try:
            with recorder:
                model(*inputs)
        except Exception as error:
            raise ValueError(_failure_message(error, modules, shapes)) from error
    layers = recorder.finish()
    counts = {**recorder.counts, "macs": sum(layer.macs for layer in layers)}
    return Profile(type(model).__name__, shapes, layers, counts)


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Disable the caller's dispatch modes and autocast on this thread, and autograd."""
    with contextlib.ExitStack() as stack:
        # A FakeTensorMode would reject our meta tensors.
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        # Autocast's cache would store a meta tensor as the half-precision copy of a
        # real weight.
        stack.enter_context(torch.autocast("cpu", enabled=False, cache_enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C._AutoDispatchBelowAutograd())
        yield


@contextlib.contextmanager
def _restored(
    modules: list[tuple[str, nn.Module]], recorder: MacRecorder
) -> Iterator[None]:
    """Run in eval mode, and afterwards restore modes and attributes that changed.

    The items of lists and dictionaries are restored too. A change by another thread
    meanwhile cannot be distinguished from one by the forward pass, and is undone too,
    except for hooks of this library.
    """
    tensors = [
        t
        for _, module in modules
        for t in (*module._parameters.values(), *module._buffers.values())
    ]
    data = [
        (tensor, tensor.detach())
        for tensor in tensors
        if tensor is not None and not tensor.is_meta
    ]
    snapshots = []
    for _, module in modules:
        items = dict(vars(module))
        snapshots.append((vars(module), items))
        for container in items.values():
            if isinstance(container, dict):
                snapshots.append((container, dict(container)))
            elif isinstance(container, list):
                snapshots.append((container, list(container)))
    try:
        for _, module in modules:
            if module.training:
                module.training = False
        yield
    finally:
        for container, items in snapshots:
            if container or items:
                _restore_items(container, items)
        for tensor, original in data:
            # A forward that assigns `weight.data = ...` has replaced the data by a meta
            # tensor. The recorder's mode allows swapping it back.
            if tensor.is_meta:
                with recorder:
                    tensor.data = original


def _restore_items(container: dict | list, items: dict | list) -> None:
    """Restore a container's items, changing only those that differ (by identity)."""
    new, old = (
        (container, items)
        if isinstance(container, list)
        else (container.values(), items.values())
    )
    if len(new) == len(old) and all(map(operator.is_, new, old)):
        return
    if isinstance(container, list):
        container[:] = items
        return
    # Hooks of this library belong to calls in other threads, which may use the model at
    # the same time.
    for name in container.keys() - items.keys():
        if not hasattr(container.get(name), "thread"):
            container.pop(name, None)
    for name, value in items.items():
        if container.get(name, container) is not value and not hasattr(value, "thread"):
            container[name] = value


def _check_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return all modules by name, or raise if one can't be profiled."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is {model!r}; expected an nn.Module that has been built,"
            " such as MobileNetV1()"
        )
    modules = list(model.named_modules())
    for name, module in modules:
        where = f"layer {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{where} is a ScriptModule, which runs outside Python,"
                " where layers cannot be distinguished; expected an nn.Module:"
                " pass the nn.Module that it was scripted or traced from"
            )
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(
                tensor,
                (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer),
            ):
                raise ValueError(
                    f"{key!r} of {where} is lazy and has no shape yet;"
                    " expected a model that has run; run it once"
                )
    return modules


def _parse_shapes(input_shape: Sequence) -> list[tuple[int, ...]]:
    if (
        not isinstance(input_shape, Sequence)
        or isinstance(input_shape, str)
        or not len(input_shape)
    ):
        raise ValueError(
            f"input_shape = {input_shape!r}; expected a shape such as (1, 3, 224, 224);"
            " pass a list of shapes for several inputs"
        )
    several = any(isinstance(item, Sequence) for item in input_shape)
    if several and not all(isinstance(item, Sequence) for item in input_shape):
        raise ValueError(
            f"input_shape = {input_shape!r} mixes numbers and shapes;"
            " expected one shape or a list of shapes; pass one shape per input"
        )
    return [
        tuple(_check_size(side, "a size in input_shape") for side in shape)
        for shape in (input_shape if several else [input_shape])
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
    modules: list[tuple[str, nn.Module]],
    shapes: list[tuple[int, ...]],
) -> str:
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    names = {id(module): name for name, module in modules}
    module = innermost_module(frame.tb_frame, names)
    where = f" in layer {names[id(module)]!r}" if names.get(id(module)) else ""
    if module is not None and not any(module.children()):
        where += f", {module!r}"
    shape = ", ".join(map(str, shapes))
    reason = f"{type(error).__name__}: {str(error).rstrip('.')}"
    return (
        f"{type(modules[0][1]).__name__} failed on input of shape {shape}{where}."
        f" The error was: {reason}. Pass input_shape as forward expects it,"
        " batch first, and dtype=torch.long for token ids; a forward that reads"
        " the values of its activations, or differentiates them, cannot be profiled"
    )


def _align_columns(rows: list[tuple[str, ...]], align: str) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    lines = (
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, align, widths, strict=True)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
