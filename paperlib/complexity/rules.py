"""What each PyTorch operation counts when `recorder` records a run: one rule for each
kind of operation.

A rule takes the tape, the operation and its arguments, writes down what there is to
count and returns the result: a tensor without data. It finds the shape itself where
PyTorch's own way, in Python, would take most of the time.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from paperlib.complexity.recorder import Layer, Rule, Tape

aten = torch.ops.aten


def default_rule(tape: Tape, func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operation without a rule: look inside if PyTorch builds it from others;
    else it is no product of tensors.

    Source: none; our own. Departures: none.
    Test: test_complexity.py::test_every_way_to_multiply
    """
    # not in aten, and torchvision need not be imported
    if func.name() == "torchvision::deform_conv2d":
        return _deformable_convolution(tape, func, args, kwargs)
    if not _composite(func):
        return tape.run(func, args, kwargs)
    found: list[Tensor] = []
    args = [tape.to_meta(arg, found) for arg in args]
    kwargs = {name: tape.to_meta(value, found) for name, value in kwargs.items()}
    with tape:
        return func.decompose(*args, **kwargs)


@functools.cache
def _composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


def _plumbing(tape: Tape, func, args: tuple, kwargs: dict) -> Any:
    """Operations that PyTorch builds from others, none of them a product: to look
    inside would only cost time.
    """
    return tape.run(func, args, kwargs)


def _value(tape: Tape, func, args: tuple, kwargs: dict) -> Any:
    """Reading a number or the device of a weight or buffer works; a number of an
    activation, and PyTorch complains.
    """
    return func(*args, **kwargs)


def _product(
    tape: Tape, func, args: tuple, kwargs: dict, data: int
) -> tuple[list, Tensor]:
    """Run a product of tensors, the first `data` of which are not its weights; return
    the arguments on meta as well.

    Its operands may differ in precision: autocast casts a weight, but no meta tensor.
    """
    found: list[Tensor] = []
    meta_args = [tape.to_meta(arg, found) for arg in args]
    for tensor in found[:data]:
        tape.touch(tape.origin(tensor))
    dtype = found[0].dtype
    operands = meta_args
    if dtype.is_floating_point and any(
        tensor.dtype != dtype and tensor.is_floating_point() for tensor in found
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
        **{name: tape.to_meta(value, found) for name, value in kwargs.items()},
    )


def _convolution(tape: Tape, func, args: tuple, kwargs: dict) -> Tensor:
    args, out = _product(tape, func, args, kwargs, data=1)
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    transposed = (
        args[6]
        if func.overloadpacket in _EITHER_WAY
        else func.overloadpacket in _TRANSPOSED
    )
    # Each filter is laid once on every position: of the output, or, transposed, of the
    # input.
    macs = (x if transposed else out).numel() * (weight.numel() // weight.shape[0])
    tape.add(
        "transposed conv" if transposed else _convolution_kind(x, weight),
        macs,
        out,
        weight,
        bias,
    )
    if bias is not None:
        tape.counts["conv_bias"] += out.numel()
    return out


def _convolution_kind(x: Tensor, weight: Tensor) -> str:
    # counted from the end, as the batch dimension may be missing
    in_channels = x.shape[1 - weight.ndim]
    groups = in_channels // weight.shape[1]
    if groups > 1:
        return "depthwise conv" if groups == in_channels else "grouped conv"
    return "pointwise conv" if all(side == 1 for side in weight.shape[2:]) else "conv"


def _deformable_convolution(tape: Tape, func, args: tuple, kwargs: dict) -> Tensor:
    """The products with the filters; those that interpolate between pixels do not
    count, as in any other resampling.
    """
    args, out = _product(tape, func, args, kwargs, data=1)
    weight, bias = args[1], args[4]
    tape.add(
        "deformable conv",
        out.numel() * (weight.numel() // weight.shape[0]),
        out,
        weight,
        bias,
    )
    # torchvision adds zeros where there is no bias
    tape.counts["conv_bias"] += out.numel()
    return out


def _linear(tape: Tape, func, args: tuple, kwargs: dict) -> Tensor:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    fits = (
        weight.ndim == 2
        and x.ndim > 0
        and x.shape[-1] == weight.shape[1]
        and x.is_floating_point()
        and not kwargs
    )
    if fits and x.is_meta and (bias is None or bias.shape == weight.shape[:1]):
        tape.touch(tape.origin(x))
        # PyTorch's own way to the shape is 60 times slower
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    else:
        args, out = _product(tape, func, args, kwargs, data=1)
    tape.add("linear", out.numel() * weight.shape[-1], out, weight, bias)
    if bias is not None:
        tape.counts["linear_bias"] += out.numel()
    return out


def _bilinear(tape: Tape, func, args: tuple, kwargs: dict) -> Tensor:
    args, out = _product(tape, func, args, kwargs, data=2)
    _, in1, in2 = args[2].shape
    tape.add("bilinear", out.numel() * (in1 + 1) * in2, out, *args[2:4])
    return out


def _matmul(tape: Tape, func, args: tuple, kwargs: dict) -> Tensor:
    args, out = _product(tape, func, args, kwargs, data=0)
    tape.add(_matmul_kind(tape), out.numel() * args[0].shape[-1], out, *args[:2])
    return out


def _matmul_and_add(tape: Tape, func, args: tuple, kwargs: dict) -> Tensor:
    """addmm and its kin: the first argument is added to the product of the next two."""
    args, out = _product(tape, func, args, kwargs, data=0)
    columns = args[2].shape[-1] if args[2].ndim > 1 else 1
    tape.add(_matmul_kind(tape), args[1].numel() * columns, out, *args[:3])
    return out


def _matmul_kind(tape: Tape) -> str:
    return "attention" if isinstance(tape.module(), nn.MultiheadAttention) else "matmul"


def _attention(tape: Tape, func, args: tuple, kwargs: dict) -> Tensor:
    """Queries times keys and weights times values; a masked product counts, as the mask
    comes after it.
    """
    q, k, v = args[:3]
    plain = (
        q.is_meta and len(args) == 3 and not kwargs.keys() & {"attn_mask", "enable_gqa"}
    )
    plain = plain and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    if plain and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2]:
        tape.touch(*map(tape.origin, (q, k, v)))
        # PyTorch's own way to the shape takes most of a millisecond. Its fast kernels
        # lay the result out like q.
        out = (
            torch.empty_like(q)
            if q.shape[-1] == v.shape[-1]
            else q.new_empty((*q.shape[:-1], v.shape[-1]))
        )
    else:
        _, out = _product(tape, func, args, kwargs, data=4)
    tape.add(
        "attention",
        out.numel() // v.shape[-1] * k.shape[-2] * (q.shape[-1] + v.shape[-1]),
        out,
    )
    return out


def _recurrent(tape: Tape, func, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
    """An LSTM, GRU or plain RNN over a whole sequence: one row for all its steps."""
    start = len(tape.rows)
    out = default_rule(tape, func, args, kwargs)
    steps = tape.rows[start:]
    macs, params = sum(step.macs for step in steps), sum(step.params for step in steps)
    tape.rows[start:] = [
        Layer(tape.module_name(), "recurrent", tuple(out[0].shape), macs, params)
    ]
    return out


def _norm(tape: Tape, func, args: tuple, kwargs: dict) -> Tensor:
    x = args[0]
    if tape.origin(x) is not None:
        return default_rule(tape, func, args, kwargs)
    over_channels, over_batch = func in _CHANNEL_NORMS, func is aten.batch_norm.default
    first = 1 if over_channels else 2
    learned = [arg for arg in args[first : first + 2] if isinstance(arg, Tensor)]
    if not _fits_norm(func, x, args):
        out = tape.run(func, args, kwargs)
    else:
        out = x.detach() if over_batch and _dense(x) else x.new_empty(x.shape)
    tape.add("norm", 0, out, *learned)
    which = "batch_norm" if over_batch else "other_norm"
    tape.counts["norm_params"] += tape.rows[-1].params
    tape.counts[which] += x.numel()
    tape.counts[f"{which}_affine"] += x.numel() if learned else 0
    return out


def _fits_norm(func, x: Tensor, args: tuple) -> bool:
    """Whether we may skip PyTorch's own meta kernel, which is slow: only where it would
    not have complained.
    """
    if func in _CHANNEL_NORMS or func is aten.group_norm.default:
        grouped = func is aten.group_norm.default
        size = (
            x.shape[1] if x.ndim > 1 and not (grouped and x.shape[1] % args[1]) else 0
        )
        given = args[2:4] if grouped else args[1:5]
    else:
        size = (
            math.prod(args[1])
            if tuple(x.shape[-len(args[1]) :]) == tuple(args[1])
            else 0
        )
        given = args[2:4]
    return size > 0 and all(
        arg.numel() == size for arg in given if isinstance(arg, Tensor)
    )


def _activation(tape: Tape, func, args: tuple, kwargs: dict) -> Tensor:
    if tape.origin(args[0]) is None:
        tape.counts["activation"] += args[0].numel()
    return _elementwise(tape, func, args, kwargs)


def _elementwise(tape: Tape, func, args: tuple, kwargs: dict) -> Tensor:
    """Operations on one tensor, or on two of which one has the result's shape:
    PyTorch's way there is slow.
    """
    x, y = args[0], args[1] if len(args) > 1 else None
    if (
        isinstance(y, complex)
        or kwargs.keys() & {"dtype", "out"}
        or not isinstance(x, Tensor)
    ):
        return default_rule(tape, func, args, kwargs)
    small = None
    if isinstance(y, Tensor):
        x, small = (x, y) if _fits_in(y, x) else (y, x)
        if not _fits_in(small, x):
            return default_rule(tape, func, args, kwargs)
    if (
        not x.is_floating_point()
        or tape.origin(x) is not None
        or (x is not args[0] and func._schema.is_mutable)
    ):
        return default_rule(tape, func, args, kwargs)
    if small is not None:
        tape.touch(tape.origin(small))
    return _like(func, x)


def _fits_in(small: Tensor, big: Tensor) -> bool:
    """Whether small, spread over big, gives a tensor like big."""
    pairs = zip(reversed(small.shape), reversed(big.shape), strict=False)
    return (
        small.dtype == big.dtype
        and small.ndim <= big.ndim
        and all(side in (1, whole) for side, whole in pairs)
    )


def _like(func, x: Tensor) -> Tensor:
    """The result of an operation that works element by element on x."""
    if func._schema.is_mutable:
        return x
    return x.detach() if _dense(x) else torch.empty_like(x)


def _dense(x: Tensor) -> bool:
    return (
        x.is_contiguous()
        or x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _softmax(tape: Tape, func, args: tuple, kwargs: dict) -> Tensor:
    if tape.origin(args[0]) is None:
        tape.counts["activation"] += args[0].numel()
    return tape.run(func, args, kwargs)


def _pool(tape: Tape, func, args: tuple, kwargs: dict) -> Any:
    out = tape.run(func, args, kwargs)
    what = _POOLS[func]
    if tape.origin(args[0]) is None:
        tape.counts[f"{what}_in"] += args[0].numel()
        if what != "max_pool":
            tape.counts[f"{what}_out"] += out.numel()
    return out


def _overloads(names: Iterable[str]) -> list:
    """Every overload of the named operations that this version of PyTorch has."""
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    return [
        getattr(packet, overload)
        for packet in packets
        for overload in packet.overloads()
    ]


def _each(*names: str) -> list[str]:
    """An operation's names in one, two and three dimensions."""
    return [f"{name}{dimensions}d" for name in names for dimensions in (1, 2, 3)]


_TRANSPOSED = {aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d}
_EITHER_WAY = {aten.convolution, aten._convolution}  # a flag in place 6 says which way
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
RULES: dict[Any, Rule] = {
    func: rule
    for rule, funcs in (
        (
            _convolution,
            _overloads(
                (*_each("conv", "conv_transpose"), "convolution", "_convolution")
            ),
        ),
        (_linear, _overloads(["linear"])),
        (_bilinear, _overloads(["bilinear"])),
        (_matmul, _overloads(("matmul", "mm", "bmm", "mv", "dot", "vdot", "_int_mm"))),
        (
            _matmul_and_add,
            _overloads(
                (
                    "addmm",
                    "addmm_",
                    "baddbmm",
                    "baddbmm_",
                    "addbmm",
                    "addbmm_",
                    "addmv",
                    "addmv_",
                )
            ),
        ),
        (_attention, _overloads(["scaled_dot_product_attention"])),
        (_recurrent, _overloads(("lstm", "gru", "rnn_tanh", "rnn_relu"))),
        (
            _norm,
            _overloads(
                ("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm")
            ),
        ),
        (
            _activation,
            _overloads((*_ACTIVATIONS, *(f"{name}_" for name in _ACTIVATIONS))),
        ),
        (_softmax, (aten.softmax.int, aten.log_softmax.int)),
        (_pool, _POOLS),
        (
            _elementwise,
            (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor),
        ),
        (
            _elementwise,
            (aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor),
        ),
        (
            _elementwise,
            _overloads(
                ("exp", "neg", "sqrt", "rsqrt", "square", "dropout", "dropout_")
            ),
        ),
        (
            _plumbing,
            _overloads(
                (
                    "reshape",
                    "flatten",
                    "unflatten",
                    "contiguous",
                    "chunk",
                    "to",
                    "type_as",
                    "expand_as",
                )
            ),
        ),
        # what FakeTensors are asked for their device
        (_value, [torch.ops.prim.device.default]),
        (
            _value,
            _overloads(("item", "is_nonzero", "equal", "resolve_conj", "resolve_neg")),
        ),
    )
    for func in funcs
}
