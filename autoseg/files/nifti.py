"""NIfTI-1 files: header, voxels and writing, with nothing believed before it is checked against the file's size.

Source of the layout: nifti1.h of the NIfTI Data Format Working Group (https://nifti.nimh.nih.gov).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import DatasetError, GeometryError
from autoseg.files.sizes import DEFLATE_RATIO, check_size
from autoseg.files.voxels import fill, igzip, unpacking
from autoseg.types.geometry import NO_DEPTH_MM, Grid

_FIELDS: dict[str, tuple[Any, int]] = {
    "sizeof_hdr": ("i4", 0), "dim_info": ("u1", 39), "dim": (("i2", (8,)), 40), "intent_p": (("f4", (3,)), 56),
    "intent_code": ("i2", 68), "datatype": ("i2", 70), "bitpix": ("i2", 72), "slice_start": ("i2", 74),
    "pixdim": (("f4", (8,)), 76), "vox_offset": ("f4", 108), "scl_slope": ("f4", 112), "scl_inter": ("f4", 116),
    "slice_end": ("i2", 120), "slice_code": ("u1", 122), "xyzt_units": ("u1", 123),
    "cal_max": ("f4", 124), "cal_min": ("f4", 128), "slice_duration": ("f4", 132), "toffset": ("f4", 136),
    "descrip": ("S80", 148), "aux_file": ("S24", 228),
    "qform_code": ("i2", 252), "sform_code": ("i2", 254), "quatern": (("f4", (3,)), 256), "qoffset": (("f4", (3,)), 268),
    "srow": (("f4", (3, 4)), 280), "intent_name": ("S16", 328), "magic": ("S4", 344),
}
_SIZE = 348
_LAYOUT = np.dtype({
    "names": list(_FIELDS), "formats": [f for f, _ in _FIELDS.values()], "offsets": [o for _, o in _FIELDS.values()],
    "itemsize": _SIZE,
})
_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 128: "u1", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
           2304: "u1"}
_COMPONENTS = {128: 3, 2304: 4}  # RGB24 and RGBA32 hold their components side by side
_CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "u2": 512, "i8": 1024}
_SCANNER, _MILLIMETRE, _DATA_START = 1, 2, 352
_BLOCK = 1 << 24


@dataclass(frozen=True)
class NiftiHeader:
    """A checked NIfTI-1 header: `shape` (z, y, x), channels, the dtype voxels have once scaled, and the record itself."""

    shape: tuple[int, int, int]
    channels: int
    dtype: np.dtype[Any]
    record: Any

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype of the voxels in the file, with its byte order."""
        order = self.record.dtype["datatype"].byteorder
        return np.dtype(_DTYPES[int(self.record["datatype"])]).newbyteorder(order)

    @property
    def offset(self) -> int:
        """Where the voxels begin, in bytes."""
        return int(self.record["vox_offset"])

    @property
    def scaled(self) -> bool:
        """Whether stored values must be multiplied and shifted."""
        slope, inter = float(self.record["scl_slope"]), float(self.record["scl_inter"])
        return bool(np.isfinite([slope, inter]).all()) and slope != 0 and (slope, inter) != (1.0, 0.0)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """Open for reading, through gzip where the file is gzip; DatasetError when the packed data are damaged."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed and not path.name.lower().endswith(".gz"):
        raise DatasetError("is gzip data under the name .nii; rename it to .nii.gz")
    with unpacking(), (igzip().open(path, "rb") if packed else path.open("rb")) as stream:
        yield stream, packed


def read_header(path: Path) -> NiftiHeader:
    """Read and check the header of a .nii or .nii.gz file.

    Raises DatasetError when it is no NIfTI-1 image or declares more than it holds, GeometryError for an unusable spacing.
    """
    with _opened(path) as (stream, packed):
        raw = stream.read(_SIZE)
    if len(raw) < _SIZE:
        raise DatasetError(f"is not a NIfTI image: it holds {len(raw)} bytes, the header alone has {_SIZE}")
    sizes = {order: int.from_bytes(raw[:4], order) for order in ("little", "big")}
    if 540 in sizes.values():
        raise DatasetError("is a NIfTI-2 image; convert it to NIfTI-1 or NRRD")
    if _SIZE not in sizes.values() or raw[344:348] != b"n+1\x00":
        raise DatasetError("is not a NIfTI image: the file does not begin with a NIfTI-1 header")
    layout = _LAYOUT.newbyteorder("<" if sizes["little"] == _SIZE else ">")
    record = np.frombuffer(raw, layout)[0]
    header = _described(record)
    _check_geometry(record)
    if not (np.isfinite(record["vox_offset"]) and _SIZE <= record["vox_offset"] < 2**31):
        raise DatasetError(f"has a damaged NIfTI header: vox_offset is {record['vox_offset']}")
    stored_bytes = path.stat().st_size - (0 if packed else header.offset)
    voxel = header.stored.itemsize * header.channels
    copies = 1 + header.dtype.itemsize // header.stored.itemsize if header.scaled else 1
    check_size(header.shape, voxel, stored_bytes, DEFLATE_RATIO if packed else 1, copies)
    return header


def _described(record: Any) -> NiftiHeader:
    count = int(record["dim"][0])
    sizes = [int(n) for n in record["dim"][1:1 + max(0, count)]]
    if not 2 <= count <= 7 or min(sizes) < 1:
        raise DatasetError(f"has a damaged NIfTI header: dim is {record['dim'].tolist()}")
    code = int(record["datatype"])
    if code not in _DTYPES:
        raise DatasetError(f"holds voxels of NIfTI datatype {code} (complex, binary or extended); convert it to real numbers")
    x, y, z = (*sizes, 1)[:3]
    more = [n for n in sizes[3:] if n > 1] + ([_COMPONENTS[code]] if code in _COMPONENTS else [])
    if len(more) > 1:
        raise DatasetError(f"has {count} axes {sizes}; beside x, y, z at most one may be longer than 1 (it becomes the channels)")
    stored = np.dtype(_DTYPES[code])
    header = NiftiHeader((z, y, x), more[0] if more else 1, stored, record)
    if header.scaled:
        wide = "f4" if stored.itemsize <= 2 or stored == np.float32 else "f8"
        header = NiftiHeader(header.shape, header.channels, np.dtype(wide), record)
    return header


def _check_geometry(record: Any) -> None:
    spatial = record["pixdim"][1:1 + min(3, int(record["dim"][0]))]
    if not (np.isfinite(spatial).all() and (spatial > 0).all()):
        raise GeometryError(f"has an unusable spacing: pixdim is {[float(s) for s in spatial]} (x, y, z), "
                            "expected positive millimetres; correct the header")
    for code, fields in (("sform_code", ("srow",)), ("qform_code", ("quatern", "qoffset"))):
        if record[code] > 0 and not all(np.isfinite(record[field]).all() for field in fields):
            raise GeometryError(f"has an unusable orientation: its {code[:5]} holds NaN or infinite numbers; correct the header")


def read_voxels(path: Path, header: NiftiHeader) -> NDArray[np.generic]:
    """Read the voxels as (channel, z, y, x), owned and contiguous, scaled where the header says so.

    Raises DatasetError when the file ends early or its gzip data are damaged.
    """
    code = int(header.record["datatype"])
    with _opened(path) as (stream, packed):
        skip = header.offset
        while skip > 0 and (block := stream.read(min(skip, _BLOCK))):
            skip -= len(block)
        flat = fill(stream, header.stored, math.prod(header.shape) * header.channels, packed)
    if code in _COMPONENTS:
        array = np.ascontiguousarray(np.moveaxis(flat.reshape(*header.shape, header.channels), -1, 0))
    else:
        array = flat.reshape(header.channels, *header.shape)
    if header.scaled:
        array = array.astype(header.dtype)
        array *= header.dtype.type(header.record["scl_slope"])
        array += header.dtype.type(header.record["scl_inter"])
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def write(path: Path, array: NDArray[Any], grid: Grid, like: NiftiHeader | None = None) -> None:
    """Write (z, y, x), or (class, z, y, x) with the classes in the last axis of the file; gzip where the name ends with .gz.

    `like` is the header of an image on the same grid: every geometry field of it is taken over bit for bit, so that readers
    which prefer the qform and readers which prefer the sform both find what they found in the image.
    """
    dtype = np.dtype(array.dtype).newbyteorder(like.record.dtype["datatype"].byteorder if like else "<")
    record = like.record.copy() if like else _geometry_record(grid)
    _describe_voxels(record, array, dtype, flat=not grid.has_direction and grid.shape[0] == 1)
    header = _header_bytes(record) + bytes(_DATA_START - _SIZE)
    with path.open("wb") as file:
        if not path.name.lower().endswith(".gz"):
            file.write(header)
            _write_blocks(file, array, dtype)
            return
        with igzip().IGzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as packed:
            packed.write(header)
            _write_blocks(packed, array, dtype)


def _header_bytes(record: Any) -> bytes:
    """The record's fields with zeros between them, where a copy of it holds whatever was in memory."""
    raw = bytearray(_SIZE)
    clean: Any = np.frombuffer(raw, record.dtype)
    for name in _FIELDS:
        clean[name] = record[name]
    return bytes(raw)


def _write_blocks(stream: Any, array: NDArray[Any], dtype: np.dtype[Any]) -> None:
    """Write in bounded pieces, x fastest."""
    slices = array.reshape(-1, array.shape[-1])
    rows = max(1, _BLOCK // (max(1, array.shape[-1]) * dtype.itemsize))
    for start in range(0, len(slices), rows):
        stream.write(np.ascontiguousarray(slices[start:start + rows], dtype).tobytes())


def _describe_voxels(record: Any, array: NDArray[Any], dtype: np.dtype[Any], flat: bool) -> None:
    classes = array.shape[0] if array.ndim == 4 else 1
    z, y, x = array.shape[-3:]
    dims = 4 if array.ndim == 4 else 2 if flat else 3
    record["dim"] = [dims, x, y, z, classes, 1, 1, 1]
    record["datatype"], record["bitpix"] = _CODES[dtype.str[1:]], dtype.itemsize * 8
    record["pixdim"][4:] = 1
    if dims > 2 and not record["pixdim"][3] > 0:
        record["pixdim"][3] = 1
    record["vox_offset"], record["scl_slope"], record["scl_inter"], record["magic"] = _DATA_START, 1, 0, b"n+1"
    for field in ("intent_p", "intent_code", "slice_start", "slice_end", "slice_code", "slice_duration", "toffset", "cal_max",
                  "cal_min"):
        record[field] = 0
    record["descrip"], record["aux_file"], record["intent_name"] = b"autoseg", b"", b""


def _geometry_record(grid: Grid) -> Any:
    """A header whose sform and qform both hold the grid (world axes of NIfTI: to the right, to the front, to the head)."""
    flips = np.diag([-1.0, -1.0, 1.0])
    direction = flips @ np.asarray(grid.direction)[::-1, ::-1]
    spacing = np.asarray(grid.spacing)[::-1].copy()
    if spacing[2] >= NO_DEPTH_MM and not grid.has_direction:
        spacing[2] = 1.0  # a 2D image has no depth to tell
    origin = flips @ np.asarray(grid.origin)[::-1]
    record = np.zeros((), _LAYOUT.newbyteorder("<"))
    record["sizeof_hdr"] = _SIZE
    record["qform_code"] = record["sform_code"] = _SCANNER
    record["xyzt_units"] = _MILLIMETRE
    handedness = -1.0 if np.linalg.det(direction) < 0 else 1.0
    record["pixdim"] = [handedness, *spacing, 1, 1, 1, 1]
    record["srow"][:, :3], record["srow"][:, 3] = direction * spacing, origin
    record["quatern"], record["qoffset"] = _quaternion(direction @ np.diag([1.0, 1.0, handedness])), origin
    return record


def _quaternion(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vector part b, c, d of the unit quaternion of a rotation, with a scalar part of at least 0.

    It is the eigenvector of the largest eigenvalue of a symmetric matrix (Bar-Itzhack 2000), stable for half turns too.
    """
    r = rotation
    k = np.array([
        [r[0, 0] + r[1, 1] + r[2, 2], r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]],
        [0, r[0, 0] - r[1, 1] - r[2, 2], r[0, 1] + r[1, 0], r[0, 2] + r[2, 0]],
        [0, 0, r[1, 1] - r[0, 0] - r[2, 2], r[1, 2] + r[2, 1]],
        [0, 0, 0, r[2, 2] - r[0, 0] - r[1, 1]],
    ])
    values, vectors = np.linalg.eigh(k + np.triu(k, 1).T)
    quaternion = vectors[:, int(np.argmax(values))]
    result: NDArray[np.float64] = (quaternion if quaternion[0] >= 0 else -quaternion)[1:]
    return result
