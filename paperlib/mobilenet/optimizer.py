"""The optimiser's parameter groups: no weight decay on depthwise filters (Sec. 3.2)."""

from torch import nn

from paperlib.validation import check_module, check_number


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split parameters for an optimizer: no weight decay on depthwise filters.

    A depthwise filter has nine weights for one channel: there is little to regularise,
    and the paper reports that "very little or no" decay there is important.

    Args:
        model: any network; a convolution is depthwise when it has one group per input
            channel and more than one.
        weight_decay: the L2 decay of all other parameters.

    Returns:
        two groups for `torch.optim`, the decayed one first; each trainable parameter is
        in exactly one of them.

    Raises:
        ValueError: if `weight_decay` is negative.

    Example:
        >>> import torch
        >>> from paperlib.mobilenet import MobileNetV1, parameter_groups
        >>> groups = parameter_groups(MobileNetV1(), weight_decay=4e-5)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(70, 4e-05), (13, 0.0)]
        >>> optimizer = torch.optim.RMSprop(groups, lr=0.01)

    Source: Howard et al., arXiv:1704.04861v1, Sec. 3.2.
    Departures: "very little or no" is implemented as none.
    Test: test_mobilenet.py::test_depthwise_filters_are_not_decayed
    """
    check_module(model)
    check_number("weight_decay", weight_decay, "a factor such as 4e-5", least=0)
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    depthwise = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, convolutions) and module.groups == module.in_channels > 1
    }
    trainable = [
        parameter for parameter in model.parameters() if parameter.requires_grad
    ]
    return [
        {
            "params": [p for p in trainable if id(p) not in depthwise],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in trainable if id(p) in depthwise], "weight_decay": 0.0},
    ]
