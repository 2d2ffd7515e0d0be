import numpy as np
import pytest
import torch
from refusals import refuses
from torch._subclasses.fake_tensor import FakeTensorMode

from paperlib.validation import (
    check_choice,
    check_finite,
    check_images,
    check_integers,
    has_values,
    rgb_batch,
    target_classes,
)


def test_arguments_out_of_range_are_refused_by_name():
    check_integers(steps=1, crops=2)
    with refuses(r"crops=0, pairs=-1; expected at least 1"):
        check_integers(steps=1, crops=0, pairs=-1)
    check_choice("mode", "a", ("a", "b"))
    with refuses("mode='c'; expected one of a, b"):
        check_choice("mode", "c", ("a", "b"))


def test_good_images_are_cut_off_from_the_graph_but_not_copied():
    images = torch.rand(2, 3, 4, 5, requires_grad=True)
    checked = check_images(images)
    assert checked.data_ptr() == images.data_ptr()
    assert not checked.requires_grad
    assert images.requires_grad
    with torch.inference_mode():
        made_inside = torch.rand(2, 3, 4, 5)
    checked = check_images(made_inside)
    assert torch.equal(checked, made_inside) and not checked.is_inference()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 4, 4)), "type ndarray; expected a torch.Tensor"),
        (
            torch.zeros(3, 4, 4),
            r"shape \(3, 4, 4\) and dtype float32; expected a batch .*images\[None\]",
        ),
        (torch.zeros(1, 2, 3, 4, 4), r"expected a batch \(N, C, H, W\)$"),
        (
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
            "dtype uint8; expected floating point",
        ),
        (torch.zeros(0, 3, 4, 4), "at least one image"),
        (torch.zeros(2, 3, 0, 4), "no empty axis"),
        (
            torch.full((1, 3, 2, 2), float("nan")),
            "12 values of images are NaN or infinite, in images number 0;",
        ),
    ],
)
def test_bad_images_are_refused(images, message):
    with refuses(message):
        check_images(images)


def test_the_message_says_which_images():
    images = torch.zeros(12, 3, 2, 2)
    images[[1, 4], 0, 0, 0] = float("inf")
    images[4, 1] = float("-inf")
    with refuses(
        "6 values of images are NaN or infinite, in images number 1, 4;",
    ):
        check_images(images)
    with refuses("in rows number 0, 1, 2, 3, 4, 5, 6, 7, …"):
        check_finite(images / 0, "rows")
    with refuses("1 values of scores .* in scores number 2;"):
        check_finite(torch.tensor([0, 1, float("nan")]), "scores")
    # A sum that overflows is no reason to refuse.
    assert check_images(torch.full((1, 1, 2, 2), 3e38)).shape == (1, 1, 2, 2)


def test_meta_and_fake_tensors_are_not_read():
    meta = torch.empty(2, 3, 4, 4, device="meta")
    assert check_images(meta).shape == meta.shape and not has_values(meta)
    with FakeTensorMode(), torch.device("cuda"):
        fake = torch.rand(2, 3, 4, 4)
        assert check_images(fake).shape == fake.shape and not has_values(fake)
        assert target_classes([1, 2], fake[:, :, 0, 0], 2).device.type == "cuda"
    assert has_values(torch.zeros(1)) and has_values(torch.nn.Parameter(torch.zeros(1)))


def test_targets_become_indices():
    logits = torch.tensor([[0.0, 2, 1], [5, 1, 0]])
    assert target_classes(None, logits, 2).tolist() == [1, 0]
    assert target_classes(2, logits, 2).tolist() == [2, 2]
    for targets in (
        [2, 0],
        (2, 0),
        torch.tensor([2, 0]),
        np.array([2, 0]),
        torch.tensor([2, 0], dtype=torch.uint8),
    ):
        index = target_classes(targets, logits, 2)
        assert index.tolist() == [2, 0] and index.dtype == torch.int64
    assert target_classes([[2, 0, 1], [0, 0, 2]], logits, 2).shape == (2, 3)
    assert target_classes([[2, 1]], logits[:1], 1).tolist() == [[2, 1]]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (3, r"targets \[3\] are outside the model's 3 classes, 0 to 2"),
        ([0, -1], r"targets \[-1\] are outside"),
        (
            [0, 7, 1],
            r"shape \(3,\) for 2 images; expected one class, 2 classes, or \(2, T\)",
        ),
        ([], r"shape \(0,\)"),
        (torch.zeros(2, 0, dtype=torch.long), r"shape \(2, 0\)"),
        (torch.zeros(2, 1, 1, dtype=torch.long), r"shape \(2, 1, 1\)"),
        ([0.0, 1.0], "dtype float32; expected integer"),
        ([True, False], "dtype bool; expected integer"),
        ("cat", "can't be read as class indices"),
        ([[0, 1], [2]], "can't be read as class indices"),
    ],
)
def test_targets_that_fit_no_batch_are_refused(targets, message):
    with refuses(message):
        target_classes(targets, torch.zeros(2, 3), 2)


@pytest.mark.parametrize(
    "output",
    [torch.zeros(2, 3, 4), torch.zeros(3, 5), torch.zeros(2), {"out": 1}, None],
)
def test_an_output_that_is_no_logits_is_refused(output):
    with refuses(r"expected logits \(2, classes\).*targets=<function"):
        target_classes(None, output, 2)


def test_images_of_every_layout_become_rgb_batches():
    eight = torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).view(2, 4, 6, 3)
    expected = eight.movedim(-1, 1) / 255
    for same in (eight, eight.movedim(-1, 1), eight / 255, expected):
        assert torch.equal(rgb_batch(same), expected)
    grey = expected[:, :1].expand(-1, 3, -1, -1)
    for same in (eight[..., 0], eight[..., :1], expected[:, :1]):
        assert torch.equal(rgb_batch(same), grey)
    assert torch.equal(rgb_batch(expected[:1, 0]), grey[:1])
    doubles = expected.double()
    assert rgb_batch(doubles).data_ptr() == doubles.data_ptr()
    rounded = torch.tensor([-5e-7, 1 + 5e-7]).expand(1, 3, 4, 2)  # as after resizing
    assert torch.equal(rgb_batch(rounded), rounded)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 4, 6), r"photos of shape \(3, 4, 6\) .*images\[None\]"),
        (torch.zeros(4, 6, 3).byte(), r"photos of shape \(4, 6, 3\) .*images\[None\]"),
        (torch.zeros(4, 6, 4).byte(), r"\(4, 6, 4\) .*images\[None\]"),
        (torch.zeros(2, 4, 6, 2).byte(), "with 3 channels or 1$"),
        (torch.zeros(2, 3, 6, 1), "the axis of the colours is ambiguous"),
        (torch.zeros(2, 3, 0, 6), "are empty"),
        (torch.zeros(2, 3, 4, 6).int(), "dtype int32; expected uint8"),
        (torch.full((2, 3, 4, 6), -0.1), "range from -0.1 to -0.1"),
    ],
)
def test_images_of_unknown_layout_or_range_are_refused(images, message):
    with refuses(message):
        rgb_batch(images, "photos")
