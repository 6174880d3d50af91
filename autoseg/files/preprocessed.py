"""The store of preprocessed cases: one folder per case with compressed arrays that are read in parts."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import RecordError
from autoseg.files.component_store import Components, case_components
from autoseg.files.workspace import atomic_path, load_record, save_record
from autoseg.types.case import Placement, Preprocessed
from autoseg.types.geometry import Shape
from autoseg.types.record import Record

FORMAT: Literal[1] = 1
IMAGE, LABEL, LOCATIONS, CASE = "image.b2nd", "label.b2nd", "locations.bin", "case.json"
ANNOTATED = 0  # key of the locations of all annotated voxels, there when the data set has an ignore label
MIN_LOCATIONS, LOCATIONS_SHARE = 10_000, 0.01  # nnU-Net
_HALF_RANGE = (1e-3, 60_000.0)  # largest magnitudes that float16 keeps to its 11 bits
_BLOCK, _PLANE_BLOCK = 32, 128
_LOOKED_AT = 1 << 22  # voxels whose labels are sorted at once
_LEFTOVER_SECONDS = 3600.0
_ATTEMPTS = 20  # to take the place of an old case

Slices = tuple[slice, slice, slice]
Sources = tuple[tuple[str, int, int], ...]
_KEY = "autoseg-key"  # metadata of an array that is stored alone
WHOLE: Slices = (slice(None), slice(None), slice(None))


class CaseRecord(Record):
    """What case.json holds: the key the case was made with, how it lies in its image, and what its files hold.

    `locations` counts the stored positions of each target in file order, `members` are the label indices of each target (None:
    stored before they were written down), `files` gives the size of each file in bytes;
    `content` is the hash of the original files, which were in the state `sources`.
    """

    format: Literal[1] = FORMAT
    case: str
    key: str
    channels: int
    placement: Placement
    locations: dict[int, int]
    members: dict[int, tuple[int, ...]] | None = None
    files: dict[str, int]
    content: str = ""
    sources: Sources = ()


def source_states(paths: Sequence[Path]) -> Sources:
    """Return path, size and modification time of each file: while these stay, its bytes are taken to stay too."""
    return tuple((str(path), (state := path.stat()).st_size, state.st_mtime_ns) for path in paths)


def content_hash(paths: Sequence[Path]) -> str:
    """Return the BLAKE2b hash of the bytes of files, in the order given; names and folders do not count."""
    whole = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
    return whole.hexdigest()


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _positions(flat: NDArray[np.integer]) -> dict[int, NDArray[Any]]:
    """Return the sorted positions of each value above 0, gathered in parts, so that all voxels are looked at only once."""
    kind = np.uint32 if len(flat) < 1 << 32 else np.int64
    parts: dict[int, list[NDArray[Any]]] = {}
    for start in range(0, len(flat), _LOOKED_AT):
        part = flat[start:start + _LOOKED_AT]
        places = np.flatnonzero(part > 0)
        values = part[places]
        order = np.argsort(values, kind="stable")  # a radix sort for short integers
        values, places = values[order], (places[order] + start).astype(kind)
        ends = np.flatnonzero(np.diff(values)) + 1
        for group, first in zip(np.split(places, ends), [0, *ends], strict=True):
            if len(group):
                parts.setdefault(int(values[first]), []).append(group)
    return {value: np.concatenate(groups) for value, groups in parts.items()}


def _joined(groups: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the positions of several values in rising order."""
    return groups[0] if len(groups) == 1 else np.sort(np.concatenate([np.empty(0, np.int64), *groups]))


def class_locations(
    label_zyx: NDArray[np.integer], targets: Sequence[tuple[str, tuple[int, ...]]], ignore_index: int | None, key: str,
) -> dict[int, NDArray[np.int64]]:
    """Return sorted flat positions of voxels of each target that is present, keyed 1..K in the order of `targets`.

    Up to max(10000, 1 %) voxels of a target, drawn without replacement by a generator seeded with `key`. With an ignore label
    key 0 holds positions among all voxels that do not carry it.
    """
    flat = label_zyx.reshape(-1)
    of_value = _positions(flat)
    found = {index: _joined([of_value[value] for value in members if value in of_value])
             for index, (_, members) in enumerate(targets, start=1)}
    if ignore_index is not None:
        found[ANNOTATED] = np.flatnonzero(flat != ignore_index)
    locations = {}
    for index, places in sorted(found.items()):
        count = min(len(places), max(MIN_LOCATIONS, int(LOCATIONS_SHARE * len(places))))
        if count:
            rng = np.random.default_rng([_seed(key), index])
            drawn = places if count == len(places) else rng.choice(places, count, replace=False, shuffle=False)
            locations[index] = np.sort(drawn.astype(np.int64))
    return locations


def _layout(shape: Shape, patch_size: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (chunk, block) shapes: chunks about a patch, blocks small enough that little is read in vain."""
    flat = len(patch_size) == 2
    patch = (1, *patch_size) if flat else tuple(patch_size)
    side = (1, _PLANE_BLOCK, _PLANE_BLOCK) if flat else (_BLOCK,) * 3
    block = tuple(min(b, n) for b, n in zip(side, shape, strict=True))
    chunk = tuple(min(-(-max(p, b) // b) * b, -(-n // b) * b) for p, b, n in zip(patch, block, shape, strict=True))
    return chunk, block


def _write_array(path: Path, array: NDArray[Any], chunk: tuple[int, ...], block: tuple[int, ...], key: str = "") -> None:
    import blosc2

    store: Any = blosc2.asarray  # its annotations leave numpy out
    lead = (1,) * (array.ndim - 3)
    chunk = tuple(min(c, n) for c, n in zip((*lead, *chunk), array.shape, strict=True))
    cparams = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}
    whole = np.ascontiguousarray(array)
    store(whole, urlpath=str(path), mode="w", chunks=chunk, blocks=(*lead, *block), cparams=cparams,
          meta={_KEY: key} if key else None)


def _stored_kind(image_czyx: NDArray[np.float32]) -> type[np.float16] | type[np.float32]:
    """float16, unless a channel's values are too large or too small for it."""
    for channel in image_czyx:
        peak = max(abs(float(channel.max())), abs(float(channel.min())))
        if peak > _HALF_RANGE[1] or 0 < peak < _HALF_RANGE[0]:
            return np.float32
    return np.float16


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_case(
    folder: Path, case: Preprocessed, key: str, targets: Sequence[tuple[str, tuple[int, ...]]] = (),
    ignore_index: int | None = None, patch_size: Sequence[int] = (128, 128, 128), content: str = "", sources: Sources = (),
) -> None:
    """Write a case to `folder`, whose name is the case's, replacing an older one only when all of it is on disk.

    Images are stored as float16 where that keeps their precision, labels as int16; `targets` are `Labels.targets`, whose voxel
    positions are stored for sampling; the patch size guides the chunks; content and sources describe the original files.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        chunk, block = _layout(case.placement.shape, patch_size)
        counts: dict[int, int] = {}
        _write_array(temporary / IMAGE, case.image_czyx.astype(_stored_kind(case.image_czyx)), chunk, block)
        if case.label_zyx is not None:
            _write_array(temporary / LABEL, case.label_zyx.astype(np.int16, copy=False), chunk, block)
            locations = class_locations(case.label_zyx, targets, ignore_index, key)
            kind = _position_kind(case.placement.shape)
            (temporary / LOCATIONS).write_bytes(b"".join(places.astype(kind).tobytes() for places in locations.values()))
            counts = {index: len(places) for index, places in locations.items()}
        names = sorted(path.name for path in temporary.iterdir())
        for name in names:
            _flush(temporary / name)
        sizes = {name: (temporary / name).stat().st_size for name in names}
        record = CaseRecord(
            case=folder.name, key=key, channels=len(case.image_czyx), placement=case.placement, locations=counts,
            members={index: group for index, (_, group) in enumerate(targets, start=1)}, files=sizes, content=content,
            sources=sources,
        )
        save_record(temporary / CASE, record)
        temporary.chmod(0o755)
        _put(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, folder: Path) -> None:
    """Put a new case in the place of an old one; another process may do the same at this very moment."""
    for attempt in range(_ATTEMPTS):
        remove_case(folder)
        try:
            temporary.replace(folder)
            return
        except OSError as error:
            if attempt + 1 == _ATTEMPTS or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def remove_case(folder: Path) -> None:
    """Remove a stored case, if it is there; it is renamed first, so that a half-removed case is never taken for a whole one."""
    if folder.exists():
        trash = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):  # another process has just done it
            folder.replace(trash / "old")
        shutil.rmtree(trash, ignore_errors=True)


def write_previous(path: Path, label_zyx: NDArray[np.integer], key: str, patch_size: Sequence[int]) -> None:
    """Write a segmentation (uint8 or int16) that a next stage takes as input, with the key it was made with, atomically."""
    chunk, block = _layout((label_zyx.shape[0], label_zyx.shape[1], label_zyx.shape[2]), patch_size)
    with atomic_path(path) as temporary:
        _write_array(temporary, label_zyx, chunk, block, key)


def previous_key(path: Path) -> str | None:
    """Return the key that a stored segmentation was made with; None when there is none or it is damaged."""
    import blosc2

    opened: Any = blosc2.open
    try:
        array = opened(str(path), mmap_mode="r")  # it must outlive its metadata
        key = array.schunk.meta[_KEY]
    except (OSError, RuntimeError, ValueError, KeyError):
        return None
    return key if isinstance(key, str) else None


def remove_leftovers(parent: Path) -> None:
    """Remove temporary files and folders that a killed process left in `parent` more than an hour ago."""
    if not parent.is_dir():
        return
    for path in parent.glob(".*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def stored_record(folder: Path) -> CaseRecord | None:
    """Return the record of a whole stored case; None when there is none or it is damaged."""
    try:
        return open_case(folder).record
    except RecordError:
        return None


def _position_kind(shape: Shape) -> np.dtype[Any]:
    """How positions in an array of this shape are stored."""
    return np.dtype("<u4") if math.prod(shape) < 1 << 32 else np.dtype("<u8")


def _damaged(folder: Path, problem: object) -> RecordError:
    return RecordError(f"preprocessed case {folder.name} in {folder} is damaged: {problem}; "
                       f"remove that folder and run autoseg preprocess")


class StoredCase:
    """A stored case; safe to read from many threads at once, as each read opens the array anew (0.1 ms)."""

    def __init__(self, folder: Path, record: CaseRecord, previous: Path | None = None) -> None:
        self.folder, self.record, self.previous = folder, record, previous
        self.name = folder.name
        self.key = record.key if previous is None else digest([record.key, previous_key(previous)])
        self.channels = record.channels
        self.placement = record.placement
        self.shape: Shape = record.placement.shape
        self.has_label = LABEL in record.files
        self._components: Components | None = None

    def _read(self, path: Path, slices: Slices, channels: tuple[int, ...] = ()) -> NDArray[Any]:
        import blosc2

        opened: Any = blosc2.open  # its annotations are wrong about mmap_mode
        size = tuple(len(range(*part.indices(n))) for part, n in zip(slices, self.shape, strict=True))
        if 0 in size:
            return np.zeros((*channels, *size), np.int16)
        try:
            array = opened(str(path), mmap_mode="r", dparams={"nthreads": 1})
            if array.shape != (*channels, *self.shape):
                raise _damaged(self.folder, f"{path.name} has shape {array.shape}, expected {(*channels, *self.shape)}")
            part: NDArray[Any] = array[(*(slice(None) for _ in channels), *slices)]
        except (OSError, RuntimeError, ValueError) as error:
            raise _damaged(self.folder, f"{path.name} cannot be read ({error})") from None
        return part

    def read_image(self, slices: Slices = WHOLE) -> NDArray[np.float32]:
        """Return a part of all channels, float32 (C, z, y, x). Raises RecordError when the file is damaged or missing."""
        return self._read(self.folder / IMAGE, slices, (self.channels,)).astype(np.float32)

    def read_label(self, slices: Slices = WHOLE) -> NDArray[np.int16]:
        """Return a part of the label map, int16 (z, y, x). Raises RecordError when the file is damaged or missing."""
        return self._read(self.folder / LABEL, slices).astype(np.int16, copy=False)

    def read_previous(self, slices: Slices = WHOLE) -> NDArray[np.int16]:
        """Return a part of the previous stage's segmentation, int16 (z, y, x).

        Raises RecordError when the case was opened without one, or its file is damaged or missing.
        """
        if self.previous is None:
            raise RecordError(f"preprocessed case {self.name} was opened without a segmentation of the previous stage")
        try:
            return self._read(self.previous, slices).astype(np.int16, copy=False)
        except RecordError:
            raise RecordError(f"the previous stage's segmentation of case {self.name}, {self.previous}, is damaged or missing; "
                              f"remove it and run autoseg train again") from None

    @property
    def locations(self) -> Locations:
        """Sampled voxels of each target that is present."""
        return Locations(self)

    @property
    def components(self) -> Mapping[int, Sequence[NDArray[np.integer]]]:
        """Sampled voxels (n, 3) of each connected component of each target that is present; found once, then kept in the folder.

        Raises RecordError when the case was stored before the targets' members were written down.
        """
        if self.record.members is None:
            raise RecordError(f"preprocessed case {self.name} in {self.folder} does not say which labels its targets consist of; "
                              f"remove that folder and run autoseg preprocess")
        if self._components is None:
            self._components = case_components(self.folder, self.read_label, self.record.members, _seed(self.record.key))
        return self._components


class Locations(Mapping[int, NDArray[np.int32]]):
    """Voxel positions, int32 (N, 3), of each target that is present, by its index 1..K; key 0 as in `class_locations`.

    Nothing is kept in memory: an entry is read when it is asked for, the keys come from the case's record.
    """

    def __init__(self, case: StoredCase) -> None:
        self._case = case
        self._counts = case.record.locations

    def __iter__(self) -> Iterator[int]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __contains__(self, target: object) -> bool:
        return target in self._counts

    def __getitem__(self, target: int) -> NDArray[np.int32]:
        count, shape = self._counts[target], self._case.shape
        start = 0
        for other, size in self._counts.items():
            if other == target:
                break
            start += size
        kind = _position_kind(shape)
        try:
            places = np.fromfile(self._case.folder / LOCATIONS, kind, count, offset=start * kind.itemsize)
        except OSError as error:
            raise _damaged(self._case.folder, f"{LOCATIONS} cannot be read ({error})") from None
        if len(places) != count:
            raise _damaged(self._case.folder, f"{LOCATIONS} is truncated")
        return np.stack(np.unravel_index(places.astype(np.int64), shape), axis=1).astype(np.int32)


def open_case(folder: Path, previous: Path | None = None) -> StoredCase:
    """Open a stored case, with the previous stage's segmentation of it where given; arrays are read later, in parts.

    Raises RecordError naming the case when it is missing, of another format or its files do not have the recorded sizes.
    """
    if not (folder / CASE).is_file():
        raise RecordError(f"case {folder.name} is not preprocessed: {folder} holds no {CASE}; run autoseg preprocess")
    try:
        record = load_record(folder / CASE, CaseRecord)
    except RecordError as error:
        raise _damaged(folder, error) from None
    for name, size in record.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise _damaged(folder, f"{name} {'is missing' if found is None else f'has {found} bytes'}, expected {size} bytes")
    return StoredCase(folder, record, previous)


def digest(values: Any) -> str:
    """Return a short hash of plain data, for keys."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
