"""Columns of a manifest that have no meaning of their own stay with the case, for results by site, scanner and the like."""

from __future__ import annotations

import json

from autoseg.datasets.manifest import read_manifest


def files(folder):
    for name in ("a.nii.gz", "b.nii.gz", "m.nii.gz"):
        (folder / name).write_bytes(b"")


def test_further_csv_columns_become_attributes_and_empty_ones_are_left_out(tmp_path):
    files(tmp_path)
    table = tmp_path / "cases.csv"
    table.write_text(
        "case,image,label,group,fold,site,scanner model,\n"
        "x,a.nii.gz,m.nii.gz,p1,0,Basel,Skyra,1\n"
        "y,b.nii.gz,m.nii.gz,p2,1,,Avanto,2\n")
    first, second = read_manifest(table).cases
    assert first.attributes == {"site": "Basel", "scanner model": "Skyra"} and second.attributes == {"scanner model": "Avanto"}
    assert (first.group, first.fold) == ("p1", 0)


def test_further_json_entries_become_attributes_as_text_and_nested_ones_are_ignored(tmp_path):
    files(tmp_path)
    entry = {"case": "x", "images": ["a.nii.gz", "b.nii.gz"], "label": "m.nii.gz", "age": 61, "contrast": True, "note": None,
             "history": {"a": 1}, "site": " Basel "}
    (tmp_path / "cases.json").write_text(json.dumps([entry]))
    (case,) = read_manifest(tmp_path / "cases.json").cases
    assert case.attributes == {"age": "61", "contrast": "true", "site": "Basel"} and len(case.images) == 2
