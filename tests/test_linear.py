"""Linear layers that keep no cast of their weights: the same numbers as autocast's own, in less memory."""

from __future__ import annotations

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn

from rlpost.policy.linear import RecastLinear, recast_linear

WIDTH, DEPTH, TOKENS = 64, 6, 4


def stack(*, bias=True, trained=True, recast=True):
    """`DEPTH` layers with a nonlinearity after each."""
    torch.manual_seed(1)
    layers = [m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH, bias=bias), nn.Tanh())]
    model = nn.Sequential(*layers).requires_grad_(trained)
    if recast:
        recast_linear(model)
        assert type(model[0]) is RecastLinear
    return model


def run(model, x, *, autocast=True):
    """(output, [gradient of the input and of every parameter that has one])."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    out.float().square().sum().backward()
    return out.detach(), [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(TOKENS, WIDTH), (2, TOKENS, WIDTH)])
def test_same_bits_as_autocast(shape, bias, trained, autocast):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    expected, gradients = run(stack(bias=bias, trained=trained, recast=False), x, autocast=autocast)
    out, found = run(stack(bias=bias, trained=trained), x, autocast=autocast)
    assert out.dtype == expected.dtype and torch.equal(out, expected)
    assert len(found) == len(gradients) == 1 + trained * DEPTH * (1 + bias)
    for a, b in zip(found, gradients, strict=True):
        assert a.dtype == b.dtype == torch.float32 and a.abs().max() > 0
        assert torch.equal(a, b)


def test_some_parameters_frozen_and_no_gradient_for_the_input():
    model, plain = stack(), stack(recast=False)
    x = torch.randn(TOKENS, WIDTH)
    for net in (model, plain):
        net[2].weight.requires_grad_(False)
        net[4].bias.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            net(x).float().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def live_bytes(model):
    """(alive between forward and backward, at the peak of both) of a pass, without the parameters' gradients."""
    x = torch.randn(TOKENS, WIDTH)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with LiveBytes() as memory:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        kept = memory.live
        out.float().sum().backward()
    return kept, memory.peak


def test_no_cast_of_a_weight_outlives_its_layer():
    cast, weight = 2 * WIDTH * WIDTH, 4 * WIDTH * WIDTH
    kept, peak = live_bytes(stack(bias=False))
    kept_by_autocast, peak_of_autocast = live_bytes(stack(bias=False, recast=False))
    needed = DEPTH - 1  # the input has no gradient: nothing needs the first layer's weight
    assert kept_by_autocast > needed * cast, "the measurement sees what autocast keeps"
    assert kept == kept_by_autocast - needed * cast
    assert peak <= kept + 2 * cast + weight  # one layer's: the cast, the gradient, and the gradient in float32
    assert peak < peak_of_autocast - (needed - 1) * cast + TOKENS * WIDTH * 4


def test_frozen_weights_keep_no_input():
    """As under LoRA: the weight's gradient is not wanted, so its input's cast is not."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)).requires_grad_(
        False
    )
    recast_linear(model)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with LiveBytes() as memory, torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert memory.live == out.nbytes and out.requires_grad


def test_unusual_inputs_are_treated_as_autocast_treats_them():
    model, plain = stack(), stack(recast=False)
    x = torch.randn(WIDTH)
    (expected, gradients), (out, found) = run(plain, x), run(model, x)
    assert torch.equal(out, expected) and all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
    for net in (model.double(), plain.double()):
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x.double()).dtype == torch.float64


def test_a_second_derivative_is_refused():
    model = stack()
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(model(x).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_passes_without_gradients_keep_nothing():
    model = stack(bias=False)
    with LiveBytes() as memory, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(TOKENS, WIDTH))
        assert memory.live <= 2 * out.nbytes + TOKENS * WIDTH * 4  # the output, and the input


def test_only_plain_linear_layers_are_replaced_and_weights_stay_tied():
    class Other(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(4, 4), Other(4, 4), nn.Embedding(4, 4)])
    model[0].weight = model[2].weight
    recast_linear(model)
    assert [type(m) for m in model] == [RecastLinear, Other, nn.Embedding]
    assert model[0].weight is model[2].weight


def branches(*, recast=True):
    """Three layers on one input, as q, k and v are."""
    torch.manual_seed(3)
    model = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
    if recast:
        recast_linear(model)
    return model


def test_layers_with_the_same_input_share_its_cast():
    x = (
        torch.randn(TOKENS, WIDTH, requires_grad=True) * 1.0
    )  # no leaf, as between layers: autocast keeps casts of leaves
    kept = []
    for model in (branches(), branches(recast=False)):
        with LiveBytes() as memory, torch.autocast("cpu", torch.bfloat16):
            outs = [layer(x) for layer in model]
        kept.append(memory.live)
        assert all(out.shape == x.shape for out in outs)
    shared, own = kept
    cast = 2 * x.numel()
    assert shared == cast + 3 * cast  # the input's, and three outputs
    assert own == shared + 2 * cast + 3 * 2 * WIDTH * WIDTH  # and the weights' casts


def test_an_input_changed_in_place_is_cast_again():
    model, plain = branches(), branches(recast=False)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    outs = []
    for net in (model, plain):
        y = x * 1.0
        with torch.autocast("cpu", torch.bfloat16):
            first = net[0](y)
            y.mul_(3.0)
            outs.append((first, net[1](y)))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
