"""MetaImage (.mha, .mhd) and NRRD files: headers checked before a C++ library is let near them, and voxels with checksums.

Sources: the MetaImage documentation of ITK and http://teem.sourceforge.net/nrrd/format.html.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import DatasetError, GeometryError
from autoseg.files.voxels import Deflated, fill, igzip, unpacking

_HEADER_LIMIT = 1 << 20
_ENCODINGS: dict[str, Literal["raw", "gzip", "text"]] = {
    "raw": "raw", "gzip": "gzip", "gz": "gzip", "ascii": "text", "text": "text", "txt": "text", "hex": "text",
}


@dataclass(frozen=True)
class TextHeader:
    """Where the voxels are and how they are written; `stored_bytes` is what is there for them, `sizes` lists x first."""

    sizes: tuple[int, ...]
    encoding: Literal["raw", "gzip", "zlib", "text"]
    big_endian: bool
    voxel_file: Path
    offset: int
    stored_bytes: int

    @property
    def packed(self) -> bool:
        """Whether the voxels may take fewer bytes in the file than in memory."""
        return self.encoding != "raw"


def metaimage_header(path: Path) -> TextHeader:
    """Read the header of a .mha or .mhd file.

    Raises DatasetError when it is no MetaImage, is damaged or names a voxel file that is not beside it, GeometryError for an
    unusable spacing.
    """
    fields, end = _metaimage_fields(path)
    dims = _whole_numbers(fields.get("NDims", ""), "NDims")
    if len(dims) != 1 or not 2 <= dims[0] <= 4:
        raise DatasetError(f"has a damaged MetaImage header: expected NDims from 2 to 4, found {fields.get('NDims', '')!r}")
    sizes = _whole_numbers(fields.get("DimSize", ""), "DimSize")
    if len(sizes) != dims[0] or min(sizes) < 1:
        raise DatasetError(f"has a damaged MetaImage header: expected {dims[0]} positive numbers as DimSize, found {sizes}")
    _check_spacing(fields.get("ElementSpacing", fields.get("ElementSize", "1")).split(), "ElementSpacing")
    for name, count in (("TransformMatrix", dims[0] ** 2), ("Offset", dims[0])):
        _check_numbers(fields.get(name), count, name)
    if "ElementType" not in fields or "HeaderSize" in fields:
        raise DatasetError("has an unusual MetaImage header (no ElementType, or a HeaderSize); convert it to NIfTI")
    packed = _true(fields.get("CompressedData", "False"))
    data = fields.get("ElementDataFile", "")
    voxels = path
    if data.upper() != "LOCAL":
        voxels, end = path.parent / data, 0
        if not data or Path(data).name != data or " " in data or "%" in data or data.upper() == "LIST":
            raise DatasetError(f"refers to its voxels as {data[:60]!r}; expected the name of one file beside it")
        if not voxels.is_file():
            raise DatasetError(f"refers to the voxel file {data}, which is not beside it; copy both files")
    stored = voxels.stat().st_size - end
    declared = fields.get("CompressedDataSize", "")
    if packed and declared.isdigit() and int(declared) > stored:
        raise DatasetError(f"is truncated: expected {declared} bytes of packed voxels, found {stored}; copy or export it again")
    binary = _true(fields.get("BinaryData", "True"))
    big = _true(fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")))
    return TextHeader(tuple(sizes), "text" if not binary else "zlib" if packed else "raw", big, voxels, end, stored)


def _true(text: str) -> bool:
    return text[:1] in ("T", "t", "1")


def _metaimage_fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields up to and with ElementDataFile, and the position after it."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while file.tell() < _HEADER_LIMIT and (line := file.readline(_HEADER_LIMIT)):
            name, equals, value = line.decode("latin-1").partition("=")
            name = name.strip()
            if not equals or not name or not name.replace("_", "").isalnum() or not name.isascii():
                break
            if name in fields:
                raise DatasetError(f"has a damaged MetaImage header: {name} stands there twice")
            fields[name] = value.strip()
            if name == "ElementDataFile":
                return fields, file.tell()
    raise DatasetError("is not a MetaImage file: no text header that ends with ElementDataFile")


def nrrd_header(path: Path) -> TextHeader:
    """Read the header of a .nrrd file.

    Raises DatasetError when it is no NRRD, is damaged, or keeps its voxels in another file, GeometryError for an unusable
    spacing.
    """
    fields, end = _nrrd_fields(path)
    dims = _whole_numbers(fields.get("dimension", ""), "dimension")
    if len(dims) != 1 or not 2 <= dims[0] <= 5:
        raise DatasetError(f"has a damaged NRRD header: expected a dimension from 2 to 5, found {fields.get('dimension', '')!r}")
    sizes = _whole_numbers(fields.get("sizes", ""), "sizes")
    if len(sizes) != dims[0] or min(sizes) < 1:
        raise DatasetError(f"has a damaged NRRD header: expected {dims[0]} positive sizes, found {sizes}")
    encoding = fields.get("encoding", "").lower()
    if encoding not in _ENCODINGS:
        raise DatasetError(f"has the NRRD encoding {encoding!r}; save it again with encoding gzip or raw")
    if any(name in fields for name in ("data file", "datafile", "line skip", "lineskip", "byte skip", "byteskip")):
        raise DatasetError("keeps its voxels in another file or behind other data; save it as one plain .nrrd file")
    for vector in fields.get("space directions", "").replace("(", " (").split(" ("):
        numbers = vector.strip(" ()").split(",")
        if len(numbers) > 1 and _check_numbers(" ".join(numbers), len(numbers), "space directions") == 0:
            raise GeometryError("has an unusable spacing: a space direction is zero; correct the header")
    _check_spacing([s for s in fields.get("spacings", "").split() if s.lower() != "nan"], "spacings")
    origin = fields.get("space origin")
    if origin is not None:
        _check_numbers(origin.strip("() ").replace(",", " "), origin.count(",") + 1, "space origin")
    big = fields.get("endian", "little").lower() == "big"
    kind = _ENCODINGS[encoding]
    return TextHeader(tuple(sizes), kind, big, path, end, path.stat().st_size - end)


def _nrrd_fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields up to the blank line, and the position after it."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        if not file.readline(64).startswith(b"NRRD000"):
            raise DatasetError("is not a NRRD file: it does not begin with NRRD000")
        while file.tell() < _HEADER_LIMIT and (line := file.readline(_HEADER_LIMIT)):
            text = line.decode("latin-1").strip()
            if not text:
                return fields, file.tell()
            name, colon, value = text.partition(":")
            if text.startswith("#") or not colon or value.startswith("="):
                continue  # a comment, or a key of the user's own
            name = name.strip().lower()
            if name in fields:
                raise DatasetError(f"has a damaged NRRD header: {name} stands there twice")
            fields[name] = value.strip()
    raise DatasetError("is truncated or damaged: its NRRD header has no end")


def read_text_voxels(header: TextHeader, dtype: np.dtype[Any], count: int) -> NDArray[np.generic]:
    """Read `count` numbers in the order of the file (x, or the component of a vector, fastest), in native byte order.

    Raises DatasetError when they end early or fail their checksum.
    """
    stored = dtype.newbyteorder(">" if header.big_endian else "<")
    with header.voxel_file.open("rb") as file, unpacking():
        file.seek(header.offset)
        if header.encoding == "gzip":
            with igzip().open(file, "rb") as stream:
                flat = fill(stream, stored, count, packed=True)
        else:
            flat = fill(Deflated(file) if header.packed else file, stored, count, header.packed)
    return flat.astype(dtype, copy=False)


def _whole_numbers(text: str, name: str) -> list[int]:
    parts = text.split()
    if not all(part.lstrip("-").isdigit() and part.isascii() and len(part) < 20 for part in parts):
        raise DatasetError(f"has a damaged header: {name} is {text[:60]!r}, expected whole numbers")
    return [int(part) for part in parts]


def _check_spacing(parts: list[str], name: str) -> None:
    for part in parts:
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise GeometryError(f"has an unusable spacing: {name} holds {part!r}, expected positive mm; correct the header")


def _check_numbers(text: str | None, count: int, name: str) -> float:
    """Return the largest absolute value of `count` finite numbers; GeometryError when there is anything else."""
    if text is None:
        return 1.0
    try:
        numbers = [float(part) for part in text.split()]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(math.isfinite(n) for n in numbers):
        raise GeometryError(f"has an unusable geometry: {name} is {text[:80]!r}, expected {count} numbers; correct the header")
    return max(abs(n) for n in numbers)
