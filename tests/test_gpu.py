"""What only a CUDA device can show: the engine, the compiled kernels and bfloat16 products of a real run there."""

from __future__ import annotations

import pytest
import torch
from conftest import rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_bfloat16_products_stay_near_float32_on_cuda(tiny_model):
    """The learner's forward and backward under autocast, against float32: log-probs and the gradient's direction."""
    from rlpost.policy.model import load_policy
    from rlpost.policy.rows import RowGroup, build_rows
    from rlpost.recipe.sections.model import ModelSection

    group = RowGroup(tuple(range(5, 25)), ((0, 0, (30, 31, 32, 33)), (1, 4, (40, 41))))
    found = {}
    for autocast in ("none", "bfloat16"):
        section = ModelSection(path=tiny_model, autocast=autocast)
        policy = load_policy(section, tiny_model, device="cuda", temperature=1.0)
        (batch,) = build_rows([group], layout="tree", micro_batch_tokens=512, pad_id=0)
        logp = policy(batch).logp
        logp.sum().backward()
        gradient = torch.cat([p.grad.float().flatten() for p in policy.parameters() if p.grad is not None])
        found[autocast] = logp.detach().float(), gradient
    (exact, g), (low, h) = found["none"], found["bfloat16"]
    assert (exact - low).abs().max() < 0.1
    assert torch.nn.functional.cosine_similarity(g, h, dim=0) > 0.98


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_run_on_cuda(engine, write_recipe, children, tmp_path):
    """flex_attention for tree rows, bfloat16 autocast, weights synchronised in place: engine and learner stay together."""
    section = {"type": engine}
    if engine == "vllm":
        pytest.importorskip("vllm")
        section |= {"memory_fraction": 0.3, "max_sequences": 16}
    changes = {
        "model.autocast": "auto",
        "rollout.engine": section,
        "rollout.probe": {"max_mean_gap": 0.1},
        "learner.rollouts": 2,
        "learner.minibatches": 2,
    }
    code, printed = children.run(write_recipe(tmp_path, changes), launch="gpu.yaml", timeout=600)
    assert code == 0, printed
    found = rows(tmp_path / "run", "train")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all(row["optimizer/grad_norm"] > 0 and not row["optimizer/skipped"] for row in found)
