"""`python -m rlpost.run.launch`, which launch/run.sh calls: accelerate's launcher with the run's own last words and exit code.

By itself accelerate puts a traceback of its own (of several processes, torch's table of them) below whatever a run said of
its error, and ends with 1 whatever the run's exit code was.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Takes what `accelerate launch` takes. Ends with the exit code of the run: of several processes, of the first to fail."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it reports every process that ends
    try:
        launch_command(launch_command_parser().parse_args(list(arguments)))
    except subprocess.CalledProcessError as error:
        sys.exit(_code(error.returncode))
    except ChildFailedError as error:
        sys.exit(_code(error.get_first_failure()[1].exitcode))
    except SignalException as error:
        sys.exit(128 + int(error.sigval))


def _code(code: int) -> int:
    """As a shell gives it: a process that signal n ended has the code 128 + n."""
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main(sys.argv[1:])
