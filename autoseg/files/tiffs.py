"""TIFF files through tifffile: 2D grey and colour, and stacks, with the spacing that tags or a sidecar give."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import DatasetError, GeometryError
from autoseg.files.pictures import without_constant_alpha
from autoseg.files.sizes import DEFLATE_RATIO, check_size
from autoseg.types.geometry import Shape, Vector

_MM = {"m": 1000.0, "cm": 10.0, "mm": 1.0, "millimeter": 1.0, "um": 1e-3, "µm": 1e-3, "μm": 1e-3, "\\u00b5m": 1e-3,
       "micron": 1e-3, "microns": 1e-3, "micrometer": 1e-3, "nm": 1e-6, "nanometer": 1e-6, "inch": 25.4, "in": 25.4}
# Resolutions that programs write for screens and printers; they say nothing about the specimen.
_PRINT_DPI = frozenset({72, 75, 90, 96, 100, 120, 144, 150, 180, 200, 240, 300, 350, 360, 400, 600, 720, 1200})
_INCH, _CENTIMETRE = 2, 3
_DEFLATE = frozenset({8, 32946})
_PALETTE = 3
_IMAGEJ_CHANNELS = 7
_OWN_SPACING = "spacing_zyx_mm"

Decode = Callable[[Path], NDArray[np.generic]]


@dataclass(frozen=True)
class TiffHeader:
    """Shape (z, y, x), channels, dtype, and the spacing z, y, x in mm that tags or a sidecar give (None where they do not)."""

    shape: Shape
    channels: int
    dtype: str
    spacing: Vector | None
    may_hold_alpha: bool


@functools.cache
def _tifffile() -> Any:
    import tifffile

    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # damaged files are told by errors, not on stderr
    return tifffile


def read_tiff_header(path: Path) -> TiffHeader:
    """Read what a TIFF declares, checked against the file's size and the memory.

    Raises DatasetError for a damaged file or axes that are no image, GeometryError for an unusable spacing.
    """
    tifffile = _tifffile()
    with tifffile.TiffFile(path) as file:
        parts = _parts(file)
        channels, shape, _ = _layout(parts)
        _check_stored(parts, channels, shape, path.stat().st_size)
        dtype = np.dtype(np.uint8 if parts[0].dtype == np.bool_ else parts[0].dtype)
        if dtype.kind not in "uif":
            raise DatasetError(f"holds {dtype.name} samples, which is not an image to segment")
        spacing = _sidecar_spacing(path)
        if spacing is None:
            spacing = _tag_spacing(file, parts[0].pages[0])
        may_hold_alpha = channels in (2, 4) and "S" in parts[0].axes
    if spacing is not None and not all(math.isfinite(s) and s > 0 for s in spacing):
        raise GeometryError(f"has an unusable spacing {spacing} (z, y, x); correct its tags or sidecar")
    return TiffHeader(shape, channels, dtype.name, spacing, may_hold_alpha)


def read_tiff(path: Path, header: TiffHeader, decode: Decode) -> NDArray[np.generic]:
    """Read as (channel, z, y, x) in the stored dtype, without an alpha channel that is the same everywhere.

    `decode` reads the compressions that tifffile needs further libraries for. Raises DatasetError.
    """
    tifffile = _tifffile()
    with tifffile.TiffFile(path) as file:
        parts = _parts(file)
        _, _, order = _layout(parts)
        palette = int(parts[0].keyframe.photometric) == _PALETTE
        try:
            array = np.stack([part.asarray(maxworkers=1) for part in parts]).transpose(order)
        except (ValueError, ImportError) as error:
            if "imagecodecs" not in str(error):
                raise
            array = _decoded_by_pillow(path) if palette or header.dtype == "uint8" else decode(path)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.size != header.channels * math.prod(header.shape):
        raise DatasetError(f"cannot be unpacked: expected {header.channels} x {header.shape}, found {array.shape}; "
                           "save it without compression or with deflate")
    array = array.reshape(header.channels, *header.shape)
    array = without_constant_alpha(array) if header.may_hold_alpha else array
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=array.base is not None)


def _decoded_by_pillow(path: Path) -> NDArray[np.generic]:
    """Pages of 8 bits as (channel, z, y, x), palettes as their indices; damaged data raise, which they do not in SimpleITK."""
    from PIL import ImageSequence
    from PIL.TiffImagePlugin import TiffImageFile

    with TiffImageFile(path) as picture:
        pages = np.stack([np.array(frame) for frame in ImageSequence.Iterator(picture)])
    return pages[None] if pages.ndim == 3 else np.moveaxis(pages, -1, 0)


def _parts(file: Any) -> list[Any]:
    """The series that make up the image: one, or equal pages that were written one by one."""
    series = list(file.series)
    if not series:
        raise DatasetError("holds no image")
    first = series[0]
    same = all((s.shape, s.axes, s.dtype) == (first.shape, first.axes, first.dtype) for s in series)
    flat = math.prod(n for n, axis in zip(first.shape, first.axes, strict=True) if axis not in "YXSC") == 1
    return series if same and flat else [first]


def _layout(parts: list[Any]) -> tuple[int, Shape, list[int]]:
    """Channels, shape (z, y, x), and the order that brings the stacked parts to channels, depth, y, x."""
    axes, sizes = "#" + _axes(parts[0]), (len(parts), *parts[0].shape)  # "#" counts the parts
    if axes.count("Y") != 1 or axes.count("X") != 1:
        raise DatasetError(f"has the TIFF axes {parts[0].axes}, expected an image with y and x")
    channel = [i for i, axis in enumerate(axes) if axis in "SC"]
    depth = [i for i, axis in enumerate(axes) if axis not in "SCYX"]
    for group, name in ((channel, "channels"), (depth, "slices")):
        if sum(sizes[i] > 1 for i in group) > 1:
            raise DatasetError(f"has the TIFF axes {parts[0].axes} of {parts[0].shape}; only one may hold {name}; split it")
    y, x = axes.index("Y"), axes.index("X")
    shape = (math.prod(sizes[i] for i in depth), int(sizes[y]), int(sizes[x]))
    return math.prod(sizes[i] for i in channel), shape, [*channel, *depth, y, x]


def _axes(series: Any) -> str:
    """The axes as named, but slices for ImageJ channels that have a distance or are more than ImageJ can show."""
    axes = str(series.axes)
    if series.kind == "imagej" and "C" in axes and not set(axes) & set("TZ"):
        metadata = series.parent.imagej_metadata or {}
        if metadata.get("spacing") or series.shape[axes.index("C")] > _IMAGEJ_CHANNELS:
            return axes.replace("C", "Z")
    return axes


def _check_stored(parts: list[Any], channels: int, shape: Shape, file_bytes: int) -> None:
    keyframe = parts[0].keyframe
    stored = 0
    for part in parts:
        if part.dataoffset is not None and part.dataoffset + part.nbytes > file_bytes:
            raise DatasetError(f"is truncated: its voxels need {part.dataoffset + part.nbytes} bytes, the file has {file_bytes}")
        stored += part.nbytes if part.dataoffset is not None else 0
        for page in part.pages if part.dataoffset is None else ():
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False) if page is not None else ():
                stored += count
                if offset + count > file_bytes:
                    raise DatasetError(f"is truncated: its voxels reach to byte {offset + count}, the file has {file_bytes}")
    plain = int(keyframe.compression) == 1
    bits = max(1, int(keyframe.bitspersample))
    ratio = max(1.0, 8 / bits) if plain else DEFLATE_RATIO * 8 / min(8, bits) if int(keyframe.compression) in _DEFLATE else None
    check_size(shape, parts[0].dtype.itemsize * channels, min(stored, file_bytes), ratio, copies=2)


def _sidecar_spacing(path: Path) -> Vector | None:
    """Spacing z, y, x from a JSON file beside the image: its own name, or its name without the channel number."""
    stem = path.name[:-len(path.suffix)]
    for name in (stem, re.sub(r"_\d{4}$", "", stem)):
        sidecar = path.with_name(f"{name}.json")
        if not sidecar.is_file():
            continue
        try:
            data = json.loads(sidecar.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or "spacing" not in data:
                continue
            numbers = [float(n) for n in data["spacing"]]
        except (ValueError, TypeError, RecursionError):
            raise DatasetError(f'has a damaged sidecar {sidecar.name}; expected {{"spacing": [z, y, x]}} in mm') from None
        if len(numbers) not in (2, 3):
            raise DatasetError(f"has a sidecar {sidecar.name} with {len(numbers)} spacings; expected z, y, x")
        z, y, x = [1.0, *numbers][-3:]
        return (z, y, x)
    return None


def _tag_spacing(file: Any, page: Any) -> Vector | None:
    """Spacing z, y, x in mm from our own, ImageJ's or OME's description, or from resolutions that are not meant for printing."""
    shaped: dict[str, Any] = (file.shaped_metadata or ({},))[0]
    own = shaped.get(_OWN_SPACING)
    if isinstance(own, (list, tuple)) and len(own) == 3:
        return (float(own[0]), float(own[1]), float(own[2]))
    if file.is_ome:
        return _ome_spacing(file.ome_metadata or "")
    y, x = _resolution(page, "YResolution"), _resolution(page, "XResolution")
    if file.is_imagej:
        metadata = file.imagej_metadata or {}
        depth = _number(metadata.get("spacing"))
        if depth is None and (x is None or y is None or x == y == 1):
            return None
        scale = _MM.get(str(metadata.get("unit", "mm")).lower(), 1.0)
        return (abs(scale * (1.0 if depth is None else depth)), scale / (y or 1.0), scale / (x or 1.0))
    tag = page.tags.get("ResolutionUnit")
    unit = int(tag.value) if tag is not None else _INCH
    if x is None or y is None or unit not in (_INCH, _CENTIMETRE) or (unit == _INCH and round(x) in _PRINT_DPI):
        return None
    scale = 10.0 if unit == _CENTIMETRE else 25.4
    return (_number(shaped.get("spacing")) or 1.0, scale / y, scale / x)


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _resolution(page: Any, name: str) -> float | None:
    """Pixels per unit from a rational tag; None when it is absent or 0."""
    tag = page.tags.get(name)
    value = tag.value if tag is not None else None
    if not isinstance(value, tuple) or len(value) != 2 or not value[0] or not value[1]:
        return None
    return float(value[0]) / float(value[1])


def _ome_spacing(xml: str) -> Vector | None:
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", xml)
    found = dict(re.findall(r'\bPhysicalSize([XYZ](?:Unit)?)\s*=\s*"([^"]*)"', pixels.group())) if pixels else {}
    sizes = []
    for axis in "ZYX":
        number = _number(found.get(axis))
        scale = _MM.get(found.get(f"{axis}Unit", "µm").lower())
        sizes.append(None if number is None or scale is None else number * scale)
    z, y, x = sizes
    return None if y is None or x is None else (1.0 if z is None else z, y, x)


def write_tiff(path: Path, label_zyx: NDArray[np.integer[Any]], spacing: Vector, like: Path | None) -> None:
    """Write a label map as a deflated stack, or as one page when z is 1, with the spacing z, y, x in mm in its tags.

    `like` is the image it belongs to: its resolution tags and its ImageJ or OME description of the spacing are taken over.
    """
    tifffile = _tifffile()
    array = label_zyx if len(label_zyx) > 1 else label_zyx[0]
    axes = "ZYX" if array.ndim == 3 else "YX"
    options: dict[str, Any] = {"resolution": (10 / spacing[2], 10 / spacing[1]), "resolutionunit": _CENTIMETRE}
    metadata: dict[str, Any] = {"axes": axes, _OWN_SPACING: list(spacing)}
    if like is not None:
        with tifffile.TiffFile(like) as file:
            page: Any = file.series[0].pages[0]
            tags = page.tags
            values = {name: tags[name].value for name in ("XResolution", "YResolution", "ResolutionUnit") if name in tags}
            options = {}
            if all(_resolution(page, name) for name in ("XResolution", "YResolution")):
                options = {"resolution": (values["XResolution"], values["YResolution"]),
                           "resolutionunit": values.get("ResolutionUnit", _INCH)}
            if file.is_imagej and array.dtype in (np.uint8, np.uint16) and _sidecar_spacing(like) is None:
                known = {k: v for k, v in (file.imagej_metadata or {}).items() if k in ("spacing", "unit")}
                metadata, options["imagej"] = {"axes": axes, **known}, True
    tifffile.imwrite(path, array, photometric="minisblack", compression="zlib", metadata=metadata, **options)
