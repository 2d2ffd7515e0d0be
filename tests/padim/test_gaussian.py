from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_gaussian import naive_distance, naive_statistics
from refusals import refuses
from safetensors import safe_open
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from two_processes import run_twice

from paperlib import precision
from paperlib.padim import PatchGaussian, leave_one_out_distance, mahalanobis_distance
from paperlib.padim.gaussian import _inverse_cholesky, whiten, whitened_norm
from paperlib.validation import NotFitted


def fed(x, *lengths, **options):
    gaussian = PatchGaussian(*x.shape[1:], **options)
    for batch in x.split(lengths or len(x)):
        gaussian.update(batch)
    return gaussian


# ---- the Gaussians ----


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 12),
    p=st.integers(1, 5),
    d=st.sampled_from([1, 3, 20, 150]),
    cut=st.integers(1, 11),
    wide=st.booleans(),
)
def test_batches_give_numpys_mean_and_covariance(n, p, d, cut, wide):
    generator = torch.Generator().manual_seed(n * 100 + d)
    x = torch.randn(
        n, p, d, generator=generator, dtype=torch.float64 if wide else torch.float32
    )
    gaussian = fed(
        x,
        *[part for part in (min(cut, n - 1), 1, n - 1 - min(cut, n - 1)) if part],
        dtype=x.dtype,
    )
    mean, covariance = naive_statistics(x)
    tolerance = 1e-12 if wide else 1e-6
    np.testing.assert_allclose(gaussian.mean(), mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(
        gaussian.covariance(), covariance, rtol=tolerance, atol=5 * tolerance
    )
    assert torch.equal(gaussian.covariance(), gaussian.covariance().mT)
    torch.linalg.cholesky(gaussian.covariance())  # also where n ≤ d
    assert gaussian.covariance().dtype == gaussian.mean().dtype == x.dtype


def test_the_covariance_is_accurate_far_from_zero():
    x = 1e4 + 0.1 * torch.randn(300, 4, 6, generator=torch.Generator().manual_seed(0))
    x = x.float()
    _, truth = naive_statistics(x, 0)
    for gaussian in (
        fed(x),
        fed(x, *[30] * 10),
        fed(x, *[1] * 300),
        fed(x[:100]).merge(fed(x[100:])),
    ):
        error = (
            np.abs(gaussian.covariance(0).numpy() - truth).max() / np.abs(truth).max()
        )
        assert error < 1e-4


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)]
)
def test_halves_merged_agree_with_the_whole(dtype, tolerance):
    x = (
        torch.randn(
            61, 7, 140, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        + 2
    )
    whole = fed(x, dtype=dtype)
    first, second = fed(x[:20], dtype=dtype), fed(x[20:], dtype=dtype)
    before = second.covariance()
    for merged in (
        first.merge(second),
        PatchGaussian(7, 140, dtype).merge(whole),
        whole.merge(PatchGaussian(7, 140, dtype)),
    ):
        assert merged.count == 61
        torch.testing.assert_close(
            merged.covariance(),
            fed(x, dtype=dtype).covariance(),
            rtol=tolerance,
            atol=tolerance,
        )
        torch.testing.assert_close(merged.mean(), x.mean(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(second.covariance(), before)


def test_memory_does_not_depend_on_the_number_of_images():
    def held(gaussian):
        return sum(
            t.numel() * t.element_size()
            for t in vars(gaussian).values()
            if isinstance(t, torch.Tensor)
        )

    x = torch.randn(64, 5, 9)
    assert held(fed(x[:2])) == held(fed(x, *[8] * 8)) == 5 * 9 * 8 + 5 * 9 * 9 * 4


def test_results_come_in_the_dtype_that_was_fed():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(5, 2, 3).to(dtype)
        assert fed(x).mean().dtype == fed(x).covariance().dtype == dtype
        assert fed(x, dtype=torch.float64).covariance().dtype == dtype


def test_one_image_has_no_covariance():
    gaussian = PatchGaussian(2, 3)
    with refuses("0 images; a mean needs at least 1", NotFitted):
        gaussian.mean()
    with refuses(
        "0 images; .* a sample covariance, which divides by N - 1, at least 2"
    ):
        gaussian.covariance()
    gaussian.update(torch.randn(1, 2, 3))
    gaussian.mean()
    with refuses(
        "1 image; .* a sample covariance, which divides by N - 1, at least 2",
    ):
        gaussian.covariance()
    gaussian.update(torch.randn(1, 2, 3))
    with refuses("epsilon=-1"):
        gaussian.covariance(-1)


def test_a_refused_update_does_not_change_a_gaussian():
    x = torch.randn(4, 2, 3)
    gaussian, bad = fed(x), x.clone()
    bad[1, 0, 2] = torch.nan
    for batch, message in (
        (bad, "1 values of x are NaN or infinite, in x number 1"),
        (x[..., :2], r"shape \(4, 2, 2\); expected \(N, 2, 3\)"),
        (x[:0], r"shape \(0, 2, 3\)"),
        (x.to("meta"), "x on meta; the sums are on cpu"),
    ):
        with refuses(message):
            gaussian.update(batch)
    with refuses(r"\(2, 4, torch.float32\); expected \(2, 3, torch.float32\)"):
        gaussian.merge(PatchGaussian(2, 4))
    assert torch.equal(gaussian.covariance(), fed(x).covariance())
    assert gaussian.count == 4
    for arguments in ((0, 3), (2, 0), (2, 3, torch.float16)):
        with refuses("expected"):
            PatchGaussian(*arguments)
    with refuses("no process group; .*call torch.distributed.init_process_group"):
        gaussian.all_reduce()


def test_statistics_take_part_in_no_graph_and_in_inference_mode():
    x = torch.randn(6, 2, 3, requires_grad=True)
    with torch.inference_mode():
        gaussian = fed(x, 2, 4)
    gaussian.update(x)
    assert not gaussian.covariance().requires_grad and gaussian.count == 12


def _of_process(rank, folder):
    """One of two processes: uneven shares, then a process without images, then sizes
    that disagree.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    x = torch.load(f"{folder}/x.pt", weights_only=True)
    uneven = fed((x[:3], x[3:])[rank], dtype=torch.float64).all_reduce()
    lonely = (
        fed(x, dtype=torch.float64)
        if rank == 0
        else PatchGaussian(*x.shape[1:], torch.float64)
    )
    lonely.all_reduce()
    message = ""
    try:
        PatchGaussian(2, 3 + rank).all_reduce()
    except ValueError as error:
        message = str(error)
    found = {}
    for name, gaussian in (("uneven", uneven), ("lonely", lonely)):
        found |= {
            f"{name}.mean": gaussian.mean(),
            f"{name}.covariance": gaussian.covariance(),
        }
    save_file(
        found,
        f"{folder}/{rank}.safetensors",
        {"counts": f"{uneven.count} {lonely.count}", "message": message},
    )
    torch.distributed.destroy_process_group()


def test_two_processes_share_their_statistics(tmp_path):
    x = torch.randn(11, 4, 5, dtype=torch.float64) + 3
    torch.save(x, tmp_path / "x.pt")
    run_twice(_of_process, str(tmp_path))
    mean, covariance = naive_statistics(x)
    for rank in (0, 1):
        with safe_open(tmp_path / f"{rank}.safetensors", "np") as file:
            assert file.metadata()["counts"] == "11 11"
            assert "dimensions" in file.metadata()["message"]
            assert "another process" in file.metadata()["message"]
            for name in ("uneven", "lonely"):
                np.testing.assert_allclose(
                    file.get_tensor(f"{name}.mean"), mean, rtol=1e-12
                )
                np.testing.assert_allclose(
                    file.get_tensor(f"{name}.covariance"),
                    covariance,
                    rtol=1e-12,
                    atol=1e-12,
                )


# ---- the distance ----


@pytest.mark.parametrize(("n", "p", "d"), [(5, 4, 3), (1, 3, 150), (3, 1, 1)])
def test_distance_equals_scipys(n, p, d):
    x = torch.randn(
        30, p, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)
    )
    gaussian = fed(x, dtype=torch.float64)
    mean, cholesky = gaussian.mean(), torch.linalg.cholesky(gaussian.covariance())
    seen = 2 * torch.randn(n, p, d, dtype=torch.float64) + 1
    truth = naive_distance(seen, mean, gaussian.covariance().numpy())
    np.testing.assert_allclose(
        mahalanobis_distance(seen, mean, cholesky), truth, rtol=1e-9
    )
    single = mahalanobis_distance(seen.float(), mean.float(), cholesky.float())
    np.testing.assert_allclose(single, truth, rtol=1e-4)
    whitening, _ = _inverse_cholesky(gaussian.covariance())
    np.testing.assert_allclose(whitened_norm(seen, mean, whitening), truth, rtol=1e-9)
    assert single.dtype == torch.float32 and single.shape == (n, p)
    assert (mahalanobis_distance(mean[None], mean, cholesky) == 0).all()


@pytest.mark.parametrize("d", [1, 2, 17, 100, 150])
def test_inverse_factor_equals_lapacks(d):
    a = torch.randn(
        3, d, 2 * d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)
    )
    covariance = a @ a.mT / (2 * d) + 0.01 * torch.eye(d)
    # Above the diagonal nothing is read.
    below = covariance.tril() + 1e9 * torch.ones(d, d).triu(1)
    found, _ = _inverse_cholesky(below)
    torch.testing.assert_close(
        found, torch.linalg.inv(torch.linalg.cholesky(covariance)), rtol=1e-9, atol=1e-9
    )
    assert torch.equal(found, found.tril())


def test_whitening_is_the_inverse_factor_of_the_covariance():
    # Few: N - 1 is felt.
    x = torch.randn(
        5, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for epsilon in (0.01, 1):
        lower = torch.linalg.cholesky(fed(x, dtype=torch.float64).covariance(epsilon))
        found = whiten(fed(x, dtype=torch.float64), epsilon)
        torch.testing.assert_close(found, torch.linalg.inv(lower), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1, 1e6])
def test_a_whitened_gaussian_refuses_further_use(scale):
    """Its sums are overwritten, also if the factorisation fails (scale 1e6)."""
    x = scale * torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0))
    gaussian, other = fed(x), fed(x)
    with refuses("epsilon=-1"):
        gaussian.covariance(-1)
    if scale == 1:
        whiten(gaussian, 0.01)
    else:
        with refuses("not positive definite"):
            whiten(gaussian, 0.01)
    for use in (
        gaussian.mean,
        gaussian.covariance,
        lambda: gaussian.update(x),
        lambda: gaussian.merge(other),
        lambda: other.merge(gaussian),
        lambda: whiten(gaussian, 0.01),
    ):
        with refuses("consumed by whiten.*fit a new one"):
            use()
    assert torch.equal(other.covariance(), fed(x).covariance())


def test_distance_runs_where_its_input_lies():
    with FakeTensorMode(), torch.device("cuda"):
        fake = mahalanobis_distance(
            torch.rand(2, 3, 4), torch.rand(3, 4), torch.rand(3, 4, 4)
        )
        assert fake.shape == (2, 3) and fake.device.type == "cuda"
        gaussian = fed(torch.rand(5, 3, 4))
        assert gaussian.covariance().device.type == "cuda"
        assert gaussian.mean().device.type == "cuda"


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (
            ((2, 3), (3, 4), (3, 4, 4)),
            "fff",
            r"x \(2, 3\).*expected \(N, P, D\), \(P, D\) and \(P, D, D\)",
        ),
        (((2, 3, 4), (3, 5), (3, 4, 4)), "fff", r"mean \(3, 5\)"),
        (((2, 3, 4), (3, 4), (2, 4, 4)), "fff", r"cholesky \(2, 4, 4\)"),
        (
            ((2, 3, 4), (3, 4), (3, 4, 4)),
            "fdf",
            "mean is torch.float64.*expected the same",
        ),
        (((2, 3, 4), (3, 4), (3, 4, 4)), "hhh", "float16.*float32 or float64"),
    ],
)
def test_distances_with_mismatched_arguments_are_refused(shapes, dtypes, message):
    kinds = {"f": torch.float32, "d": torch.float64, "h": torch.float16}
    x = [
        torch.zeros(shape, dtype=kinds[kind])
        for shape, kind in zip(shapes, dtypes, strict=True)
    ]
    with refuses(message):
        mahalanobis_distance(*x)


@pytest.mark.parametrize(
    ("n", "d"), [(30, 4), (6, 20)]
)  # more images than dimensions, and fewer
def test_leaving_out_equals_fitting_again(n, d):
    x = torch.randn(
        n, 3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(n)
    )
    gaussian = fed(x, dtype=torch.float64)
    fitted = mahalanobis_distance(
        x, gaussian.mean(), torch.linalg.cholesky(gaussian.covariance(0.01))
    )
    corrected = leave_one_out_distance(fitted, n)
    for k in range(n):
        rest = fed(x[torch.arange(n) != k], dtype=torch.float64)
        cholesky = torch.linalg.cholesky(rest.covariance(0.01 * (n - 1) / (n - 2)))
        truth = mahalanobis_distance(x[k : k + 1], rest.mean(), cholesky)[0]
        torch.testing.assert_close(corrected[k], truth, rtol=1e-7, atol=0)
    assert fitted.max() < (n - 1) / n**0.5  # however strange the image
    with refuses("count=2; expected at least 3"):
        leave_one_out_distance(fitted, 2)
    bound = (n - 1) / n**0.5
    with refuses(f"up to .*; those of {n} training images are at most {bound:.4g}"):
        leave_one_out_distance(torch.tensor([0.5, 1.01]) * bound, n)


# ---- precision ----


def _new_setting(value):
    for backend in precision._BACKENDS:
        backend.fp32_precision = value


LOWERED = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "one backend": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "the backends' own": lambda: _new_setting("tf32"),
}


def test_a_precision_set_during_a_block_remains_after_it():
    try:
        torch.set_float32_matmul_precision("medium")
        with precision.full_precision():
            with ThreadPoolExecutor(1) as worker:
                worker.submit(torch.set_float32_matmul_precision, "high").result()
        assert torch.get_float32_matmul_precision() == "high"
        with precision.full_precision(), precision.full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("lower", LOWERED)
def test_no_bfloat16_or_tf32_leaks_in(monkeypatch, lower):
    x, seen = torch.randn(40, 3, 300), torch.randn(60, 3, 300)
    covariance = fed(x).covariance()
    whitening, _ = _inverse_cholesky(covariance)
    quiet = whitened_norm(seen, fed(x).mean(), whitening)
    inside, bmm, baddbmm = [], torch.bmm, torch.Tensor.baddbmm_
    note = precision._read_settings
    monkeypatch.setattr(torch, "bmm", lambda *a: inside.append(note()) or bmm(*a))
    monkeypatch.setattr(
        torch.Tensor,
        "baddbmm_",
        lambda *a: inside.append(precision._read_settings()) or baddbmm(*a),
    )
    whitened = whiten(fed(x), 0.01)
    full = {"highest", "ieee", "none"}
    assert inside and all({common, *own} <= full for common, own in inside)
    inside.clear()
    try:
        LOWERED[lower]()
        before = precision._read_settings()
        assert not {before[0], *before[1]} <= full
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fed(x).covariance(), covariance)
            assert torch.equal(whitened_norm(seen, fed(x).mean(), whitening), quiet)
            assert torch.equal(whiten(fed(x), 0.01), whitened)
        assert precision._read_settings() == before  # as the caller had it
    finally:
        torch.set_float32_matmul_precision("highest")
        _new_setting("none")
    assert len(inside) > 5 and all({common, *own} <= full for common, own in inside)
