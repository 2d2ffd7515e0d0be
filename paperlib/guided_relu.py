"""Guided backpropagation's rule for ReLUs, in every form that a network calls."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from paperlib.inference import (
    HOOK_NUMBERS,
    hook_in_this_thread,
    raise_if_hidden,
    without_compiler,
)
from paperlib.validation import has_values


class GuidedReLU:
    """The switch of a `guided_relu` block: while `on` is False, gradients are plain.

    Attributes:
        on: whether gradients are guided.
        uses_float16: whether an activation in the block was computed in float16.
    """

    on = True
    uses_float16 = False

    def check(self, output: Tensor) -> None:
        """Raise ValueError if an output depends on activations that are not guided.

        A model that runs its parts in other threads has such activations, and so have
        functions written in C++ that contain a ReLU (`nn.RNN(nonlinearity="relu")`).

        Args:
            output: computed inside the block.

        Raises:
            ValueError: with the autograd name of the activation.
        """
        nodes, seen = [output.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [earlier for earlier, _ in node.next_functions]
            if node.name() in _ACTIVATION_NODES and _GUIDED not in node.metadata:
                raise ValueError(
                    f"guided backpropagation did not see an activation ({node.name()})"
                    " and would return its plain gradient: it ran in another thread"
                    " or inside a C++ function. Use a model that runs in the calling"
                    " thread and calls its activations from Python"
                )


@contextmanager
def guided_relu(*, positive_gradients: bool = False) -> Iterator[GuidedReLU]:
    r"""Apply the rule of guided backpropagation to every ReLU in the `with` block.

    $$R^l = [f^l > 0]\,[R^{l+1} > 0]\,R^{l+1}$$   with $f^l$ the ReLU's input and
    $R^{l+1}$ the gradient at its output; for a ReLU6 the gradient is also zero where
    $f^l \ge 6$.

    All ways to write a ReLU are recognised: `nn.ReLU`, `nn.ReLU6`, `F.relu`, `F.relu6`,
    `F.hardtanh` from 0, `x.relu_()`, `clamp`, `clip` and `clamp_min` at 0, `threshold`
    to 0, `maximum` with zeros; in place or not; shared or not. A ReLU composed of
    arithmetic (`x * (x > 0)`) cannot be distinguished from other products and keeps its
    plain gradient, and so does a SiLU composed as `x * sigmoid(x)`: sigmoids are more
    often gates than activations.

    The rule is part of the autograd graph that the forward pass records, so it also
    applies to a backward pass after the block. No module is changed. Only activations
    that run in the thread that entered the block are guided; `switch.check(output)`
    raises if others contributed to an output. Blocks may be nested.

    Args:
        positive_gradients: True applies the rule to other activations (SiLU, GELU,
            leaky ReLU, …) too: negative gradients at their output are set to zero, and
            the others are multiplied by the activation's derivative.

    Yields:
        a switch: while `switch.on` is False, a backward pass over the same graph
        returns plain gradients.

    Raises:
        ValueError: if an activation other than ReLU runs and `positive_gradients` is
            not set, or if a ScriptModule or an nn.DataParallel over several devices
            runs, whose ReLUs cannot be guided.

    Example:
        >>> import torch
        >>> from paperlib.activations import guided_relu
        >>> x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
        >>> with guided_relu():
        ...     y = torch.relu(x)
        >>> torch.autograd.grad(y, x, torch.tensor([4.0, -5.0, 6.0]))[0]
        tensor([0., 0., 6.])

    Source: Springenberg et al., arXiv:1412.6806, Sec. 3.4, as used in Grad-CAM,
        arXiv:1610.02391v4, Sec. 3.2.
    Departures: ReLU6 and, on request, other activations are not in the paper.
    Test: test_activations.py::test_every_way_to_write_a_relu_is_guided
    """
    switch = GuidedReLU()

    def raise_unless_guided(module, inputs):
        raise_if_hidden(module, "a module of the model")

    with (
        hook_in_this_thread(register_module_forward_pre_hook, raise_unless_guided),
        without_compiler(),
        _GuidedMode(switch, positive_gradients),
    ):
        yield switch


class _Activation(NamedTuple):
    """An activation: its argument, a replacement, and its name if it is not a ReLU."""

    x: Any
    # argument, in place → result
    replacement: Callable[[Tensor, bool], Tensor] | None = None
    other: str = ""


class _GuidedMode(TorchFunctionMode):
    """Adds the rule to the results of activations that run in this thread."""

    def __init__(self, switch: GuidedReLU, positive_gradients: bool):
        super().__init__()
        self.switch, self.positive_gradients = switch, positive_gradients

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        # An exported network calls relu.default.
        full_name = getattr(func, "__name__", "").partition(".")[0]
        rule = _RULES.get(full_name.strip("_"))
        if rule and "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        activation = rule(*args, **kwargs) if rule else None
        if activation is None:
            return func(*args, **kwargs)
        if activation.other and not self.positive_gradients:
            raise ValueError(
                "guided backpropagation is defined for ReLU,"
                f" and this network uses {activation.other};"
                " explain it with grad_cam, or set positive_gradients=True to pass"
                " the positive gradients of any activation"
            )
        x = activation.x
        if not (isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        self.switch.uses_float16 |= x.dtype is torch.float16
        in_place = bool(
            full_name.endswith("_")
            or kwargs.get("inplace")
            or any(a is True for a in args[1:])
        )
        run = activation.replacement or (lambda x, _: func(x, *args[1:], **kwargs))
        if not (in_place and x._is_view()):
            return self._hooked(run(x, in_place))
        # The gradient of a view that is changed in place passes through its base, not
        # through hooks on the view.
        return x.copy_(self._hooked(run(x.clone(), in_place)))

    def _hooked(self, result: Tensor) -> Tensor:
        switch = self.switch
        with HOOK_NUMBERS:
            result.register_hook(
                lambda gradient: gradient.clamp_min(0) if switch.on else None
            )
        result.grad_fn.metadata[_GUIDED] = True
        return result


# Classify a call by its arguments; the keys are torch's names without underscores.
# Where torch's gradient differs from a ReLU's at the kink (clamp passes it at 0,
# maximum halves it), a threshold is called instead. Unlike F.relu it does not need its
# result for the backward pass, so the network may change it in place.
def _strict_relu(x: Tensor, in_place: bool) -> Tensor:
    return F.threshold(x, 0.0, 0.0, in_place)


def _hardtanh(input, min_val=-1.0, max_val=1.0, *_, **__):
    return _Activation(
        input,
        other="" if min_val == 0 < max_val else f"hardtanh from {min_val} to {max_val}",
    )


def _threshold(input, threshold=0, value=0, *_, **__):
    return _Activation(
        input,
        other=(
            ""
            if value == 0 <= threshold
            else f"threshold at {threshold} with value {value}"
        ),
    )


def _clamp(input, min=None, max=None, *, out=None):
    if out is not None or not _is_zero(min, input):
        return None
    if max is None:
        return _Activation(input, _strict_relu)
    if isinstance(max, Tensor) or max <= 0:
        return None
    return _Activation(
        input, lambda x, in_place: F.hardtanh(x, 0.0, float(max), in_place)
    )


def _maximum(input, other=None, *_, **__):
    # x.max(0) is a maximum along an axis.
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
        return None
    x = input if _is_zero(other, input) else other if _is_zero(input, other) else None
    return None if x is None else _Activation(x, _strict_relu)


def _elementwise(other, input, *_, **__):
    return _Activation(input, other=other)


def _is_zero(value: Any, x: Tensor) -> bool:
    """Whether a bound is constant zero: a number, or a tensor that broadcasts to x."""
    if not isinstance(value, Tensor):
        return value is not None and not isinstance(value, bool) and value == 0
    if (
        value.requires_grad
        or value.numel() == 0
        or value.ndim > x.ndim
        or not has_values(value)
    ):
        return False
    return (
        all(a in (1, b) for a, b in zip(value.shape[::-1], x.shape[::-1], strict=False))
        and not value.any()
    )


_OTHER_ACTIVATIONS = (
    "celu elu gelu hardshrink hardswish leaky_relu log_sigmoid logsigmoid mish prelu"
    " rrelu selu silu softplus softshrink softsign tanh tanhshrink"
).split()
_RULES: dict[str, Callable[..., _Activation | None]] = {
    "relu": partial(_elementwise, ""),
    "relu6": partial(_elementwise, ""),
    "hardtanh": _hardtanh,
    "threshold": _threshold,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "maximum": _maximum,
    "max": _maximum,
    **{name: partial(_elementwise, name) for name in _OTHER_ACTIVATIONS},
}
# Autograd's names of activations. Gates (tanh and sigmoid of an LSTM) and clamps, which
# need not be activations, are not in the list.
_ACTIVATION_NODES = {
    f"{name}Backward0"
    for name in (
        "Relu Hardtanh Threshold Celu Elu Gelu Hardshrink Hardswish LeakyRelu Mish"
        " PreluKernel RreluWithNoise Silu Softplus Softshrink"
    ).split()
}
_GUIDED = "paperlib.guided"  # key in the metadata of autograd nodes that have the rule
