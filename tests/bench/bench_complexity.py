"""Compare `profile` with fvcore, PyTorch's counter and plain hooks, on ResNet-50."""

import copy
import logging

import torch
import torchvision
from measure import COMMON, OURS, Contender, Part, peer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from paperlib.complexity import profile

SHAPE = (1, 3, 224, 224)


def by_hooks(model: nn.Module) -> int:
    """Count as most published scripts do: with hooks, in a real forward pass."""
    total, handles = 0, []

    def count(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        total += output[0].numel() * (layer.weight[0].numel())

    try:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                handles.append(module.register_forward_hook(count))
        with torch.no_grad():
            model(torch.zeros(SHAPE, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return total


NOTE = "also lists type, shape and parameters of each layer"


def counting(full: bool, device: torch.device) -> Part:
    model = torchvision.models.resnet50().eval().to(device)
    on_meta, missing = copy.deepcopy(model).to("meta"), {}

    def counter(network: nn.Module) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as mode:
            network(torch.zeros(SHAPE, device=next(network.parameters()).device))
        return mode.get_total_flops() // 2

    contenders = [
        Contender(OURS, lambda: profile(model, SHAPE).macs, note=NOTE),
        Contender(COMMON, lambda: by_hooks(model)),
        Contender("torch's counter", lambda: counter(model)),
        Contender(
            "torch's counter, meta",
            lambda: counter(on_meta),
            note="reports no layer types, parameters or shapes",
        ),
    ]
    with peer(missing, "fvcore"):
        from fvcore.nn import FlopCountAnalysis

        logging.getLogger("fvcore").setLevel(logging.ERROR)

        def fvcore() -> int:
            with torch.no_grad():
                return (
                    FlopCountAnalysis(model, torch.zeros(SHAPE, device=device))
                    .unsupported_ops_warnings(False)
                    .total()
                )

        contenders.append(
            Contender("fvcore", fvcore, note="counts batch norm and pooling too")
        )
    return Part("count ResNet-50", contenders, 0, 0, missing)


PARTS = {"counting": counting}
