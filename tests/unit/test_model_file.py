"""Model files: what is written comes back, and whatever was made to harm is refused before a tensor is made of it."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_safetensors

from autoseg.errors import RecordError, RunError
from autoseg.files import archive
from autoseg.files.model import MODEL, ModelFile, open_model_file, write_model_file
from autoseg.files.tensors import make_tensors, read_header, tensor_bytes
from autoseg.networks.build import build
from autoseg.networks.describe import describe
from autoseg.networks.limits import largest_activation, require_sane, tensor_shapes
from autoseg.types.labels import Label, Labels
from autoseg.types.model import MemberRecord, ModelRecord, NetworkRecord, part_name
from autoseg.types.plan import Configuration, Plan
from autoseg.types.record import Spec

PART = part_name("3d", 0)
LABELS = Labels(foreground=(Label(name="liver", value=1), Label(name="tumour", value=7)))
Parts = dict[str, bytes]


def configuration(kind: str = "unet", dims: int = 3, previous: str | None = None) -> Configuration:
    return Configuration(
        patch_size=(8,) * dims, batch_size=2, spacing=(1.0,) * dims, median_shape=(8.0,) * dims, network=Spec(kind=kind),
        strides=((1,) * dims, (2,) * dims), kernel_sizes=((3,) * dims,) * 2, features_per_stage=(4, 6), blocks_per_stage=(1, 2),
        decoder_blocks_per_stage=(1,), batch_dice=False, normalization=("NoNormalization",), use_mask_for_norm=(False,),
        previous_stage=previous,
    )


def record(**changes: Any) -> ModelRecord:
    plan = Plan(
        dataset_name="livers", planner="default", gpu_memory_gb=8, transpose_forward=(0, 1, 2), channels=("CT",), labels=LABELS,
        intensities=(), configurations={"3d_fullres": configuration(), "2d": configuration("residual-unet", 2)},
    )
    made = ModelRecord(
        name="livers", made_by="a test", licence="CC-BY-4.0", labels=LABELS, colours={"liver": "#FF0000"}, channels=("CT",),
        plan=plan, networks={"3d": NetworkRecord(configuration="3d_fullres", folds=(0, 3), mirror_axes=(0, 2)),
                             "flat": NetworkRecord(configuration="2d", folds=(1,), mirror_axes=())},
        members=(MemberRecord(run="3d", weight=2), MemberRecord(run="flat")),
        postprocessing=(Spec(kind="largest_component", options={"labels": [1]}),),
    )
    return made.model_copy(update=changes)


def trained(made: ModelRecord) -> dict[str, dict[str, torch.Tensor]]:
    """Networks with weights that differ from part to part."""
    found = {}
    for seed, name in enumerate(made.part_names):
        run = name.split("/")[1]
        description = describe(made.configuration_of(run), made.input_channels(run), made.labels.output_count)
        found[name] = build(description, seed).state_dict()
    return found


def written(path: Path, made: ModelRecord | None = None) -> ModelFile:
    made = made or record()
    tensors = trained(made)
    return write_model_file(path, made, {name: lambda n=name: tensor_bytes(tensors[n], made.weights) for name in tensors})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """The contents of a sound model file, by name."""
    path = tmp_path_factory.mktemp("sound") / "m.autoseg"
    written(path)
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def stored(path: Path, parts: Parts, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in parts.items():
            file.writestr(name, data)
    return path


def changed(parts: Parts, change: Callable[[dict[str, Any]], object]) -> Parts:
    """The same parts with another model.json."""
    data = json.loads(parts[MODEL])
    change(data)
    return {**parts, MODEL: json.dumps(data).encode()}


def replaced(parts: Parts, name: str, content: bytes) -> Parts:
    """The same parts with one replaced, and its size and hash in model.json made to fit."""

    def fit(data: dict[str, Any]) -> None:
        data["parts"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    return {**changed(parts, fit), name: content}


def refusal(path: Path) -> str:
    """The message with which a file is refused, whether on opening or on reading."""
    with pytest.raises(RecordError) as caught:
        file = open_model_file(path)
        file.read(file.record.part_names)
    message = str(caught.value)
    assert str(path) in message and len(message) < 6000
    return message


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    made = record()
    file = written(tmp_path / "deep" / "m.autoseg", made)
    assert file.record == made.model_copy(update={"parts": file.record.parts}) == open_model_file(file.path).record
    assert list(file.record.parts) == [part_name("3d", 0), part_name("3d", 3), part_name("flat", 1)]
    for name, tensors in trained(made).items():
        found = file.read([name])[name]
        assert {key: (value.dtype, value.shape) for key, value in found.items()} == {
            key: (torch.float32, value.shape) for key, value in tensors.items()}
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    file.verify()
    assert [p.name for p in file.path.parent.iterdir()] == ["m.autoseg"]


def test_it_is_a_plain_zip_of_json_and_safetensors_with_equal_bytes_for_equal_content(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a.autoseg"), written(tmp_path / "b.autoseg")
    assert first.path.read_bytes() == second.path.read_bytes() and first.key == second.key
    with zipfile.ZipFile(first.path) as file:
        assert file.testzip() is None and {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
        data = json.loads(file.read(MODEL))
        assert file.namelist() == [MODEL, *data["parts"]]
        for name, part in data["parts"].items():
            assert (part["size"], part["sha256"]) == (len(file.read(name)), hashlib.sha256(file.read(name)).hexdigest())
            assert load_safetensors(file.read(name))
    assert {"format", "plan", "labels", "channels", "metrics", "licence"} <= set(data)
    assert first.key == hashlib.sha256(zipfile.ZipFile(first.path).read(MODEL)).hexdigest()


@pytest.mark.parametrize(("precision", "error"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_half_precision_takes_half_the_room_and_rounds(tmp_path: Path, precision: str, error: float) -> None:
    made = record(weights=precision)
    file = written(tmp_path / "m.autoseg", made)
    for name, tensors in trained(made).items():
        found = file.read([name])[name]
        assert file.record.parts[name].size < 0.75 * len(tensor_bytes(tensors))  # headers stay as they are
        for key, value in tensors.items():
            assert found[key].dtype == torch.float32
            torch.testing.assert_close(found[key], value, rtol=error, atol=1e-7)


def test_weights_that_are_no_numbers_or_do_not_fit_are_not_written() -> None:
    with pytest.raises(RunError, match=r"x holds numbers that are NaN or infinite$"):
        tensor_bytes({"x": torch.tensor([1.0, torch.nan])})
    with pytest.raises(RunError, match="do not fit into fp16; choose bf16 or fp32"):
        tensor_bytes({"x": torch.tensor([1e5])}, "fp16")


def test_an_equal_file_stays_and_another_one_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "m.autoseg"
    written(path)
    before = path.stat().st_mtime_ns, path.stat().st_ino
    written(path)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    other = record(licence="MIT")
    with pytest.raises(RunError, match=r"exists and is not this model.*--overwrite"):
        written(path, other)
    assert open_model_file(path).record.licence == "CC-BY-4.0"
    tensors = trained(other)
    weights = {name: lambda n=name: tensor_bytes(tensors[n]) for name in tensors}
    assert write_model_file(path, other, weights, overwrite=True).record.licence == "MIT"
    data = bytearray(path.read_bytes())
    data[-3000] ^= 1  # a flipped bit in the weights: the file is no longer this model
    path.write_bytes(data)
    with pytest.raises(RunError, match="exists and is not this model"):
        written(path, other)
    with pytest.raises(RunError, match="is a folder"):
        written(tmp_path)


def test_a_record_that_could_not_be_opened_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "m.autoseg"
    with pytest.raises(RecordError, match=r"m\.autoseg is refused.*control characters"):
        written(path, record(licence="\x1b[2J"))
    assert not list(tmp_path.iterdir())


def test_opening_needs_no_torch_and_reads_no_weights(tmp_path: Path) -> None:
    path = written(tmp_path / "m.autoseg").path
    code = f"import sys; from pathlib import Path; from autoseg.files.model import open_model_file as o; o(Path({str(path)!r}))"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules and 'pickle' not in globals()"], check=True)


@pytest.mark.parametrize("kind", ["unet", "residual-unet"])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_known_shapes_are_those_of_the_built_network(kind: str, dims: int) -> None:
    description = describe(configuration(kind, dims), 3, 4)
    expected = {name: tuple(tensor.shape) for name, tensor in build(description).state_dict().items()}
    assert tensor_shapes(description) == expected


def test_a_large_ordinary_network_is_within_the_limits() -> None:
    stages = 6
    large = configuration("residual-unet").model_copy(update={
        "patch_size": (192, 224, 192), "batch_size": 4, "features_per_stage": (32, 64, 128, 256, 320, 320),
        "strides": ((1, 1, 1), *((2, 2, 2),) * 5), "kernel_sizes": ((3, 3, 3),) * stages, "blocks_per_stage": (1, 3, 4, 6, 6, 6),
        "decoder_blocks_per_stage": (1,) * 5})
    require_sane(large, 4, 118)
    assert largest_activation(large, 3) == 4 * 64 * 192 * 224 * 192


# what is not a sound zip

def not_a_zip(path: Path, parts: Parts) -> None:
    path.write_bytes(b"\x80\x04\x95" + bytes(1000))


def cut_short(path: Path, parts: Parts) -> None:
    data = stored(path, parts).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def something_behind(path: Path, parts: Parts) -> None:
    path.write_bytes(stored(path, parts).read_bytes() + b"more")


def something_in_front(path: Path, parts: Parts) -> None:
    path.write_bytes(b"#!/bin/sh\n" + stored(path, parts).read_bytes())


def zip_in_front(path: Path, parts: Parts) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(60) + stored(path, parts).read_bytes())


def bomb(path: Path, parts: Parts) -> None:
    stored(path, {**parts, PART: bytes(50_000_000)}, zipfile.ZIP_DEFLATED)


def escaping(path: Path, parts: Parts) -> None:
    stored(path, {**parts, "weights/../../../etc/cron.d/x": b"x"})


def absolute(path: Path, parts: Parts) -> None:
    stored(path, {**parts, "/etc/passwd": b"x"})


def program(path: Path, parts: Parts) -> None:
    stored(path, {**parts, "sitecustomize.py": b"raise SystemExit"})


def hidden_name(path: Path, parts: Parts) -> None:
    stored(path, {**parts, "model.jsonX": b"{}"})
    path.write_bytes(path.read_bytes().replace(b"model.jsonX", b"model.json\0"))


def backslashes(path: Path, parts: Parts) -> None:
    stored(path, {**parts, "weights\\3d\\fold_9.safetensors": b"x"})


def twice(path: Path, parts: Parts) -> None:
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in [*parts.items(), (MODEL, b"{}")]:
            file.writestr(name, data)


def linked(path: Path, parts: Parts) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            info = zipfile.ZipInfo(name)
            if name == PART:
                info.create_system, info.external_attr, data = 3, (stat.S_IFLNK | 0o777) << 16, b"/etc/passwd"
            file.writestr(info, data)


def directory_entry(path: Path, parts: Parts, **changes: int) -> None:
    """Rewrite fields of the last entry of the directory."""
    data = bytearray(stored(path, parts).read_bytes())
    at = data.rfind(b"PK\x01\x02")
    places = {"flags": ("<H", 8), "compressed": ("<L", 20), "size": ("<L", 24), "offset": ("<L", 42)}
    for name, value in changes.items():
        form, offset = places[name]
        struct.pack_into(form, data, at + offset, value)
    path.write_bytes(data)


def encrypted(path: Path, parts: Parts) -> None:
    directory_entry(path, parts, flags=1)


def claims_too_much(path: Path, parts: Parts) -> None:
    directory_entry(path, parts, size=2**32 - 2)


def reaches_beyond(path: Path, parts: Parts) -> None:
    directory_entry(path, parts, size=2**31, compressed=2**31)


def overlapping(path: Path, parts: Parts) -> None:
    directory_entry(path, parts, offset=0)


def crowded(path: Path, parts: Parts) -> None:
    stored(path, {**parts, **{part_name(f"r{i}", 0): b"" for i in range(archive.MOST_ENTRIES)}})


def claims_a_crowd(path: Path, parts: Parts) -> None:
    data = bytearray(stored(path, parts).read_bytes())
    struct.pack_into("<L", data, len(data) - 10, 2**31)  # the length of the directory
    path.write_bytes(data)


def flipped_header(path: Path, parts: Parts) -> None:
    data = bytearray(stored(path, parts).read_bytes())
    data[data.index(MODEL.encode()) - 30] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(("make", "said"), [
    (not_a_zip, "not a zip"), (cut_short, "ends early"), (something_behind, "added behind"), (something_in_front, "not a zip"),
    (zip_in_front, "begins with something"), (bomb, "is compressed"), (escaping, "does not belong"), (absolute, "not belong"),
    (program, "'sitecustomize.py' does not belong"), (hidden_name, "does not belong"), (backslashes, "does not belong"),
    (twice, "'model.json' is there twice"), (linked, "is a link"), (encrypted, "is encrypted"), (claims_too_much, "claims"),
    (reaches_beyond, "claim more bytes"), (overlapping, "overlap"), (crowded, "at most 4096 files"),
    (claims_a_crowd, "at most 4096 files"), (flipped_header, "not a zip"),
])
def test_a_zip_that_is_not_plain_is_refused(
    tmp_path: Path, parts: Parts, make: Callable[[Path, Parts], None], said: str
) -> None:
    path = tmp_path / "m.autoseg"
    make(path, parts)
    assert said in refusal(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.autoseg"]


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "missing.autoseg", "does not exist"), (tmp_path, "is not a file")):
        with pytest.raises(RecordError, match=said):
            open_model_file(path)


def test_a_file_beyond_the_old_size_of_zips_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    file = written(tmp_path / "m.autoseg")
    assert b"PK\x06\x06" in file.path.read_bytes()
    monkeypatch.undo()
    open_model_file(file.path).verify()


# what model.json says

def giant(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["plan"]["configurations"]["3d_fullres"].update({key: value})


@pytest.mark.parametrize(("change", "said"), [
    (lambda d: d.update(format=2), "format 2.*update autoseg"),
    (lambda d: d.update(trainer="os:system"), r"trainer: Extra inputs"),
    (lambda d: d["plan"].update(loss={"kind": "os:system"}), r"plan\.loss"),
    (lambda d: d.pop("labels"), "labels: Field required"),
    (lambda d: d["members"].append({"run": "other"}), "'other' must be one of networks"),
    (lambda d: d["members"].append({"run": "3d"}), "each run once"),
    (lambda d: d["members"].pop(), r"\['flat'\], which no member uses"),
    (lambda d: d["members"][0].update(weight=-1), r"members\.0\.weight"),
    (lambda d: d["networks"]["3d"].update(mirror_axes=[3]), "mirror_axes"),
    (lambda d: d["networks"]["3d"].update(folds=[0, 0]), "folds"),
    (lambda d: d["networks"]["3d"].update(previous="3d"), "must not rest on itself"),
    (lambda d: d["networks"]["3d"].update(previous="flat"), r"networks\.3d\.previous must name a run if, and only if"),
    (lambda d: d["networks"]["3d"].update(configuration="x"), "not in its plan"),
    (lambda d: d.update(channels=["MR"]), "must be those of the plan"),
    (lambda d: d["parts"].pop(PART), "parts: 2 are listed"),
    (lambda d: d["parts"].update({"weights/../x": d["parts"][PART]}), "parts: 4 are listed"),
    (lambda d: d["parts"][PART].update(size=10**15), "should have 1000000000000000 bytes"),
    (lambda d: d["parts"][PART].update(sha256="0" * 64), f"{PART}: its SHA-256 is .* altered"),
    (lambda d: d["parts"][PART].update(sha256="../x"), r"parts\.weights/3d/fold_0\.safetensors\.sha256"),
    (lambda d: d.update(weights="fp16"), "has type F32, expected F16"),
    (lambda d: d.update(name="\x1b]0;x\x07"), "control characters"),
    (lambda d: d["colours"].update({"a\x00": "b"}), "control characters"),
    (lambda d: d.update(postprocessing=[{"kind": "os:system", "options": {}}]), "postprocessing.0: unknown step 'os:system'"),
    (lambda d: d.update(postprocessing=[{"kind": "opening", "options": {"mm": "x"}}]), r"postprocessing\.0\.options"),
    (lambda d: d.update(postprocessing=d["postprocessing"] * 101), "at most 100 steps"),
    (lambda d: d["postprocessing"][0].update(options={"labels": [2**70]}), "numbers of labels from 1 to 2"),
    (lambda d: d.update(postprocessing=[{"kind": "threshold", "options": {"values": [0.5]}}]), "expected 3 thresholds"),
    (lambda d: d.update(postprocessing=[{"kind": "crf", "options": {"channel": 1}}]), "channel: expected 0 to 0"),
    (giant("network", {"kind": "os:system", "options": {}}), r"networks\.3d: unknown network 'os:system'"),
    (giant("features_per_stage", [4, 10**9]), "features_per_stage: at most"),
    (giant("blocks_per_stage", [1, 10**12]), "blocks_per_stage: at most"),
    (giant("decoder_blocks_per_stage", [10**12]), "decoder_blocks_per_stage: at most"),
    (giant("kernel_sizes", [[3, 3, 3], [9999999, 3, 3]]), "kernel_sizes: at most"),
    (giant("patch_size", [2**20, 8, 8]), "patch_size: at most"),
    (giant("patch_size", [4096, 4096, 4096]), "activations"),
    (giant("batch_size", 10**10), "batch_size: at most"),
    (giant("spacing", [1e-300, 1, 1]), "spacing"),
    (giant("features_per_stage", [8000, 8000]), "would have 7424344003 weights"),
    (giant("features_per_stage", [800, 800]), "has shape"),
    (giant("blocks_per_stage", [64, 64]), "tensors missing"),
    (lambda d: [d["labels"]["foreground"][0].update(value=2**40), d["plan"].update(labels=d["labels"])],
     "does not fit into a mask"),
    (lambda d: d["plan"]["configurations"].update({f"c{i}": {"inherits_from": f"c{i + 1}"} for i in range(5000)}), "model.json"),
])
def test_a_record_that_lies_is_refused(
    tmp_path: Path, parts: Parts, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    message = refusal(stored(tmp_path / "m.autoseg", changed(parts, change)))
    assert re.search(said, message, re.S), message


@pytest.mark.parametrize(("text", "said"), [
    (b"", "model.json"), (b"[]", "not an object"), (b"\xff\xfe", "UTF-8"), (b"[" * 100_000, "nested too deeply"),
    (b'{"format": 1, "format": 1}', "'format' is there twice"), (b'{"format": NaN}', "not finite"),
    (b'{"format": 1e999}', "not finite"), (b'{"format": ' + b"9" * 10_000 + b"}", "model.json"),
    (b'{"name": "\\ud800"}', "control characters"), (b"{}" + b" " * (17 << 20), "at most 16777216"),
])
def test_a_record_that_is_no_json_is_refused(tmp_path: Path, parts: Parts, text: bytes, said: str) -> None:
    assert said in refusal(stored(tmp_path / "m.autoseg", {**parts, MODEL: text}))


def test_a_file_without_record_is_refused(tmp_path: Path, parts: Parts) -> None:
    rest = {name: data for name, data in parts.items() if name != MODEL}
    assert "model.json: it is missing" in refusal(stored(tmp_path / "m.autoseg", rest))


def spots(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in nested data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(spot for key, value in inner for spot in spots(value, (*path, key)))]


def test_any_value_may_be_replaced_by_any_other_without_anything_worse_than_a_refusal(tmp_path: Path, parts: Parts) -> None:
    path, rng = tmp_path / "m.autoseg", random.Random(0)
    for spot in spots(json.loads(parts[MODEL]))[1:]:
        data = json.loads(parts[MODEL])
        target = data
        for key in spot[:-1]:
            target = target[key]
        target[spot[-1]] = rng.choice([None, True, -1, 0, 2**70, 1.5, 1e300, "", "x" * 5000, "os:system", [], [[]], {}, [0] * 99])
        stored(path, {**parts, MODEL: json.dumps(data).encode()})
        try:
            open_model_file(path)
        except RecordError as error:
            assert len(str(error)) < 6000


# what the weights say

def header(data: bytes) -> dict[str, Any]:
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


def rebuilt(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A part with another header over the same tensors."""
    head = header(data)
    change(head)
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]


FIRST = "units.encoder_0_0.conv.weight"


@pytest.mark.parametrize(("change", "said"), [
    (lambda h: h[FIRST].update(shape=[10**6, 10**6, 10**3]), "needs .* bytes"),
    (lambda h: h[FIRST].update(shape=[2**62, 4]), "impossible shape"),
    (lambda h: h[FIRST].update(shape=[4, -1, -3, 3, 3]), "impossible shape"),
    (lambda h: h[FIRST].update(shape=[True]), "impossible shape"),
    (lambda h: h[FIRST].update(shape=[4, 3, 3, 3, 1]), "needs .*1, 3, 3, 3"),
    (lambda h: h[FIRST].update(data_offsets=[0, 10**12]), "lies at bytes"),
    (lambda h: h[FIRST].update(data_offsets=[-8, 424]), "impossible shape"),
    (lambda h: h[FIRST].update(dtype="object"), "has type 'object'"),
    (lambda h: h[FIRST].update(dtype="I64"), "has type 'I64'"),
    (lambda h: h[FIRST].update(code="os.system"), "must be described by"),
    (lambda h: h.pop(FIRST), "overlap or leave gaps"),
    (lambda h: h.update(extra=dict(h[FIRST])), "overlap or leave gaps"),
    (lambda h: h.update(__metadata__={"a": {"b": 1}}), "__metadata__"),
    (lambda h: h.update({"units.other": h.pop(FIRST)}), "lacks 'units.encoder_0_0.conv.weight'"),
])
def test_weights_that_lie_about_their_tensors_are_refused_though_their_hash_is_right(
    tmp_path: Path, parts: Parts, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    path = stored(tmp_path / "m.autoseg", replaced(parts, PART, rebuilt(parts[PART], change)))
    with pytest.raises(RecordError) as caught:
        open_model_file(path)  # no weights were read yet
    assert PART in str(caught.value) and re.search(said, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(("content", "said"), [
    (b"1234", "too few for a header"), ((2**63).to_bytes(8, "little") + b"{}", "claims"), (bytes(8), "data fit no header"),
    ((2).to_bytes(8, "little") + b"[]", "not an object"), (b"PK\x03\x04" + bytes(100), "claims"),
])
def test_weights_that_are_none_are_refused(tmp_path: Path, parts: Parts, content: bytes, said: str) -> None:
    message = refusal(stored(tmp_path / "m.autoseg", replaced(parts, PART, content)))
    assert PART in message and (said in message or said == "data fit no header")


def test_pickles_in_place_of_weights_are_refused_and_not_run(tmp_path: Path, parts: Parts) -> None:
    mark = tmp_path / "ran"
    pickled = f"cpathlib\nPath\n(S'{mark}'\ntR.".encode()
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(1)}, buffer)
    for content in (pickled, buffer.getvalue()):
        assert PART in refusal(stored(tmp_path / "m.autoseg", replaced(parts, PART, content)))
    assert not mark.exists()


def test_one_altered_bit_in_any_place_is_noticed(tmp_path: Path, parts: Parts) -> None:
    path = tmp_path / "m.autoseg"
    whole = written(path).path.read_bytes()
    rng = random.Random(0)
    for place in [*range(0, 40, 3), *(rng.randrange(len(whole)) for _ in range(120))]:
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << rng.randrange(8)
        path.write_bytes(spoiled)
        try:
            file = open_model_file(path)
            read = file.read(file.record.part_names)
        except RecordError:
            continue
        path.write_bytes(whole)  # what was accepted must mean the same: the bit was in a field that says nothing here
        sound = open_model_file(path)
        expected = sound.read(sound.record.part_names)
        assert file.record == sound.record
        assert all(torch.equal(read[n][k], expected[n][k]) for n in expected for k in expected[n])


def test_a_file_that_changes_after_it_was_opened_is_noticed(tmp_path: Path, parts: Parts) -> None:
    path = stored(tmp_path / "m.autoseg", parts)
    file = open_model_file(path)
    other = bytearray(parts[PART])
    other[-1] ^= 1
    stored(path, {**parts, PART: bytes(other)})
    with pytest.raises(RecordError, match="its SHA-256 is"):
        file.read([PART])
    with pytest.raises(RecordError, match="its SHA-256 is"):
        file.verify()


def test_tensors_at_odd_places_are_read_too() -> None:
    data = tensor_bytes({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0, 2)})
    for spaces in range(4):
        length = int.from_bytes(data[:8], "little")
        moved = bytearray((length + spaces).to_bytes(8, "little") + data[8 : 8 + length] + b" " * spaces + data[8 + length :])
        places = read_header(io.BytesIO(moved).read, len(moved))
        found = make_tensors(moved, places)
        assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["b"].shape == (0, 2)
