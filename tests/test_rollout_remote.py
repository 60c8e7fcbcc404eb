"""vLLM in processes of its own: what a reply must be, how weights travel, and what happens when a process is lost."""

from __future__ import annotations

import copy
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, rows
from test_rollout import tiny

from rlpost.errors import EngineLost, RolloutError
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.rollout.engine import SamplingRequest, SamplingSettings
from rlpost.rollout.factory import make_engine
from rlpost.rollout.place import Place
from rlpost.rollout.remote.arguments import server_arguments, server_environment
from rlpost.rollout.remote.child import shared_memory_of
from rlpost.rollout.remote.client import Client, ServerLost, run
from rlpost.rollout.remote.engine import RemoteEngine
from rlpost.rollout.remote.lanes import Server
from rlpost.rollout.remote.replies import BadReply, read_sample, read_scores
from rlpost.rollout.remote.weights import WeightFiles, weights_folder

engine_test = pytest.mark.engine
SETTINGS = SamplingSettings(max_completion_tokens=24, temperature=1.0)
DEADLINE_S = 8.0  # short, so that a stopped process is noticed soon; a busy machine must still answer within it
SECTION = VllmEngine(where="worker", dtype="float32", kv_cache_gib=0.25, max_sequences=32, deadline_s=DEADLINE_S)


def requests(n: int = 40) -> list[SamplingRequest]:
    return [SamplingRequest(tuple(range(40 + i, 43 + i + i % 5)), seed=2**62 + i) for i in range(n)]


# --- replies -----------------------------------------------------------------------------------------------------------


def reply(**changes) -> dict:
    choice = {
        "token_ids": [5, 6, 1],
        "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1.0}, {"logprob": 0.0}]},
        "finish_reason": "stop",
        "text": "ab",
        "weight_versions": [{"version": "3", "start": 0, "end": 3}],
    }
    return {"choices": [choice | changes]}


def scored(*values) -> dict:
    return {"content": [{"logprob": value} for value in values]}


def test_a_reply_as_it_should_be():
    found = read_sample(reply(), vocabulary=10, longest=3, versions=["3"])
    assert (found.token_ids, found.sampler_logprobs, found.text, found.finish) == (
        (5, 6, 1),
        (-0.5, -1.0, 0.0),
        "ab",
        "stop",
    )


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([], "one sample"),
        ({"choices": []}, "one sample"),
        ({"choices": [reply()["choices"][0]] * 2}, "one sample"),
        (reply(token_ids=[5, 6, 10]), "token 10"),
        (reply(token_ids=[5, -1, 1]), "token -1"),
        (reply(token_ids=[5, 6.0, 1]), "token 6.0"),
        (reply(token_ids=[5, True, 1]), "token True"),
        (reply(token_ids=[5, 6]), "2 tokens and 3"),
        (reply(token_ids=[], logprobs=scored()), "1 to 3 tokens"),
        (reply(token_ids=[5, 6, 1, 1], logprobs=scored(-1.0, -1.0, -1.0, -1.0)), "1 to 3 tokens"),
        (reply(token_ids=None), "1 to 3 tokens"),
        (reply(logprobs=None), "1 to 3 tokens"),
        (reply(logprobs=[1]), "1 to 3 tokens"),
        (reply(logprobs={"content": ["x", "y", "z"]}), "finite"),
        (reply(logprobs=scored(-0.5, -9999.0, 0.0)), "-9999"),
        (reply(logprobs=scored(-0.5, float("nan"), 0.0)), "finite"),
        (reply(logprobs=scored(-0.5, float("-inf"), 0.0)), "finite"),
        (reply(logprobs=scored(-0.5, 0.1, 0.0)), "0.1"),
        (reply(logprobs=scored(-0.5, None, 0.0)), "finite"),
        (reply(logprobs=scored(-0.5, True, 0.0)), "finite"),
        (reply(finish_reason="abort"), "'abort'"),
        (reply(finish_reason=None), "None"),
        (reply(text=None), "no text"),
        (reply(weight_versions=None), "which weights"),
        (reply(weight_versions=[]), "0 of 3"),
        (reply(weight_versions=[{"version": "2", "start": 0, "end": 3}]), "'2'"),
        (reply(weight_versions=[{"version": "default", "start": 0, "end": 3}]), "'default'"),
        (reply(weight_versions=[{"version": "3", "start": 0, "end": 2}]), "2 of 3"),
        (reply(weight_versions=[{"version": "3", "start": 1, "end": 3}]), "do not cover"),
        (
            reply(weight_versions=[{"version": "3", "start": 0, "end": 2}, {"version": "2", "start": 2, "end": 3}]),
            "'2'",
        ),
    ],
)
def test_a_reply_that_cannot_be_is_refused(bad, says):
    with pytest.raises(BadReply, match=says):
        read_sample(bad, vocabulary=10, longest=3, versions=["3"])


def test_scores_of_a_sequence():
    span = {"choices": [{"weight_versions": [{"version": "3", "start": 0, "end": 1}]}]}
    good = span | {
        "prompt_logprobs": [None, {"6": {"logprob": -1.5}}, {"9": {"logprob": -9.0}, "1": {"logprob": -2.5}}]
    }
    assert read_scores(good, (5, 6, 1), version="3") == [-1.5, -2.5]
    for bad in (
        span | {"prompt_logprobs": None},
        span | {"prompt_logprobs": good["prompt_logprobs"][:2]},
        good | {"prompt_logprobs": [None, {"7": {"logprob": -1.5}}, {"1": {"logprob": -2.5}}]},
        good | {"prompt_logprobs": [None, {"6": {"logprob": -9999.0}}, {"1": {"logprob": -2.5}}]},
    ):
        with pytest.raises(BadReply):
            read_scores(bad, (5, 6, 1), version="3")
    with pytest.raises(BadReply, match="'3'"):
        read_scores(good, (5, 6, 1), version="4")


# --- weights and start ---------------------------------------------------------------------------------------------------


def test_weights_as_files_hold_what_a_sharded_learner_gathers_in_one_buffer(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr("rlpost.rollout.remote.weights.BUCKET_BYTES", 100)
    buffer = torch.empty(20)

    def gathered():
        for i in range(7):
            yield f"w{i}", buffer.fill_(i)

    files = WeightFiles(weights_folder(str(tmp_path), 0))
    assert files.folder.stat().st_mode & 0o077 == 0, "for this user only"
    files.write(gathered())
    assert files.names() == [f"w{i}" for i in range(7)]
    assert len(files.files) == 4
    found = {name: tensor for path, _ in files.files for name, tensor in load_file(path).items()}
    assert all(torch.equal(found[f"w{i}"], torch.full((20,), float(i))) for i in range(7))
    files.write([("w0", buffer)])
    assert len(list(files.folder.iterdir())) == 1, "the version before is gone"
    files.close()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = weights_folder(str(tmp_path), 0)
    others = tmp_path / f"rlpost-weights-another-host-{dead.pid}-x"
    left = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    for folder in (others, left):
        folder.mkdir()
    new = weights_folder(str(tmp_path), 0)
    assert mine.is_dir() and new.is_dir() and others.is_dir() and not left.exists()


def test_a_folder_for_weights_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RolloutError, match=r"rollout\.engine\.weights_folder=.*cannot be written"):
        weights_folder(str(tmp_path / "file" / "x"), 0)


def test_a_server_starts_without_what_a_launcher_told_the_learner(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    found = server_environment(SECTION.model_copy(update={"cores": (1,)}), on_cpu=True, deadline_s=7.9)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & set(found)
    assert found["VLLM_LOGGING_LEVEL"] == "DEBUG", "a user's own setting"
    assert found["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert server_environment(SECTION, on_cpu=False, deadline_s=7, devices=(2, 3))["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_the_arguments_are_the_options_of_the_engine_in_process():
    found = server_arguments(
        "m", SECTION, max_model_len=9, seed=3, on_cpu=True, trust_remote_code=False, address="127.0.0.1:80"
    )
    pairs = dict(zip(found[1:], found[2:], strict=False))
    assert found[0] == "m"
    assert pairs["--logprobs-mode"] == "processed_logprobs"
    assert pairs["--block-size"] == "32"
    assert (pairs["--host"], pairs["--port"], pairs["--seed"], pairs["--max-model-len"]) == (
        "127.0.0.1",
        "80",
        "3",
        "9",
    )
    assert "--enforce-eager" in found
    assert "--uds" not in found


def test_no_server_left_is_an_exit_code_that_says_try_again():
    assert EngineLost.exit_code == 75
    assert issubclass(EngineLost, RolloutError)


class DyingProcess:
    """A worker of which the first starts fail."""

    def __init__(self, failures: int) -> None:
        self.failures, self.starts, self.alive, self.address = failures, 0, False, "unix:/nowhere"

    def start(self) -> None:
        self.starts += 1
        if self.starts <= self.failures:
            raise ServerLost(f"start {self.starts} failed")
        self.alive = True

    def end(self) -> None:
        self.alive = False


@pytest.mark.parametrize(("failures", "starts", "lives"), [(0, 1, True), (2, 3, True), (3, 3, False)])
def test_a_worker_is_replaced_as_often_as_the_recipe_says(failures, starts, lives):
    process = DyingProcess(failures)
    section = SECTION.model_copy(update={"restarts": 3})
    engine = RemoteEngine(
        [Server(process.address, process)],
        section,
        None,
        vocabulary=9,
        max_model_len=9,
        ends=(),
        place=Place(),
        files=None,
    )
    if lives:
        engine._replace()
        assert engine.restarts == starts
    else:
        with pytest.raises(EngineLost, match=r"start 3 failed.*3 of rollout\.engine\.restarts=3 restarts were used"):
            engine._replace()
    assert process.starts == starts


# --- real servers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pytest.importorskip("vllm")
    return tiny(tmp_path_factory.mktemp("tiny"))


def start_engine(saved, logs, section=SECTION, *, lora=None, **options):
    """An engine whose worker has the saved model."""
    path, _, tokenizer = saved
    model = ModelSection(path=path, lora=lora)
    limits = {"max_model_len": 100, "seed": 0, "device": "cpu"}
    return make_engine(section, model, path, tokenizer, place=Place(logs=logs), **limits, **options)


@pytest.fixture(scope="module")
def make(saved, tmp_path_factory):
    """Makes an engine; all are closed at the end, and must have left nothing."""
    threads, made = torch.get_num_threads(), []
    torch.set_num_threads(1)

    def make(section=SECTION):
        made.append(start_engine(saved, tmp_path_factory.mktemp("logs"), section))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
        engine.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def worker(make):
    return make(
        SECTION.model_copy(update={"deadline_s": 120.0})
    )  # nothing is stopped here, and the machine may be busy


@pytest.fixture(scope="module")
def expected(saved, make):
    """Completions and scores of the engine in process, by two versions of the weights."""
    engine = make(SECTION.model_copy(update={"where": "colocated"}))
    found = []
    for model in versions(saved[1]):
        engine.load_weights(model.named_parameters())
        found.append((engine.sample(requests(), SETTINGS), engine.logprobs([r.token_ids for r in requests()])))
    engine.close()
    return found


def versions(model):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model, other


def processes(engine) -> dict[str, int]:
    """The three processes of the engine's server, by what they are called."""
    import psutil

    [server] = engine.servers
    found = {}
    for process in psutil.Process(server.process._process.pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline()) or process.name()
        except psutil.Error:
            continue
        for part, name in (("vllm_serve", "api"), ("EngineCore", "core"), ("Worker", "worker")):
            if part in title:
                found[name] = process.pid
    return found


def all_gone(pids, within: float) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@engine_test
def test_a_worker_gives_the_bits_of_the_engine_in_process(worker, expected, saved):
    for number, (model, (completions, scores)) in enumerate(zip(versions(saved[1]), expected, strict=True)):
        worker.load_weights(model.named_parameters(), number)
        assert worker.sample(requests(), SETTINGS) == completions
        assert worker.logprobs([r.token_ids for r in requests()]) == scores
    assert expected[0] != expected[1]


@engine_test
def test_completions_are_told_one_by_one_while_others_are_sampled(worker, expected, saved):
    worker.load_weights(saved[1].named_parameters(), 0)
    told = []

    def finished(number, completion):
        told.append((time.monotonic(), number, completion))

    made = worker.sample(requests(), SETTINGS, finished=finished)
    ended = time.monotonic()
    assert sorted(number for _, number, _ in told) == list(range(len(made)))
    assert all(completion is made[number] for _, number, completion in told)
    assert ended - told[0][0] > told[-1][0] - told[0][0] > 0, "the first was told before the last was there"


@engine_test
def test_weights_that_are_missing_stop_the_sync(worker, saved):
    weights = [(n, p) for n, p in saved[1].named_parameters() if "layers.1.mlp.up_proj" not in n]
    with pytest.raises(RolloutError, match=r"1 of the model's weights did not reach .*layers\.1\.mlp\.up_proj"):
        worker.load_weights(weights, 7)
    worker.load_weights(saved[1].named_parameters(), 0)


@engine_test
@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_samples_is_replaced(worker, expected, saved):
    """What was asked of it is sampled by the next, with the same weights and seeds."""
    worker.load_weights(versions(saved[1])[1].named_parameters(), 1)
    before, found = worker.restarts, processes(worker)
    threading.Timer(0.1, os.kill, (found["core"], signal.SIGKILL)).start()
    time.sleep(0.05)
    assert worker.sample(requests(), SETTINGS) == expected[1][0]
    if worker.restarts == before:  # it had answered everything by then
        assert worker.sample(requests(), SETTINGS) == expected[1][0]
    assert worker.restarts == before + 1
    assert all_gone(found.values(), 10)


@engine_test
@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("part", ["api", "core", "worker"])
def test_each_process_lost_while_sampling(make, expected, saved, part, sent):
    engine = make()
    engine.load_weights(saved[1].named_parameters(), 0)
    found = processes(engine)
    os.kill(found[part], sent)
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        noticed = []
        patch.setattr(
            engine,
            "_lose",
            lambda server, why, lose=engine._lose: (noticed.append(time.monotonic()), lose(server, why)),
        )
        assert engine.sample(requests(), SETTINGS) == expected[0][0]
    assert noticed[0] - began < 2 * DEADLINE_S + 2
    assert engine.restarts == 1
    assert all_gone(found.values(), 10)
    engine.close()


@engine_test
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["/start_weight_update", "/update_weights", "/finish_weight_update"])
def test_a_worker_that_dies_within_a_sync_is_replaced_and_given_everything(make, expected, saved, phase, monkeypatch):
    from rlpost.rollout.remote.client import Client

    engine = make()
    engine.load_weights(saved[1].named_parameters(), 0)
    call, dead = Client.call, []

    async def deadly(self, path, *args, **options):
        if path == phase and not dead:
            dead.append(True)
            os.kill(processes(engine)["worker"], signal.SIGKILL)
        return await call(self, path, *args, **options)

    monkeypatch.setattr(Client, "call", deadly)
    engine.load_weights(versions(saved[1])[1].named_parameters(), 1)
    assert dead
    assert engine.restarts == 1
    assert engine.sample(requests(), SETTINGS) == expected[1][0]
    engine.close()


@engine_test
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sampling", "sync"])
def test_an_engine_that_runs_out_of_memory_is_replaced(make, expected, saved, phase, monkeypatch):
    """The error is raised where the model is computed, or where weights arrive, in the worker's process."""
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{REPOSITORY / 'tests'}")

    def arguments(*given, **named):
        found = server_arguments(*given, **named)
        return ["out_of_memory.Extension" if word.endswith("worker.Extension") else word for word in found]

    monkeypatch.setattr("rlpost.rollout.remote.make.server_arguments", arguments)
    engine = make(SECTION.model_copy(update={"deadline_s": 30.0}))
    engine.load_weights(saved[1].named_parameters(), 0)
    found, said, lose = processes(engine), [], engine._lose
    monkeypatch.setattr(engine, "_lose", lambda server, why: (said.append(why), lose(server, why)))

    async def fill() -> None:
        async with Client(engine.servers[0].address, deadline_s=30) as client:
            assert await client.rpc(f"full_while_{phase}") == [None]

    run(fill())
    if phase == "sampling":
        assert engine.sample(requests(), SETTINGS) == expected[0][0]
    else:
        engine.load_weights(versions(saved[1])[1].named_parameters(), 1)
        assert engine.sample(requests(), SETTINGS) == expected[1][0]
        assert any("out of memory" in why for why in said), said
    assert said and engine.restarts == 1
    assert all_gone(found.values(), 10)
    engine.close()


@engine_test
@pytest.mark.slow
def test_without_restarts_the_run_ends(make, saved):
    engine = make(SECTION.model_copy(update={"restarts": 0}))
    engine.load_weights(saved[1].named_parameters(), 0)
    os.kill(processes(engine)["worker"], signal.SIGKILL)
    with pytest.raises(EngineLost, match="No rollout server is left"):
        engine.sample(requests(), SETTINGS)
    engine.close()


@engine_test
@pytest.mark.slow
def test_nothing_outlives_a_learner_that_is_killed(saved, tmp_path):
    code = f"""
import sys; sys.path.insert(0, "tests")
import test_rollout_remote as t, torch, time
from transformers import AutoModelForCausalLM, AutoTokenizer
path = {saved[0]!r}
engine = t.make_engine(t.SECTION, t.ModelSection(path=path), path, AutoTokenizer.from_pretrained(path), max_model_len=100,
                       seed=0, device="cpu", place=t.Place(logs=t.Path({str(tmp_path)!r})))
engine.load_weights(AutoModelForCausalLM.from_pretrained(path).named_parameters(), 0)
print(*t.processes(engine).values(), engine.servers[0].process._process.pid, engine.servers[0].address, flush=True)
time.sleep(600)
"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        line = child.stdout.readline()
        while line and not line[0].isdigit():
            line = child.stdout.readline()
        *pids, address = line.split()
        pids, socket_folder = [int(pid) for pid in pids], Path(address.removeprefix("unix:")).parent
        assert socket_folder.stat().st_mode & 0o077 == 0, "for this user only"
        segments = shared_memory_of(pids)
        assert segments, "vLLM's queues"
        assert left_of(child.pid, pids), "weights, and semaphores under the server's own name"
        assert len(pids) == 4
    finally:
        child.kill()
        child.wait()
    assert all_gone(pids, 10)
    assert not any(segment.exists() for segment in segments)
    assert not left_of(child.pid, pids)
    assert not socket_folder.exists()


def left_of(learner: int, servers) -> list[Path]:
    """What a learner and its servers have in shared memory under their own names."""
    shared = Path("/dev/shm")
    return [
        *shared.glob(f"rlpost-weights-*-{learner}-*"),
        *(path for pid in servers for path in shared.glob(f"sem.rlpost-{pid}-*")),
    ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@engine_test
def test_a_run_with_a_worker_learns_the_bits_of_a_colocated_one(write_recipe, children, tmp_path):
    pytest.importorskip("vllm")
    found = {}
    for where in ("colocated", "worker"):
        engine = {"type": "vllm", "where": where, "dtype": "float32", "kv_cache_gib": 0.25, "max_sequences": 16}
        recipe = write_recipe(tmp_path / where, {"rollout.engine": engine, "learner.rollouts": 3})
        code, printed = children.run(recipe, timeout=600)
        assert code == 0, printed
        found[where] = rows(tmp_path / where / "run")
    assert found["worker"] == found["colocated"]


@engine_test
@pytest.mark.slow
def test_a_run_with_two_servers_goes_on_when_one_is_killed(write_recipe, children, tmp_path):
    """`rlpost serve` twice; the run's metrics are those of a colocated engine, whoever sampled."""
    import psutil

    pytest.importorskip("vllm")
    ports = [free_port(), free_port()]
    section = {"type": "vllm", "dtype": "float32", "kv_cache_gib": 0.25, "max_sequences": 16, "deadline_s": 10}
    changes = {"learner.rollouts": 6, "rollout.probe": {"max_mean_gap": 1e-3}}
    alone = write_recipe(tmp_path / "alone", changes | {"rollout.engine": section})
    code, printed = children.run(alone, timeout=600)
    assert code == 0, printed
    served = section | {"where": "server", "urls": [f"http://127.0.0.1:{port}" for port in ports]}
    recipe = write_recipe(tmp_path / "served", changes | {"rollout.engine": served})
    servers = [children.start(Path("serve"), str(recipe), "--port", str(port)) for port in ports]
    learner = children.start(recipe)
    metrics = tmp_path / "served" / "run" / "metrics.jsonl"
    until = time.monotonic() + 300
    while not metrics.is_file() or metrics.read_text().count('"train"') < 1:
        assert learner.poll() is None and time.monotonic() < until, learner.communicate()[0]
        time.sleep(0.05)
    processes = [psutil.Process(servers[0].pid), *psutil.Process(servers[0].pid).children(recursive=True)]
    servers[0].kill()  # what watches vLLM ends the rest
    printed, _ = learner.communicate(timeout=300)
    assert learner.returncode == 0, printed
    assert f"http://127.0.0.1:{ports[0]} is lost" in printed
    assert all_gone([process.pid for process in processes], 10)
    wanted, got = rows(tmp_path / "alone" / "run", "train"), rows(tmp_path / "served" / "run", "train")
    assert [row["reward/mean"] for row in got] == pytest.approx([row["reward/mean"] for row in wanted], rel=1e-6)
