"""Reading and writing images and label maps; the only module that knows that SimpleITK lists axes as x, y, z."""

from __future__ import annotations

import functools
import math
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import DatasetError, GeometryError
from autoseg.files import nifti
from autoseg.files.damage import reading, writing
from autoseg.files.grids import GridDifference, compare_grids, no_depth, plain_grid
from autoseg.files.pictures import PICTURE_ENDINGS, picture_header, read_picture, write_picture
from autoseg.files.sizes import DEFLATE_RATIO, check_size
from autoseg.files.textheaders import TextHeader, metaimage_header, nrrd_header, read_text_voxels
from autoseg.files.tiffs import read_tiff, read_tiff_header, write_tiff
from autoseg.files.voxels import NotWholeError, smallest, whole
from autoseg.files.workspace import atomic_path
from autoseg.types.case import Image
from autoseg.types.geometry import Grid, Matrix

__all__ = [
    "ENDINGS", "ColourMaskError", "GridDifference", "ImageHeader", "NotWholeError", "compare_grids", "mask_ending", "read_case",
    "read_header", "read_image", "read_label", "split_ending", "write_label", "write_probabilities",
]

ENDINGS: tuple[str, ...] = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_SMALL = ("uint8", "int8", "uint16", "int16")
_NIFTI, _META, _TIFF, _LOSSY = (".nii", ".nii.gz"), (".mha", ".mhd"), (".tif", ".tiff"), (".jpg", ".jpeg")

ORTHONORMAL = 1e-3  # how far direction columns may be from perpendicular unit vectors
_META_HEADER = 1 << 16
_SHEARED = ("has directions that are not perpendicular unit vectors (sheared, for example by a tilted gantry); "
            "resample image and label onto a grid with perpendicular axes")
_ITK = threading.RLock()  # SimpleITK's readers crash now and then when several threads create and destroy them (SimpleITK #74)


class ColourMaskError(DatasetError):
    """A label file has colours or several channels instead of one value per voxel."""


@dataclass(frozen=True)
class ImageHeader:
    """What a file says about itself: grid, channels, the dtype of its voxels as numpy names it, and its ending."""

    grid: Grid
    channels: int
    dtype: str
    ending: str


def split_ending(name: str) -> tuple[str, str]:
    """Split a file name into stem and known ending in lower case ("case_0000", ".nii.gz"); ending "" when it is unknown."""
    lower = name.lower()
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if lower.endswith(ending) and len(name) > len(ending):
            return name[:-len(ending)], ending
    return name, ""


def mask_ending(ending: str) -> str:
    """The ending of a mask for an image with `ending`: PNG for JPEG, which would change label values, else the same."""
    return ".png" if ending.lower() in _LOSSY else ending.lower()


def _ending_of(path: Path) -> str:
    ending = split_ending(path.name)[1]
    if not ending:
        raise DatasetError(f"has an unknown ending; expected one of {', '.join(ENDINGS)}")
    return ending


def _text_reader(ending: str) -> str:
    return "MetaImageIO" if ending in _META else "NrrdImageIO"


def _checked_ending(path: Path) -> str:
    ending = _ending_of(path)
    if not path.exists():
        raise FileNotFoundError
    if not path.is_file():
        raise DatasetError("is not a file")
    if path.stat().st_size == 0:
        raise DatasetError("is empty (0 bytes); copy or export it again")
    return ending


def read_header(path: Path) -> ImageHeader:
    """Read grid, channels and dtype without the voxels (only an alpha channel is looked at, to see whether it counts).

    Raises DatasetError when the file is damaged, truncated or of another kind, GeometryError when its geometry is unusable.
    """
    with reading(path):
        return _header(path, _checked_ending(path))


def _header(path: Path, ending: str) -> ImageHeader:
    if ending in PICTURE_ENDINGS:
        (y, x), channels, dtype = picture_header(path, ending, functools.partial(_decode, reader="PNGImageIO"))
        return ImageHeader(plain_grid((1, y, x), None), channels, dtype, ending)
    if ending in _TIFF:
        tiff = read_tiff_header(path)
        channels = len(read_tiff(path, tiff, _decode_tiff)) if tiff.may_hold_alpha else tiff.channels
        return ImageHeader(plain_grid(tiff.shape, tiff.spacing), channels, tiff.dtype, ending)
    if ending in _NIFTI:
        header = nifti.read_header(path)
        return ImageHeader(_information(path, "NiftiImageIO").grid, header.channels, header.dtype.name, ending)
    _, found = _text_header(path, ending)
    return ImageHeader(found.grid, found.channels, found.dtype.name, ending)


def _text_header(path: Path, ending: str) -> tuple[TextHeader, _Information]:
    """The checked text header of a MetaImage or NRRD file, and what SimpleITK reads from it."""
    text = metaimage_header(path) if ending in _META else nrrd_header(path)
    found = _information(path, _text_reader(ending))
    check_size(found.grid.shape, found.dtype.itemsize * found.channels, text.stored_bytes,
               DEFLATE_RATIO if text.packed else 1, copies=2)
    return text, found


def read_image(path: Path) -> Image:
    """Read an image as (channel, z, y, x) in its stored dtype, owned and contiguous.

    A fourth axis, vector voxels and colours become channels. Raises as `read_header` does.
    """
    with reading(path):
        return _read(path, indices=False)


def _read(path: Path, indices: bool) -> Image:
    ending = _checked_ending(path)
    if ending in _NIFTI:
        header = nifti.read_header(path)
        return Image(nifti.read_voxels(path, header), _information(path, "NiftiImageIO").grid, ending)
    if ending in _TIFF:
        tiff = read_tiff_header(path)
        return Image(read_tiff(path, tiff, _decode_tiff), plain_grid(tiff.shape, tiff.spacing), ending)
    if ending in PICTURE_ENDINGS:
        array = read_picture(path, ending, indices, functools.partial(_decode, reader="PNGImageIO"))
        return Image(array, plain_grid((1, *array.shape[2:]), None), ending)
    text, found = _text_header(path, ending)
    grid, parts = found.grid, found.parts
    if text.encoding == "text" or (parts > 1 and ending not in _META):
        return Image(_decode(path, _text_reader(ending)).reshape(-1, *grid.shape), grid, ending)
    array = read_text_voxels(text, found.dtype, math.prod(found.grid.shape) * found.channels).reshape(-1, *grid.shape, parts)
    return Image(np.ascontiguousarray(np.moveaxis(array, -1, 1)).reshape(-1, *grid.shape), grid, ending)


def read_case(paths: Sequence[Path], as_stored: bool = False) -> Image:
    """Read the files of a case as one float32 array (channel, z, y, x): their channels one after the other.

    With `as_stored` integers of 8 or 16 bits stay what they are where all files hold the same, which takes half the memory or
    less. Raises GeometryError when the grids differ by more than rounding noise, and as `read_header` does.
    """
    if not paths:
        raise DatasetError("a case needs at least one image file")
    headers = [read_header(path) for path in paths] if len(paths) > 1 else []
    for path, header in zip(paths[1:], headers[1:], strict=False):
        for difference in compare_grids(headers[0].grid, header.grid):
            if not difference.noise:
                raise GeometryError(f"{path} lies on another grid than {paths[0].name}: expected {difference.field} "
                                    f"{difference.expected}, found {difference.found}; "
                                    "resample it onto the grid of the first channel")
    image = read_image(paths[0])
    part = image.array_czyx
    stays = as_stored and part.dtype.name in _SMALL and len({header.dtype for header in headers}) <= 1
    kind = part.dtype if stays else np.dtype(np.float32)
    channels = sum(header.channels for header in headers) if headers else len(part)
    if channels == len(part) and part.dtype == kind:
        return image
    with reading(paths[0]):
        check_size(image.grid.shape, kind.itemsize * channels, 0, None)
        case = np.empty((channels, *image.grid.shape), kind)
    image = Image(case, image.grid, image.ending)
    for index, path in enumerate(paths):
        part = read_image(path).array_czyx if index else part
        with np.errstate(over="ignore", invalid="ignore"):
            case[:len(part)] = part
        case = case[len(part):]
    return image


def read_label(path: Path) -> tuple[NDArray[np.integer[Any]], Grid]:
    """Read a label map as integers (z, y, x), owned and contiguous, with its grid; a palette gives its indices.

    Raises ColourMaskError for colours or several channels, NotWholeError when a value is farther than `WHOLE` from a whole
    number, and as `read_header` does.
    """
    with reading(path):
        image = _read(path, indices=True)
        array = image.array_czyx
        if len(array) != 1:
            kind = "an RGB mask" if len(array) in (3, 4) and image.ending in (*PICTURE_ENDINGS, *_TIFF) else "no label map"
            raise ColourMaskError(f"is {kind}: expected one integer per voxel, found {len(array)} channels; "
                                  "save it with one channel")
        return whole(array[0]), image.grid


def write_label(path: Path, label_zyx: NDArray[np.integer[Any]], grid: Grid, like: Path | None = None) -> None:
    """Write a label map (z, y, x) on `grid`, atomically, compressed, in the smallest integer type that holds its values.

    `like` is the image file it belongs to: where both formats are the same (NIfTI, TIFF) and the grids agree, every geometry
    field is taken over as it stands there. 2D formats and 2D grids give a 2D file. Raises DatasetError when the format cannot
    hold the values, ValueError when shape and grid disagree.
    """
    if tuple(label_zyx.shape) != grid.shape:
        raise ValueError(f"label has shape {label_zyx.shape}, its grid {grid.shape}")
    with writing(path):
        ending = _ending_of(path)
        if ending in _LOSSY:
            raise DatasetError("is a JPEG, which would change label values; write PNG")
        flat = ending in PICTURE_ENDINGS
        if flat and grid.shape[0] != 1:
            raise DatasetError(f"holds one slice, the label map has {grid.shape[0]}; write NIfTI or TIFF")
        label = label_zyx if flat else label_zyx.astype(smallest(label_zyx), copy=False)
        model = like if like is not None and _matches(like, ending, grid) else None
        if ending == ".mhd":
            _write_mhd(path, label, grid)
            return
        with atomic_path(path) as temporary:
            if flat:
                write_picture(temporary, label[0])
            elif ending in _TIFF:
                write_tiff(temporary, label, grid.spacing, model)
            elif ending in _NIFTI:
                nifti.write(temporary, label, grid, nifti.read_header(model) if model else None)
            else:
                _write_itk(temporary, label, grid)


def write_probabilities(path: Path, probabilities_czyx: NDArray[np.float32], grid: Grid, like: Path | None = None) -> None:
    """Write class probabilities (class, z, y, x) as a 4D float32 NIfTI with the classes in the last axis, atomically.

    `like` as in `write_label`. Raises ValueError when shape and grid disagree.
    """
    if tuple(probabilities_czyx.shape[1:]) != grid.shape or probabilities_czyx.ndim != 4:
        raise ValueError(f"probabilities have shape {probabilities_czyx.shape}, their grid {grid.shape}")
    with writing(path):
        ending = _ending_of(path)
        if ending not in _NIFTI:
            raise DatasetError("must end with .nii.gz, because probabilities have four axes")
        model = like if like is not None and _matches(like, ending, grid) else None
        array = probabilities_czyx.astype(np.float32, copy=False)
        with atomic_path(path) as temporary:
            nifti.write(temporary, array, grid, nifti.read_header(model) if model else None)


def _matches(like: Path, ending: str, grid: Grid) -> bool:
    family = next((f for f in (_NIFTI, _TIFF) if ending in f), ())
    return split_ending(like.name)[1] in family and like.is_file() and not compare_grids(read_header(like).grid, grid)


@functools.cache
def _sitk() -> Any:
    import SimpleITK

    module: Any = SimpleITK  # its stubs leave these calls untyped
    module.ProcessObject_SetGlobalWarningDisplay(False)
    return module


@functools.cache
def _itk_dtypes() -> dict[int, np.dtype[Any]]:
    sitk = _sitk()
    names = [f"{kind}{bits}" for kind in ("UInt", "Int") for bits in (8, 16, 32, 64)] + ["Float32", "Float64"]
    return {getattr(sitk, f"sitk{prefix}{name}"): np.dtype(name.lower()) for name in names for prefix in ("", "Vector")}


def _reader(path: Path, name: str) -> Any:
    """A reader bound to one format, so that no other decoder is tried on the file."""
    reader = _sitk().ImageFileReader()
    reader.SetImageIO(name)
    reader.SetFileName(str(path))
    return reader


@dataclass(frozen=True)
class _Information:
    """What SimpleITK reads from a header: grid, voxel type, components per voxel, and channels (components and a fourth axis)."""

    grid: Grid
    dtype: np.dtype[Any]
    parts: int
    channels: int


def _information(path: Path, name: str) -> _Information:
    """Read a header; GeometryError when the direction is sheared beyond repair."""
    with _ITK:
        reader = _reader(path, name)
        try:
            reader.ReadImageInformation()
            parts = reader.GetNumberOfComponents()
            return _Information(_itk_grid(reader), _dtype(reader), parts, parts * math.prod(reader.GetSize()[3:]))
        except RuntimeError as error:
            if "orthonormal" in str(error):
                raise GeometryError(_SHEARED) from None
            raise
        finally:
            del reader


def _dtype(reader: Any) -> np.dtype[Any]:
    dtype = _itk_dtypes().get(reader.GetPixelID())
    if dtype is None:
        raise DatasetError("holds complex or unknown voxels, which is not an image to segment")
    return dtype


def _decode(path: Path, reader: str) -> NDArray[np.generic]:
    """Decode with SimpleITK as (channel, z, y, x)."""
    with _ITK:
        image = _reader(path, reader).Execute()
        array = _sitk().GetArrayFromImage(image)
        parts = image.GetNumberOfComponentsPerPixel()
        del image
    spatial = array.shape[:array.ndim - (parts > 1)]
    array = array.reshape(-1, *((1, 1, *spatial)[-3:]), parts)  # a fourth axis, slowest in the file, before z
    array = array.transpose(0, 4, 1, 2, 3).reshape(-1, *array.shape[1:4])
    result: NDArray[np.generic] = np.array(array, order="C", copy=array.base is not None)
    return result


_decode_tiff = functools.partial(_decode, reader="TIFFImageIO")


def _itk_grid(reader: Any) -> Grid:
    """The grid as SimpleITK read it, axes reversed to z, y, x; 2D files keep origin and direction in the plane."""
    dims = min(3, reader.GetDimension())
    spacing, origin = list(reader.GetSpacing()[:dims]), list(reader.GetOrigin()[:dims])
    direction = np.asarray(reader.GetDirection(), float).reshape(reader.GetDimension(), -1)[:dims, :dims]
    if not (np.isfinite(spacing).all() and min(spacing) > 0):
        raise GeometryError(f"has an unusable spacing {tuple(spacing)} (x, y, z), expected positive millimetres; "
                            "correct the header")
    if not (np.isfinite(origin).all() and np.isfinite(direction).all()):
        raise GeometryError("has an origin or direction that is not finite; correct the header")
    if dims == 2 and np.linalg.det(direction) == 0:
        direction = np.eye(2)  # a NIfTI slice that stands upright in the world: its plane has no direction in x and y
    if np.abs(direction.T @ direction - np.eye(dims)).max() > ORTHONORMAL:
        raise GeometryError(_SHEARED)
    full = np.eye(3)
    full[3 - dims:, 3 - dims:] = direction[::-1, ::-1]
    rows: Matrix = tuple(tuple(float(v) + 0.0 for v in row) for row in full)  # type: ignore[assignment]
    size = (*reader.GetSize()[:dims], 1)[:3]
    if dims == 2:
        spacing, origin = [*spacing, no_depth(spacing[1], spacing[0])], [*origin, 0.0]
    return Grid(shape=(size[2], size[1], size[0]), spacing=(spacing[2], spacing[1], spacing[0]), direction=rows,
                origin=(origin[2] + 0.0, origin[1] + 0.0, origin[0] + 0.0), has_direction=dims == 3)


def _itk_image(label_zyx: NDArray[Any], grid: Grid) -> Any:
    """A SimpleITK image, 2D when the grid is one slice without a direction in space."""
    dims = 2 if grid.shape[0] == 1 and not grid.has_direction else 3
    image = _sitk().GetImageFromArray(np.ascontiguousarray(label_zyx[0] if dims == 2 else label_zyx))
    image.SetSpacing(grid.spacing[::-1][:dims])
    image.SetOrigin(grid.origin[::-1][:dims])
    image.SetDirection(np.asarray(grid.direction)[::-1, ::-1][:dims, :dims].ravel().tolist())
    return image


def _write_itk(path: Path, label_zyx: NDArray[Any], grid: Grid) -> None:
    with _ITK:
        _sitk().WriteImage(_itk_image(label_zyx, grid), str(path), True, 1)


def _write_mhd(path: Path, label_zyx: NDArray[Any], grid: Grid) -> None:
    """Write header and voxels as two files, the voxels first, so that a header never stands alone."""
    voxels = path.with_name(path.name[:-len(".mhd")] + ".zraw")
    with atomic_path(path.with_suffix(".mha")) as whole:
        _write_itk(whole, label_zyx, grid)
        with whole.open("rb") as source:
            header, _, _ = source.read(_META_HEADER).partition(b"LOCAL\n")
            source.seek(len(header) + len(b"LOCAL\n"))
            with atomic_path(voxels) as temporary, temporary.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
    with atomic_path(path) as temporary:
        temporary.write_bytes(header + voxels.name.encode() + b"\n")
