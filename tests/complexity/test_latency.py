import time

import pytest
import torch
from refusals import refuses
from torch import nn

from paperlib.complexity import latency


class Sleep(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def test_rows_carry_the_profiles_macs_and_their_own_bytes():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    conv, relu, flatten, linear = latency.time_layers(
        model, torch.randn(2, 3, 6, 6), repeats=3
    )
    assert conv.macs == 2 * 9 * 3 * 8 * 36
    assert linear.macs == 2 * 8 * 36 * 5
    assert relu.macs == flatten.macs == 0
    assert conv.bytes == 4 * (2 * 3 * 36 + 2 * 8 * 36 + 3 * 8 * 9 + 8)
    assert linear.bytes == 4 * (2 * 8 * 36 + 2 * 5 + 8 * 36 * 5 + 5)
    assert [conv.kind, linear.kind, relu.kind] == ["conv", "linear", "ReLU"]
    assert conv.intensity == conv.macs / conv.bytes
    assert all(row.seconds > 0 for row in (conv, relu, flatten, linear))


def test_bytes_of_tensors_in_tuples_dictionaries_and_keywords_count():
    (row,) = latency.time_layers(nn.LSTM(3, 4), torch.randn(5, 2, 3), repeats=1)
    weights, states = 4 * (4 * 3 + 4 * 4 + 4 + 4), 2 * (2 * 4)
    assert row.bytes == 4 * (5 * 2 * 3 + 5 * 2 * 4 + states + weights)

    class Add(nn.Module):
        def forward(self, pair, *, bias):
            return {"sum": pair[0] + pair[1] + bias}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.add = Add()

        def forward(self, x):
            return self.add((x, x), bias=x[:, 0])["sum"]  # x is read once

    (row,) = latency.time_layers(Model(), torch.randn(2, 2), repeats=1)
    assert row.bytes == 4 * (4 + 2 + 4)


def test_a_layer_without_tensors_has_no_intensity():
    class Two(nn.Module):
        def forward(self):
            return 2

    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = Two()

        def forward(self, x):
            return self.factor() * x

    (row,) = latency.time_layers(Double(), torch.ones(1), repeats=1)
    assert (row.bytes, row.macs, row.intensity) == (0, 0, 0)


def test_a_slow_layer_is_found_and_calls_are_added_up():
    slow = Sleep(0.01)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), slow, nn.ReLU(), slow)
    rows = {
        row.name: row
        for row in latency.time_layers(model, torch.randn(1, 3, 4, 4), repeats=3)
    }
    assert list(rows) == ["0", "1", "2"]
    # Sleeping takes at least that long: a bound, not a timing.
    assert rows["1"].seconds >= 0.02
    assert rows["1"].bytes == 2 * 2 * 4 * 48


def test_nothing_is_left_behind_even_after_an_error():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken on purpose")

    for model, fails in (
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), False),
        (nn.Sequential(nn.ReLU(), Broken()), True),
    ):
        model.train()
        if fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                latency.time_layers(model, torch.randn(2, 3, 4, 4))
        else:
            before = model[0].running_mean.clone()
            latency.time_layers(model, torch.randn(2, 3, 4, 4), repeats=2)
            assert torch.equal(model[0].running_mean, before)
        assert all(module.training for module in model.modules())
        assert not any(
            m._forward_hooks or m._forward_pre_hooks for m in model.modules()
        )


def test_roofline_is_a_minimum():
    machine = latency.Machine(macs_per_second=100.0, bytes_per_second=10.0)
    assert machine.ridge == 10
    assert [machine.attainable(i) for i in (1, 10, 1000)] == [10, 100, 100]


def test_measured_machine_is_consistent():
    machine = latency.measure_machine(side=128, seconds=0.02)
    assert machine.macs_per_second > 1e6 and machine.bytes_per_second > 1e6


@pytest.mark.gpu
def test_events_time_a_gpu():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU()).cuda()
    rows = latency.time_layers(
        model, torch.randn(8, 3, 64, 64, device="cuda"), repeats=3
    )
    assert all(row.seconds > 0 for row in rows)
    assert latency.measure_machine("cuda").macs_per_second > 1e11


def test_a_call_is_timed_by_its_median(monkeypatch):
    durations = iter([9.0, 0.25, 5.0, 0.5, 0.25, 0.25, 0.5])
    now = [0.0]

    def run():
        now[0] += next(durations)

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    # The first call is not timed; the last begins before 6.5 s have passed.
    assert latency.time_call(run, seconds=6.5) == 0.375
    assert next(durations, None) is None


def test_cuda_events_are_recorded_on_the_device_that_is_timed(monkeypatch):
    streams, awaited = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            streams.append(stream)

        def synchronize(self):
            awaited.append(self)

        def elapsed_time(self, end):
            return 3.0

    def current_stream(device=None):
        return f"stream of {device}"

    monkeypatch.setattr(latency, "as_device", torch.device)  # it is not there
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    assert latency.time_call(lambda: None, "cuda:1", seconds=1e-9) == 0.003
    assert set(streams) == {"stream of cuda:1"} and len(awaited) == len(streams) / 2


@pytest.mark.parametrize("device", ["mps", "xpu:1"])
def test_other_accelerators_finish_before_the_clock_is_read(monkeypatch, device):
    events, clock = [], time.perf_counter

    def synchronize(device):
        events.append(str(device))

    monkeypatch.setattr(latency, "as_device", torch.device)  # it is not there
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    monkeypatch.setattr(time, "perf_counter", lambda: events.append("clock") or clock())
    latency.time_call(lambda: events.append("run"), device, seconds=1e-9)
    _, *timed_runs = (i for i, event in enumerate(events) if event == "run")
    assert len(timed_runs) >= 3
    for i in timed_runs:
        assert events[i - 2 : i + 3] == [device, "clock", "run", device, "clock"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: latency.time_layers(nn.ReLU(), torch.ones(1), 0), "repeats=0"),
        (lambda: latency.measure_machine(side=0), "side=0"),
        (lambda: latency.measure_machine(seconds=0), "seconds=0"),
        (lambda: latency.time_call(lambda: None, seconds=-1), "seconds=-1"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with refuses(message):
        call()
