"""Images of other libraries: SimpleITK's and nibabel's, in any orientation, to ours and back, told apart by what they can do.

SimpleITK counts axes x, y, z in an LPS world; nibabel's arrays are x, y, z, with an affine into an RAS world.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import GeometryError
from autoseg.files.grids import no_depth
from autoseg.types.case import Image
from autoseg.types.geometry import Grid

_TOLERANCE = 1e-3  # by which grids of channels may differ, and directions from perpendicular unit vectors


def is_foreign(image: object) -> bool:
    """Whether it is an image of SimpleITK or nibabel, or a list of such."""
    first = image[0] if isinstance(image, list | tuple) and image else image
    return _is_itk(first) or _is_nibabel(first)


def _is_itk(image: object) -> bool:
    return hasattr(image, "GetDirection") and hasattr(image, "GetNumberOfComponentsPerPixel")


def _is_nibabel(image: object) -> bool:
    return hasattr(image, "affine") and hasattr(image, "dataobj")


def from_foreign(image: Any) -> Image:
    """One image, or a list with one image per channel, as ours.

    Raises:
        GeometryError: not three axes (two for SimpleITK), channels on different grids, or sheared axes.
    """
    parts = [_from_one(one) for one in (image if isinstance(image, list | tuple) else [image])]
    for part in parts[1:]:
        if not _same(parts[0].grid, part.grid):
            raise GeometryError(f"the channels lie on different grids: {parts[0].grid} and {part.grid}")
    array = parts[0].array_czyx if len(parts) == 1 else np.concatenate([part.array_czyx for part in parts])
    return Image(array, parts[0].grid, "")


def _from_one(image: Any) -> Image:
    if _is_itk(image):
        return _from_itk(image)
    if _is_nibabel(image):
        return _from_nibabel(image)
    raise GeometryError(f"expected a SimpleITK or nibabel image, found {type(image).__name__}")


def _same(a: Grid, b: Grid) -> bool:
    pairs = ((a.spacing, b.spacing), (a.origin, b.origin), (a.direction, b.direction))
    return a.shape == b.shape and all(np.allclose(one, other, atol=_TOLERANCE) for one, other in pairs)


def _from_itk(image: Any) -> Image:
    import SimpleITK as sitk

    array = np.asarray(sitk.GetArrayFromImage(image))
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    else:
        array = array[None]
    dims = image.GetDimension()
    if dims == 2:
        x, y = image.GetSpacing()
        spacing = (no_depth(y, x), y, x)
        grid = Grid(shape=(1, array.shape[1], array.shape[2]), spacing=spacing, has_direction=False)
        return Image(np.ascontiguousarray(array[:, None]), grid, "")
    if dims != 3:
        raise GeometryError(f"expected an image of 2 or 3 dimensions, found {dims}")
    columns = np.asarray(image.GetDirection(), float).reshape(3, 3)
    return _image(array, columns[::-1, ::-1], image.GetSpacing()[::-1], image.GetOrigin()[::-1])


def _from_nibabel(image: Any) -> Image:
    array = np.asanyarray(image.dataobj)
    if array.ndim == 5 and array.shape[3] == 1:  # NIfTI keeps vectors in the fifth axis
        array = array[:, :, :, 0]
    if array.ndim not in (3, 4):
        raise GeometryError(f"expected an array (x, y, z) or (x, y, z, channel), found shape {array.shape}")
    czyx = array.transpose(2, 1, 0)[None] if array.ndim == 3 else array.transpose(3, 2, 1, 0)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(image.affine, float)  # RAS to LPS
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and (spacing > 0).all()):
        raise GeometryError(f"the affine has no usable axes: {image.affine}")
    return _image(czyx, (affine[:3, :3] / spacing)[::-1, ::-1], spacing[::-1].tolist(), affine[2::-1, 3].tolist())


def _image(czyx: NDArray[Any], columns: NDArray[np.float64], spacing: Sequence[float], origin: Sequence[float]) -> Image:
    if not np.allclose(columns.T @ columns, np.eye(3), atol=_TOLERANCE):
        raise GeometryError("the image's axes are not perpendicular (sheared); resample it onto a grid with perpendicular axes")
    grid = Grid.model_validate({
        "shape": czyx.shape[1:], "spacing": [float(v) for v in spacing], "origin": [float(v) for v in origin],
        "direction": columns.tolist(),
    })
    return Image(np.ascontiguousarray(czyx), grid, "")


def to_foreign(array: NDArray[Any], like: Any) -> Any:
    """An array (z, y, x), or (k, z, y, x), on the grid of the image that a prediction was made of, as the same kind of image."""
    first = like[0] if isinstance(like, list | tuple) else like
    return _to_itk(array, first) if _is_itk(first) else _to_nibabel(array, first)


def _to_itk(array: NDArray[Any], like: Any) -> Any:
    import SimpleITK as sitk

    flat = like.GetDimension() == 2
    vector = array.ndim == 4
    if flat:
        array = array[:, 0] if vector else array[0]
    found: Any = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(array, 0, -1) if vector else array), isVector=vector)
    found.SetSpacing(like.GetSpacing())
    found.SetOrigin(like.GetOrigin())
    found.SetDirection(like.GetDirection())
    return found


def _to_nibabel(array: NDArray[Any], like: Any) -> Any:
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    axes = (3, 2, 1, 0) if array.ndim == 4 else (2, 1, 0)
    return type(like)(array.transpose(axes), like.affine, header)
