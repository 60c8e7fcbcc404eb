"""Weights & Biases through its own package. Nothing in here may stop or delay training."""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost.recipe.sections.learner import WandbSection
from rlpost.tracking.completions import CompletionRecord
from rlpost.tracking.metrics import Kind, MetricRow, write_atomically
from rlpost.tracking.rundir import RunDirectory

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 120.0
TABLE_ROWS = 16
MODES = ("online", "offline", "disabled")


class WandbTracker:
    """One W&B run, resumed under the same id when training is.

    `note` is called with one-line messages for the user. After any failure of W&B the rest of the run goes without it.
    The environment variable WANDB_MODE wins over the recipe's `tracking.wandb.mode`, as everywhere in W&B.
    """

    def __init__(
        self, run: RunDirectory, settings: WandbSection, config: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        self._state_file = run.path / "wandb" / "run.json"
        self._note = note
        self._run: Any = None
        self._synced_later = False
        self._state = _read_state(self._state_file)
        mode = os.environ.get("WANDB_MODE") or settings.mode
        if mode in ("online", "offline"):
            self._guarded("start", lambda: self._start(run, settings, config, mode))
        elif mode not in MODES:
            note(f"WANDB_MODE={mode} is none of {', '.join(MODES)}: the run goes on without W&B.")

    @property
    def active(self) -> bool:
        """Whether rows are being recorded by W&B."""
        return self._run is not None

    @property
    def id(self) -> str:
        """The W&B run id, kept in the run directory."""
        return str(self._state["id"])

    def log(self, row: MetricRow, *, kind: Kind) -> None:
        """Sends a row as it stands in `metrics.jsonl`. Rows sent before the run was killed are not sent again."""
        if self._run is None:
            return
        step = int(row["step"])
        if step <= self._state["sent"].get(kind, -1):
            return
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        self._guarded("log", lambda: self._run.log(numbers))
        self._state["sent"][kind] = step
        self._guarded("log", self._write_state)

    def log_completions(self, step: int, records: Sequence[CompletionRecord]) -> None:
        """Sends a table of completions spread evenly over `records`."""
        if self._run is None or not records:
            return
        some = records[:: max(1, len(records) // TABLE_ROWS)][:TABLE_ROWS]
        self._guarded("table", lambda: self._run.log({"step": step, "completions/samples": _table(some)}))

    def finish(self, *, exit_code: int = 0) -> None:
        """Ends the W&B run, waiting for the upload for at most two minutes."""
        run, self._run = self._run, None
        if run is None:
            return
        path = _sync_path(run)
        ended = threading.Event()

        def end() -> None:
            self._guarded("finish", lambda: _finish_and_flush(run, exit_code))
            ended.set()

        threading.Thread(target=end, daemon=True, name="wandb-finish").start()
        if not ended.wait(FINISH_TIMEOUT_S):
            self._note(
                f"W&B has not taken everything within {FINISH_TIMEOUT_S:.0f} s. Send the rest: wandb sync {path}"
            )
        elif self._synced_later:
            self._note(f"W&B was off line. Send this run: wandb sync {path}")

    def _start(self, run: RunDirectory, settings: WandbSection, config: Mapping[str, Any], mode: str) -> None:
        import wandb

        self._write_state()
        if mode == "online":
            reason = self._init_online(wandb, run, settings, config)
            if reason is None:
                self._note(f"W&B: {self._run.url}")
                return
            if wandb.run is None:
                wandb.teardown()  # a failed start keeps the run's id occupied in W&B's background process
            self._synced_later = True
        self._run = self._init(wandb, run, settings, config, "offline")
        if mode == "online":
            self._note(
                f"W&B is not reachable ({reason}); the run goes on and is recorded off line. Send it later: "
                f"wandb login, then wandb sync {_sync_path(self._run)}"
            )

    def _init_online(
        self, wandb: Any, run: RunDirectory, settings: WandbSection, config: Mapping[str, Any]
    ) -> str | None:
        """Starts an online run; the reason in one line when that fails. Never asks for a key at the terminal."""
        try:
            if not wandb.login(prompt=False, verify=False):
                return "not logged in"
            self._run = self._init(wandb, run, settings, config, "online")
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0][:160]
        return None

    def _init(self, wandb: Any, run: RunDirectory, settings: WandbSection, config: Mapping[str, Any], mode: str) -> Any:
        started = wandb.init(
            mode=mode,
            id=self.id,
            resume="allow",
            name=run.name,
            project=settings.project,
            entity=settings.entity,
            tags=list(settings.tags) or None,
            dir=str(run.path),
            config=dict(config),
            # The console belongs to rlpost, and W&B must neither write over it nor copy it.
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S, silent=True, console="off"
            ),
        )
        started.define_metric("step", hidden=True)
        started.define_metric("*", step_metric="step")
        for metric in ("eval/accuracy", "reward/mean"):
            started.define_metric(metric, step_metric="step", summary="max,last")
        return started

    def _write_state(self) -> None:
        write_atomically(self._state_file, json.dumps(self._state))

    def _guarded(self, doing: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            self._note(f"W&B failed ({doing}; {reason}); the run goes on without it, metrics.jsonl has everything.")


def _table(records: Sequence[CompletionRecord]) -> Any:
    import wandb

    names = list(records[0].scores)
    table = wandb.Table(columns=["step", "prompt", "completion", "reward", "advantage", "finish", "tokens", *names])
    for one in records:
        scores = [
            (str(s.value) if s.value is not None else s.outcome) if (s := one.scores.get(name)) else ""
            for name in names
        ]
        table.add_data(one.step, one.prompt, one.completion, one.reward, one.advantage, one.finish, one.tokens, *scores)
    return table


def _finish_and_flush(run: Any, exit_code: int) -> None:
    import wandb

    run.finish(exit_code=exit_code)
    # W&B 0.31 returns from finish() while its background process may not have written the offline file yet; only the
    # teardown waits for that. A process that ends hard after this must not lose its last rows.
    if wandb.run is None:
        wandb.teardown()


def _sync_path(run: Any) -> Path:
    return Path(run.settings.sync_dir)


def _read_state(path: Path) -> dict[str, Any]:
    """The run's W&B id and the last step sent of every kind of row; a new id when there is none."""
    try:
        state = json.loads(path.read_text())
        return {"id": str(state["id"]), "sent": {kind: int(step) for kind, step in state["sent"].items()}}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {"id": secrets.token_hex(4), "sent": {}}
