"""Time Grad-CAM and Guided Grad-CAM beside pytorch-grad-cam and captum: ResNet-50, random weights, layer4.

The last row is the floor under Guided Grad-CAM: the network's own forward and backward pass to the image, and nothing
else. No way to compute it exactly in this layout can take less.

Runs take turns, so that a machine that slows down slows all of them down. Peak memory is that of a process of its own
for each, above what model and images take. Start it with `python -m tests.bench.bench_gradcam`, or directly; on a
machine that does other work, `OMP_WAIT_POLICY=passive` keeps threads that wait from taking its time.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from captum.attr import GuidedGradCam, LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, when started directly

from paperlib.gradcam import grad_cam, guided_grad_cam  # noqa: E402

FLOOR = "Guided Grad-CAM, the floor"


def contenders(batch: int, channels_last: bool) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by method and library; each returns maps (N, h, w), or guided gradients (N, 3, H, W)."""
    torch.manual_seed(0)
    model, images = torchvision.models.resnet50().eval(), torch.randn(batch, 3, 224, 224)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    classes = torch.arange(batch)
    captum_map, captum_guided = LayerGradCam(model, model.layer4), GuidedGradCam(model, model.layer4)

    def pytorch_grad_cam() -> Tensor:
        peer = GradCAM(model, [model.layer4])
        peer(images, [ClassifierOutputTarget(int(c)) for c in classes])  # scales and resizes its maps as well
        found = peer.activations_and_grads
        a, g = found.activations[0].numpy(), found.gradients[0].numpy()
        raw = peer.get_cam_image(images, model.layer4, None, a, g)
        peer.activations_and_grads.release()
        return torch.from_numpy(raw).clamp_min(0)

    def floor() -> Tensor:
        source = images.clone().requires_grad_()
        return torch.autograd.grad(model(source).gather(1, classes[:, None]).sum(), source)[0]

    return {
        "Grad-CAM, paperlib": lambda: grad_cam(model, images, "layer4", classes).maps,
        "Grad-CAM, pytorch-grad-cam": pytorch_grad_cam,
        "Grad-CAM, captum": lambda: captum_map.attribute(images, classes, relu_attributions=True)[:, 0].detach(),
        "Guided Grad-CAM, paperlib": lambda: guided_grad_cam(model, images, "layer4", classes),
        "Guided Grad-CAM, captum": lambda: captum_guided.attribute(
            images, classes, interpolate_mode="bilinear"
        ).detach(),
        FLOOR: floor,
    }


def high_water() -> int:
    """The most memory that this process has had resident, in MiB; Linux only."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


def peak_mebibytes(name: str, arguments: list[str]) -> int:
    """Run one contender once in a process of its own and read what it took above model and images."""
    found = subprocess.run(
        [sys.executable, __file__, *arguments, "--peak", name], capture_output=True, text=True, check=True
    )
    return int(found.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=7, help="timed runs of each (default 7)")
    parser.add_argument("--batch", type=int, default=8, help="images (default 8)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--channels-last", action="store_true", help="give all of them channels-last images")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    timed = contenders(options.batch, options.channels_last)
    if options.peak:
        before = high_water()
        timed[options.peak]()
        print(high_water() - before)
        return

    results = {name: run() for name, run in timed.items()}  # also a warm-up
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.n):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    layout = "channels last" if options.channels_last else "channels first"
    print(f"ResNet-50 layer4, {options.batch} images of 224×224, {layout}, {options.n} runs, ", end="")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':27} {'median ms':>9}  {'min to max ms':>15}  {'ratio':>5}  {'peak MiB':>8}  {'difference':>10}")
    for name, times in seconds.items():
        ours = f"{name.split(',')[0]}, paperlib"
        median = statistics.median(times)
        ratio = median / statistics.median(seconds[ours])
        spread = f"{1e3 * min(times):.0f} to {1e3 * max(times):.0f}"
        difference = ((results[name] - results[ours]).norm() / results[ours].norm()).item()
        passed = [
            f"--batch={options.batch}",
            f"--threads={options.threads}",
            *["--channels-last"] * options.channels_last,
        ]
        peak = peak_mebibytes(name, passed)
        apart = "" if name == FLOOR else f"{difference:10.1e}"  # a plain gradient, not a guided one
        print(f"{name:27} {1e3 * median:9.0f}  {spread:>15}  {ratio:5.2f}  {peak:8,}  {apart:>10}")
    print(
        "ratio: time over paperlib's for the same method; difference: norm of the results' difference over paperlib's."
    )


if __name__ == "__main__":
    main()
