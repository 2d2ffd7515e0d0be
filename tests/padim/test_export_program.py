"""A fitted detector can be exported and compiled as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from refusals import without_type_checks
from test_padim import small_extractor
from torch import nn

from paperlib.backbones import FeatureExtractor
from paperlib.padim import PaDiM


@pytest.fixture(scope="module")
def images():
    return torch.randn(40, 3, 32, 24, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def detector(images):
    """Fitted, with layers that another order of running would mix up."""
    region = torch.ones(32, 24, dtype=torch.bool)
    region[:4] = False
    extractor = small_extractor()
    extractor.layers = ("1", "2")
    return PaDiM(extractor, 8, mode="bicubic", region=region).fit([images[:30]])


@pytest.fixture(scope="module")
def program(detector, images):
    """The exported detector, for a batch of any length."""
    shapes = ({0: torch.export.Dim("n")},)
    with without_type_checks():
        return torch.export.export(detector, (images[:5],), dynamic_shapes=shapes)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_an_exported_detector_scores_any_batch_alike(detector, program, images, n):
    scores, maps = program.module()(images[-n:])
    expected = detector(images[-n:])
    torch.testing.assert_close(maps, expected.maps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores, expected.scores, rtol=1e-5, atol=1e-5)


def test_onnxruntime_scores_as_pytorch(detector, program, images, tmp_path):
    path = tmp_path / "detector.onnx"
    torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (received,) = session.get_inputs()
    for n in (1, 10):
        scores, maps = session.run(None, {received.name: images[-n:].numpy()})
        expected = detector(images[-n:])
        assert abs(scores / expected.scores.numpy() - 1).max() < 1e-4
        assert abs(maps - expected.maps.numpy()).max() < 1e-4 * expected.maps.max()


COMPILED = """
import torch
from test_padim import small_extractor
from paperlib.padim import PaDiM

graphs = []

def count(graph, inputs):
    graphs.append(sum("conv2d" in str(node.target) for node in graph.graph.nodes))
    return graph

images = torch.randn(40, 3, 32, 24)
detector = PaDiM(small_extractor(), 8).fit([images])
compiled = torch.compile(detector, backend=count)
for n in (4, 6):
    torch.testing.assert_close(compiled(images[:n]).maps, detector(images[:n]).maps)
assert not any(part._forward_hooks for part in detector.modules())
print(graphs)
"""


@pytest.mark.long
def test_a_compiled_detector_scores_alike_and_keeps_the_network_whole():
    """Without the type checks of the tests, into which the compiler does not look.

    Code is not generated (it takes a minute): what is tested is what is followed.
    """
    paths = os.pathsep.join(["tests/padim", "tests", "."])
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 3 in json.loads(done.stdout)  # all layers of the network in one graph


def test_a_layer_that_does_not_run_is_refused_under_a_compiler():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.first(x)

    extractor = FeatureExtractor(Unused(), ["unused"])
    with pytest.raises(ValueError, match="layer 'unused' did not run"):
        torch.export.export(extractor, (torch.zeros(1, 3, 8, 8),))
    assert not extractor.model.unused._forward_hooks
