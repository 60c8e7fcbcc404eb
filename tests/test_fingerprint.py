"""Fingerprints of what an engine holds: parts add up to the whole, one element is enough, and nothing sound is accused."""

from __future__ import annotations

import math
import os

import pytest
import torch
from families import save_tiny
from test_rollout_remote import SECTION, SETTINGS, expected, make, requests, saved, versions  # noqa: F401
from torch import nn

from rlpost.policy.weights import named_weights
from rlpost.rollout.fingerprint import Held, Sent, as_json, as_matrix, compare, fingerprint, from_json, sent
from rlpost.rollout.remote.held import HeldWeights
from rlpost.rollout.remote.weights import WeightFiles, weights_folder

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 48), (7, 5), (1, 9), (3, 1), (300, 1100)], ids=str)
def test_parts_add_up_to_the_whole(dtype, shape):
    torch.manual_seed(0)
    whole = torch.randn(shape).mul(3).to(dtype)
    for row in {0, 1, shape[0] // 2, shape[0]}:
        for column in {0, 1, shape[1] // 2, shape[1]}:
            parts = [
                fingerprint(part, r, c)
                for rows, r in ((whole[:row], 0), (whole[row:], row))
                for part, c in ((rows[:, :column], 0), (rows[:, column:], column))
            ]
            assert sum(parts) % 2**32 == fingerprint(whole), (row, column)
    assert fingerprint(whole.t().contiguous().t()) == fingerprint(whole), "however it lies in memory"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_changed_by_one_bit_or_stands_elsewhere_is_seen(dtype):
    torch.manual_seed(0)
    whole = torch.randn(96, 33).to(dtype)
    right = fingerprint(whole)
    for _ in range(200):
        i, j = int(torch.randint(96, ())), int(torch.randint(33, ()))
        changed = whole.clone()
        changed[i, j] = torch.nextafter(changed[i, j], torch.tensor(math.inf, dtype=dtype))
        assert fingerprint(changed) != right
    others = [whole.roll(1, 0), whole.roll(1, 1), torch.cat([whole[48:], whole[:48]]), whole.flip(0), -whole]
    assert len({right, *map(fingerprint, others)}) == 6
    square = whole[:33]
    assert fingerprint(square) != fingerprint(square.t())
    assert fingerprint(torch.zeros(4, 4)) == fingerprint(torch.zeros(2, 2)) == 0, "padding adds nothing"


def test_a_tensor_is_counted_as_it_is_sent_and_as_the_engine_casts_it():
    tensor = torch.randn(6, 4, 8)
    found = sent(tensor, torch.bfloat16)
    assert (found.rows, found.columns, sorted(found.values)) == (24, 8, ["bfloat16", "float32"])
    assert found.values["bfloat16"] == fingerprint(as_matrix(tensor).bfloat16())
    assert sorted(sent(torch.arange(3), torch.bfloat16).values) == ["int64"]
    assert sorted(sent(tensor, None).values) == ["float32"]
    assert sent(torch.tensor(2.0), None).columns == 1


def test_parts_of_several_processes_are_compared_with_what_was_sent():
    q, norm = torch.randn(8, 6), torch.randn(6)
    given = {"q": sent(q, None), "norm": sent(norm, None)}
    first = [Held.of("q", (0, 0, 4, 6), q[:4]), Held.of("norm", (0, 0, 1, 6), norm[None])]
    second = [Held.of("q", (4, 0, 4, 6), q[4:]), Held.of("norm", (0, 0, 1, 6), norm[None])]
    again = [from_json(as_json(part)) for part in second]
    found = compare(given, [first, again])
    assert not found.wrong and not found.unseen
    assert compare(given, [first, [*second[:1], Held.of("norm", (0, 0, 1, 6), norm[None] + 1)]]).wrong == ("norm",)
    assert compare(given, [first, [Held.of("q", (4, 0, 4, 6), q[:4]), second[1]]]).wrong == ("q",)
    assert compare(given, [first]).unseen == ("q",), "half of it is nowhere"
    doubled = [Held.of("q", (2, 0, 4, 6), q[2:6]), second[1]]
    assert compare(given, [first, doubled]).unseen == ("q",), "two parts overlap, and another is nowhere"
    coarse = [Held.of("q", (0, 0, 8, 6), q.half()), first[1]]
    assert compare(given, [coarse]).unseen == ("q",), "in a precision that was not counted"
    for bad in (["q", 1], None, ["q", 0, 0, 4, 6, "float32", None]):
        with pytest.raises(ValueError):
            from_json(bad)


# --- where tensors go: a model that loads as vLLM's do ------------------------------------------------------------------


class Fused(nn.Module):
    """A part of a model on one of `of` cards: fused rows, a shard by columns, a padded vocabulary, a transposed matrix."""

    def __init__(self, rank: int = 0, of: int = 1) -> None:
        super().__init__()
        self.rank, self.of = rank, of
        self.qkv = nn.Parameter(torch.empty(16 // of, 6))
        self.out = nn.Parameter(torch.empty(6, 8 // of))
        self.embed = nn.Parameter(torch.empty(12, 6))
        self.turned = nn.Parameter(torch.empty(4, 6))
        self.decay = nn.Parameter(torch.empty(6))
        self.skip: tuple[str, ...] = ()

    def load_weights(self, weights) -> None:
        offsets = {"q": 0, "k": 8 // self.of, "v": 12 // self.of}
        for name, tensor in weights:
            if name in self.skip:
                continue
            if name in offsets:
                n = len(tensor) // self.of
                self.qkv.data.narrow(0, offsets[name], n).copy_(tensor.narrow(0, self.rank * n, n))
            elif name == "out":
                n = tensor.shape[1] // self.of
                self.out.data.copy_(tensor.narrow(1, self.rank * n, n))
            elif name == "embed":
                self.embed.data[: len(tensor)].copy_(tensor)
                self.embed.data[len(tensor) :].fill_(0)
            elif name == "turned":
                self.turned.data.copy_(tensor.t())
            elif name == "decay":
                self.decay.data.copy_(-torch.exp(tensor))


SHAPES = {"q": (8, 6), "k": (4, 6), "v": (4, 6), "out": (6, 8), "embed": (10, 6), "turned": (6, 4), "decay": (6,)}


def given(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def loaded(held: HeldWeights, model: Fused, weights: dict[str, torch.Tensor]) -> None:
    held.begin()
    with torch.no_grad(), held.loading(weights.items()) as watched:
        model.load_weights(watched)
    held.end(list(weights))


@pytest.mark.parametrize("of", [1, 2])
def test_places_are_found_once_and_hold_on(of):
    models = [Fused(rank, of) for rank in range(of)]
    followed = [HeldWeights(model) for model in models]
    for seed in range(3):
        weights = given(seed)
        told = {name: sent(tensor, None) for name, tensor in weights.items()}
        for held, model in zip(followed, models, strict=True):
            loaded(held, model, weights)
        found = compare(told, [held.held for held in followed])
        assert not found.wrong and found.unseen == ("decay",), "what is computed of a tensor is not compared"
        assert not any(held.unloaded or held.stale for held in followed)
    before = compare({name: sent(tensor, None) for name, tensor in given(9).items()}, [h.held for h in followed])
    assert set(before.wrong) == set(SHAPES) - {"decay"}, "stale, all of them"
    with torch.no_grad():
        models[-1].turned[2, 3].mul_(1 + 1e-6)
    followed[-1].end(list(SHAPES))
    assert compare(told, [held.held for held in followed]).wrong == ("turned",)


def test_a_tensor_that_is_left_out_is_named_at_the_first_load_already():
    model = Fused()
    model.skip = ("k",)
    held = HeldWeights(model)
    loaded(held, model, given())
    assert held.unloaded == ["k"]
    model, found = Fused(), {}
    held = HeldWeights(model)
    loaded(held, model, given() | {"rotary.inv_freq": torch.ones(3)})
    assert held.unloaded == [], "the model has no place for it"
    found = compare({"rotary.inv_freq": sent(torch.ones(3), None)}, [held.held])
    assert found == compare({"rotary.inv_freq": Sent(1, 3, {})}, []), "so nothing is said of it"


# --- vLLM's own models ---------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192, "num_key_value_heads": 4}
Q, K = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


class Updates:
    """vLLM in this process, updated as a server is, with the learner's model beside it."""

    def __init__(self, folder, family: str, dtype: str = "float32") -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from transformers import AutoModelForCausalLM
        from vllm import LLM

        save_tiny(family, folder / "model", **(SIZES if family == "llama" else SIZES | {"num_key_value_heads": 2}))
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.files = WeightFiles(weights_folder(str(folder), 0), getattr(torch, dtype))
        self.llm = LLM(
            model=str(folder / "model"),
            dtype=dtype,
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=8,
            kv_cache_memory_bytes=2**26,
            block_size=32,
            skip_tokenizer_init=True,
            weight_transfer_config={"backend": "rlpost_files"},
            worker_extension_cls="rlpost.rollout.remote.worker.Extension",
        )
        self.step()

    def step(self) -> None:
        """Of the optimizer, at a rate of 1e-6."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1e-6 * torch.randn_like(parameter).sign())

    def update(self) -> tuple:
        """(tensors that differ, that were left out, layers whose packed copy is stale, tensors of which nothing is said)"""
        self.step()
        self.files.write(named_weights(self.model))
        self.llm.start_weight_update()
        for path, names in self.files.files:
            self.llm.update_weights({"update_info": {"path": str(path), "names": names}})
        self.llm.finish_weight_update("1")
        [told] = self.llm.collective_rpc("rlpost_held")
        found = compare(self.files.sent, [[from_json(row) for row in told["held"]]])
        return found.wrong, tuple(told["unloaded"]), tuple(told["stale"]), found.unseen

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        self.files.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    pytest.importorskip("vllm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Updates(tmp_path_factory.mktemp("llama"), "llama")
    yield made
    made.close()
    torch.set_num_threads(threads)


def one_element(weights, _old):
    tensor = weights[UP] = weights[UP].clone()
    tensor[3, 7] = torch.nextafter(tensor[3, 7], torch.tensor(math.inf))


def q_and_k_swapped(weights, _old):
    weights[Q], weights[K] = weights[K], weights[Q]


def one_left_out(weights, _old):
    del weights[UP]


def one_stale(weights, old):
    weights[K] = old[K]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("fault", "named"), [(one_element, (UP,)), (q_and_k_swapped, (K, Q)), (one_left_out, (UP,)), (one_stale, (K,))]
)
def test_a_fault_while_vllm_loads_is_seen_at_once_and_named(llama, monkeypatch, fault, named):
    """The fault is in the worker, between what was sent and the model's code, at one update of steps at a rate of 1e-6."""
    from rlpost.rollout.remote import worker

    clean = llama.update()
    assert clean == ((), (), (), ())
    old = {name: tensor.detach().clone() for name, tensor in named_weights(llama.model)}
    [engine] = llama.llm.collective_rpc(lambda self: self.weight_transfer_engine)
    assert isinstance(engine, worker.FilesEngine)
    load = engine.model.load_weights

    def broken(weights):
        weights = dict(weights)
        fault(weights, old)
        return load(weights.items())

    monkeypatch.setattr(engine.model, "load_weights", broken)
    wrong, unloaded, stale, _ = llama.update()
    assert tuple(sorted((*wrong, *unloaded))) == named
    assert not stale or fault is one_left_out, "what was not loaded is not equal to itself where it is no number"
    monkeypatch.undo()
    assert llama.update() == ((), (), (), ())


@pytest.mark.engine
def test_a_packed_copy_that_was_not_renewed_is_named(llama):
    [engine] = llama.llm.collective_rpc(lambda self: self.weight_transfer_engine)
    layers = {name: m for name, m in engine.model.named_modules() if name.endswith(("1.mlp.down_proj", "lm_head"))}
    assert len(layers) == 2
    for name, layer in layers.items():
        llama.update()
        old, layer.cpu_linear = layer.cpu_linear, None
        finish = engine._replaced

        def with_old(layer=layer, old=old, finish=finish):
            finish()
            layer.cpu_linear = old

        engine._replaced = with_old
        assert llama.update() == ((), (), (name,), ())
        del engine._replaced
    assert llama.update() == ((), (), (), ())


@pytest.mark.engine
def test_what_changes_after_loading_is_named(llama):
    [engine] = llama.llm.collective_rpc(lambda self: self.weight_transfer_engine)
    finish = engine._replaced

    def then_changed():
        finish()
        norm = engine.model.model.norm.weight.data
        norm[5] = torch.nextafter(norm[5], torch.tensor(0.0))

    engine._replaced = then_changed
    assert llama.update()[0] == (NORM,)
    del engine._replaced


OTHERS = "gemma2 gemma3_text gpt2 gpt_neox mixtral opt phi3 qwen2_moe qwen3_moe stablelm"


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS.split())
def test_sound_updates_of_other_families_raise_no_alarm(family, tmp_path, one_thread):
    """Fused and interleaved projections, experts, tied heads, biases, transposed matrices: every tensor is compared."""
    pytest.importorskip("vllm")
    made = Updates(tmp_path, family)
    try:
        assert [made.update() for _ in range(3)] == [((), (), (), ())] * 3
    finally:
        made.close()


@pytest.mark.slow
def test_an_engine_in_bfloat16_is_compared_with_what_its_cast_makes(tmp_path, one_thread):
    pytest.importorskip("vllm")
    made = Updates(tmp_path, "llama", "bfloat16")
    try:
        assert [made.update() for _ in range(2)] == [((), (), (), ())] * 2
        made.step = lambda: None
        with torch.no_grad():
            made.model.model.norm.weight[3] *= 1.01
        before = made.files.sent[NORM]
        assert made.update() == ((), (), (), ())
        assert made.files.sent[NORM].values["bfloat16"] != before.values["bfloat16"]
    finally:
        made.close()


@pytest.mark.engine
@pytest.mark.slow
def test_a_worker_with_one_wrong_bit_is_replaced_and_given_everything(make, expected, saved, monkeypatch):  # noqa: F811
    """The bit is turned in the file, after the learner has looked at what it sends."""
    from safetensors.torch import load_file, save_file

    from rlpost.rollout.remote.client import Client

    engine = make(SECTION.model_copy(update={"deadline_s": 120.0}))
    engine.load_weights(saved[1].named_parameters(), 0)
    call, lose, state, said = Client.call, engine._lose, [], []

    async def with_a_fault(self, path, body=None, **options):
        if path == "/update_weights" and len(state) < 2:
            file = body["update_info"]["path"]
            if not state:
                state.append(load_file(file))
                wrong = {name: tensor.clone() for name, tensor in state[0].items()}
                tensor = wrong["model.layers.1.self_attn.v_proj.weight"]
                tensor[2, 3] = torch.nextafter(tensor[2, 3], torch.tensor(0.0))
                save_file(wrong, file)
            else:
                save_file(state[0], file)
                state.append(None)
        return await call(self, path, body, **options)

    monkeypatch.setattr(Client, "call", with_a_fault)
    monkeypatch.setattr(engine, "_lose", lambda server, why: (said.append(why), lose(server, why)))
    engine.load_weights(versions(saved[1])[1].named_parameters(), 1)
    assert any("1 of the weights: 'model.layers.1.self_attn.v_proj.weight'" in why for why in said), said
    assert engine.restarts == 1
    assert engine.sample(requests(), SETTINGS) == expected[1][0]
    engine.close()
