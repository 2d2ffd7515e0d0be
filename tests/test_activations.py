import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from refusals import refuses
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

from paperlib.activations import find_layer, on_output, record_activations
from paperlib.cam import cam
from paperlib.gradcam import grad_cam
from paperlib.guided_relu import GuidedReLU, guided_relu
from paperlib.inference import SharedSetting, evaluating

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:FutureWarning")

# Both signs, the kink itself, and what lies beyond a ReLU6's upper kink.
INPUT = torch.tensor([-3.0, -0.5, 0.0, 0.5, 2.0, 6.0, 7.5])
UPSTREAM = torch.tensor(
    [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [-1.0, 2.0, -3.0, -4.0, 5.0, -6.0, -7.0]]
)
PASS = (INPUT > 0).float()
PASS6 = PASS * (INPUT < 6)

RELUS = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu by keyword": lambda x: F.relu(input=x),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "torch.relu by keyword": lambda x: torch.relu(input=x),
    "torch.clamp by keyword": lambda x: torch.clamp(input=x, min=0),
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.relu_(),
    "aten.relu": torch.ops.aten.relu.default,
    "clamp": lambda x: x.clamp(min=0),
    "clamp by position": lambda x: torch.clamp(x, 0.0),
    "clamp to a tensor": lambda x: torch.clamp(x, min=torch.tensor(0.0)),
    "clamp to a row of zeros": lambda x: torch.clamp(x[None], min=torch.zeros(1, 1))[0],
    "clamp_": lambda x: x.clamp_(0),
    "clamp_min": lambda x: torch.clamp_min(x, 0),
    "clamp_min_": lambda x: x.clamp_min_(0),
    "clip": lambda x: x.clip(0, None),
    "clip_": lambda x: torch.clip_(x, min=0),
    "nn.Threshold": nn.Threshold(0, 0),
    "F.threshold in place": lambda x: F.threshold(x, 0, 0, True),
    "maximum": lambda x: torch.maximum(x, torch.zeros(())),
    "maximum, zeros first": lambda x: torch.maximum(torch.zeros_like(x), x),
    "max of two": lambda x: x.max(torch.zeros(1)),
}
RELU6S = {
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "F.relu6": F.relu6,
    "F.hardtanh": lambda x: F.hardtanh(x, 0, 6),
    "F.hardtanh_": lambda x: F.hardtanh_(x, 0.0, 6.0),
    "nn.Hardtanh": nn.Hardtanh(0.0, 6.0),
    "clamp": lambda x: x.clamp(0, 6),
    "clip_": lambda x: x.clip_(0, 6),
}
OTHERS = {
    "silu": F.silu,
    "silu_": lambda x: F.silu(x, inplace=True),
    "gelu": F.gelu,
    "mish": F.mish,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "elu_": F.elu_,
    "leaky_relu": F.leaky_relu,
    "nn.LeakyReLU": nn.LeakyReLU(0.2),
    "nn.PReLU": nn.PReLU(),
    "selu": torch.selu,
    "celu": F.celu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "nn.Hardtanh": nn.Hardtanh(),
    "nn.RReLU": nn.RReLU().eval(),
    "nn.Threshold": nn.Threshold(0.1, 20),
    "nn.Threshold below zero": nn.Threshold(-1, 0),
}


def derivative(function, x, upstream):
    """Return the plain gradient at the input of `function`."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x.clone()), x, upstream)[0]


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("way", [*RELUS, *(f"6 {way}" for way in RELU6S)])
def test_every_way_to_write_a_relu_is_guided(way, upstream):
    relu6 = way.startswith("6 ")
    relu = RELU6S[way[2:]] if relu6 else RELUS[way]
    x = INPUT.clone().requires_grad_()
    with guided_relu() as guide:
        y = relu(x.clone())
    assert torch.equal(y, INPUT.clamp(0, 6 if relu6 else None))
    (guided,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
    assert torch.equal(guided, upstream.clamp_min(0) * (PASS6 if relu6 else PASS))

    guide.on = False  # the same graph gives plain gradients, and guided ones again
    (plain,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
    assert torch.equal(plain, upstream * (PASS6 if relu6 else PASS))
    guide.on = True
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], guided)


def test_a_relu_in_place_on_a_view_is_guided():
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0], [2.0, 2.0, -2.0, -2.0]])
    for relu in (
        F.relu_,
        lambda v: F.relu(v, True),
        lambda v: F.hardtanh(v, 0, 6, True),
        lambda v: v.clamp_(min=0),
    ):
        x = torch.tensor(
            [[1.0, -1.0, 2.0, -2.0], [3.0, 4.0, -3.0, -4.0]], requires_grad=True
        )
        with guided_relu():
            y = x.clone()
            assert relu(y[:, :2]) is not None  # the last two columns stay linear
        assert torch.equal(y, torch.cat([x[:, :2].clamp_min(0), x[:, 2:]], 1))
        (gradient,) = torch.autograd.grad((y * weight).sum(), x)
        assert torch.equal(
            gradient, torch.tensor([[1.0, 0.0, 1.0, -1.0], [2.0, 2.0, -2.0, -2.0]])
        )


def test_the_sum_over_all_uses_is_clamped_not_each_one():
    x = torch.tensor([1.0, 1.0], requires_grad=True)
    with guided_relu():
        y = F.relu(x)
        score = (y * torch.tensor([-3.0, -3.0])).sum() + (
            y * torch.tensor([5.0, 1.0])
        ).sum()
    assert torch.equal(torch.autograd.grad(score, x)[0], torch.tensor([2.0, 0.0]))


def test_values_changed_in_place_afterwards_do_not_matter():
    for relu in (
        lambda v: v.clamp(min=0),
        lambda v: v.clamp_(0),
        lambda v: F.relu6(v),
        lambda v: v.maximum(torch.zeros(1)),
    ):
        x = torch.tensor([1.0, 2.0, -1.0], requires_grad=True)
        with guided_relu():
            y = relu(x.clone())
            y.mul_(-1).add_(3)
        assert torch.equal(
            torch.autograd.grad(y, x, torch.tensor([-1.0, 1.0, -1.0]))[0],
            torch.tensor([1.0, 0.0, 0.0]),
        )


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.clamp(min=-1),
        lambda x: x.clamp(0.1, 5),
        lambda x: x.clamp(max=1),
        lambda x: x.clamp(torch.zeros(7), torch.arange(7.0)),
        lambda x: torch.maximum(x, torch.tensor([0.0] * 6 + [1.0])),
        lambda x: torch.sigmoid(x),
        lambda x: x * torch.sigmoid(x),  # a gate, or a SiLU composed of arithmetic
        lambda x: x.max(0).values * x,
    ],
)
def test_other_functions_keep_their_gradient(other):
    x = INPUT.clone().requires_grad_()
    with guided_relu():
        y = other(x)
    upstream = UPSTREAM[1]
    assert torch.equal(
        torch.autograd.grad(y, x, upstream)[0], derivative(other, INPUT, upstream)
    )


@pytest.mark.parametrize("name", OTHERS)
def test_other_activations_are_refused_or_clamped_on_request(name):
    function, upstream = OTHERS[name], UPSTREAM[1]
    with (
        guided_relu(),
        refuses(
            "defined for ReLU, and this network uses .*positive_gradients=True",
        ),
    ):
        function(INPUT.clone().requires_grad_().clone())

    x = INPUT.clone().requires_grad_()
    with guided_relu(positive_gradients=True):
        y = function(x.clone())
    expected = derivative(function, INPUT, upstream.clamp_min(0))
    torch.testing.assert_close(torch.autograd.grad(y, x, upstream)[0], expected)


def test_a_refusal_names_what_runs():
    # As an exported network calls it, without the bounds that are usual.
    hardtanh = torch.ops.aten.hardtanh.default
    named = {
        F.gelu: "gelu",
        hardtanh: "hardtanh from -1.0 to 1.0",
    }
    named |= {
        nn.Hardtanh(-2, 1): "hardtanh from -2 to 1",
        nn.Threshold(0.1, 20): "threshold at 0.1 with value 20",
    }
    for function, name in named.items():
        with guided_relu(), refuses(name):
            function(INPUT)


def test_blocks_can_be_nested_and_the_inner_switch_is_its_own():
    x = torch.tensor([1.0, 1.0], requires_grad=True)
    with guided_relu() as outer, guided_relu() as inner:
        y = F.relu(x)
    upstream = torch.tensor([1.0, -1.0])
    gradients = []
    for outer.on, inner.on in itertools.product((True, False), repeat=2):
        gradients.append(
            torch.autograd.grad(y, x, upstream, retain_graph=True)[0].tolist()
        )
    assert gradients == [[1, 0], [1, 0], [1, 0], [1, -1]]
    assert isinstance(outer, GuidedReLU) and torch._C._len_torch_function_stack() == 0


def test_only_the_calling_thread_is_guided():
    x = torch.ones(2, requires_grad=True)
    upstream = torch.tensor([1.0, -1.0])
    plain = []

    def elsewhere():
        plain.append(torch.autograd.grad(F.relu(x), x, upstream)[0])
        plain.append(torch.jit.trace(nn.ReLU(), x)(x))  # and no script is refused there

    with guided_relu():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        guided = torch.autograd.grad(F.relu(x), x, upstream)[0]
    assert torch.equal(plain[0], upstream) and len(plain) == 2
    assert torch.equal(guided, torch.tensor([1.0, 0.0]))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(True),
    ).eval()


def test_checkpointing_gives_the_same_guided_gradient():
    model, x = network(), torch.randn(2, 2, 8, 8, requires_grad=True)
    upstream = torch.linspace(-1, 1, 2 * 4 * 4 * 4).view(2, 4, 4, 4)
    with guided_relu():
        straight, stored = model(x), checkpoint(model, x, use_reentrant=False)
        (inside,) = torch.autograd.grad(stored, x, upstream, retain_graph=True)
    (expected,) = torch.autograd.grad(straight, x, upstream)
    assert torch.equal(inside, expected)
    # Recomputed outside the block.
    assert torch.equal(torch.autograd.grad(stored, x, upstream)[0], expected)
    assert not torch.equal(torch.autograd.grad(model(x), x, upstream)[0], expected)


@pytest.mark.filterwarnings(
    "ignore:Using .torch.compile"
)  # it calls global hooks twice, which does no harm here
@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        lambda m: m.compile(backend="eager") or m,
    ],
)
def test_compiled_networks_are_watched_too(wrap):
    torch._dynamo.reset()
    model, x = network(), torch.randn(2, 2, 8, 8, requires_grad=True)
    weights = torch.linspace(-1, 1, 2 * 4 * 4 * 4).view(2, 4, 4, 4)
    with guided_relu(), record_activations(model, "0") as expected:
        gradient = torch.autograd.grad((model(x) * weights).sum(), x)[0]
    compiled = wrap(model)
    with torch.no_grad():
        compiled(x)  # compiled before there is any hook
    name = "0" if compiled is model else "_orig_mod.0"
    with guided_relu(), record_activations(compiled, name) as kept:
        assert torch.equal(
            torch.autograd.grad((compiled(x) * weights).sum(), x)[0], gradient
        )
    # Alone as well: guided_relu's mode makes the compiler start anew, and then it sees
    # the hooks.
    with record_activations(compiled, name) as alone:
        compiled(x + 1)
    assert torch.equal(alone[name], model[0](x + 1))
    assert torch.equal(kept[name], expected["0"])
    assert find_layer(compiled, "0") == (model[0], name)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_script_modules_are_refused_without_side_effects():
    scripted = torch.jit.trace(network(), torch.zeros(1, 2, 8, 8))
    for model in (scripted, nn.Sequential(scripted)):
        with (
            refuses("TracedModule, which hides its layers and ReLUs.*pass the module"),
            guided_relu(),
        ):
            model(torch.zeros(1, 2, 8, 8))
    assert not nn_module._global_forward_pre_hooks
    assert torch._C._len_torch_function_stack() == 0


def test_data_parallel_over_several_devices_is_refused():
    inner = network()
    parallel = nn.DataParallel(inner)
    parallel.device_ids = [0, 1]  # as with two GPUs; it is refused before it runs
    images, message = torch.zeros(1, 2, 8, 8), "nn.DataParallel over 2 devices"
    for model, layer in (
        (parallel, "0"),
        (parallel, inner[0]),
        (nn.Sequential(parallel), "0.module.0"),
    ):
        with refuses(f"{message}.*pass its .module"):
            find_layer(model, layer)
        with refuses(message), guided_relu():
            model(images)
    with refuses(f"the model is an {message}"):
        cam(parallel, images)
    partly = nn.Sequential(parallel, nn.Conv2d(4, 4, 1))
    assert find_layer(partly, "1") == (partly[1], "1")  # runs in the calling thread
    parallel.device_ids = [0]  # one device: no threads
    assert find_layer(parallel, "0") == (inner[0], "module.0")


def test_an_activation_that_the_block_did_not_see_is_named():
    x = torch.ones(2, 1, 3, requires_grad=True)
    inside_cpp = nn.RNN(3, 4, nonlinearity="relu")

    def in_a_thread(function):
        with ThreadPoolExecutor(1) as worker:
            return worker.submit(function, x).result()

    for run, name in (
        (lambda: inside_cpp(x)[0], "Relu"),
        (lambda: in_a_thread(F.relu), "Relu"),
        (lambda: in_a_thread(F.relu6), "Hardtanh"),
        (lambda: in_a_thread(F.silu), "Silu"),
        (lambda: F.relu(x) + in_a_thread(F.relu), "Relu"),
    ):
        with guided_relu() as guide:
            output = run() * 2
            message = rf"did not see an activation \({name}Backward"
            with refuses(message):
                guide.check(output)
    with guided_relu() as guide:
        guide.check(x.detach())
        guide.check(nn.LSTM(3, 4)(x)[0])  # its tanh and sigmoids are gates


@pytest.mark.parametrize("name", [*RELUS, *(f"6 {way}" for way in RELU6S), *OTHERS])
def test_every_guided_activation_passes_the_check(name):
    function = RELU6S[name[2:]] if name.startswith("6 ") else {**RELUS, **OTHERS}[name]
    with guided_relu(positive_gradients=True) as guide:
        guide.check(function(INPUT.clone().requires_grad_() * 1) * 2)


def test_an_exported_network_is_guided():
    model, x = network(), torch.randn(1, 2, 8, 8, requires_grad=True)
    exported = torch.export.export(model, (x.detach(),)).module()
    gradients = []
    for run in (model, exported):
        with guided_relu():
            y = run(x)
        slope = torch.linspace(-1, 1, y.numel()).view_as(y)
        gradients.append(torch.autograd.grad(y, x, slope)[0])
    torch.testing.assert_close(*gradients)


# ---- record_activations ----


def test_records_survive_in_place_operations():
    model, x = network(), torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        expected = model[:4](x)
        # The ReLU after it, in place, would change something.
        assert (expected < 0).any()
        with record_activations(model, "3", model[0]) as kept:
            output = model(x)
        assert torch.equal(kept["3"], expected)
        assert torch.equal(kept[model[0]], model[0](x))
        assert torch.equal(output, model(x))


def test_a_record_does_not_share_memory_with_the_network():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.same = nn.Identity()

        def forward(self, x):
            x = x * 1
            y = self.same(x)
            x.add_(100)  # before the record is read, its input is changed
            return y.add_(10)

    model, x = Residual(), torch.randn(3)
    with record_activations(model, "same") as kept:
        model(x)
    assert torch.equal(kept["same"], x)


def test_gradients_reach_a_record():
    model, x = network(), torch.randn(2, 2, 8, 8)
    with record_activations(model, "3") as kept:
        score = model(x).square().sum() / 2
    (gradient,) = torch.autograd.grad(score, kept["3"])
    assert torch.equal(gradient, kept["3"].clamp_min(0))


def test_the_last_call_of_a_shared_layer_counts_and_a_skipped_one_has_no_entry():
    shared, unused = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.ModuleList([shared, unused])
    with record_activations(model, "0", "1") as kept, torch.no_grad():
        last = shared(shared(torch.ones(1, 3)))
    assert list(kept) == ["0"] and torch.equal(kept["0"], last)


def test_records_of_threads_are_separate():
    model, results, barrier = network(), {}, threading.Barrier(4)

    def run(seed):
        x = torch.full((1, 2, 8, 8), float(seed))
        with record_activations(model, "2") as kept, torch.no_grad():
            barrier.wait()
            model(x)
            barrier.wait()  # everybody has run before anybody leaves
        results[seed] = kept["2"]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for seed in range(4):
            assert torch.equal(
                results[seed], model[:3](torch.full((1, 2, 8, 8), float(seed)))
            )
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_go_after_an_exception():
    model = network()
    with pytest.raises(RuntimeError), record_activations(model, "0", "2"):
        model(torch.randn(1, 5, 8, 8))  # five channels where two are expected
    with refuses(), record_activations(model, "0", "absent"):
        pass
    with pytest.raises(KeyError), on_output(model[0], lambda output: {}["absent"]):
        model(torch.randn(1, 2, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            "layer1.conv",
            "no layer 'layer1.conv' in this Net; did you mean one of:"
            " layer1.conv[12], layer1.conv[12]",
        ),
        ("zzz", "did you mean one of: layer1, layer2, head"),
        ("", "no layer ''"),
        (nn.ReLU(), "the layer, a ReLU, is not part of this model"),
    ],
)
def test_an_unknown_layer_offers_the_closest_names(layer, message):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer1 = nn.ModuleDict(
                {"conv1": nn.ReLU(), "conv2": nn.ReLU(), "bn": nn.ReLU()}
            )
            self.layer2 = nn.ReLU()
            self.head = self.layer2  # one module under two names: both are found

    model = Net()
    assert find_layer(model, "head") == (model.layer2, "head")
    assert find_layer(model, model.layer1["bn"]) == (model.layer1["bn"], "layer1.bn")
    with refuses(message):
        find_layer(model, layer)


def test_a_layer_that_gives_no_tensor_is_refused():
    model = nn.Sequential(nn.LSTM(3, 3))
    with (
        refuses("layer '0' returns a tuple; expected a tensor"),
        record_activations(model, "0"),
    ):
        model(torch.zeros(1, 2, 3))
    scripted = torch.jit.trace(network(), torch.zeros(1, 2, 8, 8))
    with (
        refuses("which hides its layers"),
        record_activations(scripted, "0"),
    ):
        pass


# ---- the state of model and caller ----


def test_evaluating_puts_every_mode_back():
    model = network().train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == modes


def test_the_first_of_overlapping_blocks_changes_a_setting_and_the_last_restores_it():
    log = []

    @contextmanager
    def change():
        log.append("changed")
        yield
        log.append("restored")

    setting = SharedSetting(change)
    first, second = setting.block(), setting.block()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert log == ["changed"]
    second.__exit__(None, None, None)
    assert log == ["changed", "restored"]
    with pytest.raises(KeyError), setting.block():
        raise KeyError
    assert log == ["changed", "restored"] * 2


def test_the_callers_autocast_keeps_its_gradients():
    model = nn.Sequential(
        network(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    x = torch.randn(2, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        grad_cam(model, x, "0.4")
        model(x).sum().backward()
        assert torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
    assert all(p.grad is not None for p in model.parameters())
