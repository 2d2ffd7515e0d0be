"""The rules that count PyTorch's operations for `recorder`, one per kind of operation.

A rule receives the recorder, the operation and its arguments, records the counts and
returns the result: a tensor without data. It computes the shape itself where PyTorch's
meta kernel, which is written in Python, would take most of the time.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from paperlib.complexity.recorder import Layer, MacRecorder, Rule

aten = torch.ops.aten


def default_rule(recorder: MacRecorder, func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operation without a rule: decompose it if composite, else count nothing.

    Source: none; our own. Departures: none.
    Test: test_complexity.py::test_every_way_to_multiply
    """
    # It is not in aten, and torchvision may not be imported.
    if func.name() == "torchvision::deform_conv2d":
        return _deformable_convolution(recorder, func, args, kwargs)
    if not _is_composite(func):
        return recorder.run(func, args, kwargs)
    tensors: list[Tensor] = []
    args = [recorder.to_meta(arg, tensors) for arg in args]
    kwargs = {name: recorder.to_meta(value, tensors) for name, value in kwargs.items()}
    with recorder:
        return func.decompose(*args, **kwargs)


@functools.cache
def _is_composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


def _run_composite(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Any:
    """Run a composite operation without products, which need not be decomposed."""
    return recorder.run(func, args, kwargs)


def _read_value(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Any:
    """Read a value or device; for values of activations PyTorch raises."""
    return func(*args, **kwargs)


def _product(
    recorder: MacRecorder, func, args: tuple, kwargs: dict, data: int
) -> tuple[list, Tensor]:
    """Run a product, and return its arguments on meta and its result.

    The first `data` operands are not weights. Operands may differ in precision, because
    autocast casts weights, but not meta tensors.
    """
    tensors: list[Tensor] = []
    meta_args = [recorder.to_meta(arg, tensors) for arg in args]
    for tensor in tensors[:data]:
        recorder.touch(recorder.origin(tensor))
    dtype = tensors[0].dtype
    operands = meta_args
    if dtype.is_floating_point and any(
        tensor.dtype != dtype and tensor.is_floating_point() for tensor in tensors
    ):
        operands = [
            (
                arg.to(dtype)
                if isinstance(arg, Tensor) and arg.is_floating_point()
                else arg
            )
            for arg in meta_args
        ]
    return meta_args, func(
        *operands,
        **{name: recorder.to_meta(value, tensors) for name, value in kwargs.items()},
    )


def _convolution(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Tensor:
    args, out = _product(recorder, func, args, kwargs, data=1)
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    transposed = (
        args[6]
        if func.overloadpacket in _MAYBE_TRANSPOSED
        else func.overloadpacket in _TRANSPOSED
    )
    # Each filter is applied once at every position: of the output, or, if transposed,
    # of the input.
    macs = (x if transposed else out).numel() * (weight.numel() // weight.shape[0])
    recorder.add(
        "transposed conv" if transposed else _convolution_kind(x, weight),
        macs,
        out,
        weight,
        bias,
    )
    if bias is not None:
        recorder.counts["conv_bias"] += out.numel()
    return out


def _convolution_kind(x: Tensor, weight: Tensor) -> str:
    # Counted from the end, because the batch dimension may be missing.
    in_channels = x.shape[1 - weight.ndim]
    groups = in_channels // weight.shape[1]
    if groups > 1:
        return "depthwise conv" if groups == in_channels else "grouped conv"
    return "pointwise conv" if all(side == 1 for side in weight.shape[2:]) else "conv"


def _deformable_convolution(
    recorder: MacRecorder, func, args: tuple, kwargs: dict
) -> Tensor:
    """Count the products with the filters, not the interpolation between pixels."""
    args, out = _product(recorder, func, args, kwargs, data=1)
    weight, bias = args[1], args[4]
    recorder.add(
        "deformable conv",
        out.numel() * (weight.numel() // weight.shape[0]),
        out,
        weight,
        bias,
    )
    # torchvision adds zeros where there is no bias.
    recorder.counts["conv_bias"] += out.numel()
    return out


def _linear(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Tensor:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    has_simple_shapes = (
        weight.ndim == 2
        and x.ndim > 0
        and x.shape[-1] == weight.shape[1]
        and x.is_floating_point()
        and not kwargs
    )
    if (
        has_simple_shapes
        and x.is_meta
        and (bias is None or bias.shape == weight.shape[:1])
    ):
        recorder.touch(recorder.origin(x))
        # PyTorch's meta kernel is 60 times slower.
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    else:
        args, out = _product(recorder, func, args, kwargs, data=1)
    recorder.add("linear", out.numel() * weight.shape[-1], out, weight, bias)
    if bias is not None:
        recorder.counts["linear_bias"] += out.numel()
    return out


def _bilinear(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Tensor:
    args, out = _product(recorder, func, args, kwargs, data=2)
    _, in1, in2 = args[2].shape
    recorder.add("bilinear", out.numel() * (in1 + 1) * in2, out, *args[2:4])
    return out


def _matmul(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Tensor:
    args, out = _product(recorder, func, args, kwargs, data=0)
    recorder.add(
        _matmul_kind(recorder), out.numel() * args[0].shape[-1], out, *args[:2]
    )
    return out


def _matmul_and_add(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Tensor:
    """Count addmm and its variants: argument 0 plus the product of the next two."""
    args, out = _product(recorder, func, args, kwargs, data=0)
    columns = args[2].shape[-1] if args[2].ndim > 1 else 1
    recorder.add(_matmul_kind(recorder), args[1].numel() * columns, out, *args[:3])
    return out


def _matmul_kind(recorder: MacRecorder) -> str:
    return (
        "attention"
        if isinstance(recorder.module(), nn.MultiheadAttention)
        else "matmul"
    )


def _attention(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Tensor:
    """Count queries times keys and weights times values, also where they are masked."""
    q, k, v = args[:3]
    is_simple = (
        q.is_meta and len(args) == 3 and not kwargs.keys() & {"attn_mask", "enable_gqa"}
    )
    is_simple = is_simple and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    if is_simple and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2]:
        recorder.touch(*map(recorder.origin, (q, k, v)))
        # PyTorch's meta kernel takes most of a millisecond. Its fast kernels return the
        # layout of q.
        out = (
            torch.empty_like(q)
            if q.shape[-1] == v.shape[-1]
            else q.new_empty((*q.shape[:-1], v.shape[-1]))
        )
    else:
        _, out = _product(recorder, func, args, kwargs, data=4)
    recorder.add(
        "attention",
        out.numel() // v.shape[-1] * k.shape[-2] * (q.shape[-1] + v.shape[-1]),
        out,
    )
    return out


def _recurrent(
    recorder: MacRecorder, func, args: tuple, kwargs: dict
) -> tuple[Tensor, ...]:
    """Count an LSTM, GRU or plain RNN over a sequence: one row for all its steps."""
    start = len(recorder.rows)
    out = default_rule(recorder, func, args, kwargs)
    steps = recorder.rows[start:]
    macs, params = sum(step.macs for step in steps), sum(step.params for step in steps)
    recorder.rows[start:] = [
        Layer(recorder.module_name(), "recurrent", tuple(out[0].shape), macs, params)
    ]
    return out


def _norm(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Tensor:
    x = args[0]
    if recorder.origin(x) is not None:
        return default_rule(recorder, func, args, kwargs)
    over_channels, over_batch = func in _CHANNEL_NORMS, func is aten.batch_norm.default
    first = 1 if over_channels else 2
    learned = [arg for arg in args[first : first + 2] if isinstance(arg, Tensor)]
    if not _fits_norm(func, x, args):
        out = recorder.run(func, args, kwargs)
    else:
        out = x.detach() if over_batch and _is_contiguous(x) else x.new_empty(x.shape)
    recorder.add("norm", 0, out, *learned)
    which = "batch_norm" if over_batch else "other_norm"
    recorder.counts["norm_params"] += recorder.rows[-1].params
    recorder.counts[which] += x.numel()
    recorder.counts[f"{which}_affine"] += x.numel() if learned else 0
    return out


def _fits_norm(func, x: Tensor, args: tuple) -> bool:
    """Whether PyTorch's slow meta kernel can be skipped, because it would not raise."""
    if func in _CHANNEL_NORMS or func is aten.group_norm.default:
        grouped = func is aten.group_norm.default
        size = (
            x.shape[1] if x.ndim > 1 and not (grouped and x.shape[1] % args[1]) else 0
        )
        parameters = args[2:4] if grouped else args[1:5]
    else:
        size = (
            math.prod(args[1])
            if tuple(x.shape[-len(args[1]) :]) == tuple(args[1])
            else 0
        )
        parameters = args[2:4]
    return size > 0 and all(
        arg.numel() == size for arg in parameters if isinstance(arg, Tensor)
    )


def _activation(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Tensor:
    if recorder.origin(args[0]) is None:
        recorder.counts["activation"] += args[0].numel()
    return _elementwise(recorder, func, args, kwargs)


def _elementwise(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Tensor:
    """Run an operation on each element without PyTorch's slow meta kernel.

    It has one tensor argument, or two of which one has the result's shape.
    """
    x, y = args[0], args[1] if len(args) > 1 else None
    if (
        isinstance(y, complex)
        or kwargs.keys() & {"dtype", "out"}
        or not isinstance(x, Tensor)
    ):
        return default_rule(recorder, func, args, kwargs)
    small = None
    if isinstance(y, Tensor):
        x, small = (x, y) if _broadcasts_to(y, x) else (y, x)
        if not _broadcasts_to(small, x):
            return default_rule(recorder, func, args, kwargs)
    if (
        not x.is_floating_point()
        or recorder.origin(x) is not None
        or (x is not args[0] and func._schema.is_mutable)
    ):
        return default_rule(recorder, func, args, kwargs)
    if small is not None:
        recorder.touch(recorder.origin(small))
    return _empty_result(func, x)


def _broadcasts_to(small: Tensor, big: Tensor) -> bool:
    """Whether `small` broadcasts to the shape of `big`, with the same dtype."""
    pairs = zip(reversed(small.shape), reversed(big.shape), strict=False)
    return (
        small.dtype == big.dtype
        and small.ndim <= big.ndim
        and all(side in (1, whole) for side, whole in pairs)
    )


def _empty_result(func, x: Tensor) -> Tensor:
    """Return the result of an operation on each element of x."""
    if func._schema.is_mutable:
        return x
    return x.detach() if _is_contiguous(x) else torch.empty_like(x)


def _is_contiguous(x: Tensor) -> bool:
    return (
        x.is_contiguous()
        or x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _softmax(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Tensor:
    if recorder.origin(args[0]) is None:
        recorder.counts["activation"] += args[0].numel()
    return recorder.run(func, args, kwargs)


def _pool(recorder: MacRecorder, func, args: tuple, kwargs: dict) -> Any:
    out = recorder.run(func, args, kwargs)
    kind = _POOLS[func]
    if recorder.origin(args[0]) is None:
        recorder.counts[f"{kind}_in"] += args[0].numel()
        if kind != "max_pool":
            recorder.counts[f"{kind}_out"] += out.numel()
    return out


def _overloads(names: Iterable[str]) -> list:
    """List all overloads of the named operations that this version of PyTorch has."""
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    return [
        getattr(packet, overload)
        for packet in packets
        for overload in packet.overloads()
    ]


def _each(*names: str) -> list[str]:
    """List the names of operations in one, two and three dimensions."""
    return [f"{name}{dimensions}d" for name in names for dimensions in (1, 2, 3)]


_TRANSPOSED = {aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d}
_MAYBE_TRANSPOSED = {
    aten.convolution,
    aten._convolution,
}  # argument 6: whether transposed
_CHANNEL_NORMS = {aten.batch_norm.default, aten.instance_norm.default}
_POOLS = {
    **dict.fromkeys(_overloads(_each("max_pool", "adaptive_max_pool")), "max_pool"),
    **dict.fromkeys(
        _overloads(("max_pool2d_with_indices", "max_pool3d_with_indices")), "max_pool"
    ),
    **dict.fromkeys(_overloads(_each("avg_pool")), "avg_pool"),
    **dict.fromkeys(_overloads(_each("adaptive_avg_pool")), "adaptive_avg_pool"),
}
_ACTIVATIONS = (
    "relu relu6 hardtanh leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish"
    " hardsigmoid sigmoid tanh softplus log_sigmoid threshold"
).split()
_NAMES_BY_RULE: dict[Rule, list[str]] = {
    _convolution: [*_each("conv", "conv_transpose"), "convolution", "_convolution"],
    _linear: ["linear"],
    _bilinear: ["bilinear"],
    _matmul: "matmul mm bmm mv dot vdot _int_mm".split(),
    _matmul_and_add: (
        "addmm addmm_ baddbmm baddbmm_ addbmm addbmm_ addmv addmv_".split()
    ),
    _attention: ["scaled_dot_product_attention"],
    _recurrent: "lstm gru rnn_tanh rnn_relu".split(),
    _norm: "batch_norm instance_norm layer_norm group_norm rms_norm".split(),
    _activation: [*_ACTIVATIONS, *(f"{name}_" for name in _ACTIVATIONS)],
    _elementwise: "exp neg sqrt rsqrt square dropout dropout_".split(),
    _run_composite: (
        "reshape flatten unflatten contiguous chunk to type_as expand_as".split()
    ),
    _read_value: "item is_nonzero equal resolve_conj resolve_neg".split(),
}
_ARITHMETIC = "add add_ sub sub_ mul mul_ div div_".split()
RULES: dict[Any, Rule] = {
    **{f: rule for rule, names in _NAMES_BY_RULE.items() for f in _overloads(names)},
    **dict.fromkeys((getattr(aten, name).Tensor for name in _ARITHMETIC), _elementwise),
    **dict.fromkeys((aten.softmax.int, aten.log_softmax.int), _softmax),
    **dict.fromkeys(_POOLS, _pool),
    torch.ops.prim.device.default: _read_value,  # queried on FakeTensors
}
