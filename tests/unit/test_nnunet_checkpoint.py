"""Foreign checkpoints: read as torch reads them, or refused; nothing in them ever runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoseg.errors import RecordError
from autoseg.files import nnunet_checkpoint
from autoseg.files.nnunet_checkpoint import Opaque, TensorEntry, read_checkpoint

KINDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
         torch.uint8, torch.bool)


def training_state() -> dict[str, Any]:
    """What nnU-Net's trainer saves, small."""
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.InstanceNorm3d(2, affine=True))
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99)
    network(torch.zeros(1, 1, 5, 5, 5)).sum().backward()
    optimizer.step()
    return {
        "network_weights": network.state_dict(), "optimizer_state": optimizer.state_dict(), "grad_scaler_state": None,
        "logging": {"losses": [np.float32(0.5), np.float64(1.5)], "dice": [np.arange(3.0)], "when": [1.5e9]},
        "_best_ema": np.float64(2), "current_epoch": 7, "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
        "init_args": {
            "configuration": "3d_fullres", "fold": 0, "device": torch.device("cuda", 0), "plans": {"a": [1, 2.5, None, True]}
        },
    }


def saved(tmp_path: Path, content: Any, name: str = "checkpoint_final.pth") -> Path:
    path = tmp_path / name
    torch.save(content, path)
    return path


def crafted(tmp_path: Path, pickled: bytes, records: dict[str, bytes] | None = None, root: str = "archive/") -> Path:
    """A checkpoint with a pickle written by hand."""
    path = tmp_path / "crafted.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{root}data.pkl", pickled)
        for name, data in (records or {}).items():
            file.writestr(root + name, data)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def a_tensor(count: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A pickle of {"w": tensor} with any numbers."""
    def row(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + row(shape) + row(strides) + b"\x89Nt" + b"R"
    return b"\x80\x02}" + text("w") + call + b"s."


def test_a_training_checkpoint_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    state = training_state()
    found = read_checkpoint(saved(tmp_path, state))
    assert list(found.values) == list(state) and found.values["inference_allowed_mirroring_axes"] == (0, 1, 2)
    assert found.values["init_args"]["plans"] == {"a": [1, 2.5, None, True]} and found.values["current_epoch"] == 7
    arrays = found.tensors(found.values["network_weights"])
    assert list(arrays) == list(state["network_weights"])
    for name, tensor in state["network_weights"].items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy())


def test_what_is_not_needed_stays_unread(tmp_path: Path) -> None:
    found = read_checkpoint(saved(tmp_path, {**training_state(), "path": Path("/somewhere")}))
    assert found.values["init_args"]["device"] == Opaque("torch device")
    assert isinstance(found.values["_best_ema"], Opaque) and isinstance(found.values["logging"]["dice"][0], Opaque)
    assert isinstance(found.values["path"], Opaque)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_number_comes_out_right(tmp_path: Path, kind: torch.dtype) -> None:
    tensor = (torch.arange(24).reshape(2, 3, 4) % 7).to(kind)
    found = read_checkpoint(saved(tmp_path, {"w": tensor}))
    array = found.tensors({"w": found.values["w"]})["w"]
    expected = tensor.float() if kind == torch.bfloat16 else tensor
    np.testing.assert_array_equal(array, expected.numpy())
    assert array.dtype == expected.numpy().dtype


def test_views_parameters_and_shared_storages_are_read(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    given = {"base": base, "part": base[1:, ::2], "turned": base.permute(2, 0, 1), "scalar": torch.tensor(3.0),
             "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(base[0])}
    given["last"] = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    found = read_checkpoint(saved(tmp_path, given))
    arrays = found.tensors(found.values)
    for name, tensor in given.items():
        np.testing.assert_array_equal(arrays[name], tensor.detach().numpy(), err_msg=name)
    assert np.shares_memory(arrays["base"], arrays["turned"])


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Stateful:
    """Pickles as an object with a state."""

    def __init__(self) -> None:
        self.anything = 1


HOSTILE: dict[str, Callable[[str], Any]] = {
    "os.system": lambda command: Call(os.system, command),
    "eval": lambda command: Call(eval, f"__import__('os').system({command!r})"),
    "exec": lambda command: Call(exec, f"import os; os.system({command!r})"),
    "getattr": lambda command: Call(getattr, Call(__import__, "os"), "system"),
    "subprocess": lambda command: Call(subprocess.check_output, command.split()),
    "torch.load": lambda command: Call(torch.load, "other.pth"),
    "torch.hub": lambda command: Call(torch.hub.load, "someone/something", "model"),
    "pickle": lambda command: Call(pickle.loads, pickle.dumps(Call(os.system, command))),
    "numpy": lambda command: Call(np.load, "other.npy", None, True),
    "lambda-like": lambda command: Call(collections.namedtuple, "a", "b"),
    "object": lambda command: Stateful(),
    "class": lambda command: os.PathLike,
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["top", "weights", "nested", "key"])
def test_whatever_would_run_is_refused_and_does_not_run(tmp_path: Path, kind: str, place: str) -> None:
    marker = tmp_path / "ran"
    hostile = HOSTILE[kind](f"touch {marker}")
    state = training_state()
    if place == "top":
        state["payload"] = hostile
    elif place == "weights":
        state["network_weights"]["conv.weight"] = hostile
    elif place == "nested":
        state["logging"]["losses"] = [[{"deep": (1, hostile)}]]
    else:
        state[hostile] = 1
    path = saved(tmp_path, state)
    with pytest.raises(RecordError, match=r"_final\.pth is refused, and nothing in it was run: it refers to [a-z_A-Z.]+"):
        read_checkpoint(path)
    assert not marker.exists()


def test_a_known_name_is_never_really_called(tmp_path: Path) -> None:
    state = {"device": Call(torch.device, "no such device"), "text": Call(type(Path()), "\0", 1)}
    found = read_checkpoint(saved(tmp_path, state))
    assert isinstance(found.values["device"], Opaque) and isinstance(found.values["text"], Opaque)


@pytest.mark.parametrize(("pickled", "why"), [
    (b"\x80\x02(" + text("touch ran") + b"ios\nsystem\n.", "uses the step INST"),
    (b"\x80\x02(cos\nsystem\nX\x01\x00\x00\x00ao.", "refers to os.system"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "refers to os.system"),
    (b"\x80\x02\x82\x01.", "uses the step EXT1"),
    (b"\x80\x02Psomething\n.", "uses the step PERSID"),
    (b"\x80\x02}(K\x01K\x02u" + text("x") + b"Q.", "refers to something outside"),
    (b"\x80\x02ccollections\nOrderedDict\nctorch\ndevice\n\x81.", "calls a Opaque"),
    (b"\x80\x02]K\x01b.", "sets the state of a list"),
    (b"\x80\x02K\x01K\x01\x85R.", "calls a int"),
    (b"\x80\x02}]K\x01s.", "uses a list as a key"),
    (b"\x80\x02" + b"}" + b")" + b"\x85" * 5000 + b"K\x01s.", "uses a tuple as a key"),
])
def test_steps_that_no_checkpoint_needs_are_refused(tmp_path: Path, pickled: bytes, why: str) -> None:
    with pytest.raises(RecordError, match=why):
        read_checkpoint(crafted(tmp_path, pickled))


@pytest.mark.parametrize("pickled", [
    b"", b".", b"\x80\x02", b"\x80\x02}", b"\x80\x02u.", b"\x80\x02}}.", b"\x80\x02h\x07.", b"\x80\x02(.", b"\x80\x02t.", b"none",
    b"\x80\x02}(K\x01u.", b"\x80\x02R.", b"\x80\x02]K\x01K\x02s.", b"\x80\x02X\xff\xff\xff\x7fabc.", b"\x80\x02\x93.",
    b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.", b"\x80\x02]K\x01e.",
    b"\x80\x02q\x00.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    b"\x80\x02" + text("\ud800".encode("utf-8", "surrogatepass").decode("latin1")),
])
def test_broken_pickles_are_damaged_or_refused_files(tmp_path: Path, pickled: bytes) -> None:
    with pytest.raises(RecordError):
        read_checkpoint(crafted(tmp_path, pickled))


def test_values_that_refer_to_one_another_many_times_cost_nothing(tmp_path: Path) -> None:
    laughs = b")q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(200))
    found = read_checkpoint(crafted(tmp_path, b"\x80\x02}" + text("x") + laughs + b"s."))
    assert len(found.values["x"]) == 2 and len(str(found)) < 1000


@pytest.mark.parametrize(("count", "offset", "shape", "strides"), [
    (4, 0, (1 << 40,), (1,)), (4, 0, (1 << 40,), (0,)), (4, 0, (5,), (1,)), (4, 1, (4,), (1,)), (4, 0, (2, 2), (1, 1)),
    (4, -1, (1,), (1,)), (4, 0, (-1,), (1,)), (4, 0, (2,), (-1,)), (4, 0, (2, 2), (2,)), (4, 0, (1,) * 9, (1,) * 9),
    (4, 5, (0,), (1,)), (4, 0, (2,), (1 << 60,)), (1 << 60, 0, (1,), (1,)), (-4, 0, (1,), (1,)),
])
def test_tensors_that_cannot_be_are_refused_before_anything_is_read(
    tmp_path: Path, count: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    with pytest.raises(RecordError, match=r"it declares a (tensor|storage)"):
        read_checkpoint(crafted(tmp_path, a_tensor(count, offset, shape, strides), {"data/0": bytes(16)}))


def test_a_storage_larger_than_its_record_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    count = 1 << 45
    found = read_checkpoint(crafted(tmp_path, a_tensor(count, 0, (count,), (1,)), {"data/0": bytes(16)}))
    with pytest.raises(RecordError, match=f"w needs {4 * count} bytes in record data/0, which holds 16"):
        found.tensors({"w": found.values["w"]})


def test_a_tensor_whose_record_is_missing_or_elsewhere_is_refused(tmp_path: Path) -> None:
    found = read_checkpoint(crafted(tmp_path, a_tensor(4, 0, (4,), (1,)), {"data/1": bytes(16)}))
    with pytest.raises(RecordError, match="it has no record data/0"):
        found.tensors({"w": found.values["w"]})
    outside = TensorEntry("data/../../secret", "<f4", 4, 0, (4,), (1,))
    with pytest.raises(RecordError, match="it has no record"):
        found.tensors({"w": outside})


@pytest.mark.parametrize("name", ["../data/0", "/data/0", "data/0\\x", "code/__torch__.py", "data/x", "constants.pkl"])
def test_records_with_wrong_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecordError, match="does not belong there"):
        read_checkpoint(crafted(tmp_path, b"\x80\x02}.", {name: b"x"}))


def test_a_root_that_leads_out_is_refused(tmp_path: Path) -> None:
    for root in ("../", "/", "a/b/", "./"):
        with pytest.raises(RecordError, match="is refused"):
            read_checkpoint(crafted(tmp_path, b"\x80\x02}.", root=root))


def test_two_pickles_or_none_are_refused(tmp_path: Path) -> None:
    path = crafted(tmp_path, b"\x80\x02}.")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", b"\x80\x02}.")
    with pytest.raises(RecordError, match="holds 2 pickles"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/version", b"3")
    with pytest.raises(RecordError, match="holds 0 pickles"):
        read_checkpoint(path)


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(1 << 24))
    with pytest.raises(RecordError, match="is compressed"):
        read_checkpoint(path)


def test_a_pickle_that_is_too_large_or_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, training_state())
    monkeypatch.setattr(nnunet_checkpoint, "MAX_OPCODES", 100)
    with pytest.raises(RecordError, match="more than 100 steps"):
        read_checkpoint(path)
    monkeypatch.setattr(nnunet_checkpoint, "MAX_PICKLE_BYTES", 100)
    with pytest.raises(RecordError, match="at most 100 are read"):
        read_checkpoint(path)


def test_checkpoints_of_the_old_format_and_other_files_are_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(training_state(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(RecordError, match=r"not a zip archive.*load it with torch and save it again"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {tmp_path / 'ran'}")))
    with pytest.raises(RecordError, match="not a zip archive"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(RecordError, match=r"none\.pth cannot be read"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(RecordError, match="expected a dictionary in it, found list"):
        read_checkpoint(saved(tmp_path, [1, 2]))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path, training_state())
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(RecordError):
        read_checkpoint(path)


def test_damaged_weights_are_found_by_their_checksum(tmp_path: Path) -> None:
    weights = torch.arange(64.0)
    path = saved(tmp_path, {"w": weights})
    data = path.read_bytes()
    place = data.index(weights.numpy().tobytes())
    path.write_bytes(data[:place] + b"\xff" + data[place + 1:])
    found = read_checkpoint(path)
    with pytest.raises(RecordError, match=r"is refused.*damaged"):
        found.tensors({"w": found.values["w"]})


def test_big_endian_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="not little-endian"):
        read_checkpoint(crafted(tmp_path, b"\x80\x02}.", {"byteorder": b"big"}))


SOUND = io.BytesIO()
torch.save({"network_weights": {"a": torch.arange(6.0)}, "n": [1, "x", (2.5, None)]}, SOUND)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, len(SOUND.getvalue()) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_whatever_is_altered_the_file_is_read_or_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(SOUND.getvalue())
    for place, value in changes:
        data[place] = value
    path = tmp_path / "altered.pth"
    path.write_bytes(data)
    try:
        found = read_checkpoint(path)
        weights = found.values.get("network_weights")
        if isinstance(weights, dict):
            found.tensors({name: entry for name, entry in weights.items() if isinstance(entry, TensorEntry)})
    except RecordError as error:
        assert str(path) in str(error)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pickled=st.binary(max_size=60))
def test_any_bytes_for_a_pickle_are_read_or_refused(tmp_path: Path, pickled: bytes) -> None:
    with pytest.raises(RecordError):
        read_checkpoint(crafted(tmp_path, b"\x80\x02]" + pickled + b"."))
