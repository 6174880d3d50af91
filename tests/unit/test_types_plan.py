"""Plans: each value is checked on its own and against the others, and configurations may inherit."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from autoseg.types.plan import Configuration, Plan, plan_schema
from autoseg.types.run import TrainSpec


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "patch_size": [16, 32], "batch_size": 2, "spacing": [1.0, 1.0], "median_shape": [20.5, 40],
        "strides": [[1, 1], [2, 2], [1, 2]], "kernel_sizes": [[3, 3], [3, 3], [3, 3]], "features_per_stage": [8, 16, 32],
        "blocks_per_stage": [2, 2, 2], "decoder_blocks_per_stage": [2, 2], "batch_dice": True,
        "normalization": ["ZScoreNormalization"], "use_mask_for_norm": [False], **changes,
    }


def plan(configurations: dict[str, Any], **changes: Any) -> Plan:
    return Plan.model_validate({
        "dataset_name": "x", "planner": "default", "gpu_memory_gb": 8, "transpose_forward": [0, 1, 2], "channels": ["mr"],
        "labels": {"foreground": [{"name": "a", "value": 1}]}, "intensities": [], "configurations": configurations, **changes,
    })


def test_a_plan_comes_back_from_json_equal() -> None:
    made = plan({"2d": entry()})
    assert Plan.model_validate_json(made.model_dump_json()) == made
    assert made.configurations["2d"].dims == 2


@pytest.mark.parametrize(("changes", "message"), [
    ({"patch_size": [16, 30]}, r"patch_size\[1\] is 30, but the strides need a multiple of 4; nearest legal values: 28 and 32"),
    ({"patch_size": [1, 32]}, r"patch_size\[0\] is 1, .* multiple of 2; nearest legal values: 2 and 4"),
    ({"patch_size": [16]}, r"patch_size must have 2 or 3 axes, found \(16,\)"),
    ({"patch_size": [16, 0]}, r"must hold positive whole numbers, found \(16, 0\)"),
    ({"spacing": [1.0]}, r"spacing must have 2 axes like patch_size \(16, 32\)"),
    ({"spacing": [1.0, -1.0]}, "must be positive millimetres"),
    ({"median_shape": [1, 2, 3]}, "median_shape must have 2 axes"),
    ({"strides": [[1, 1], [2, 2], [1, 2, 2]]}, "strides must hold 3 entries of 2 positive numbers"),
    ({"kernel_sizes": [[3, 3]]}, "kernel_sizes must hold 3 entries"),
    ({"features_per_stage": [8]}, "features_per_stage must have 3 entries"),
    ({"decoder_blocks_per_stage": [2, 2, 2]}, "decoder_blocks_per_stage must have 2 entries"),
    ({"normalization": ["Z"]}, "unknown normalization 'Z'; choose from ZScoreNormalization, CTNormalization"),
    ({"use_mask_for_norm": []}, "one entry per channel"),
    ({"batch_size": 0}, "batch_size"),
    ({"patch": 3}, "Extra inputs are not permitted"),
])
def test_a_configuration_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Configuration.model_validate(entry(**changes))


def test_a_configuration_inherits_what_it_leaves_out() -> None:
    made = plan({"2d": entry(), "wide": {"inherits_from": "2d", "batch_size": 9}, "wider": {"inherits_from": "wide"}})
    wide = made.configurations["wide"]
    assert wide.batch_size == 9 and wide.patch_size == (16, 32) and wide.inherits_from == "2d"
    assert made.configurations["wider"].batch_size == 9 and made.configurations["wider"].inherits_from == "wide"


def test_a_saved_plan_with_inheritance_keeps_what_was_written_out() -> None:
    made = plan({"2d": entry(), "wide": {"inherits_from": "2d", "batch_size": 9}})
    assert Plan.model_validate(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(("configurations", "message"), [
    ({"a": {"inherits_from": "b"}}, r"configurations\.a\.inherits_from: 'b' must name another configuration"),
    ({"a": {"inherits_from": "b"}, "b": {"inherits_from": "a"}}, r"without a circle"),
    ({"a": entry(inherits_from="a")}, r"configurations\.a\.inherits_from: 'a'"),
])
def test_inheritance_in_a_circle_or_from_nothing_is_refused(configurations: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        plan(configurations)


@pytest.mark.parametrize(("changes", "message"), [
    ({"transpose_forward": [0, 1, 1]}, r"transpose_forward must be a permutation of 0, 1, 2, found \(0, 1, 1\)"),
    ({"channels": ["a", "b"]}, r"configurations\.2d\.normalization must have one entry for each of 2 channels"),
    ({"gpu_memory_gb": 0}, "gpu_memory_gb"),
    ({"orientation": "LAS"}, "'LPS', 'RAS' or 'as_stored'"),
    ({"format": 2}, "format"),
])
def test_a_plan_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        plan({"2d": entry()}, **changes)


def test_a_stage_must_link_to_a_configuration_that_is_there() -> None:
    with pytest.raises(ValidationError, match=r"configurations\.2d refers to '3d_lowres', which the plan does not hold"):
        plan({"2d": entry(previous_stage="3d_lowres")})


def test_records_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        plan({"2d": entry()}).planner = "other"


def test_the_training_record_is_the_references_recipe() -> None:
    spec = TrainSpec()
    assert (spec.epochs, spec.steps_per_epoch, spec.val_steps, spec.total_steps) == (1000, 250, 50, 250_000)
    sgd = spec.optimizer
    assert (sgd.kind, sgd.lr, sgd.momentum, sgd.weight_decay) == ("sgd", 0.01, 0.99, 3e-5)
    assert (spec.schedule.kind, spec.schedule.power, spec.gradient_clip, spec.sampler.foreground) == ("polynomial", 0.9, 12, 0.33)
    assert (spec.loss.kind, spec.deep_supervision, spec.augment.kind, spec.augment.mirror) == ("dice_ce", True, "default", None)


@pytest.mark.parametrize(("changes", "message"), [
    ({"patch_size": [4, 4], "strides": [[1, 1], [2, 2], [2, 2]]},
     r"patch_size \(4, 4\) is a single voxel at the lowest stage.*nearest legal values: \(8, 4\) or \(4, 8\), or leave out"),
    ({"mirror_axes": [2]}, r"mirror_axes must be some of the patch's axes 0, 1, found \(2,\)"),
    ({"mirror_axes": [0, 0]}, r"mirror_axes must be some of the patch's axes 0, 1, found \(0, 0\)"),
    ({"checkpointing": 4}, "checkpointing must be at most 3, the number of stages, found 4"),
])
def test_a_hand_edit_that_the_network_cannot_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Configuration.model_validate(entry(**changes))


def test_legal_hand_edits_at_the_border_are_taken() -> None:
    smallest = Configuration.model_validate(entry(patch_size=[2, 8], mirror_axes=[], checkpointing=3))
    assert smallest.mirror_axes == () and smallest.checkpointing == 3
    with pytest.raises(ValidationError, match="nearest legal values"):
        Configuration.model_validate(entry(patch_size=[2, 4]))


@pytest.mark.parametrize("parent", [["2d"], 3])
def test_a_parent_that_is_no_name_is_refused(parent: Any) -> None:
    with pytest.raises(ValidationError, match="inherits_from"):
        plan({"2d": entry(), "wide": {"inherits_from": parent}})


def test_a_parent_that_is_no_object_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"configurations\.2d"):
        plan({"2d": [1], "wide": {"inherits_from": "2d"}})


def test_the_schema_key_is_for_editors_only() -> None:
    assert plan({"2d": entry()}, **{"$schema": "plan.schema.json"}) == plan({"2d": entry()})


def test_the_schema_knows_every_value_and_lets_a_configuration_inherit() -> None:
    schema = plan_schema()
    assert set(schema["properties"]) == {"$schema", *Plan.model_fields} and schema["additionalProperties"] is False
    configuration = schema["$defs"]["Configuration"]
    assert set(configuration["properties"]) == set(Configuration.model_fields)
    whole = [choice for choice in configuration["anyOf"] if "patch_size" in choice["required"]]
    parts = [choice for choice in configuration["anyOf"] if choice["required"] == ["inherits_from"]]
    assert len(whole) == len(parts) == 1 and "mirror_axes" not in whole[0]["required"]
    assert all("description" in value for name, value in configuration["properties"].items())
