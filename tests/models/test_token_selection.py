"""The selection is the original's, id by id (golden/selective_mae/README.md), and works where the original fails."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_rsheat import select_tokens
from hf_rsheat.models.token_selection import (
    SelectionStage,
    fixed_draws,
    permutation_lengths,
    stage_at,
    token_counts,
)

EPOCHS = [0, 281, 290, 299, 300, 590, 600]
RATIOS = (1 - 0.85, 0.25)


@pytest.fixture(scope="module")
def outputs(golden):
    return load_file(golden / "selective_mae/small_pretrain_outputs.safetensors")


@pytest.fixture(scope="module")
def meta(golden):
    return json.loads((golden / "selective_mae/small_pretrain_meta.json").read_text())


def permutations(outputs, epoch: int) -> list[torch.Tensor] | None:
    names = [f"e{epoch}.randperm_{index}" for index in (1, 2)]
    return [outputs[name] for name in names] if names[0] in outputs else None


def assert_is_golden(selection, outputs, epoch: int) -> None:
    assert torch.equal(selection.encode_ids, outputs[f"e{epoch}.select_ids"].long())
    assert torch.equal(selection.reconstruct_ids, outputs[f"e{epoch}.recon_ids"].long())
    assert torch.equal(selection.mask, outputs[f"e{epoch}.mask"].bool())


@pytest.mark.parametrize("epoch", EPOCHS)
def test_ids_are_exact_at_every_point_of_the_schedule(outputs, epoch):
    selection = select_tokens(
        outputs["tokens"],
        stage_at(epoch),
        *RATIOS,
        seed_ids=outputs[f"e{epoch}.seed_ids"],
        permutations=permutations(outputs, epoch),
        reconstruct_choice=outputs[f"e{epoch}.recon_choice"],
    )
    assert_is_golden(selection, outputs, epoch)


@pytest.mark.parametrize("epoch", EPOCHS)
def test_a_seed_draws_what_the_original_draws(outputs, meta, epoch):
    generator = torch.Generator().manual_seed(meta["points"][str(epoch)]["torch_seed"])
    selection = select_tokens(outputs["tokens"], stage_at(epoch), *RATIOS, generator=generator)
    assert_is_golden(selection, outputs, epoch)


@pytest.mark.parametrize("mode", ["autocast", "medium"])
def test_reduced_precision_modes_do_not_reach_the_similarity(outputs, mode):
    arguments = {"seed_ids": outputs["e0.seed_ids"], "reconstruct_choice": outputs["e0.recon_choice"]}
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            assert_is_golden(select_tokens(outputs["tokens"], "near", *RATIOS, **arguments), outputs, 0)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_schedule_is_the_originals(meta):
    phases = {1: "near", 2: "near_to_far", 3: "far", 4: "far_to_random", 5: "random"}
    for epoch, number, first, second in meta["schedule_rows_epoch_stage_changefirst_changesecond"]:
        stage = stage_at(epoch)
        assert stage.phase == phases[number]
        if number in (2, 4):
            assert stage.share == 1 - (first if number == 2 else second) / 20


@pytest.mark.parametrize(("number", "expected"), [(7, "76655544433322211100"), (8, "87766655444332221100")])
def test_transitions_take_whole_tokens_as_the_original_does(number, expected):
    shares = [1.0] + [stage_at(280 + c).share for c in range(1, 20)]
    taken = "".join(str(int(share * number)) for share in shares)
    assert taken == expected


def test_a_run_of_any_length_passes_through_all_phases():
    steps = 200
    stages = [stage_at(step / steps, total_epochs=1, smooth_epochs=0.025).phase for step in range(steps)]
    assert list(dict.fromkeys(stages)) == ["near", "near_to_far", "far", "far_to_random", "random"]
    assert [stages.index("far") / steps, stages.index("random") / steps] == [0.375, 0.75]


def test_a_schedule_without_transitions_works():
    assert [stage_at(epoch, 8, 0).phase for epoch in (0, 2.9, 3, 5.9, 6)] == ["near", "near", "far", "far", "random"]


@pytest.mark.parametrize(
    ("length", "mask", "kept", "seeds", "rounds", "reconstructed"),
    [
        (196, 0.85, 0.25, 14, (7, 8), 49),
        (196, 0.75, 0.5, 24, (12, 13), 98),
        (196, 0.9, 0.25, 9, (5, 5), 49),
        (49, 0.85, 0.25, 3, (2, 2), 12),
        (256, 0.85, 0.25, 19, (9, 10), 64),
        (9, 0.85, 0.25, 1, (0, 0), 2),
        (4, 0.85, 0.25, 1, (0, 0), 1),
    ],
)
def test_counts_are_truncated_as_in_the_original_and_never_empty(length, mask, kept, seeds, rounds, reconstructed):
    assert token_counts(length, 1 - mask, kept) == (seeds, rounds, reconstructed)


STAGES = [SelectionStage("near"), SelectionStage("near_to_far", 0.5), SelectionStage("far")]
STAGES += [SelectionStage("far_to_random", 0.5), SelectionStage("random")]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.phase)
@pytest.mark.parametrize("criterion", ["uniform", "hog"])
@pytest.mark.parametrize("length", [4, 9, 12, 20, 35, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_encoded_and_reconstructed_tokens_are_distinct_on_any_grid(stage, criterion, length, batch):
    tokens, scores = torch.randn(batch, length, 6), torch.rand(batch, length)
    selection = select_tokens(tokens, stage, *RATIOS, criterion, scores=scores)
    counts = token_counts(length, *RATIOS)
    assert selection.encode_ids.shape == (batch, counts.seeds + sum(counts.rounds))
    assert selection.reconstruct_ids.shape == (batch, counts.reconstructed)
    for encoded, reconstructed, mask in zip(*selection, strict=True):
        assert len({*encoded.tolist(), *reconstructed.tolist()}) == len(encoded) + len(reconstructed)
        assert mask.nonzero().flatten().tolist() == reconstructed.tolist()


def test_hog_takes_the_tokens_of_the_highest_score():
    tokens, scores = torch.randn(1, 40, 6), torch.arange(40.0)[None]
    selection = select_tokens(tokens, "random", *RATIOS, "hog", scores=scores)
    assert selection.encode_ids[0, :3].tolist() == [39, 38, 37]
    left = [i for i in range(40) if i not in selection.encode_ids[0]]
    assert selection.reconstruct_ids[0].tolist() == left[-10:]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.phase)
def test_fixed_draws_replace_everything_random(stage):
    tokens = torch.randn(2, 50, 6)
    draws = fixed_draws(2, 50, stage, *RATIOS)
    assert [len(p) for p in draws["permutations"]] == list(permutation_lengths(50, token_counts(50, *RATIOS), stage))
    state = torch.get_rng_state()
    first, second = (select_tokens(tokens, stage, *RATIOS, **draws) for _ in range(2))
    assert torch.equal(first.encode_ids, second.encode_ids)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_gradient_flows_through_the_selection():
    tokens = torch.randn(1, 40, 6, requires_grad=True)
    assert not any(part.requires_grad for part in select_tokens(tokens, "near", *RATIOS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "nearest"}, "phases are near"),
        ({"criterion": "entropy"}, "criteria are uniform, hog"),
        ({"criterion": "hog"}, "hog_scores"),
        ({"encode_ratio": 0.9, "reconstruct_ratio": 0.5}, "too few"),
        ({"encode_ratio": 0.0}, "within"),
        ({"seed_ids": torch.zeros(2, 3, dtype=torch.long)}, r"seed_ids.*\(1, 3\)"),
        ({"permutations": [torch.arange(3), torch.arange(3)]}, "permutations"),
        ({"reconstruct_choice": torch.zeros(1, 1, dtype=torch.long)}, "reconstruct_choice"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"stage": "random", "encode_ratio": 0.15, "reconstruct_ratio": 0.25, **changes}
    with pytest.raises(ValueError, match=message):
        select_tokens(torch.randn(1, 40, 6), **arguments)


@pytest.mark.parametrize("arguments", [(-1,), (0, 0), (0, 800, 400)])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="schedule"):
        stage_at(*arguments)
