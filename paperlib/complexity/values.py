"""Values of tensors on the meta device, computed only if the network reads them.

A profile runs the network on tensors without data. A tensor has known values if the
values of the input do not enter it: a parameter, a buffer, a constant that `forward`
creates, and what is computed from these; with real inputs every tensor. The operations
on such tensors are stored, and executed on the CPU, in their order, once a value is
read: a network that reads none costs nothing. In-place operations change all views of a
tensor, so its storage tells whether the values are known.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from paperlib.validation import has_values

# Their results depend on the shape of the first tensor only.
_LIKE = {
    *"empty_like zeros_like ones_like full_like".split(),
    *"new_empty new_empty_strided new_zeros new_ones new_full".split(),
}


def without_data(tensor: Tensor) -> Tensor:
    """Return a constant on the meta device, with the given tensor as its `original`."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"it has a tensor of layout {tensor.layout}, {tensor.dtype}")
    # empty_like would keep a fake tensor fake.
    empty = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
    )
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, tensor.requires_grad)
    empty.original, empty.parameter_names = tensor, frozenset()
    empty.untyped_storage().is_known = has_values(tensor)
    return empty


def list_tensors(values: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dictionaries."""
    leaves: list[Any] = []
    map_aggregate(values, lambda leaf: leaves.append(leaf) or leaf)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def to_meta(item: Any) -> Any:
    """Replace a device or a tensor with data by one on the meta device."""
    if isinstance(item, Tensor) and not item.is_meta:
        return without_data(item)
    return torch.device("meta") if isinstance(item, torch.device) else item


class Values:
    """Runs operations on the meta device, and computes known values on demand."""

    def __init__(self):
        self._pending: deque[tuple] = deque()

    def run(
        self, func: Any, name: str, args: tuple, kwargs: dict, tensors: list[Tensor]
    ) -> Any:
        """Run an operation on meta tensors; store it if its result's values are known.

        Args:
            func: an operator of `torch.ops`.
            name: of the operator, without suffixes.
            args: its arguments.
            kwargs: its keyword arguments.
            tensors: all tensors in both.
        """
        known, stored_args = all(map(_is_known, tensors)), args
        if name in _LIKE and not known:  # any values will do
            like = torch.empty((), dtype=tensors[0].dtype).expand_as(tensors[0])
            known, stored_args = True, (like, *args[1:])
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            known = False  # random numbers
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            out = self._run_on_values(func, args, kwargs, known, error)
        if known:
            self._pending.append((func, stored_args, kwargs, out))
        for result in list_tensors(out):
            if known or any(result is tensor for tensor in tensors):
                result.untyped_storage().is_known = known
        return out

    def _run_on_values(self, func, args, kwargs, all_known, error):
        """Run an operation whose output shape depends on values, such as nonzero.

        If some are unknown, only indices, lengths and masks are read: no shape depends
        on floating-point numbers alone.
        """

        def to_value(item):
            is_float = isinstance(item, Tensor) and item.is_floating_point()
            return item if is_float and not all_known else self.read(item)

        try:
            args, kwargs = map_aggregate((args, kwargs), to_value)
            out = func(*args, **kwargs)
        except Exception:
            raise error from None
        return map_aggregate(out, to_meta)

    def read(self, item: Any) -> Any:
        """Return a tensor with its values if they are known, anything else as it is."""
        if not isinstance(item, Tensor) or not _is_known(item):
            return item
        while self._pending:
            func, args, kwargs, out = self._pending.popleft()
            args, kwargs = map_aggregate((args, kwargs), _value)
            computed = list_tensors(func(*args, **kwargs))
            for result, value in zip(list_tensors(out), computed, strict=True):
                result.value = value
        return _value(item)


def _is_known(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "is_known", False)


def _value(item: Any) -> Any:
    """Return a tensor's values, or the CPU for a device."""
    if isinstance(item, Tensor) and item.is_meta and not hasattr(item, "value"):
        # A copy, because an in-place operation must not change the model or the input.
        item.value = item.original.detach().to("cpu", copy=True)
    is_device = isinstance(item, torch.device)
    return torch.device("cpu") if is_device else getattr(item, "value", item)


def _to_number(item: Any) -> Any:
    is_scalar = isinstance(item, Tensor) and item.ndim == 0
    return item.item() if is_scalar and _is_known(item) else item


class NumbersOnCpu(TorchFunctionMode):
    """Makes meta tensors name the CPU as their device.

    `torch.tensor([4, 2], device=x.device)` would lose its numbers on the meta device.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == Tensor.device.__get__:
            return torch.device("cpu")
        if func in (Tensor.numpy, Tensor.__array__):
            args = args[0].resolve_conj(), *args[1:]  # reads the values
        if func == Tensor.new_tensor:
            kwargs = {"dtype": args[0].dtype, **(kwargs or {})}
            func, args = torch.tensor, args[1:]
        if func == torch.tensor:  # its numbers may be tensors
            args = map_aggregate(args, _to_number)
        return func(*args, **(kwargs or {}))
