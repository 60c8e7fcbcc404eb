"""The chunked head against plain log_softmax: values, gradients, statistics, memory."""

from __future__ import annotations

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn

import rlpost.policy.fused as fused_module
import rlpost.policy.head as head_module
from rlpost.gradient.types import StatisticsRequest
from rlpost.policy.head import HeadRequest, LogitRule, ScoringLinear, chunked_head, head_statistics


def naive(hidden, weight, bias, target, temperature=1.0, softcap=None, logit_scale=1.0):
    z = nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    logq = (z / temperature).log_softmax(-1)
    return logq.gather(-1, target[:, None]).squeeze(-1), -(logq.exp() * logq).sum(-1)


def make(n=13, d=8, v=29, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, dtype=dtype, requires_grad=True)
    b = torch.randn(v, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, b, torch.randint(v, (n,))


CASES = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0, "temperature": 1.3},
    {"logit_scale": 0.25},
    {"softcap": 2.0, "logit_scale": 1.5, "temperature": 0.9},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(case, bias):
    hidden, weight, b, target = make(n=5, d=3, v=7, dtype=torch.float64, bias=bias)
    tensors = [t for t in (hidden, weight, b) if t is not None]

    def scored(h, w, *rest):
        return chunked_head(h, w, rest[0] if rest else None, target, chunk=2, **case)

    assert torch.autograd.gradcheck(scored, tensors)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_float32_agrees_with_log_softmax(case, chunk):
    hidden, weight, bias, target = make()
    a, c = torch.randn(13), torch.randn(13)
    grads = []
    for function, extra in ((chunked_head, {"chunk": chunk}), (naive, {})):
        logp, entropy = function(hidden, weight, bias, target, **case, **extra)
        grads.append([logp, entropy, *torch.autograd.grad((logp * a + entropy * c).sum(), (hidden, weight, bias))])
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_only_wanted_gradients_are_made():
    hidden, weight, _, target = make(bias=False)
    logp, _ = chunked_head(hidden, weight.detach(), None, target, chunk=4)
    logp.sum().backward()
    assert hidden.grad is not None
    logp, entropy = chunked_head(hidden.detach(), weight.detach(), None, target)
    assert not logp.requires_grad and not entropy.requires_grad


def test_no_tokens():
    hidden, weight, bias, target = make(n=0)
    logp, entropy = chunked_head(hidden, weight, bias, target)
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == (0,) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_autocast_multiplies_in_bfloat16_and_reduces_in_float32():
    hidden, weight, bias, target = make(n=40, d=64, v=300)
    exact, exact_entropy = naive(hidden, weight, bias, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, entropy = chunked_head(hidden, weight, bias, target, chunk=16)
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp - exact).abs().max() < 0.2 and 1e-6 < (logp - exact).abs().mean() < 0.05
    assert (entropy - exact_entropy).abs().max() < 0.1
    got = torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
    want = torch.autograd.grad(exact.sum() + exact_entropy.sum(), (hidden, weight))
    for ours, theirs in zip(got, want):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() / theirs.norm() < 0.02


def test_the_weight_may_be_emptied_between_forward_and_backward():
    """What ZeRO-3 does: the parameter holds nothing outside its module's forward and backward."""
    hidden, _, _, target = make()
    layer = ScoringLinear(8, 29, bias=False)
    want = torch.autograd.grad(naive(hidden, layer.weight, None, target)[0].sum(), layer.weight)[0]
    full = layer.weight.data
    logp, _ = layer(hidden, HeadRequest(target, LogitRule(), chunk=4))
    shared = []
    layer.weight.data = torch.empty(0)
    logp.register_hook(lambda _grad: shared.append(setattr(layer.weight, "data", full)))
    logp.sum().backward()
    assert shared
    torch.testing.assert_close(layer.weight.grad, want)


def test_scoring_linear_is_a_linear_layer_without_a_request():
    layer = nn.Linear(8, 29)
    x = torch.randn(2, 3, 8)
    want = layer(x)
    layer.__class__ = ScoringLinear
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(0.7, 1.5, 3.0)], ids=str)
@pytest.mark.parametrize("v", [29, 331, 2003], ids=["searched whole", "folded", "folded twice"])  # with k of 5 and less
@pytest.mark.parametrize("k", [None, 1, 5, 100])
def test_statistics_against_naive(rule, k, v):
    hidden, weight, bias, target = make(v=v)
    got = head_statistics(hidden, weight, target, k, chunk=4, bias=bias, rule=rule)
    z = rule.logits(nn.functional.linear(hidden, weight, bias).detach())
    p = z.softmax(-1)
    torch.testing.assert_close(got.sum_p2, (p**2).sum(-1))
    torch.testing.assert_close(got.sum_p3, (p**3).sum(-1))
    assert torch.equal(got.hidden, hidden.detach())
    if k is None:
        assert got.top_ids is None and got.top_logits is None
        return
    assert got.top_ids.shape == got.top_logits.shape == (13, min(k, v))
    torch.testing.assert_close(got.top_logits, z.gather(-1, got.top_ids))
    for n in range(13):
        best = z[n].topk(min(k, v)).indices.tolist()
        want = best if int(target[n]) in best else [*best[:-1], int(target[n])]
        assert got.top_ids[n].tolist() == want


@pytest.mark.parametrize("v", [29, 2003])
def test_statistics_leave_the_numbers_as_they_are(v):
    hidden, weight, bias, target = make(v=v)
    layer = ScoringLinear(8, v)
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    plain = layer(hidden, HeadRequest(target, LogitRule(), chunk=4))
    with_them = layer(hidden, HeadRequest(target, LogitRule(), chunk=4, statistics=StatisticsRequest(5, powers=True)))
    assert torch.equal(plain[0], with_them[0]) and torch.equal(plain[1], with_them[1])


def head_memory(n, v, chunk, d=16):
    hidden, weight, _, target = make(n=n, d=d, v=v, bias=False)
    with LiveBytes() as memory:
        logp, entropy = chunked_head(hidden, weight, None, target, chunk=chunk)
        (logp.sum() + 0.1 * entropy.sum()).backward()
        head_statistics(hidden, weight, target, 8, chunk)
    return memory


def test_live_bytes_counts():
    with LiveBytes() as memory:
        kept = [torch.zeros(100) for _ in range(5)]
        torch.zeros(1000)
        assert memory.live == 2000 and memory.peak == 6000 and memory.largest == 4000
        del kept
        assert memory.live == 0


def test_a_second_backward_pass_gives_the_same():
    """The first one uses up the last chunk's scores."""
    torch.manual_seed(5)
    hidden, weight = torch.randn(10, 6, requires_grad=True), torch.randn(30, 6, requires_grad=True)
    logp, entropy = chunked_head(hidden, weight, None, torch.randint(0, 30, (10,)), chunk=4)
    loss = (logp * torch.randn(10) + entropy * torch.randn(10)).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(first, second, strict=True))


@pytest.mark.thorough
def test_memory_is_bounded_by_the_chunk():
    chunk, v, d, n = 32, 4000, 16, 512
    once, twice = head_memory(n, v, chunk), head_memory(2 * n, v, chunk)
    assert once.largest == chunk * v * 4  # no tensor is larger than a chunk of scores
    assert 2 * once.largest < once.peak  # the measurement sees what is alive
    assert once.peak < 4 * chunk * v * 4 + 3 * v * d * 4 + 3 * n * (d + 8) * 4
    assert twice.peak - once.peak < 3 * n * (d + 8) * 4  # only what is per token grows with the tokens
    wide = head_memory(n, 2 * v, chunk)
    assert wide.largest == 2 * once.largest
    assert wide.peak < 2 * once.peak  # and nothing with tokens x vocabulary


K = 8  # largest scores kept for the curvature mask


def step_memory(n, v, *, chunk=32, d=8, autocast):
    """One pass forward and backward through the layer itself, with CAPO's statistics."""
    hidden, weight, _, target = make(n=n, d=d, v=v, bias=False)
    layer = ScoringLinear(d, v, bias=False)
    layer.weight = nn.Parameter(weight.detach())
    request = HeadRequest(target, LogitRule(0.9), chunk, StatisticsRequest(k=K))
    with LiveBytes() as memory, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logp, entropy, *statistics = layer(hidden, request)
        (logp.sum() + 0.1 * entropy.sum()).backward()
    assert len(statistics) == 5 and hidden.grad is not None and layer.weight.grad is not None
    return memory


@pytest.mark.thorough
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_a_whole_step_with_statistics_holds_no_more_than_chunks(autocast):
    """Peaks over tokens x vocabulary, doubled one by one and together: no term of one times the other."""
    n, v, chunk, d = 256, 5000, 32, 8
    once, tokens, words, both = (
        step_memory(a, b, autocast=autocast).peak for a, b in ((n, v), (2 * n, v), (n, 2 * v), (2 * n, 2 * v))
    )
    scores = chunk * v * 4  # a chunk's, in float32
    # A token's own: its state's gradient and copies, ids and scores of the largest, a few numbers.
    own = n * (3 * d * 4 + 2 * K * (8 + 4) + 10 * 4)
    assert tokens - once <= own < scores
    # The vocabulary's: the chunk's scores, what is made of them, the weight's gradient (two while one is added to the
    # other) and its copy in the precision of products.
    assert scores < words - once <= 2 * scores + 3 * v * d * 4
    assert both - once <= (tokens - once) + (words - once)
    assert once < n * v * 4 / 2, "all scores at once would be more than twice that"


def test_a_chunk_of_bfloat16_products_is_never_held_in_float32():
    n, v = 256, 5000
    narrow, wide = (step_memory(n, words, chunk=n, autocast=True) for words in (v, 2 * v))
    assert narrow.largest == n * v * 2
    blocks = 5 * 8 * v * 4  # a few rows at a time are
    assert n * v * 2 < wide.peak - narrow.peak <= n * v * 2 + blocks + 3 * v * 8 * 4


@pytest.fixture
def fused_kernels(monkeypatch):
    """The path of a GPU, on whatever device there is: TorchInductor compiles for a CPU, too."""
    monkeypatch.setattr(head_module, "fuses", lambda _device: True)
    fused_module.fused.cache_clear()
    yield
    fused_module.fused.cache_clear()


@pytest.mark.engine
def test_fused_kernels_give_the_same_numbers(fused_kernels, caplog):
    """Values, gradients and CAPO's statistics, over chunks of several sizes without another compilation failing."""
    a, c = torch.randn(13), torch.randn(13)
    for case in ({}, {"temperature": 0.7, "logit_scale": 0.25}, {"softcap": 3.0}):
        for chunk in (4, 13):
            hidden, weight, bias, target = make()
            grads = []
            for function, extra in ((chunked_head, {"chunk": chunk}), (naive, {})):
                logp, entropy = function(hidden, weight, bias, target, **case, **extra)
                loss = (logp * a + entropy * c).sum()
                grads.append([logp, entropy, *torch.autograd.grad(loss, (hidden, weight, bias))])
            for ours, theirs in zip(*grads):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    hidden, weight, bias, target = make()
    head = ScoringLinear(8, 29)
    head.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    _, _, _, squares, cubes, *_ = head(hidden, HeadRequest(target, LogitRule(), 4, StatisticsRequest(k=3)))
    p = torch.softmax(nn.functional.linear(hidden, weight, bias), -1)
    torch.testing.assert_close(squares, p.square().sum(-1))
    torch.testing.assert_close(cubes, p.pow(3).sum(-1))
    assert not [r for r in caplog.records if r.name.startswith("rlpost")], "it was compiled, not replaced"


def test_without_a_compiler_the_head_works_and_says_so(fused_kernels, monkeypatch, caplog):
    def broken(_function, **_options):
        def call(*_args, **_kwargs):
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    hidden, weight, bias, target = make()
    logp, _ = chunked_head(hidden, weight, bias, target, chunk=4)
    torch.testing.assert_close(logp, naive(hidden, weight, bias, target)[0])
    (record,) = [r for r in caplog.records if r.name.startswith("rlpost")]
    assert "no compiler here" in record.getMessage()
