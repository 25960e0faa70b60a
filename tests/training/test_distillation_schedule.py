import json
from dataclasses import asdict

import pytest

from hf_rsheat.errors import ConfigurationError
from hf_rsheat.training.distillation_schedule import AdaptiveState, CorruptionSchedule
from hf_rsheat.training.recipe import build


def adaptive(**options) -> CorruptionSchedule:
    return CorruptionSchedule(schedule="adaptive", **{"adaptive_window": 2, **options})


def run(schedule: CorruptionSchedule, losses: list[float], state: AdaptiveState | None = None) -> list[AdaptiveState]:
    states = [state or AdaptiveState()]
    for loss in losses:
        states.append(schedule.advance(states[-1], loss))
    return states[1:]


def test_constant_and_linear_follow_from_the_step_alone():
    late = AdaptiveState(strength=1.4)
    assert [CorruptionSchedule().strength(p, late) for p in (0, 0.5, 1)] == [1, 1, 1]
    linear = CorruptionSchedule(schedule="linear", strength_range=(0.5, 1.5))
    assert [linear.strength(p, late) for p in (0, 0.5, 1)] == [0.5, 1.0, 1.5]


def test_adaptive_rises_while_the_loss_falls_and_sinks_when_it_stalls():
    schedule = adaptive()
    falling = run(schedule, [1.0, 1.0, 0.9, 0.9, 0.8, 0.8])
    assert [round(state.strength, 6) for state in falling] == [1, 1, 1, 1.1, 1.1, 1.2]
    stalled = run(schedule, [0.8, 0.8, 0.799, 0.799], falling[-1])  # 0.1 %, less than adaptive_fall
    assert [round(state.strength, 6) for state in stalled] == [1.2, 1.1, 1.1, 1.0]


def test_adaptive_stays_within_its_bounds():
    schedule = adaptive(adaptive_window=1, adaptive_change=0.2)
    assert run(schedule, [2.0**-step for step in range(10)])[-1].strength == 1.5
    assert run(schedule, [1.0] * 10)[-1].strength == 0.5


def test_adaptive_continues_from_json_to_the_same_bits():
    schedule = adaptive(adaptive_window=3)
    losses = [1 / (3 + step) for step in range(11)]
    whole = run(schedule, losses)
    stored = json.loads(json.dumps(asdict(run(schedule, losses[:4])[-1])))
    assert run(schedule, losses[4:], AdaptiveState(**stored)) == whole[4:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosine"}, "schedule"),
        ({"strength_range": [0.5, 0.9]}, "low <= 1 <= high"),
        ({"strength_range": [-0.5, 1.5]}, "at least 0"),
        ({"adaptive_window": 0}, "at least 1 step"),
        ({"adaptive_change": 0}, "positive"),
        ({"adaptive_fall": 1.5}, "adaptive_fall"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigurationError, match=message):
        build(CorruptionSchedule, options, "option")
