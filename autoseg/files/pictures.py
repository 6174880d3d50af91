"""PNG, JPEG and BMP files through Pillow: always one slice, without spacing or direction.

The decoders are opened directly, because `Image.open` refuses large but honest microscopy by a fixed number of pixels; what a
picture may take is decided from its file's size and the free memory instead.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import DatasetError
from autoseg.files.sizes import DEFLATE_RATIO, JPEG_RATIO, check_size

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp")
_DEEP_COLOUR = (2, 4, 6)  # PNG colour types that Pillow cuts to 8 bits when they have 16
_RLE_RATIO = 256
_MODES = {"1": (1, "u1"), "L": (1, "u1"), "I;16": (1, "u2"), "I;16B": (1, "u2"), "I": (1, "i4"), "F": (1, "f4"),
          "LA": (2, "u1"), "RGB": (3, "u1"), "RGBA": (4, "u1")}

Decode = Callable[[Path], NDArray[np.generic]]


def _open(path: Path, ending: str) -> Any:
    """Open without decoding; DatasetError when the file is of another kind or declares more than it can hold."""
    if ending == ".png":
        from PIL.PngImagePlugin import PngImageFile as Opener
    elif ending == ".bmp":
        from PIL.BmpImagePlugin import BmpImageFile as Opener  # type: ignore[assignment]
    else:
        from PIL.JpegImagePlugin import JpegImageFile as Opener  # type: ignore[assignment]
    try:
        picture = Opener(path)
    except SyntaxError:
        raise DatasetError(f"is not a {ending[1:].upper()} picture, whatever its name says, or its header is damaged") from None
    try:
        width, height = picture.size
        ratio = {".png": DEFLATE_RATIO * 8, ".bmp": _RLE_RATIO * 8}.get(ending, JPEG_RATIO)  # one bit may become one byte
        check_size((height, width), float(max(1, len(picture.getbands()))), path.stat().st_size, ratio, copies=3)
    except BaseException:
        picture.close()
        raise
    return picture


def _is_deep_colour(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(26)
    return len(start) == 26 and start[12:16] == b"IHDR" and start[24] == 16 and start[25] in _DEEP_COLOUR


def read_picture(path: Path, ending: str, indices: bool, decode: Decode) -> NDArray[np.generic]:
    """Read as (channel, 1, y, x): grey or colours, without an alpha channel that is the same everywhere.

    A palette becomes its colours (one channel when all are grey), or its `indices` for label maps. `decode` reads the pictures
    that Pillow would cut to 8 bits. Raises DatasetError.
    """
    with _open(path, ending) as picture:
        if ending == ".png" and _is_deep_colour(path):
            array = decode(path)
        else:
            pixels = np.array(_converted(picture, indices))
            pixels = pixels.astype(np.uint8) if pixels.dtype == np.bool_ else pixels
            array = (pixels if pixels.ndim == 3 else pixels[..., None]).transpose(2, 0, 1)[:, None]
    return without_constant_alpha(array)


def picture_header(path: Path, ending: str, decode: Decode) -> tuple[tuple[int, int], int, str]:
    """Return (y, x), the number of channels and the dtype; decodes only where an alpha channel may have to be dropped."""
    with _open(path, ending) as picture:
        width, height = picture.size
        deep = ending == ".png" and _is_deep_colour(path)
        mode = _target(picture)
    channels, dtype = _MODES.get(mode, (len(picture.getbands()), "u1"))
    if deep or channels in (2, 4):
        array = read_picture(path, ending, False, decode)
        channels, dtype = array.shape[0], array.dtype.str
    return (height, width), channels, np.dtype(dtype).name


def without_constant_alpha(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """Drop the last of 2 or 4 channels when it is the same everywhere: such an alpha channel says nothing."""
    if len(array) in (2, 4) and bool(np.all(array[-1] == array[-1].flat[0])):
        array = array[:-1]
    return np.ascontiguousarray(array)


def _target(picture: Any) -> str:
    """The Pillow mode whose samples are the channels."""
    mode = str(picture.mode)
    if mode == "P":
        palette = np.asarray(picture.getpalette() or [0, 0, 0]).reshape(-1, 3)
        return "L" if bool(np.all(palette == palette[:, :1])) else "RGB"
    return {"PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "RGBX": "RGB", "LAB": "RGB"}.get(mode, mode)


def _converted(picture: Any, indices: bool) -> Any:
    target = _target(picture)
    if picture.mode == target or (indices and picture.mode == "P"):
        return picture
    return picture.convert(target)


def write_picture(path: Path, label_yx: NDArray[np.integer[Any]]) -> None:
    """Write a label map as PNG (8 bits, or 16 where values need them) or 8-bit BMP.

    Raises DatasetError when a value does not fit.
    """
    from PIL import Image as Pictures

    low, high = int(label_yx.min()), int(label_yx.max())
    most = 255 if path.name.lower().endswith(".bmp") else 65535
    if low < 0 or high > most:
        raise DatasetError(f"cannot hold the label values {low} to {high}; {path.suffix[1:].upper()} holds 0 to {most}")
    pixels = np.ascontiguousarray(label_yx, np.uint8 if high <= 255 else np.uint16)
    Pictures.fromarray(pixels).save(path, compress_level=4)
