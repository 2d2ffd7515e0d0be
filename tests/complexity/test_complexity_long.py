"""Counts of all classification networks of torchvision agree with PyTorch's counter.

Runs in `make test-long`.
"""

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from paperlib.complexity import profile

NETWORKS = torchvision.models.list_models(module=torchvision.models)


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_every_torchvision_classifier_agrees_with_flop_counter(name):
    weightless = {"weights": None} | (
        {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    )
    # RegNet computes its widths with tensors while it is built, which needs a device
    # with numbers.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = torchvision.models.get_model(name, **weightless).to("meta").eval()
    images = torch.empty(1, 3, 224, 224, device="meta")
    with FlopCounterMode(display=False) as peer, torch.no_grad():
        model(images)
    counted = profile(model)
    assert counted.flops == peer.get_total_flops()
    assert counted.params == sum(parameter.numel() for parameter in model.parameters())
