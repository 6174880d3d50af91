from __future__ import annotations

from pathlib import Path

import pytest

from autoseg.datasets.read import read_dataset
from autoseg.datasets.splits import make_splits
from autoseg.stages.check import check
from autoseg.types.dataset import Dataset

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
pytestmark = [pytest.mark.real_data, pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here")]
SAME_PERSON = (("1003", "1023"), ("1004", "1024"), ("1005", "1025"), ("1018", "1038"), ("1019", "1039"))


def read(path: Path) -> Dataset:
    dataset, faults = read_dataset(path)
    assert dataset is not None and faults == []
    return dataset


@pytest.mark.parametrize(("name", "cases", "channels", "labels"), [
    ("hippocampus", 200, 1, 3), ("em_vnc", 15, 1, 5), ("oasis_malf_2mm", 29, 1, 27), ("acdc30", 48, 1, 4),
    ("lungct_gtv", 4, 1, 2), ("totalseg_ct", 3, 1, 118), ("ms3_2mm", 3, 4, 2),
])
def test_each_real_data_set_is_read_without_errors(name: str, cases: int, channels: int, labels: int) -> None:
    dataset = read(DATA / name)
    assert (len(dataset.cases), len(dataset.channels), dataset.labels.declared_count) == (cases, channels, labels)
    assert all(len(c.images) == channels and c.label for c in dataset.cases)
    assert [f for f in check(dataset) if f.code != "absent-label"] == []
    assert dataset.groups_from == ("names" if name == "acdc30" else "none")


def test_two_frames_of_a_heart_share_a_fold() -> None:
    dataset = read(DATA / "acdc30")
    assert len({c.group for c in dataset.cases}) == 24
    for split in make_splits(dataset.cases, {}):
        assert len({c.partition("_")[0] for c in split.val} & {c.partition("_")[0] for c in split.train}) == 0
        assert len(split.val) in (8, 10)


def test_people_scanned_twice_share_a_fold_through_a_manifest(tmp_path: Path) -> None:
    person = {second: first for first, second in SAME_PERSON}
    source = (DATA / "oasis_malf_2mm").resolve()
    rows = ["image,label,group"]
    for label in sorted((source / "labels").glob("*.nii.gz")):
        number = label.name.removesuffix(".nii.gz").removeprefix("oasis_")
        rows.append(f"{source}/images/oasis_{number}_0000.nii.gz,{label},{person.get(number, number)}")
    (tmp_path / "oasis.csv").write_text("\n".join(rows))
    dataset = read(tmp_path / "oasis.csv")
    assert dataset.groups_from == "manifest" and len({c.group for c in dataset.cases}) == len(dataset.cases) - len(SAME_PERSON)
    assert dataset.labels.values == tuple(range(27))
    for split in make_splits(dataset.cases, {}):
        for first, second in SAME_PERSON:
            assert (f"oasis_{first}" in split.val) == (f"oasis_{second}" in split.val)
