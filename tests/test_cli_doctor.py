"""The doctor: a finding for everything, an exit code, and no death by what it examines."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from rlpost import doctor
from rlpost.doctor import Finding, constraints, examine, print_findings


@pytest.fixture(scope="module")
def findings():
    return examine(quick=True)


def test_this_machine_is_examined(findings):
    subjects = {finding.subject for finding in findings}
    assert {
        "Python",
        "torch",
        "CPU",
        "bfloat16",
        "vLLM",
        "memory",
        "disk",
        "W&B",
        "quickstart model",
        "tests",
    } <= subjects
    assert all(finding.advice for finding in findings if finding.status != "ok")


def test_constraints_name_versions():
    assert constraints()["torch"].count(".") == 2


def test_other_and_missing_versions(monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "rich" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    missing, other = list(doctor._packages())[:2]
    assert missing.status == "fail" and "peft" in missing.detail
    assert other.status == "warn" and "rich 0.0.1" in other.detail


def test_a_broken_check_is_a_finding(monkeypatch):
    def broken():
        raise OSError("no such library")
        yield

    monkeypatch.setattr(doctor, "_torch", broken)
    found = [
        finding for finding in examine(quick=True) if finding.status == "fail" and "no such library" in finding.detail
    ]
    assert len(found) == 1 and found[0].advice


def test_imports_are_tried_outside(monkeypatch):
    assert doctor._import_in_subprocess("json", "json").status == "ok"
    failed = doctor._import_in_subprocess("nothing", "no_such_module_at_all")
    assert failed.status == "fail" and "no_such_module_at_all" in failed.detail
    assert "still importing" in doctor._import_in_subprocess("json", "json", timeout_s=0.001).detail


def test_printing_and_exit_code(capsys):
    good, bad = Finding("a", "ok", "fine"), Finding("b", "fail", "broken", "mend it")
    assert print_findings([good]) == 0
    assert print_findings([good, bad]) == 1
    assert "mend it" in capsys.readouterr().out
    assert print_findings([good, bad], as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and found["findings"][1]["advice"] == "mend it"
