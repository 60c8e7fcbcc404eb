"""Which DeepSpeed and which optimizers `learner.offload` takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from rlpost.errors import RecipeError
from rlpost.offload.known import KNOWN, fingerprints, refuse_unknown

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def source() -> str:
    found = importlib.util.find_spec("deepspeed")
    assert found is not None and found.origin is not None
    return (Path(found.origin).parent / "runtime" / "zero" / "stage3.py").read_text()


def test_the_installed_version_is_known(source):
    assert fingerprints(source, tuple(KNOWN["0.19.8"])) == KNOWN["0.19.8"]
    for version in ("0.19.8", "9.9.9"):  # another name for the same methods
        assert refuse_unknown(source, version) is None  # an error would say what differs


def test_every_method_has_a_fingerprint_of_its_own(source):
    """Most are wrapped by one decorator, and `inspect.getsource` gives its lines for all of them."""
    for methods in KNOWN.values():
        assert len(set(methods.values())) == len(methods)


@pytest.mark.parametrize("name", sorted({name for methods in KNOWN.values() for name in methods}))
def test_a_changed_line_in_any_method_that_counts_is_refused(name, source):
    at = source.index(f"    def {name}(")
    colon = source.index(":\n", at) + 2
    changed = source[:colon] + "        self.changed = True\n" + source[colon:]
    with pytest.raises(RecipeError) as caught:
        refuse_unknown(changed, "0.20.0")
    for said in (name, "0.20.0", "deepspeed==0.19.8", "launch/zero3-offload.yaml"):
        assert said in str(caught.value)


def test_a_changed_line_elsewhere_is_none_of_its_business(source):
    changed = source.replace("def dump_pre_step_gradients(self", "def dumped(self")
    assert changed != source and refuse_unknown(changed, "0.20.0") is None
    names = tuple(KNOWN["0.19.8"])
    assert fingerprints(changed, names) == fingerprints(source, names)


def test_a_method_that_is_gone_is_named(source):
    assert fingerprints(source.replace("def _post_step(", "def _after("), ("_post_step",)) == {"_post_step": None}
    with pytest.raises(RecipeError, match="another _post_step than"):
        refuse_unknown(source.replace("def _post_step(", "def _after("), "0.20.0")


@pytest.mark.engine
def test_an_optimizer_other_than_adamw_is_refused():
    from rlpost.learner.deepspeed_import import import_deepspeed

    import_deepspeed()
    from rlpost.offload.zero3 import refuse_other_optimizers

    weights = [torch.nn.Parameter(torch.zeros(3))]
    refuse_other_optimizers(torch.optim.AdamW(weights, fused=True))
    for optimizer, said in (
        (torch.optim.SGD(weights), "SGD"),
        (torch.optim.Adam(weights), "Adam"),
        (torch.optim.AdamW(weights, amsgrad=True), "AdamW with amsgrad"),
    ):
        with pytest.raises(RecipeError, match=f"the optimizer is {said}"):
            refuse_other_optimizers(optimizer)
