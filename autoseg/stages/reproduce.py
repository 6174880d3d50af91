"""Reproduce a public benchmark: check the download, run the protocol, put ours beside what has been published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoseg.datasets.downloads import CONVERTED, Download, manifest_of, read_download
from autoseg.errors import DatasetError
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace, load_record, save_record, write_text
from autoseg.logs import SILENT, Reporter
from autoseg.stages.catalogue import find_benchmark, source_text, values_text
from autoseg.stages.check import describe_faults
from autoseg.stages.evaluate import evaluate, find_masks, merge_reports
from autoseg.stages.plan import plan
from autoseg.stages.records import Options
from autoseg.stages.select import select
from autoseg.stages.train import train
from autoseg.types.benchmark import MEAN, Benchmark, Published, Reproduction, Result
from autoseg.types.dataset import Split
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.plan import Plan
from autoseg.types.report import Report, Value
from autoseg.types.run import TrainSpec
from autoseg.types.selection import Selection

if TYPE_CHECKING:
    from autoseg.interrupts import Interrupts

LISTED = 20  # names and faults shown in one message
FEW = 4  # targets up to which a table shows all of them
STATED = ("epochs", "steps_per_epoch", "precision")  # parts of the training record that are stated in other words


@dataclass(frozen=True)
class Prepared:
    """A checked download: its manifest, how it was recognised, its cases, whether they have patients, and what it lacks."""

    benchmark: Benchmark
    manifest: Path
    read_as: str
    cases: int
    grouped: bool
    lacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def folder_of(workspace: Workspace) -> Path:
    """Where the manifest and converted files of a reproduction lie."""
    return workspace.root / "data"


def reproduction_path(workspace: Workspace) -> Path:
    """The Reproduction record."""
    return workspace.root / "report" / "reproduction.json"


def prepare(name: str, data: Path, workspace: Workspace, partial: bool = False, reporter: Reporter = SILENT) -> Prepared:
    """Recognise and check a download, and write data/manifest.json into the work folder; images stay where they are.

    Raises DatasetError when the download is not recognised, faulty, or, unless `partial`, not the benchmark's number of cases;
    everything that is wrong or missing is listed.
    """
    benchmark = find_benchmark(name)
    download = read_download(benchmark, data, folder_of(workspace), reporter)
    errors = [fault for fault in download.faults if fault.severity == "error"]
    lacks = missing_cases(benchmark, download)
    if errors or (lacks and not partial):
        shown = describe_faults(errors[:LISTED]) + (f"\n... and {len(errors) - LISTED} more" if len(errors) > LISTED else "")
        advice = "" if errors else "\nor give --partial to go on with what is there; the result will say so"
        raise DatasetError("\n".join(filter(None, (
            f"{data} is not the complete {benchmark.title} (read as {download.read_as})",
            *(f"  {line}" for line in lacks), shown if errors else "",
            f"get it from {benchmark.page}: {benchmark.access}",
        ))) + advice)
    if len(download.cases) < 2:
        raise DatasetError(f"{data} holds {len(download.cases)} labelled case(s); at least 2 are needed")
    manifest = folder_of(workspace) / "manifest.json"
    text = manifest_of(benchmark, download.cases)
    if not manifest.exists() or manifest.read_text(encoding="utf-8") != text:
        write_text(manifest, text)
    grouped = any(case.group is not None for case in download.cases)
    notes = []
    if download.unlabelled:
        notes.append(f"{len(download.unlabelled)} images without a label are left out: {_some(download.unlabelled)}")
    if download.read_as == CONVERTED:
        notes.append(f"the data were read as {CONVERTED}; what a conversion changed cannot be told")
    for note in notes:
        reporter.info(note)
    return Prepared(benchmark, manifest, download.read_as, len(download.cases), grouped, tuple(lacks), tuple(notes))


def missing_cases(benchmark: Benchmark, download: Download) -> list[str]:
    """How a download differs from the complete one in number and names of cases; empty when it does not."""
    lines = []
    count = len(download.cases)
    if count != benchmark.cases:
        lines.append(f"cases: expected {benchmark.cases}, found {count}")
    expected = {name for numbers in benchmark.names for name in numbers.names}
    if expected and download.read_as != CONVERTED:
        found = {case.group or case.case for case in download.cases}
        for what, names in (("missing", expected - found), ("not part of it", found - expected)):
            if names:
                lines.append(f"{what}: {_some(sorted(names))}")
    return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def reproduce(
    name: str,
    data: Path,
    workspace: Workspace,
    spec: TrainSpec | None = None,
    *,
    planner: str | None = None,
    gpu_memory_gb: float | None = None,
    configurations: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    partial: bool = False,
    options: Options = Options(),
    reporter: Reporter = SILENT,
    interrupts: Interrupts | None = None,
) -> Reproduction:
    """Run a benchmark's protocol on its download: check, plan, train, validate, select; writes report/reproduction.json.

    What is not given is as the catalogue's recipe says; whatever differs from it is listed in the result's `deviations`. What is
    done already is kept, as in the stages themselves.
    Raises DatasetError when the download is not complete (see `prepare`), and as the stages do.
    """
    prepared = prepare(name, data, workspace, partial, reporter)
    benchmark = prepared.benchmark
    recipe = benchmark.recipe
    wanted = spec or TrainSpec(epochs=recipe.epochs, steps_per_epoch=recipe.steps_per_epoch)
    names = list(configurations or recipe.configurations)
    planned_before = workspace.plan_path.exists()
    planned = plan(
        prepared.manifest, workspace, planner=planner or (None if planned_before else recipe.planner),
        gpu_memory_gb=gpu_memory_gb, groups="auto" if prepared.grouped else "none", reporter=reporter,
    )
    if not planned_before:
        save_record(_as_made_path(workspace), planned.plan)
    train(workspace, names, folds, spec=wanted, options=options, reporter=reporter, interrupts=interrupts)
    selection = select(workspace, reporter=reporter)
    runs = {run: _finished(workspace, run) for run in names}
    labels = planned.plan.labels
    ours = [_result(workspace, benchmark, run, folders, labels, reporter) for run, folders in runs.items() if folders]
    if (len(selection.runs) > 1 or selection.postprocessing) and benchmark.metric == "dice" and not benchmark.measured:
        ours.append(_selected(selection))
    records = [folder.record() for folders in runs.values() for folder in folders]
    deviations = [
        *(f"data: {line}" for line in prepared.lacks),
        *plan_deviations(benchmark, planned.plan, _as_made_path(workspace)),
        *_run_deviations(benchmark, names, ours, planned.splits),
        *dict.fromkeys(line for record in records for line in _training_deviations(benchmark, record.spec)),
    ]
    reproduction = Reproduction(
        benchmark=benchmark, data=str(Path(data).absolute()), read_as=prepared.read_as, cases=prepared.cases,
        metric=benchmark.metric, ours=tuple(ours), deviations=tuple(deviations), notes=prepared.notes,
    )
    save_record(reproduction_path(workspace), reproduction)
    return reproduction


def _as_made_path(workspace: Workspace) -> Path:
    """The plan as it was made for this reproduction, to tell what was edited since."""
    return folder_of(workspace) / "plan_as_made.json"


def _finished(workspace: Workspace, run: str) -> list[RunFolder]:
    """The folds of a run that are trained and validated."""
    folders = [RunFolder(path) for path in sorted((workspace.runs / run).glob("fold_*"))]
    return [folder for folder in folders if folder.finished and (folder.validation / "report.json").exists()]


def _selected(selection: Selection) -> Result:
    steps = f", {len(selection.postprocessing)} post-processing step(s)" if selection.postprocessing else ""
    return Result(method=f"selected: {' + '.join(selection.runs)}{steps}", folds=selection.folds, cases=selection.cases,
                  values={MEAN: selection.nested_dice},
                  protocol="the default run's Dice plus the gains of what was chosen, each on folds it was chosen without")


def _result(workspace: Workspace, benchmark: Benchmark, run: str, finished: Sequence[RunFolder], labels: Labels,
            reporter: Reporter) -> Result:
    """The pooled validation of a run's finished folds."""
    if benchmark.measured:
        masks = {case: mask for folder in finished for case, mask in find_masks(folder.validation).items()}
        references = {c.case: Path(c.label) for c in workspace.dataset().cases if c.label and c.case in masks}
        report = evaluate(masks, references, unions(benchmark, labels), reporter=reporter)
    else:
        report = merge_reports(load_record(folder.validation / "report.json", Report) for folder in finished)
    values: dict[str, Value] = {MEAN: report.foreground_mean.get(benchmark.metric)}
    values |= {target: metrics.get(benchmark.metric) for target, metrics in report.mean.items()}
    records = [folder.record() for folder in finished]
    steps = " or ".join(f"{count:,}" for count in sorted({record.spec.total_steps for record in records}))
    where = " and ".join(sorted({f"{record.device} in {record.spec.precision}" for record in records}))
    protocol = f"out of fold, {len(records)} of {benchmark.folds} folds, {steps} steps each on {where}, mean over all cases"
    return Result(method=f"ours, {run}", folds=tuple(record.fold for record in records), cases=len(report.cases), values=values,
                  protocol=protocol)


def unions(benchmark: Benchmark, labels: Labels) -> Labels:
    """Labels whose measured targets are the benchmark's unions of label values."""
    regions = tuple(Region(name=name, values=values) for name, values in benchmark.measured.items())
    foreground = tuple(Label(name=label.name, value=label.value) for label in labels.foreground)
    return Labels(background=labels.background, foreground=foreground, regions=regions,
                  region_order=tuple(region.values[0] for region in regions))


def plan_deviations(benchmark: Benchmark, current: Plan, as_made: Path) -> list[str]:
    """How the plan in use differs from the recipe, and what was edited since it was made (`as_made`, if this command made it)."""
    recipe = benchmark.recipe
    lines = []
    if current.planner != recipe.planner:
        lines.append(f"planner: {current.planner}, the recipe has {recipe.planner}")
    elif current.gpu_memory_gb != recipe.gpu_memory_gb:
        lines.append(f"planned for {current.gpu_memory_gb:g} GB of GPU memory, the recipe has {recipe.gpu_memory_gb:g}")
    if not as_made.exists():
        return [*lines, "plan.json was there before this command, and may have been edited"]
    before, after = (p.model_dump(mode="json")["configurations"] for p in (load_record(as_made, Plan), current))
    edited = _differing(before, after, "configurations")
    if edited:
        lines.append(f"plan.json was edited: {_some(edited)}")
    return lines


def _training_deviations(benchmark: Benchmark, spec: TrainSpec) -> list[str]:
    """What a run was trained with against the recipe."""
    recipe = benchmark.recipe
    lines = []
    full = recipe.epochs * recipe.steps_per_epoch
    if (spec.epochs, spec.steps_per_epoch) != (recipe.epochs, recipe.steps_per_epoch):
        lines.append(f"training: {spec.epochs} epochs of {spec.steps_per_epoch} steps ({spec.total_steps:,} in all), the recipe "
                     f"has {recipe.epochs} of {recipe.steps_per_epoch} ({full:,}): {spec.total_steps / full:.2g} of them")
    usual, given = (s.model_dump(mode="json", exclude=set(STATED)) for s in (TrainSpec(), spec))
    return lines + [f"training record: {line}" for line in _differing(usual, given)]


def _run_deviations(benchmark: Benchmark, names: Sequence[str], ours: Sequence[Result], splits: Sequence[Split]) -> list[str]:
    recipe = benchmark.recipe
    lines = []
    if list(names) != list(recipe.configurations):
        lines.append(f"configurations: {', '.join(names)}, the recipe has {', '.join(recipe.configurations)}")
    if len(splits) != benchmark.folds:
        lines.append(f"folds: the data were split into {len(splits)}, the recipe has {benchmark.folds}")
    for result in ours:
        if len(result.folds) < len(splits):
            lines.append(f"{result.method}: {len(result.folds)} of {len(splits)} folds ({', '.join(map(str, result.folds))})")
    return lines


def _differing(old: Any, new: Any, where: str = "") -> list[str]:
    """`path: old -> new` of every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [line for key in dict.fromkeys([*old, *new])
                for line in _differing(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))]
    return [] if old == new else [f"{where}: {str(old)[:60]} -> {str(new)[:60]}"]


def reproduction_table(result: Reproduction) -> list[list[str]]:
    """Ours and the published rows of the same metric as rows of text, a heading first; `*` marks another protocol."""
    benchmark = result.benchmark
    rows = [row for row in benchmark.published if row.metric == result.metric]
    several = len(benchmark.targets) > 1
    shown = [t for t in benchmark.targets if len(benchmark.targets) <= FEW or any(t in row.values for row in rows)]
    columns = ([MEAN] if several else []) + shown
    table = [["method", *columns, "cases", "folds", "published in"]]
    for ours in result.ours:
        values = ours.values if several else {**ours.values, shown[0]: ours.values.get(shown[0], ours.values.get(MEAN))}
        table.append([ours.method, *(_cell(values.get(c)) for c in columns), str(ours.cases), str(len(ours.folds)), "here"])
    for row in rows:
        mark = "" if row.comparable else " *"
        where = f"{row.source.venue}, {row.source.year}"
        table.append([row.method + mark, *(_cell(row.values.get(c)) for c in columns), "", "", where])
    return table


def _cell(value: Value) -> str:
    return "-" if value is None else f"{value:.4f}"


def reproduction_facts(result: Reproduction) -> list[str]:
    """What has to be said beside the table: what was shortened, protocols and citations, results in other measures."""
    benchmark = result.benchmark
    lines = [f"{benchmark.title}: {result.cases} cases, {result.metric}; folds: {benchmark.splits}"]
    lines += [f"  {ours.method}: {ours.protocol}" for ours in result.ours]
    lines += ["shortened, or different from the recipe:"] if result.deviations else ["nothing was shortened"]
    lines += [f"  {line}" for line in result.deviations]
    lines += [f"note: {note}" for note in (*result.notes, benchmark.note) if note]
    lines.append("published results (* another protocol, not to be compared):" if benchmark.published
                 else "published results: none whose source was found")
    return lines + [f"  {_published_text(row, result.metric)}" for row in benchmark.published]


def _published_text(row: Published, metric: str) -> str:
    mark = "" if row.comparable else " *"
    values = "" if row.metric == metric else f" {values_text(row)};"
    note = f" ({row.note})" if row.note else ""
    return f"{row.method}{mark}:{values} {row.protocol}{note}. {source_text(row.source)}"
