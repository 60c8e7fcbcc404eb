"""Runs inside the sandbox, by the plain interpreter: a process and a line of JSON for each test case. Knows no right answer."""

import json
import os
import subprocess
import sys
from typing import Any

CHILD = """
import json, os, sys
task = json.loads(sys.stdin.readline())
out = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
space = {"__name__": "__main__" if "statements" in task else "program"}
exec(compile(open("main.py", encoding="utf-8").read(), "main.py", "exec"), space)
if "expression" in task:
    told = {"value": repr(eval(task["expression"], space))[: task["limit"]]}
else:
    exec(compile(task["statements"], "tests.py", "exec"), space)
    told = {"held": True}
out.write(json.dumps(told))
out.flush()
os._exit(0)
"""


def main() -> None:
    task = json.load(sys.stdin)
    for case in task["cases"]:
        print(json.dumps(one(case, task["seconds"], task["limit"])), flush=True)


def one(case: dict[str, Any], seconds: float, limit: int) -> dict[str, Any]:
    whole = "stdin" in case
    command = [sys.executable, "-I", "-S", *(["main.py"] if whole else ["-c", CHILD])]
    given = case["stdin"] if whole else json.dumps(dict(case, limit=limit)) + "\n"
    try:
        done = subprocess.run(
            command,
            input=given.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"time": True}
    except OSError as error:
        return {"error": str(error)}
    out = done.stdout[:limit].decode("utf-8", "replace")
    if whole:
        return {"code": done.returncode, "stdout": out}
    try:
        told = json.loads(out)
    except ValueError:
        return {"code": done.returncode}
    return told if isinstance(told, dict) else {}


if __name__ == "__main__":
    os.chdir("/work")
    main()
