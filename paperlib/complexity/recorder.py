"""Record every operation of a network that costs multiply-adds, without data.

The network runs unchanged, on inputs on the meta device. A dispatch mode, which acts on
its own thread only, intercepts each operation, replaces each real tensor (a weight, a
buffer or any attribute) by a meta tensor and returns a meta tensor of the right shape.
So nothing is computed, no weight is copied or moved, and a model on a GPU stays there.
What each operation counts is in `rules`.

`paperlib.complexity.counting.profile` runs this below autograd, where the mode receives
`linear`, `conv2d`, `batch_norm` or `scaled_dot_product_attention` before PyTorch
decomposes them.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_META = torch.device("meta")
_CALL: CodeType = nn.Module._call_impl.__code__


class Layer(NamedTuple):
    """One row of a profile, in execution order.

    Fields:
        name: dotted name of the module in whose forward the operation ran ("" for the
            model itself); for the kind "parameter" the parameter's own name.
        kind: "conv", "pointwise conv" (1×1, ungrouped, in any number of dimensions),
            "depthwise conv" (one group per channel, any kernel), "grouped conv" (any
            other groups, also 1×1), "transposed conv", "deformable conv", "linear",
            "bilinear", "matmul", "attention" (scaled_dot_product_attention, and the
            products inside nn.MultiheadAttention; attention written as products is two
            "matmul"), "recurrent", and without MACs "norm", "parameter" (used outside
            all of these, as a class token or a position embedding) and "unused" (by
            this forward, as an auxiliary head in eval mode).
        output_shape: with the batch dimension.
        macs: multiply-adds of this call.
        params: elements of its parameters that no earlier row used.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    macs: int
    params: int


class MacRecorder(TorchDispatchMode):
    """The dispatch mode that collects `rows`, in execution order, and `counts`.

    A tensor is constant if it is a parameter, a buffer or computed from nothing else; a
    layer's output never is. `origin` returns the parameters that a constant was
    computed from. So a convolution whose weight was standardised or multiplied by a
    gain still owns its parameters, and a norm over a weight does not count as a layer.

    Source: this book; it counts as `paperlib.complexity.counting.profile` documents.
    Departures: none.
    Test: test_complexity.py::test_parameters_belong_to_the_layer_that_uses_them
    """

    def __init__(
        self,
        modules: list[tuple[str, nn.Module]],
        rules: Mapping[Any, "Rule"],
        default_rule: "Rule",
    ):
        super().__init__()
        self._rules, self._default_rule = rules, default_rule
        self.rows: list[Layer] = []
        self.counts: Counter[str] = Counter()
        self._names = {id(module): name for name, module in modules}
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._real: dict[tuple[int, int], frozenset[str]] = {}
        self._origins: dict[int, frozenset[str]] = {}
        # References to stand-ins and constants are stored to the end: a new storage at
        # a freed address would inherit its origin.
        self._stand_ins: dict[int, tuple[Tensor, Tensor]] = {}
        self._constants: list[Tensor] = []
        self._claimed: set[str] = set()
        self._touched: dict[str, int] = {}
        seen = set()
        for prefix, module in modules:
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    self._register(f"{prefix}.{key}" if prefix else key, parameter)

    def _register(self, name: str, parameter: Tensor) -> None:
        self._sizes[name] = tuple(parameter.shape)
        storage = parameter.untyped_storage()._cdata
        if parameter.is_meta:
            self._origins[storage] = self._origins.get(storage, frozenset()) | {name}
        else:
            self._real[storage, parameter.storage_offset()] = frozenset({name})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self._rules.get(func, self._default_rule)(self, func, args, kwargs or {})

    def origin(self, tensor: Tensor) -> frozenset[str] | None:
        """Return the parameters that a constant depends on; None for an activation."""
        if tensor.is_meta:
            return self._origins.get(tensor.untyped_storage()._cdata)
        return self._real.get(
            (tensor.untyped_storage()._cdata, tensor.storage_offset()), frozenset()
        )

    def to_meta(self, value: Any, tensors: list[Tensor]) -> Any:
        """Replace tensors and devices in an argument by meta ones; collect tensors."""
        if isinstance(value, Tensor):
            if not value.is_meta:
                value = self._stand_in(value)
            tensors.append(value)
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(
                [
                    item if isinstance(item, int) else self.to_meta(item, tensors)
                    for item in value
                ]
            )
        return _META if isinstance(value, torch.device) else value

    def _stand_in(self, real: Tensor) -> Tensor:
        if id(real) not in self._stand_ins:
            stand_in = torch.empty_strided(
                real.shape, real.stride(), dtype=real.dtype, device="meta"
            )
            self._origins[stand_in.untyped_storage()._cdata] = self.origin(real)
            self._stand_ins[id(real)] = (real, stand_in)
        return self._stand_ins[id(real)][1]

    def run(self, func, args: tuple, kwargs: dict) -> Any:
        """Run an operation on the meta device; track which results are constant."""
        tensors: list[Tensor] = []
        meta_args = [self.to_meta(arg, tensors) for arg in args]
        meta_kwargs = (
            {name: self.to_meta(value, tensors) for name, value in kwargs.items()}
            if kwargs
            else {}
        )
        out = func(*meta_args, **meta_kwargs)
        self._follow(func, [self.origin(tensor) for tensor in tensors], out)
        for real, stand_in in zip(args, meta_args, strict=True):
            if out is stand_in:
                # An in-place operation returns its argument itself.
                return real
        return out

    def _follow(self, func, origins: list[frozenset[str] | None], out: Any) -> None:
        constant = [origin for origin in origins if origin is not None]
        if len(constant) == len(origins):
            joined = frozenset().union(*constant)
            for tensor in _tensors(out):
                self._origins[tensor.untyped_storage()._cdata] = joined
                self._constants.append(tensor)
        elif constant:
            self.touch(*constant)
            # Writing an activation into a constant makes it non-constant.
            if func._schema.is_mutable:
                for tensor in _tensors(out):
                    self._origins.pop(tensor.untyped_storage()._cdata, None)

    def touch(self, *origins: frozenset[str] | None) -> None:
        """Store where parameters are first used, for those without a row of a layer."""
        for origin in origins:
            for name in origin or ():
                self._touched.setdefault(name, len(self.rows))

    def add(self, kind: str, macs: int, out: Tensor, *constants: Tensor | None) -> None:
        """Add a row for the running module; it owns all parameters not owned before."""
        names = {
            name
            for tensor in constants
            if tensor is not None
            for name in self.origin(tensor) or ()
        }
        names -= self._claimed
        self._claimed |= names
        params = sum(math.prod(self._sizes[name]) for name in names)
        self.rows.append(
            Layer(self.module_name(), kind, tuple(out.shape), macs, params)
        )

    def module(self) -> nn.Module | None:
        """Return the innermost module whose forward is running on this thread."""
        return innermost_module(sys._getframe(1), self._names)

    def module_name(self) -> str:
        """Return that module's dotted name, "" for the model itself."""
        return self._names.get(id(self.module()), "")

    def finish(self) -> list[Layer]:
        """Return all rows, with those of parameters that no operation owns."""
        before: dict[int, list[str]] = {}
        unused: Counter[str] = Counter()
        for name, size in self._sizes.items():
            if name in self._touched and name not in self._claimed:
                before.setdefault(min(self._touched[name], len(self.rows)), []).append(
                    name
                )
            elif name not in self._claimed:
                unused[name.rpartition(".")[0]] += math.prod(size)
        rows = []
        for position in range(len(self.rows) + 1):
            for name in before.get(position, ()):
                rows.append(
                    Layer(
                        name,
                        "parameter",
                        self._sizes[name],
                        0,
                        math.prod(self._sizes[name]),
                    )
                )
            rows += self.rows[position : position + 1]
        return rows + [
            Layer(owner, "unused", (), 0, params) for owner, params in unused.items()
        ]


# How an operation runs and counts: recorder, operation and arguments → its result.
Rule = Callable[[MacRecorder, Any, tuple, dict], Any]


def innermost_module(
    frame: FrameType | None, names: dict[int, str]
) -> nn.Module | None:
    """Find the innermost module in `names` whose forward or call is on a stack.

    Reading the stack needs no hook, so other threads that run the same model are not
    affected.

    Source: none; our own. Departures: none. Test:
        test_complexity.py::test_functional_calls_belong_to_the_module_whose_forward_runs
    """
    while frame is not None:
        if frame.f_code is _CALL or frame.f_code.co_name == "forward":
            module = frame.f_locals.get("self")
            if id(module) in names:
                return module
        frame = frame.f_back
    return None


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
