"""What to do about a symptom: likely causes by what is known of the run, and commands to run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from autoseg.stages.symptom_rules import Sample, rows_of
from autoseg.types.diagnosis import Finding, Remedy, Symptom
from autoseg.types.fingerprint import CaseFingerprint
from autoseg.types.plan import Plan
from autoseg.types.run import TrainSpec

RARE = 0.001  # share of the voxels below which a label is hardly ever met by a patch drawn at random
MORE_FOREGROUND, LESS_FOREGROUND, ALL_FOREGROUND = 0.66, 0.1, 1.0
COARSER = 1.2  # planned voxel edge over the usual stored one
UNUSUAL = 3.0  # robust standard deviations


@dataclass(frozen=True)
class Context:
    """What commands and causes need to know of the run; the defaults are for two folders of masks."""

    work: str = "WORK"
    data: str = "DATASET"
    run: str = ""
    configuration: str = ""
    spec: TrainSpec = field(default_factory=TrainSpec)
    plan: Plan | None = None
    grouped: bool = False
    mirrored: bool = True
    side_axis: int | None = None  # patch axis from left to right
    fingerprints: tuple[CaseFingerprint, ...] = ()

    @property
    def configurations(self) -> tuple[str, ...]:
        """Those of the plan."""
        return tuple(self.plan.configurations) if self.plan else ()

    def train(self, suffix: str, *settings: str, configuration: str = "", more: Sequence[str] = ()) -> str:
        """The command that trains the run with other settings, under a new name, or under its own without `suffix`.

        What the run was given beside the defaults is given again, apart from what another configuration cannot take.
        """
        config = configuration or self.configuration or "3d_fullres"
        run = self.run if self.run and config == (self.configuration or config) else config
        name = f"{run}-{suffix}" if suffix else run
        changed = {setting.partition("=")[0] for setting in settings}
        kept = [s for s in given_settings(self.spec) if s.partition("=")[0] not in changed and (
            config == self.configuration or s.partition("=")[0] not in ("augment.mirror", "batch_size"))]
        kept = [s for s in kept if "loss.kind" not in changed or not s.startswith("loss.")]  # options are those of a kind
        named = ["--name", name] if name != config else []
        return _command("train", self.work, "--config", config, *named, *more,
                        *(part for s in (*kept, *settings) for part in ("--set", s)))

    def replan(self, suffix: str, *options: str) -> str:
        """The command that plans the data set anew in a work folder beside this one."""
        return _command("plan", self.data, "--out", f"{self.work}-{suffix}", *options)


def given_settings(spec: TrainSpec) -> list[str]:
    """The --set values that turn the default training record into `spec`."""
    def differences(own: Mapping[str, object], usual: Mapping[str, object], path: str) -> list[str]:
        found = []
        for key, value in own.items():
            if isinstance(value, dict) and (key in usual or path):
                there = usual.get(key)
                found += differences(value, there if isinstance(there, dict) else {}, f"{path}{key}.")
            elif key not in usual or value != usual[key]:
                found.append(f"{path}{key}={value if isinstance(value, str) else json.dumps(value)}")
        return found

    return differences(spec.model_dump(mode="json"), TrainSpec().model_dump(mode="json"), "")


def _command(*parts: str) -> str:
    return shlex.join(["autoseg", *parts])


def advise(finding: Finding, context: Context, samples: Sequence[Sample]) -> Finding:
    """A finding with likely causes and remedies added."""
    causes = (*finding.causes, *_causes(finding, context, samples))
    return finding.model_copy(update={"causes": causes, "remedies": tuple(REMEDIES[finding.symptom](context, finding))})


def _select(context: Context, why: str) -> Remedy:
    return Remedy(command=_command("select", context.work), why=why)


def _check(context: Context, why: str) -> Remedy:
    return Remedy(command=_command("check", context.data), why=why)


def _larger(context: Context, why: str) -> Remedy:
    memory = 2 * (context.plan.gpu_memory_gb if context.plan else 8.0)
    return Remedy(command=context.replan("larger", "--planner", "fit", "--gpu-memory", f"{memory:g}"), why=why)


def _more_foreground(context: Context, why: str) -> list[Remedy]:
    wanted = MORE_FOREGROUND if context.spec.sampler.foreground < MORE_FOREGROUND else ALL_FOREGROUND
    if context.spec.sampler.foreground >= wanted:
        return []
    return [Remedy(command=context.train("foreground", f"sampler.foreground={wanted}"), why=why)]


def _other_loss(context: Context, kind: str, why: str, *options: str) -> list[Remedy]:
    if context.spec.loss.kind == kind:
        return []
    return [Remedy(command=context.train(kind, f"loss.kind={kind}", *(f"loss.options.{o}" for o in options)), why=why)]


def _boundary_loss(context: Context) -> list[Remedy]:
    spacing: tuple[float, ...] = ()
    if context.plan is not None and context.configuration in context.configurations:
        spacing = context.plan.configurations[context.configuration].spacing
    options = ["spacing=[" + ",".join(f"{s:g}" for s in spacing) + "]"] if spacing else []
    return _other_loss(context, "boundary", "an error counts by its distance from the boundary", *options)


def _tversky(context: Context, why: str, *options: str) -> list[Remedy]:
    return _other_loss(context, "tversky", why, *options, "ce=1")


def _background(context: Context, finding: Finding) -> list[Remedy]:
    return [
        *_more_foreground(context, "more patches that hold the label, so that finding it pays more often"),
        *_tversky(context, "counts what is missed more than what is found wrongly (0.7 against 0.3)"),
        _select(context, "tries on the out-of-fold masks what is safe to add"),
    ]


def _foreground(context: Context, finding: Finding) -> list[Remedy]:
    return [
        _check(context, "and look at the listed cases: structures that are there and were not labelled teach the same error"),
        Remedy(command=context.train("background", f"sampler.foreground={LESS_FOREGROUND}"),
               why="more patches drawn anywhere, so that the network meets what it takes for the label"),
        *_tversky(context, "counts what is found wrongly more than what is missed (0.7 against 0.3)", "alpha=0.7", "beta=0.3"),
        _select(context, "tries on the out-of-fold masks what is safe to remove"),
    ]


def _blur(context: Context, finding: Finding) -> list[Remedy]:
    remedies = []
    if context.configuration == "3d_lowres" and "3d_fullres" in context.configurations:
        remedies.append(Remedy(command=context.train("", configuration="3d_fullres"), why="sees the image in full resolution"))
    if "2d" in context.configurations and context.configuration != "2d":
        remedies.append(Remedy(command=context.train("", configuration="2d"),
                               why="sees slices at full detail; afterwards autoseg select tries the two together"))
    return [*remedies, Remedy(command=context.train("longer", f"epochs={2 * context.spec.epochs}"),
                              why="boundaries are what a network learns last"),
            *_boundary_loss(context),
            _check(context, "and compare the reference contours of the listed cases: no network is more precise than its labels")]


def _far(context: Context, finding: Finding) -> list[Remedy]:
    remedies = [_select(context, "tries keeping the largest object of each label, and keeps it where that helps")]
    if "3d_cascade_fullres" in context.configurations and context.configuration != "3d_cascade_fullres":
        remedies.append(Remedy(command=context.train("", configuration="3d_cascade_fullres"), why="sees the whole image first"))
    return [*remedies, _larger(context, "a larger patch shows what lies around")]


def _small(context: Context, finding: Finding) -> list[Remedy]:
    return [
        *_more_foreground(context, "more patches around the label, small objects among them"),
        *_tversky(context, "counts what is missed more than what is found wrongly (0.7 against 0.3)"),
        Remedy(command=context.train("longer", f"epochs={2 * context.spec.epochs}"), why="small objects are learned last"),
        _larger(context, "a plan with more memory keeps more detail in the same patch"),
    ]


def _swap(context: Context, finding: Finding) -> list[Remedy]:
    if not context.mirrored:
        return [_check(context, "mirroring was off already: look whether sides are exchanged in labels or headers of the cases")]
    dims = 2 if context.configuration == "2d" else 3
    side = dims - 1 if context.side_axis is None else context.side_axis
    kept = ",".join(str(axis) for axis in range(dims) if axis != side)
    return [
        Remedy(command=context.train("sides", f"augment.mirror=[{kept}]"),
               why="mirrored training patches show left as right; without that axis, prediction is not mirrored along it either"),
        Remedy(command=_command("predict", context.work, "IMAGES", "--out", "MASKS", "--no-mirror"),
               why="shows at once how much of it comes from mirroring at prediction"),
    ]


def _jumps(context: Context, finding: Finding) -> list[Remedy]:
    three = [name for name in context.configurations if name.startswith("3d")] or ["3d_fullres"]
    if context.configuration in ("", "2d"):
        return [Remedy(command=context.train("", configuration="3d_fullres" if "3d_fullres" in three else three[0]),
                       why="sees neighbouring slices"),
                _select(context, "tries the 3D run, and both together")]
    return [_check(context, "and look for slices out of order or of another thickness in the listed cases"),
            _larger(context, "a patch that holds more slices"), _select(context, "other runs, if there are any, may be steadier")]


def _overfit(context: Context, finding: Finding) -> list[Remedy]:
    spec, decay = context.spec, 10 * context.spec.optimizer.weight_decay
    remedies = []
    if spec.augment.mirror is not None and not spec.augment.mirror:
        remedies.append(Remedy(command=context.train("mirrored", "augment.mirror=null"), why="mirrored patches are more data"))
    return [*remedies,
            Remedy(command=context.train("decay", f"optimizer.weight_decay={decay:g}"), why="holds the weights small"),
            Remedy(command=context.train("shorter", f"epochs={max(1, spec.epochs // 2)}"),
                   why="ends before the cases are learned by heart; the learning rate falls accordingly"),
            _select(context, "an ensemble of several runs varies less")]


def _underfit(context: Context, finding: Finding) -> list[Remedy]:
    return [Remedy(command=context.train("", f"epochs={2 * context.spec.epochs}"), why="goes on from where the run ended")]


def _nothing(context: Context, finding: Finding) -> list[Remedy]:
    if finding.target:
        return [*_more_foreground(context, "the label is hardly ever in a patch"),
                _check(context, "tells in how many cases the label is missing")]
    return [_check(context, "a constant image or wrong labels leave nothing to learn"),
            Remedy(command=context.train("slower", f"optimizer.lr={context.spec.optimizer.lr / 10:g}", "schedule.warmup=0.05"),
                   why="a smaller and slowly rising learning rate does not jump out")]


def _fold(context: Context, finding: Finding) -> list[Remedy]:
    fold = finding.target.removeprefix("fold ")
    remedies = [Remedy(command=context.train("again", f"seed={context.spec.seed + 1}", more=("--folds", fold)),
                       why="shows whether the training failed or the cases are hard")]
    if not context.grouped:
        remedies.append(Remedy(command=context.replan("grouped", "--groups", "auto"),
                               why="with a manifest whose column `group` names patient or site, folds are made alike"))
    return remedies


def _group(context: Context, finding: Finding) -> list[Remedy]:
    return [_check(context, "and compare spacing, orientation and intensities of this group with the others"),
            *_more_labels(context)]


def _more_labels(context: Context) -> list[Remedy]:
    return [Remedy(command=_command("plan", context.data, "--out", context.work),
                   why="after more labelled cases of this group were added: a few of them in training help most")]


def _outliers(context: Context, finding: Finding) -> list[Remedy]:
    return [Remedy(command=_command("report", context.work), why="shows the worst cases with both contours"),
            _check(context, "looks for faults in headers and labels; mend the listed cases or leave them out")]


REMEDIES: Mapping[Symptom, Callable[[Context, Finding], list[Remedy]]] = {
    "over_predicted_background": _background, "over_predicted_foreground": _foreground, "blurred_boundary": _blur,
    "far_false_positives": _far, "small_objects_missed": _small, "left_right_swap": _swap, "slice_jumps": _jumps,
    "overfitting": _overfit, "underfitting": _underfit, "nothing_learned": _nothing, "bad_fold": _fold,
    "shifted_group": _group, "outlier_cases": _outliers,
}


def _causes(finding: Finding, context: Context, samples: Sequence[Sample]) -> list[str]:
    causes = []
    if finding.symptom in ("over_predicted_background", "small_objects_missed"):
        share = median([t.reference / s.found.voxels for s, t in rows_of(samples, finding.target)] or [1.0])
        if share < RARE:
            causes.append(f"{finding.target} fills {share:.3%} of the image: few patches meet it by chance")
    if finding.symptom in ("blurred_boundary", "small_objects_missed") and (coarse := _coarse(context)):
        causes.append(coarse)
    if finding.symptom == "left_right_swap" and context.mirrored:
        causes.append("the run was trained with mirrored patches, in which left and right look alike")
    if finding.symptom == "slice_jumps" and context.configuration == "2d":
        causes.append("the 2d configuration sees one slice at a time")
    if finding.symptom in ("bad_fold", "shifted_group"):
        causes += _unlike(finding, context.fingerprints, samples)
    return causes


def _coarse(context: Context) -> str:
    """A sentence when the planned voxels are coarser than those of most images."""
    if context.plan is None or context.configuration not in context.configurations or not context.fingerprints:
        return ""
    configuration = context.plan.configurations[context.configuration]
    stored = np.median([case.spacing for case in context.fingerprints], axis=0)[list(context.plan.transpose_forward)]
    planned = np.asarray(configuration.spacing)
    stored = stored[-len(planned):]
    if not (planned > COARSER * stored).any():
        return ""
    shown = [" x ".join(f"{v:.3g}" for v in values) for values in (planned, stored)]
    return f"the network sees voxels of {shown[0]} mm, most images have {shown[1]} mm: detail is lost"


def _unlike(finding: Finding, fingerprints: Sequence[CaseFingerprint], samples: Sequence[Sample]) -> list[str]:
    """In what the cases of a fold or group differ from the others: spacing, volume, mean intensities of the foreground."""
    column, _, value = finding.target.partition(" ")
    inside = {s.case for s in samples if (str(s.fold) if column == "fold" else s.groups.get(column)) == value}
    known = {s.case for s in samples}
    texts = []
    for name, values in _features([f for f in fingerprints if f.case in known]).items():
        own, others = ([v for case, v in values.items() if (case in inside) == side] for side in (True, False))
        if len(own) < 2 or len(others) < 3:
            continue
        spread = 1.4826 * median(abs(v - median(others)) for v in others) + 0.02 * abs(median(others)) + 1e-6
        if abs(median(own) - median(others)) > UNUSUAL * spread:
            texts.append(f"its {name} differs: {median(own):.3g} against {median(others):.3g} elsewhere (medians)")
    return texts


def _features(fingerprints: Sequence[CaseFingerprint]) -> dict[str, dict[str, float]]:
    features: dict[str, dict[str, float]] = {}
    for case in fingerprints:
        for axis, spacing in zip("zyx", case.spacing, strict=True):
            features.setdefault(f"voxel size along {axis} in mm", {})[case.case] = spacing
        present = [label for label in case.labels.values() if label.voxels]
        for channel, intensities in enumerate(zip(*(label.mean_intensity for label in present), strict=False)):
            features.setdefault(f"mean foreground intensity in channel {channel}", {})[case.case] = float(np.mean(intensities))
    return features
