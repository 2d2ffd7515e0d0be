"""Settings of all tests: figures without a screen, GPU tests only with a GPU."""

import matplotlib
import pytest
import torch

matplotlib.use("Agg")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
