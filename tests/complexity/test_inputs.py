"""Inputs that networks really have: real tensors, lists, dictionaries and keywords,
constants that forward creates, operators without a formula, sparse weights.
"""

from collections import UserDict

import numpy as np
import pytest
import torch
import torchvision
from refusals import refuses
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from paperlib.complexity import Profile, profile, time_layers

X = torch.tensor([[1.0, 2, 3, 4], [-1, 0, 0, 0], [5, 0, 0, 0]])
ROW = 4 * 5  # multiply-adds of the linear layer per row


class Net(nn.Module):
    """A module around a function of itself and its inputs."""

    def __init__(self, function, **buffers):
        super().__init__()
        self.function = function
        self.layer = nn.Linear(4, 5)
        self.lstm = nn.LSTM(5, 8, batch_first=True)
        self.gru = nn.GRU(5, 8, num_layers=2, bidirectional=True)
        for name, values in buffers.items():
            self.register_buffer(name, values)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def repeat(count):
    """Return a forward function that runs the layer `count(x)` times."""

    def function(net, x):
        for _ in range(int(count(net, x))):
            net.layer(x)

    return function


# Real inputs


@pytest.mark.parametrize(
    ("function", "inputs", "rows"),
    [
        (lambda m, x: m.layer(x), X, 3),
        (lambda m, x: m.layer(x), nn.Parameter(X), 3),
        (lambda m, x, y: m.layer(x) + m.layer(y[:1]), (X, X), 4),
        (lambda m, x, times: [m.layer(x)] * times and m.layer(x), (X, 3), 6),
        (lambda m, x: m.layer(x[0]) + m.layer(x[1]), ([X, X],), 6),
        (lambda m, x: x.append(m.layer(x.pop())), ([X, X],), 3),
        (lambda m, x: m.layer(x["a"]["b"][0]), ({"a": {"b": (X, None)}},), 3),
        (lambda m, *, pixels, mask=None: m.layer(pixels), {"pixels": X}, 3),
        (lambda m, x, y=None: m.layer(x if y is None else y[:2]), {"x": X, "y": X}, 2),
        (lambda m, ids: m.layer(F.one_hot(ids, 4).float()), torch.tensor([0, 3]), 2),
        (lambda m: m.layer(torch.zeros(1, 4)), (), 1),
        (lambda m: m.layer(torch.zeros(1, 4)), {}, 1),
    ],
    ids=(
        "tensor parameter positional number list changed-list nested keyword-only"
        " keywords ids no-positional no-keywords"
    ).split(),
)
def test_inputs(function, inputs, rows):
    assert profile(Net(function), inputs=inputs).macs == rows * ROW


def test_inputs_that_are_named_tuples_and_other_mappings():
    lengths = torch.tensor([4, 2])
    packed = pack_padded_sequence(torch.zeros(2, 4, 5), lengths, batch_first=True)
    counted = profile(Net(lambda m, x: m.lstm(x)), inputs=packed)
    assert counted.macs == (4 + 2) * 32 * (5 + 8)
    tokens = UserDict(x=X)  # as tokenizers return it
    assert profile(Net(lambda m, x: m.layer(x)), inputs=tokens).macs == 3 * ROW


def test_real_inputs_count_as_their_shapes():
    model = torchvision.models.resnet18()
    counted = profile(model, inputs=torch.rand(1, 3, 64, 64))
    assert counted == profile(model, (1, 3, 64, 64))
    assert counted.input_shapes == [(1, 3, 64, 64)]


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (lambda m, x: m.layer(x) if x.sum() > 0 else x, 3),
        (lambda m, x: m.layer(x) if (-x).sum() > 0 else x, 0),
        (lambda m, x: m.layer(x[x[:, 0] > 0]), 2),
        (lambda m, x: m.layer(x[x[:, 0].nonzero()[:, 0]]), 3),
        (lambda m, x: m.layer(x[m.layer(x).abs().sum(1) >= 0]), 6),
        (lambda m, x: m.layer(x.masked_select(x > 3)[:, None] * x[:2]), 2),
        (lambda m, x: m.layer(x[: int(x.max())]), 3),
        (repeat(lambda m, x: x[0, 1]), 6),
        (repeat(lambda m, x: x.numpy()[0, 2]), 9),
        (repeat(lambda m, x: x.mul_(2)[0, 0] + x[0, 1] / 2), 12),
    ],
    ids=range(10),
)
def test_forward_reads_the_values_of_real_inputs(function, rows):
    x = X.clone()
    assert profile(Net(function), inputs=x).macs == rows * ROW
    assert torch.equal(x, X)


def test_a_detector_of_objects():
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3
    ).eval()
    counted = profile(model, inputs=([torch.rand(3, 64, 80)],))
    heads = [row for row in counted.layers if row.name.startswith("roi_heads")]
    proposals = heads[-1].output_shape[0]
    assert proposals > 1
    # Per proposal: 256 channels of 7×7 to 1,024, to 1,024, to 3 classes and boxes.
    macs = proposals * 1024 * (256 * 49 + 1024 + 3 + 12)
    assert sum(row.macs for row in heads) == macs


def test_time_layers_of_token_ids():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5))
    rows = time_layers(model, torch.tensor([[1, 2, 8]]), repeats=1)
    assert [row.macs for row in rows] == [0, 3 * ROW]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"inputs": [X, X]}, r"inputs of type list.*pass \(\[a, b\],\)"),
        ({"inputs": X, "input_shape": (3, 4)}, r"input_shape = \(3, 4\).*inputs alone"),
        ({"inputs": X, "dtype": torch.float32}, "dtype = torch.float32.*inputs alone"),
        ({"inputs": X.to_sparse()}, "inputs cannot be copied.*dense tensors"),
        ({"inputs": (X.to_sparse_csr(),)}, "inputs cannot be copied.*dense tensors"),
        ({"inputs": (i for i in "ab")}, "inputs cannot be copied.*generator"),
        ({"inputs": {"y": X}}, "unexpected keyword argument 'y'"),
        ({"inputs": (X, X)}, "TypeError"),
        ({"inputs": X[:, :3]}, r"input of shape \(3, 3\) in layer 'layer'"),
        ({"input_shape": X}, "expected a shape .* or tensors as inputs="),
        ({"input_shape": [X, X]}, "expected a shape .* or tensors as inputs="),
    ],
    ids=range(11),
)
def test_refused_inputs(arguments, said):
    with refuses(f"(?s){said}"):
        profile(Net(lambda m, x: m.layer(x)), **arguments)


# Constants of forward


CONSTANTS = {
    "linspace": lambda m, x: len(torch.linspace(0, 1, 3).tolist()),
    "linspace on a device": lambda m, x: sum(
        torch.linspace(0, 2, 3, device=x.device).tolist()
    ),
    "range": lambda m, x: len(range(torch.tensor(2) + 1)),
    "iteration": lambda m, x: sum(int(n) for n in torch.arange(3)),
    "numbers on a device": lambda m, x: torch.tensor([1, 2], device=x.device).sum(),
    "as_tensor": lambda m, x: (
        torch.as_tensor([(1, 1), (1, 2)], device=x.device).prod(1).cumsum(0)[-1]
    ),
    "new_tensor": lambda m, x: x.new_tensor([1, 2]).sum().item(),
    "new_full": lambda m, x: x.new_full((1,), 3).item(),
    "ones_like": lambda m, x: torch.ones_like(x[:, 0]).sum(),
    "written": lambda m, x: write(torch.zeros(2), 3).max(),
    "view": lambda m, x: write(torch.zeros(2, 2), torch.tensor(3.0)).view(4)[:2].max(),
    "tensors of tensors": lambda m, x: torch.tensor([torch.tensor(3), 1]).tolist()[0],
    "stack": lambda m, x: torch.stack([torch.tensor(1)] * 3).sum(),
    "numpy": lambda m, x: torch.arange(4).numpy().max(),
    "asarray": lambda m, x: np.asarray(torch.arange(4, device=x.device)).max(),
    "from_numpy": lambda m, x: torch.from_numpy(np.arange(4)).max(),
    "bincount": lambda m, x: torch.bincount(torch.tensor([1, 1, 1])).max(),
    "unique": lambda m, x: len(torch.unique(torch.tensor([1, 1, 2, 5]))),
    "nonzero": lambda m, x: len((torch.arange(4) > 0).nonzero()),
    "one_hot": lambda m, x: F.one_hot(torch.tensor([0, 2])).shape[1],
    "all": lambda m, x: 3 if (torch.arange(3) >= 0).all() else 0,
    "parameter": lambda m, x: 3 * (m.layer.weight.abs().max().item() > 0),
    "condition": lambda m, x: 3 if m.layer.weight.norm() > 0 else 0,
    "buffer": lambda m, x: m.steps.sum() / 2 + 2,
    "written buffer": lambda m, x: write(m.steps, 3).max(),
    "counter": lambda m, x: m.steps.add_(1).max(),
}


def write(tensor, value):
    tensor[0] = value
    return tensor


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_have_values(name):
    net = Net(repeat(CONSTANTS[name]), steps=torch.tensor([2, 0]))
    assert profile(net, (3, 4)).macs == 3 * 3 * ROW
    assert net.steps.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (lambda m, x: m.layer(x[torch.tensor([True, False, True])]), 2),
        (lambda m, x: m.layer(x[torch.arange(3) > 0]), 2),
        (lambda m, x: m.layer(x[m.keep]), 1),
        (lambda m, x: m.layer(x.repeat_interleave(torch.tensor([1, 2, 2]), 0)), 5),
        (lambda m, x: m.layer(torch.tensor_split(x, torch.tensor([1]))[1]), 2),
        (lambda m, x: m.layer(x.split(torch.tensor([1, 2]).tolist())[1]), 2),
        (
            lambda m, x: [m.layer(x[:h]) for h, _ in torch.as_tensor([(1, 9), (2, 9)])],
            3,
        ),
    ],
    ids=range(7),
)
def test_constants_determine_shapes(function, rows):
    keep = torch.tensor([False, False, True])
    assert profile(Net(function, keep=keep), (3, 4)).macs == rows * ROW


@pytest.mark.parametrize(
    ("run", "macs"),
    [
        (lambda m, packed: m.lstm(packed)[0], 6 * 32 * (5 + 8)),
        (lambda m, packed: m.gru(packed)[0], 6 * 2 * 24 * (5 + 8 + 16 + 8)),
    ],
    ids=["lstm", "gru"],
)
@pytest.mark.parametrize(
    "lengths",
    [lambda x: torch.tensor([4, 2]), lambda x: [4, 2], lambda x: x.new_tensor([4, 2])],
    ids=["tensor", "list", "new_tensor"],
)
def test_packed_sequences(run, macs, lengths):
    def forward(m, x):
        packed = pack_padded_sequence(x, lengths(x), batch_first=True)
        return pad_packed_sequence(run(m, packed), batch_first=True)[0]

    counted = profile(Net(forward), (2, 4, 5))
    assert counted.macs == macs and not counted.uncounted


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum(),
        lambda x: torch.zeros(3, 4).copy_(x).sum(),
        lambda x: (
            write(canvas := torch.zeros(3, 4), x[0]) is canvas and canvas[1].sum()
        ),
        lambda x: (torch.arange(4) * x).sum(),
        lambda x: torch.rand(4).sum(),
        lambda x: torch.arange(4.0).uniform_().sum(),
        lambda x: nn.Parameter(torch.arange(4.0)).sum(),
    ],
    ids="input copied written product random in-place alias".split(),
)
def test_values_that_depend_on_the_input_are_refused(read):
    net = Net(lambda m, x: m.layer(x) if read(x) > 0 else x)
    with refuses("real tensors as inputs= if forward reads the values of its act"):
        profile(net, (3, 4))


def test_an_old_value_is_read_before_it_changes():
    def forward(m, x):
        steps = torch.arange(3)
        total = steps.sum()
        steps.mul_(x.sum().long())
        assert torch.zeros_like(steps).sum() == 0
        return repeat(lambda m, x: total)(m, x)

    assert profile(Net(forward), (3, 4)).macs == 9 * ROW


# Operators without a formula


@torch.library.custom_op("tests::product", mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


product.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))


# The name of an operator of PyTorch does not make it that operator.
@torch.library.custom_op("tests::linear", mutates_args=())
def linear(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return a @ a.mT, a + 1


linear.register_fake(
    lambda a: (a.new_empty(a.shape[0], a.shape[0]), a.new_empty(a.shape))
)


@torch.library.custom_op("tests::opaque", mutates_args=())
def opaque(a: torch.Tensor) -> torch.Tensor:
    return a @ a.mT


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda m, x: product(x, x.mT) @ product(x, x.mT), {"tests::product": 2}),
        (lambda m, x: linear(x)[0], {"tests::linear": 1}),
        (lambda m, x: torch.fft.rfft2(x), {"aten::_fft_r2c": 1}),
        (lambda m, x: torch.fft.ifft(torch.fft.fft(x)), None),
        (lambda m, x: torch.linalg.svd(x), {"aten::_linalg_svd": 1}),
        (lambda m, x: torch.linalg.inv(x[:, :3]), {"aten::linalg_inv_ex": 1}),
        (lambda m, x: torch.cdist(x, x), {"aten::_cdist_forward": 1}),
        (lambda m, x: F.normalize(m.layer(x)).softmax(-1).cumsum(0).norm(), {}),
        (lambda m, x: F.interpolate(x[None, None], scale_factor=2.0), {}),
        (lambda m, x: F.interpolate(x[None], scale_factor=2.0, mode="linear"), {}),
    ],
    ids=range(10),
)
def test_operators_that_are_not_counted_are_named(function, names):
    counted = profile(Net(function), (3, 4))
    if names is not None:
        assert counted.uncounted == names
    for name, calls in counted.uncounted.items():
        assert f"{name} ×{calls}" in counted.table().splitlines()[-1]
        assert f"{name} ×{calls}" in repr(counted)
    assert ("not counted" in counted.table()) == bool(counted.uncounted)
    assert ("not counted" in repr(counted)) == bool(counted.uncounted)


def test_an_operator_with_a_rule():
    def count_product(a, b, out_shape):
        return a[0] * a[1] * b[1]

    net = Net(lambda m, x: product(x, m.layer.weight.mT))
    for key in (torch.ops.tests.product, torch.ops.tests.product.default):
        counted = profile(net, (3, 4), rules={key: count_product})
        row = counted.layers[0]
        assert row == ("", "tests::product", (3, 5), 3 * ROW, 20)
        assert counted.uncounted == {}


@pytest.mark.parametrize(
    ("operator", "function", "rule", "macs"),
    [
        (
            "linear",
            lambda x: linear(x),
            lambda a, out_shape: a[1] * out_shape[0][1],
            12,
        ),
        ("linear", lambda x: linear(x), lambda a, out_shape: 0, 0),
        ("opaque", None, lambda *_, **__: 7, 7),
    ],
    ids=["tuple", "free", "unused arguments"],
)
def test_rules(operator, function, rule, macs):
    net = Net(lambda m, x: function(x) if function else opaque(x))
    rules = {getattr(torch.ops.tests, operator): rule}
    counted = profile(net, inputs=X, rules=rules)
    assert counted.macs == macs and counted.uncounted == {}


def test_a_rule_replaces_a_formula():
    rules = {torch.ops.aten.linear: lambda x, *weights, out_shape: x[0]}
    assert profile(Net(lambda m, x: m.layer(x)), (3, 4), rules=rules).macs == 3


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (
            {"tests::linear": lambda a, out_shape: 1},
            "rules has the key 'tests::linear'",
        ),
        (
            {linear: lambda a, out_shape: 1},
            "rules has the key .*torch.ops.library.name",
        ),
        (
            {torch.ops.tests.linear: lambda a, out_shape: 1.5},
            "=1.5; expected .* an integer",
        ),
        (
            {torch.ops.tests.linear: lambda a, out_shape: None},
            "=None; expected .* an integer",
        ),
        (
            {torch.ops.tests.linear: lambda a, out_shape: -1},
            "=-1; expected at least 0",
        ),
        (
            {torch.ops.tests.linear: lambda a: 1},
            "unexpected keyword argument 'out_shape'",
        ),
        ({torch.ops.tests.linear: 3}, "'int' object is not callable"),
    ],
    ids=range(7),
)
def test_refused_rules(rules, said):
    with refuses(f"(?s){said}"):
        profile(Net(lambda m, x: linear(x)), (3, 4), rules=rules)


def test_an_operator_without_a_fake_implementation_needs_real_inputs():
    net = Net(lambda m, x: m.layer(x) if opaque(x).sum() > 0 else x)
    with refuses("(?s)tests::opaque.*real tensors as inputs="):
        profile(net, (3, 4))
    counted = profile(net, inputs=X)
    assert counted.macs == 3 * ROW and counted.uncounted == {"tests::opaque": 1}


FLEX = [(2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 4)]


@pytest.mark.parametrize(
    "attend",
    [
        flex_attention,
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + i),
        lambda q, k, v: flex_attention(
            q,
            k,
            v,
            block_mask=create_block_mask(
                lambda b, h, i, j: i >= j, None, None, 7, 9, device=q.device
            ),
        ),
        torch.compile(flex_attention),
    ],
    ids=["plain", "score_mod", "block_mask", "compiled"],
)
def test_flex_attention(attend):
    net = Net(lambda m, *qkv: attend(*qkv))
    for inputs in ({"input_shape": FLEX}, {"inputs": tuple(map(torch.rand, FLEX))}):
        counted = profile(net, **inputs)
        assert [(row.kind, row.macs) for row in counted.layers if row.macs] == [
            ("attention", 2 * 3 * 7 * 9 * (8 + 4))
        ]
        assert counted.uncounted == {}


# Weights of other kinds


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        torch.Tensor.to_sparse_csc,
        lambda w: w.to_sparse_bsr((2, 2)),
        lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    ],
    ids="coo csr csc bsr quantised".split(),
)
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_sparse_and_quantised_weights_are_refused(convert, kind):
    model = nn.Linear(8, 6)
    weight = convert(model.weight.detach())
    if kind == "parameter":
        model.weight = nn.Parameter(weight, requires_grad=False)
    else:
        model.register_buffer("other", weight)
    with refuses(r"Linear cannot be copied .*\.to_dense\(\) and \.dequantize\(\)"):
        profile(model, (3, 8))


def test_integer_weights():
    model = nn.Linear(8, 6, bias=False)
    model.weight = nn.Parameter(torch.ones(6, 8, dtype=torch.int8), requires_grad=False)
    assert profile(model, (3, 8), torch.int8).macs == 144
    scaled = Net(lambda m, x: F.linear(x, m.codes.float() * 0.1))
    scaled.register_buffer("codes", torch.ones(5, 4, dtype=torch.int8))
    assert profile(scaled, (3, 4)).macs == 3 * ROW


# Tables by depth


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.body = nn.ModuleDict(
            {
                "first": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
                "second": nn.Sequential(nn.Linear(4, 4), nn.Conv1d(3, 2, 1)),
            }
        )
        self.head, self.spare = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x):
        first, second = self.body.values()
        return self.head(second(first(x + self.token))) @ torch.ones(5, 2)


@pytest.mark.parametrize(
    ("depth", "rows"),
    [
        (
            1,
            [
                "token   parameter               1×4        0           4",
                "body    linear, pointwise conv  1×2×4    120          56",
                "head    linear                  2×5       40          25",
                "Nested  matmul                  2×2       20           0",
                "spare   unused                             0          25",
            ],
        ),
        (
            2,
            [
                "token        parameter               1×4        0           4",
                "body.first   linear                  3×4       48          28",
                "body.second  linear, pointwise conv  1×2×4     72          28",
                "head         linear                  2×5       40          25",
                "Nested       matmul                  2×2       20           0",
                "spare        unused                             0          25",
            ],
        ),
    ],
    ids=["1", "2"],
)
def test_a_table_by_depth(depth, rows):
    counted = profile(Nested(), (3, 4))
    lines = counted.table(depth=depth).splitlines()
    assert lines[2:-1] == rows
    assert lines[-1].split() == ["total", "180", "110"]
    assert "token" not in counted.table(depth=depth, costly_only=True)
    assert counted.table(depth=9) == counted.table()


@pytest.mark.parametrize("depth", [0, -1, 1.5, True, "1"])
def test_refused_depths(depth):
    with refuses(f"depth={depth!r}; expected"):
        profile(nn.Linear(4, 5), (3, 4)).table(depth=depth)


def test_repr():
    counted = profile(nn.Linear(40, 50), (30, 40))
    assert repr(counted) == "Profile(Linear: 60,000 MACs, 2,050 parameters)"
    assert Profile("Net", [], [], {}).uncounted == {}
