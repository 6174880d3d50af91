"""--set: typed, path-exact edits of the training record."""

from __future__ import annotations

from typing import Any

import pytest

from autoseg.errors import AutosegError, RecordError, RunError
from autoseg.stages.settings import apply_settings
from autoseg.types.run import TrainSpec


@pytest.mark.parametrize(("setting", "path", "value"), [
    ("epochs=5", "epochs", 5),
    ("epochs=1e2", "epochs", 100),
    (" epochs = 7", "epochs", 7),
    ("optimizer.lr=0.003", "optimizer.lr", 0.003),
    ("optimizer.kind=adamw", "optimizer.kind", "adamw"),
    ("loss.kind=my_pkg.losses:Tversky", "loss.kind", "my_pkg.losses:Tversky"),
    ("loss.options.alpha=0.3", "loss.options", {"alpha": 0.3}),
    ('loss.options={"a": {"b": [1]}}', "loss.options", {"a": {"b": [1]}}),
    ("loss.options.text=a=b", "loss.options", {"text": "a=b"}),
    ("augment.mirror=[0, 2]", "augment.mirror", (0, 2)),
    ("augment.mirror=[]", "augment.mirror", ()),
    ("augment.mirror=null", "augment.mirror", None),
    ("deep_supervision=false", "deep_supervision", False),
    ("precision=fp32", "precision", "fp32"),
    ("batch_size=null", "batch_size", None),
])
def test_a_value_is_set_with_its_type(setting: str, path: str, value: Any) -> None:
    found: Any = apply_settings(TrainSpec(), [setting])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_later_settings_go_on_from_earlier_ones() -> None:
    spec = apply_settings(TrainSpec(seed=4), ["loss.options.a=1", "loss.options.b=2", "loss.options.a=3", "epochs=2"])
    assert spec.loss.options == {"a": 3, "b": 2} and spec.epochs == 2 and spec.seed == 4
    assert apply_settings(spec, []) == spec


@pytest.mark.parametrize(("setting", "message"), [
    ("epochs", "--set takes key=value, found 'epochs'"),
    ("=5", "--set takes key=value"),
    ("epoch=5", "--set epoch=5: the training record has no 'epoch'; it has format, epochs, steps_per_epoch"),
    ("optimizer.rate=1", "optimizer has no 'rate'; it has kind, lr, weight_decay, momentum, options"),
    ("optimiser.lr=1", "the training record has no 'optimiser'"),
    ("epochs.x=1", "epochs has no 'x'; it has no further parts"),
    ("epochs.x.y=1", "epochs has no 'x'; it has no further parts"),
    ("loss.options.a.b=1", "loss.options has no 'a'"),
    (".=1", "has no ''"),
])
def test_a_path_that_is_not_there_lists_what_there_is(setting: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        apply_settings(TrainSpec(), [setting])


@pytest.mark.parametrize(("setting", "message"), [
    ("epochs=many", r"epochs: .*valid integer.*\(found many\)"),
    ("epochs=", r"epochs: .*valid integer"),
    ("epochs=0", r"epochs: .*greater than or equal to 1"),
    ("epochs=1.5", "epochs: .*valid integer"),
    ("optimizer.lr=NaN", r"optimizer\.lr: "),
    ("optimizer.momentum=1", r"optimizer\.momentum: .*less than 1"),
    ("precision=int8", "precision: .*'auto', 'bf16', 'fp16' or 'fp32'"),
    ("loss=dice", "loss: .*dictionary"),
    ("augment.mirror=x", r"augment\.mirror: "),
    ("format=2", "format: "),
    ("seed=" + "9" * 5000, "seed: "),
    ("epochs=" + "[" * 10_000, "epochs: "),
])
def test_a_value_of_the_wrong_type_or_range_names_its_path(setting: str, message: str) -> None:
    with pytest.raises(RecordError, match=rf"(?s)the training record \(--set\) is not valid:\n  {message}"):
        apply_settings(TrainSpec(), [setting])


def test_options_that_were_made_something_else_are_an_error_and_not_a_crash() -> None:
    with pytest.raises(AutosegError):
        apply_settings(TrainSpec(), ["loss.options=3", "loss.options.x=1"])
