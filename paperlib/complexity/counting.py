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
from paperlib.complexity.formulas import _whole
from paperlib.complexity.recorder import Layer, Tape, innermost_module
from paperlib.complexity.rules import RULES, default_rule


@dataclass(frozen=True)
class Profile:
    """What one forward pass costs.

    Attributes:
        model: class name of the network.
        input_shapes: one shape for each input.
        layers: one row for each counted operation or norm, and for parameters that
            belong to none of them.
        counts: what counting conventions disagree about, by the names in
            `paperlib.complexity.counting.conventions.COUNTS`.

    Source: Howard et al., arXiv:1704.04861v1, Sec. 3 and 4 ("Mult-Adds": convolutions
        and the fully connected layer).
    Departures: matrix products and attention, which the paper has none of, are counted
        as well.
    Test: test_complexity.py::test_mobilenet_of_timm
    """

    model: str
    input_shapes: list[tuple[int, ...]]
    layers: list[Layer]
    counts: Mapping[str, int]

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions, linear layers, matrix products and attention;
        nothing else counts.
        """
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
        """Lay the layers out as text, one a line and the totals last, columns aligned.

        Args:
            costly_only: leave out rows without MACs; the totals stay those of the whole
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
        return f"{self.model}, input {shapes}\n" + _columns(rows, "<<<>>")

    def conventions(self) -> list[Convention]:
        """Total the same run by every counting convention in circulation.

        Source: counting conventions of the paper and of ten tools; see
            `paperlib.complexity.counting.conventions.totals`.
        Departures: see `paperlib.complexity.counting.conventions.totals`.
        Test: test_complexity.py::test_conventions_reproduce_the_peers
        """
        return totals(self.counts)

    def conventions_table(self) -> str:
        """Lay the conventions out as text, one a line: total, what it adds up, who
        counts so.

        Source: counting conventions of the paper and of ten tools; see
            `paperlib.complexity.counting.conventions.totals`.
        Departures: none.
        Test: test_complexity.py::test_conventions_table
        """
        rows = [("convention", "total", "what it counts", "used by")]
        rows += [
            (row.name, f"{row.total:,}", row.counts, row.used_by)
            for row in self.conventions()
        ]
        return _columns(rows, "<><<")


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
    modules = _modules(model)
    shapes = _shapes(input_shape)
    dtypes = _dtypes(dtype, len(shapes), model)
    tape = Tape(modules, RULES, default_rule)
    with _alone(), _as_it_was(modules, tape):
        inputs = [
            torch.empty(shape, dtype=kind, device="meta")
            for shape, kind in zip(shapes, dtypes, strict=True)
        ]
        try:
            with tape:
                model(*inputs)
        except Exception as error:
            raise ValueError(_what_failed(error, modules, shapes)) from error
    layers = tape.finish()
    counts = {**tape.counts, "macs": sum(layer.macs for layer in layers)}
    return Profile(type(model).__name__, shapes, layers, counts)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Set aside, on this thread, the modes and the autocast that the caller may be in,
    and all that autograd adds.
    """
    with contextlib.ExitStack() as stack:
        # a FakeTensorMode would refuse our meta tensors
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        # The cache would keep a meta tensor as the half-precision twin of a real
        # weight.
        stack.enter_context(torch.autocast("cpu", enabled=False, cache_enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C._AutoDispatchBelowAutograd())
        yield


@contextlib.contextmanager
def _as_it_was(modules: list[tuple[str, nn.Module]], tape: Tape) -> Iterator[None]:
    """Run in eval mode, and afterwards restore modes and attributes that changed.

    Attributes that are lists or dictionaries get their old items. A change by another
    thread meanwhile cannot be distinguished from one by the forward pass, and is undone
    too, except for hooks of this library.
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
    kept = []
    for _, module in modules:
        before = dict(vars(module))
        kept.append((vars(module), before))
        for holder in before.values():
            if isinstance(holder, (dict, list)):
                kept.append(
                    (holder, (dict if isinstance(holder, dict) else list)(holder))
                )
    try:
        for _, module in modules:
            if module.training:
                module.training = False
        yield
    finally:
        for holder, before in kept:
            if holder or before:
                _put_back(holder, before)
        for tensor, real in data:
            # a forward that clips its weights, `weight.data = ...`, has given them up
            # for meta ones
            if tensor.is_meta:
                with tape:  # which also vouches that the two can be exchanged
                    tensor.data = real


def _put_back(holder: dict | list, before: dict | list) -> None:
    """Give a container its old items, touching only what differs; tensors are compared
    by identity, not by value.
    """
    new, old = (
        (holder, before)
        if isinstance(holder, list)
        else (holder.values(), before.values())
    )
    if len(new) == len(old) and all(map(operator.is_, new, old)):
        return
    if isinstance(holder, list):
        holder[:] = before
        return
    # Hooks of this library come and go with calls in other threads, which may use the
    # model as well: they stay theirs.
    for name in holder.keys() - before.keys():
        if not hasattr(holder.get(name), "thread"):
            holder.pop(name, None)
    for name, value in before.items():
        if holder.get(name, holder) is not value and not hasattr(value, "thread"):
            holder[name] = value


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules by name, once it is clear that they can be profiled."""
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
                " where layers cannot be told apart; expected an nn.Module:"
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


def _shapes(input_shape: Sequence) -> list[tuple[int, ...]]:
    if (
        not isinstance(input_shape, Sequence)
        or isinstance(input_shape, str)
        or not len(input_shape)
    ):
        raise ValueError(
            f"input_shape = {input_shape!r}; expected a shape such as (1, 3, 224, 224);"
            " give a list of shapes for several inputs"
        )
    several = any(isinstance(item, Sequence) for item in input_shape)
    if several and not all(isinstance(item, Sequence) for item in input_shape):
        raise ValueError(
            f"input_shape = {input_shape!r} mixes numbers and shapes; expected one"
            " shape or a list of shapes; give every input a shape of its own"
        )
    return [
        tuple(_whole(side, "a size in input_shape") for side in shape)
        for shape in (input_shape if several else [input_shape])
    ]


def _dtypes(dtype: Any, inputs: int, model: nn.Module) -> list[torch.dtype]:
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
            " expected a torch.dtype for all, or a list with one for each;"
            " give torch.long for token ids, torch.float32 for images"
        )
    return dtypes


def _what_failed(
    error: Exception,
    modules: list[tuple[str, nn.Module]],
    shapes: list[tuple[int, ...]],
) -> str:
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    names = {id(module): name for name, module in modules}
    module = innermost_module(last.tb_frame, names)
    where = f" in layer {names[id(module)]!r}" if names.get(id(module)) else ""
    if module is not None and not any(module.children()):
        where += f", {module!r}"
    shape = ", ".join(map(str, shapes))
    said = f"{type(error).__name__}: {str(error).rstrip('.')}"
    return (
        f"{type(modules[0][1]).__name__} failed on input of shape {shape}{where}."
        f" It said: {said}. Give input_shape as forward expects it, batch first,"
        " and dtype=torch.long for token ids; a forward that looks at the values"
        " of its activations, or differentiates them, cannot be profiled"
    )


def _columns(rows: list[tuple[str, ...]], align: str) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    lines = (
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, align, widths, strict=True)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
