"""Which of DeepSpeed's stage-3 methods `zero3.py` overrides or counts on, and what they look like in versions that were tried.

The source is read as text: most of these methods are wrapped by a decorator that hides them, so that `inspect.getsource` of any
would give the decorator's own lines, the same ones for all.
"""

from __future__ import annotations

import ast
import hashlib

from rlpost.errors import RecipeError

CLASS = "DeepSpeedZeroOptimizer_Stage3"

# SHA-256 (first 16 digits) of each method's lines, without its decorators.
KNOWN: dict[str, dict[str, str]] = {
    "0.19.8": {
        "__init__": "1e0efd50b13679f7",
        "_setup_for_real_optimizer": "28252770665d59ac",
        "_create_fp16_partitions_with_defragmentation": "6944adf44597c22c",
        "_set_fp16_partitioned_groups_flat": "78c8ed5da13c57f7",
        "_create_fp32_partitions": "644398ffd22f2014",
        "initialize_optimizer_states": "9be29419ae691d5b",
        "step": "dfc83b7912f0cd7e",
        "_pre_step": "0dda946631a25d6d",
        "zero_grad": "8e690fca2ba829d4",
        "_prepare_sub_group": "5eba716ae5a46395",
        "_prepare_fp32_grad_for_sub_group": "f6c2a2d1ed800120",
        "unscale_and_clip_grads": "96aa6a844d2b1ac9",
        "_optimizer_step": "94c2aceb8afae35b",
        "_reassign_or_swap_out_partitioned_parameters": "998ae84e3c63a669",
        "_release_sub_group": "b9ca6a6949e98d08",
        "_post_step": "5c4b073f7d5c77ee",
        "partition_grads": "59d6e026081e3f8e",
        "independent_gradient_partition_epilogue": "cba07463ffe51058",
        "clear_backward_seen_flag": "7d5e035d7169231f",
        "_overflow_clean_up": "43928c51248e63ab",
        "_rigid_state_dict": "9a26e07e9fb9ac3b",
        "_rigid_load_state_dict": "9da5168f81ed4294",
        "load_state_dict": "b41e272aaf390233",
    },
}


def fingerprints(source: str, names: tuple[str, ...]) -> dict[str, str | None]:
    """The fingerprints of these methods of the class in `source` (the text of stage3.py); None: there is no such method."""
    prints: dict[str, str | None] = dict.fromkeys(names)
    lines = source.encode().splitlines(
        keepends=True
    )  # not `ast.get_source_segment`: it splits the whole file for each method
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == CLASS:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name in prints:
                    text = b"".join(lines[method.lineno - 1 : method.end_lineno])[method.col_offset :].decode().rstrip()
                    prints[method.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return prints


def refuse_unknown(source: str, version: str) -> None:
    """Raises RecipeError where the installed DeepSpeed differs in a method that counts from all versions that were tried.

    Another version with the same methods is accepted: what a release is called says nothing about what changed in it.
    """
    changes = {
        known: sorted(name for name, value in fingerprints(source, tuple(methods)).items() if value != methods[name])
        for known, methods in KNOWN.items()
    }
    nearest = min(changes, key=lambda known: len(changes[known]))
    if not changes[nearest]:
        return
    raise RecipeError(
        f"learner.offload runs the update in place of DeepSpeed's, and the installed version {version} has another "
        f"{', '.join(changes[nearest])} than {nearest}. Versions that work: {', '.join(KNOWN)} (`pip install "
        f"deepspeed=={nearest}`). Or set learner.offload to null, and take launch/zero3-offload.yaml: DeepSpeed's own "
        "offload, one part after the other"
    )
