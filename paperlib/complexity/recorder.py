"""Record the operations of a forward pass that cost multiply-adds, without data.

The network runs on the meta device, where tensors have a shape and no data. A dispatch
mode receives each operation before PyTorch executes it. The multiply-adds are half of
the FLOPs that `torch.utils.flop_counter.flop_registry` computes for an operation.
`_PRODUCTS` has the operations that the registry lacks or knows only in parts (a linear
layer as a product of reshaped operands). An operation of another library is counted
once its formula is registered with `torch.utils.flop_counter.register_flop_formula`.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from paperlib.complexity.formulas import check_size
from paperlib.complexity.values import Values, list_tensors, to_meta


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
            "matmul"), "recurrent", the operator's name if it has a rule, and without
            MACs "norm", "parameter" (used outside all of these, as a class token or a
            position embedding) and "unused" (by this forward, as an auxiliary head in
            eval mode).
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
    """The dispatch mode that collects the rows of a profile, and `counts`.

    The model is a copy on the meta device: the recorder wraps the forward of each
    module, to know which module an operation belongs to. In inference mode it receives
    operations such as `linear` or `batch_norm` before PyTorch decomposes them.

    A tensor is constant if it was computed from parameters and buffers alone, and it
    belongs to these parameters: its attribute `parameter_names` has their names. So a
    convolution whose weight was standardised or multiplied by a gain still owns its
    parameters, and a norm of a weight is not counted as a layer.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, rules: Mapping[Any, Callable[..., int]]):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.values = Values()
        self._rules = rules
        for operator in rules:
            # One overload, or all of them.
            if not (hasattr(operator, "namespace") or hasattr(operator, "overloads")):
                raise ValueError(
                    f"rules has the key {operator!r}; expected operators, such as"
                    " torch.ops.library.name"
                )
        # Names and modules whose forward runs, the innermost last.
        self.running: list[tuple[str, nn.Module]] = [("", model)]
        self._rows: list[Layer] = []
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        self._used: set[str] = set()
        self._owned: set[str] = set()
        for name, parameter in model.named_parameters():
            parameter.parameter_names = frozenset({name})
        for name, module in model.named_modules():
            module.forward = partial(self._forward, name, module, module.forward)

    def _forward(self, name, module, forward, /, *args, **kwargs):
        depth = len(self.running)
        self.running.append((name, module))
        out = forward(*args, **kwargs)
        # Not reached after an exception: the last entry is then the module that failed.
        del self.running[depth:]
        return out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = getattr(func, "overloadpacket", func)  # of a higher-order operator
        operator = f"{func.namespace}::{packet.__name__}"
        # aten::max_pool2d → max_pool, aten::relu_ → relu, other::relu → other::relu
        name = _VARIANT.sub("", operator)
        if name in _READS:
            return func(*map_aggregate(args, self.values.read), **(kwargs or {}))
        args, kwargs = map_aggregate((args, kwargs or {}), to_meta)
        tensors = list_tensors((args, kwargs))
        rule = self._rules.get(func) or self._rules.get(packet)
        product = (
            _Product(operator, 0, partial(_apply_rule, rule, operator))
            if rule
            else _PRODUCTS.get(name) or _find_registered(packet)
        )
        if product is None and name not in _NORMS and name not in _ELEMENTS:
            if hasattr(func, "decompose") and name not in _UNDIVIDED:
                with self:
                    out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
            if tensors and ("::" in name or _HEAVY.search(name)):
                self.uncounted[operator] += 1
        out = self.values.run(func, name, args, kwargs, tensors)
        is_activation = bool(tensors) and _parameter_names(tensors[0]) is None
        if product is not None:
            macs = product.macs(out, *args, **kwargs)
            self._add_product(product, macs, out, tensors, args)
        elif is_activation and name in _NORMS:
            self._add_norm(name, out, tensors, args)
        else:
            self._follow(out, tensors)
            counts = _ELEMENTS.get(name, ()) if is_activation else ()
            for count, tensor in zip(counts, (*tensors[:1], out), strict=False):
                self.counts[count] += tensor.numel()
        return out

    def _follow(self, out: Any, tensors: list[Tensor]) -> None:
        """Mark the results of an operation as constant if all its tensors are."""
        names = [_parameter_names(tensor) for tensor in tensors]
        is_constant = tensors and None not in names
        if not is_constant:
            self._use(tensors)
        for result in list_tensors(out):
            result.parameter_names = frozenset().union(*names) if is_constant else None

    def _use(self, tensors: list[Tensor]) -> None:
        """Add a row per parameter at its first use; `finish` drops those of layers."""
        for tensor in tensors:
            for name in sorted((_parameter_names(tensor) or set()) - self._used):
                self._used.add(name)
                shape = self._shapes[name]
                self._rows.append(
                    Layer(name, "parameter", tuple(shape), 0, shape.numel())
                )

    def _add(self, kind: str, macs: int, out: Tensor, weights: list[Tensor]) -> None:
        """Add a row for the running module; it owns all parameters not owned before."""
        names = frozenset().union(*(_parameter_names(w) or () for w in weights))
        params = sum(self._shapes[name].numel() for name in names - self._owned)
        self._owned |= names
        module_name = self.running[-1][0]
        self._rows.append(Layer(module_name, kind, tuple(out.shape), macs, params))

    def _add_product(
        self, product: "_Product", macs: int, out: Any, tensors: list, args: tuple
    ) -> None:
        kind, result = product.kind, [*list_tensors(out), *tensors][0]
        if kind == "conv":
            kind = _convolution_kind(args)
        elif kind == "matmul" and isinstance(
            self.running[-1][1], nn.MultiheadAttention
        ):
            kind = "attention"
        self._use(tensors[: product.inputs])
        self._add(kind, macs, result, tensors[product.inputs :])
        if product.kind in ("conv", "linear") and any(
            isinstance(arg, Tensor) for arg in args[2:3]
        ):
            self.counts[f"{product.kind}_bias"] += result.numel()

    def _add_norm(self, name: str, out: Tensor, tensors: list, args: tuple) -> None:
        self._add("norm", 0, out, tensors[1:])
        count = "batch_norm" if name == "batch_norm" else "other_norm"
        self.counts[count] += out.numel()
        if any(isinstance(arg, Tensor) for arg in args[_NORMS[name] :][:2]):
            self.counts[f"{count}_affine"] += out.numel()

    def finish(self) -> list[Layer]:
        """Return all rows, those of unused parameters last, one per module."""
        unused: Counter[str] = Counter()
        for name, shape in self._shapes.items():
            if name not in self._used | self._owned:
                unused[name.rpartition(".")[0]] += shape.numel()
        return [
            row
            for row in self._rows
            if row.kind != "parameter" or row.name not in self._owned
        ] + [Layer(name, "unused", (), 0, params) for name, params in unused.items()]


def _parameter_names(tensor: Tensor) -> frozenset[str] | None:
    """Return the names of a constant's parameters; None for an activation."""
    return getattr(tensor, "parameter_names", None)


class _Product(NamedTuple):
    """An operation that multiplies and adds.

    Fields:
        kind: of its row.
        inputs: how many of its first tensors are inputs; the others are weights.
        macs: counts its multiply-adds, given its result and its arguments.
    """

    kind: str
    inputs: int
    macs: Callable[..., int]


def _find_registered(packet: Any) -> _Product | None:
    if packet not in flop_registry:
        return None

    def macs(result, /, *args, **kwargs):
        return flop_registry[packet](*args, **kwargs, out_val=result) // 2

    is_convolution = packet.__name__.endswith("convolution")
    kind = "attention" if packet.__name__.endswith("attention") else "matmul"
    return _Product("conv", 1, macs) if is_convolution else _Product(kind, 0, macs)


def _apply_rule(rule, operator, result, /, *args, **kwargs):
    macs = shape_wrapper(rule)(*args, **kwargs, out_val=result)
    return check_size(macs, f"the result of the rule for {operator}", least=0)


def _convolution_kind(args: tuple) -> str:
    weight, is_transposed, groups = args[1], args[6], args[8]
    if is_transposed:
        return "transposed conv"
    if groups > 1:
        return "depthwise conv" if weight.shape[1] == 1 else "grouped conv"
    return "pointwise conv" if weight.shape[2:].numel() == 1 else "conv"


def _added_macs(out, added, x, y, **scales):
    # The last dimension of y is one of the result, unless y is a vector.
    return x.numel() * (y.shape[-1] if y.ndim > 1 else 1)


def _attention_macs(out, q, k, v, *rest, **options):
    # Queries times keys and weights times values, also where they are masked.
    return out.numel() // v.shape[-1] * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _recurrent_macs(out, *args):
    # Every matrix multiplies one vector per step and sequence. The weights are the last
    # list: a state may be a list too, and packed sequences have batch sizes before it.
    weights = [arg for arg in args if isinstance(arg, (list, tuple))][-1]
    steps = out[0].numel() // out[0].shape[-1]
    return steps * sum(weight.numel() for weight in weights if weight.ndim == 2)


_PRODUCTS = {
    "linear": _Product("linear", 1, lambda out, x, *_: out.numel() * x.shape[-1]),
    "bilinear": _Product(
        "bilinear",
        2,
        lambda out, x, y, w, *_: out.numel() * (y.shape[-1] + w.shape[1:].numel()),
    ),
    # The products with the filters, without the interpolation between pixels.
    "deform_conv": _Product(
        "deformable conv", 1, lambda out, x, w, *_: out.numel() * w.shape[1:].numel()
    ),
    "scaled_dot_product_attention": _Product("attention", 4, _attention_macs),
    **dict.fromkeys(
        "lstm gru rnn_tanh rnn_relu".split(), _Product("recurrent", 1, _recurrent_macs)
    ),
    **dict.fromkeys(
        "matmul mv dot vdot _int_mm".split(),
        _Product("matmul", 0, lambda out, x, *_: out.numel() * x.shape[-1]),
    ),
    **dict.fromkeys(
        "addmm baddbmm addmv addbmm".split(), _Product("matmul", 0, _added_macs)
    ),
}
# Norms, and the position of their first learned argument.
_NORMS = {"batch_norm": 1, "instance_norm": 1} | dict.fromkeys(
    ("layer_norm", "group_norm", "rms_norm"), 2
)
# The counts to which the elements of the input, and of the output, are added.
_ELEMENTS = {
    "max_pool": ("max_pool_in",),
    "adaptive_max_pool": ("max_pool_in",),
    "avg_pool": ("avg_pool_in", "avg_pool_out"),
    "adaptive_avg_pool": ("adaptive_avg_pool_in", "adaptive_avg_pool_out"),
} | dict.fromkeys(
    (
        "relu relu6 hardtanh leaky_relu prelu rrelu elu selu celu gelu silu mish"
        " hardswish hardsigmoid sigmoid tanh softplus log_sigmoid threshold softmax"
        " log_softmax"
    ).split(),
    ("activation",),
)
# Operations that read a value or a device, on which the forward may depend. PyTorch
# raises if the value is unknown.
_READS = {
    *"item is_nonzero equal _local_scalar_dense resolve_conj resolve_neg".split(),
    "device",
}
# Their decomposition reads lengths or indices in C++, which the mode does not see.
_UNDIVIDED = {"_pad_packed_sequence", "tensor_split"}
# Operators of PyTorch that multiply and add, but have no formula above or in the
# registry. Interpolation does not count as a product.
_HEAVY = re.compile(
    r"mm(_|$)|matmul|(^|_)linear$|_trilinear$|conv(?!ert)|attention|transformer_|rnn"
    r"|lstm|gru|fft_.2|cdist|euclidean_dist|cholesky|triangular_solve|geqrf|ormqr"
    r"|linalg_(?!vector_norm|cross|check)"
)
# Libraries whose operators are known above, and suffixes for the number of dimensions
# and for in-place operations.
_VARIANT = re.compile(r"^(aten|prims?|torchvision)::|[123]d(_with_indices)?$|_$")
