"""`learner.offload.type=auto`: what is measured of a machine, what is chosen by it, and what updates teach of it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import rows, weights

from rlpost.errors import RecipeError
from rlpost.learner.process import Processes
from rlpost.offload.arithmetic import TorchArithmetic
from rlpost.offload.calibrate import Work, _calls, calibrate
from rlpost.offload.forecast import NAME, Forecast, read
from rlpost.offload.plan import PARKED, RESIDENT, Kind, Room, Way, choose, predict, section_of, way_of, ways
from rlpost.offload.simulate import Rates
from rlpost.recipe.load import load_recipe
from rlpost.recipe.plan.describe import make_plan
from rlpost.recipe.plan.memory import find_model_size
from rlpost.recipe.plan.update import candidates, room_for
from rlpost.recipe.sections.offload import AutoOffload, StreamedOffload
from rlpost.run import offload as settling
from rlpost.run.offload import refuse_without_room, settle

H100 = Rates(up=50e9, down=50e9, memory=150e9, gpu_adam=90e9, cpu_adam=2.5e9, cast=10e9)
BILLION, GIB = 1_000_000_000, 2**30
KIND = Kind(2**25)


ALL = [RESIDENT, PARKED, *ways(4, (0.0, 0.25, 0.5))]


@pytest.mark.parametrize(
    ("room", "updates", "expected"),
    [
        (Room(), 1, RESIDENT),
        (Room(sampling=4e9), 4, PARKED),
        (Room(sampling=4e9), 1, Way(2, 3)),  # two copies of everything a rollout are more than one interleaved update
        (Room(accelerator=12e9, sampling=4e9), 4, Way(2, 3)),
        (Room(accelerator=4.5e9), 1, Way(0, 1)),  # no room to stage anything
    ],
)
def test_what_is_chosen_follows_from_the_room(room, updates, expected):
    best, found = choose(BILLION, H100, KIND, room, among=ALL[:2] + ways(4), updates=updates)
    assert best is not None and room.holds(best) and best.way == expected
    assert all(one.per_update(updates) >= best.per_update(updates) for one in found if room.holds(one))


def test_a_share_that_stays_fills_what_there_is():
    best, _ = choose(BILLION, H100, Kind(2**25, park=False), Room(accelerator=12e9), among=ALL)
    assert best is not None and best.way.resident == 0.5 and 10e9 < best.accelerator <= 12e9


def test_parking_costs_its_copies_once_a_rollout():
    one = predict(BILLION, PARKED, H100, KIND)
    assert one.moving == pytest.approx(12e9 / 50e9 * 2) and one.sampling == 0 and one.host == 12e9
    assert one.per_update(4) == pytest.approx(one.seconds + one.moving / 4)
    stays = predict(BILLION, RESIDENT, H100, KIND)
    assert stays.sampling == 12e9 and stays.host == stays.moving == 0.0 and stays.seconds == one.seconds


def test_without_an_accelerator_operations_take_their_times_one_after_the_other():
    serial = Kind(2**25, 4, 4, serial=True)
    through = predict(BILLION, Way(1, 1), H100, serial).seconds
    assert through == pytest.approx(12e9 / 50e9 * 2 + BILLION / 90e9)
    on_cpu = predict(BILLION, Way(0, 1), H100, serial).seconds
    assert on_cpu == pytest.approx(4e9 / 50e9 + BILLION / 2.5e9 + BILLION / 10e9 + 4e9 / 50e9)


@pytest.mark.parametrize("way", [RESIDENT, PARKED, Way(1, 1), Way(2, 3), Way(0, 1), Way(1, 1, 0.25)])
def test_a_way_and_its_section_are_one(way):
    asked = AutoOffload(piece_size=77, park=True, arithmetic="own", accelerator_gib=3)
    section = section_of(way, asked)
    assert way_of(section) == way and (section.piece_size, section.arithmetic) == (77, "own")


def test_all_lanes_are_measured():
    rates = calibrate(torch.device("cpu"), TorchArithmetic(), weights=torch.bfloat16, elements=20_000, seconds=0.01)
    assert all(value > 0 for value in asdict(rates).values()) and rates.gpu_adam == rates.cpu_adam


def test_a_lane_that_fails_ends_the_measurement():
    def broken() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        _calls({"up": Work(broken, 1, 1), "down": Work(lambda: None, 1, 1)}, 0.01)


def test_a_forecast_learns_from_updates_and_is_kept(tmp_path):
    predicted = predict(BILLION, Way(1, 1), H100, KIND)
    forecast = Forecast(predicted, H100, {"gpu": "one"}, tmp_path / NAME)
    first = forecast.observe(100.0)  # allocates, and teaches nothing
    assert first == {"offload/predicted_s": predicted.seconds, "offload/measured_s": 100.0}
    assert not (tmp_path / NAME).exists()
    slow = 3 * predicted.seconds
    assert forecast.observe(slow)["offload/predicted_s"] == predicted.seconds
    assert forecast.observe(slow)["offload/predicted_s"] == pytest.approx(slow)
    kept = read(tmp_path)
    assert kept is not None and kept.updates == 2 and kept.machine == {"gpu": "one"}
    again = predict(BILLION, Way(1, 1), kept.rates, KIND).seconds
    assert again == pytest.approx(slow)  # all rates by one factor: every program is so much slower
    (tmp_path / NAME).write_text("{")
    assert read(tmp_path) is None and read(tmp_path / "nowhere") is None


def recipe_of(write_recipe, tmp_path, **offload):
    return load_recipe(write_recipe(tmp_path, {"learner.offload": {"type": "auto", **offload}})).recipe


def test_rates_that_cannot_be_written_end_no_run(tmp_path):
    forecast = Forecast(predict(1000, RESIDENT, H100, KIND), H100, {}, tmp_path / "removed" / NAME)
    assert [forecast.observe(0.1)["offload/measured_s"] for _ in range(3)] == [0.1] * 3


def test_what_else_takes_memory_is_not_there_for_the_state(write_recipe, tmp_path):
    recipe = recipe_of(write_recipe, tmp_path)
    size, _ = find_model_size(recipe.model)
    room, said = room_for(recipe, size, 2, 80 * GIB, 100 * GIB)
    assert 60 * GIB < room.accelerator < 80 * GIB and room.host == 100 * GIB and "GiB on the accelerator" in said
    recipe = recipe_of(write_recipe, tmp_path, accelerator_gib=2, host_gib=3)
    room, _ = room_for(recipe, size, 2, 80 * GIB, 100 * GIB)
    assert room.accelerator == 2 * GIB and room.host == 3 * GIB
    assert PARKED in candidates(recipe, recipe.learner.offload)
    ahead = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"staleness": 1})})
    assert PARKED not in candidates(ahead, recipe.learner.offload)
    assert RESIDENT not in candidates(recipe, StreamedOffload())


def test_a_machine_without_room_is_refused_before_a_model_is_loaded(write_recipe, tmp_path):
    recipe = recipe_of(write_recipe, tmp_path, accelerator_gib=1e-6, host_gib=1e-6)
    with pytest.raises(RecipeError, match="no way fits into 0.00 GiB of the accelerator .* Nearest is"):
        refuse_without_room(recipe, Processes())
    refuse_without_room(recipe_of(write_recipe, tmp_path), Processes())
    loaded = load_recipe(write_recipe(tmp_path, {"learner.offload": {"type": "auto", "accelerator_gib": 1e-6}}))
    [said] = make_plan(loaded, processes=2, zero_stage=3).update
    assert "no way fits" in said


def policy():
    return SimpleNamespace(parameters=lambda: [torch.nn.Parameter(torch.zeros(100_000))])


def test_what_is_measured_once_is_kept_for_the_next_start(write_recipe, tmp_path, monkeypatch):
    calls = []

    def measured(*arguments, **options):
        calls.append(options)
        return H100

    monkeypatch.setattr(settling, "calibrate", measured)
    recipe = recipe_of(write_recipe, tmp_path)
    section, forecast, notes = settle(recipe, policy(), Processes(), tmp_path)
    assert section.offload.type == "resident" and forecast is not None and len(calls) == 1
    assert "auto: on the accelerator, the fastest of" in notes[0] and "rates measured now" in notes[1]
    _, _, notes = settle(recipe, policy(), Processes(), tmp_path)
    assert len(calls) == 1 and "what this run measured before (corrected by 0 updates)" in notes[1]
    forecast.observe(1.0)
    forecast.observe(2.0)
    _, forecast, notes = settle(recipe, policy(), Processes(), tmp_path)
    assert "corrected by 2 updates" in notes[1] and forecast.earlier == 2
    assert forecast.predicted.seconds == pytest.approx(2.0)
    kept = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(kept | {"machine": {"gpu": "another"}}))
    settle(recipe, policy(), Processes(), tmp_path)
    assert len(calls) == 2
    none = recipe.model_copy(update={"learner": recipe.learner.model_copy(update={"offload": None})})
    assert settle(none, policy(), Processes(), tmp_path) == (none.learner, None, ())


def test_one_thread_of_many_cores_is_said(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(24)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    gpu = SimpleNamespace(device=torch.device("cuda"))
    assert "OMP_NUM_THREADS=12" in (settling._one_thread(gpu, Way(1, 2)) or "")
    assert settling._one_thread(gpu, Way(1, 1)) is None and settling._one_thread(Processes(), Way(1, 2)) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    assert settling._one_thread(gpu, Way(1, 2)) is None


def test_the_plan_goes_by_what_the_run_has_measured(write_recipe, tmp_path):
    loaded = load_recipe(write_recipe(tmp_path, {"learner.offload": {"type": "auto"}}))
    before = "\n".join(make_plan(loaded, processes=2, zero_stage=3).update)
    assert "auto would take: on the accelerator" in before and "not measured here" in before
    folder = loaded.recipe.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"gpu": "some"}
    Forecast(predict(1000, RESIDENT, H100, KIND), H100, machine, folder / NAME, updates=32).save()
    after = "\n".join(make_plan(loaded, processes=2, zero_stage=3).update)
    assert "corrected by 32 updates" in after and "not measured here" not in after


@pytest.mark.engine
@pytest.mark.slow
def test_a_run_settles_logs_and_goes_on_another_way(write_recipe, children, tmp_path):
    """Two processes: the whole run without, and one in halves, of which each settles for another way."""
    changes = {"rollout.prompts_per_step": 4, "learner.rollouts": 4, "learner.minibatches": 2, "checkpoint.every": 4}
    auto = "learner.offload={type: auto, piece_size: 2000"
    starts = {
        "without": [()],
        "auto": [(auto + "}", "learner.stop_after=2"), (auto + ", accelerator_gib: 0.0005}", "resume=auto")],
    }
    taken = []
    for name, each in starts.items():
        recipe = write_recipe(tmp_path / name, changes)
        for overrides in each:
            code, printed = children.run(recipe, *overrides, launch="cpu-zero3.yaml", timeout=600)
            assert code == 0, printed
            if name == "auto":
                [way] = set(re.findall(r"type=auto: (.*?), the fastest", " ".join(printed.split())))
                taken.append(way)
    assert taken[0] == "on the accelerator" != taken[1]
    wanted, found = tmp_path / "without" / "run", tmp_path / "auto" / "run"
    assert rows(found, "train") == rows(wanted, "train")
    times = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    for row in times:
        if row["kind"] == "train":
            assert row["offload/measured_s"] > 0 and row["offload/predicted_s"] > 0
    kept = read(found)
    assert kept is not None and kept.machine["processes"] == 2
    last = ("checkpoints", "step_000008")
    first, second = (weights(run.joinpath(*last)) for run in (wanted, found))
    assert all(torch.equal(second[key], value) for key, value in first.items())
