"""Read a zip file from anywhere: only plain, uncompressed, separate files are accepted, and nothing is ever extracted to disk."""

from __future__ import annotations

import hashlib
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, BinaryIO

MOST_ENTRIES = 4096
MOST_DIRECTORY_BYTES = 1 << 20
CHUNK = 1 << 20
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold: equal content gives equal bytes
_END, _END_64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000  # traditional and strong encryption, and a hidden directory


class Archive:
    """An opened zip whose directory has been checked; `sizes` are the lengths of its files by name."""

    def __init__(self, file: zipfile.ZipFile, infos: Sequence[zipfile.ZipInfo]) -> None:
        self._file = file
        self.sizes = {info.filename: info.file_size for info in infos}

    @contextmanager
    def stream(self, name: str) -> Iterator[IO[bytes]]:
        """Open one file for reading. Raises ValueError where its bytes are damaged."""
        with _readable(), self._file.open(name) as part:
            yield part

    def read(self, name: str) -> bytearray:
        """All bytes of one file. Raises ValueError where it is damaged or ends early."""
        data = bytearray(self.sizes[name])
        view, done = memoryview(data), 0
        with self.stream(name) as part:
            while chunk := part.read(CHUNK):
                view[done : done + len(chunk)] = chunk
                done += len(chunk)
        if done != len(data):
            raise ValueError(f"it holds {done} bytes, expected {len(data)}")
        return data

    def sha256(self, name: str) -> str:
        """The SHA-256 of one file's bytes. Raises ValueError where it is damaged."""
        found = hashlib.sha256()
        with self.stream(name) as part:
            while chunk := part.read(CHUNK):
                found.update(chunk)
        return found.hexdigest()


@contextmanager
def open_archive(path: Path, allowed: Callable[[str], bool]) -> Iterator[Archive]:
    """Open a zip whose files all have names that are `allowed`.

    Raises ValueError for whatever is not a plain zip of uncompressed files: several files of one name, compressed or encrypted
    ones, links, folders, overlapping ones, sizes beyond the file's own, bytes before or after it. Raises OSError
    where it cannot be read.
    """
    with path.open("rb") as raw:
        size = raw.seek(0, 2)
        _require_small_directory(raw, size)
        with _readable(), zipfile.ZipFile(raw) as file:
            infos = file.infolist()
            _require_plain(infos, allowed, file.start_dir)
            yield Archive(file, infos)


@contextmanager
def _readable() -> Iterator[None]:
    """Turn what the zip reader says of damaged files into ValueError."""
    try:
        yield
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, struct.error, OverflowError) as error:
        raise ValueError(f"it is damaged: {error or type(error).__name__}") from None


def _require_small_directory(raw: BinaryIO, size: int) -> None:
    """Look at the zip's end before its directory is read: a hostile one could list millions of files."""
    raw.seek(0)
    if raw.read(4) != b"PK\x03\x04":
        raise ValueError("it is not a zip file")
    raw.seek(max(0, size - _END.size - _LOCATOR.size - _END_64.size))
    tail = raw.read()
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise ValueError("it ends early, or something was added behind its end")
    _, _, _, _, entries, directory, _, _ = _END.unpack(tail[-_END.size :])
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\x06\x07":
        record = tail[: _END_64.size]
        if len(tail) < _END.size + _LOCATOR.size + _END_64.size or record[:4] != b"PK\x06\x06":
            raise ValueError("its end is damaged")
        entries, directory = _END_64.unpack(record)[7], _END_64.unpack(record)[8]
    if entries > MOST_ENTRIES or directory > MOST_DIRECTORY_BYTES:
        raise ValueError(f"its directory claims {entries} files in {directory} bytes; at most {MOST_ENTRIES} files are accepted")
    raw.seek(0)


def _require_plain(infos: Sequence[zipfile.ZipInfo], allowed: Callable[[str], bool], directory: int) -> None:
    if len(infos) > MOST_ENTRIES:
        raise ValueError(f"it holds {len(infos)} files, at most {MOST_ENTRIES} are accepted")
    names: set[str] = set()
    for info in infos:
        name = info.orig_filename
        fault = _fault(info, allowed)
        if fault or name.casefold() in names:
            raise ValueError(f"{name[:100]!r} {fault or 'is there twice'}")
        names.add(name.casefold())
    ordered = sorted(infos, key=lambda info: info.header_offset)
    spans = [(i.header_offset, i.header_offset + _LOCAL_HEADER_BYTES + len(i.filename) + i.file_size) for i in ordered]
    if spans and spans[0][0] != 0:
        raise ValueError("it begins with something that is not part of the zip")
    if any(end > start for (_, end), (start, _) in pairwise([*spans, (directory, directory)])):
        raise ValueError("its files overlap, or claim more bytes than there are")


def _fault(info: zipfile.ZipInfo, allowed: Callable[[str], bool]) -> str:
    """What is wrong with one entry; empty where nothing is."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    if not allowed(info.orig_filename) or info.filename != info.orig_filename:
        return "does not belong there"
    if kind not in (0, stat.S_IFREG) or info.is_dir():
        return "is a link or a folder, not a file"
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if info.compress_type != zipfile.ZIP_STORED:
        return "is compressed; the files in it must be stored as they are (zip -0)"
    if info.compress_size != info.file_size:
        return f"claims {info.file_size} bytes in {info.compress_size}"
    return ""


def write_archive(path: Path, parts: Mapping[str, Callable[[], bytes]]) -> None:
    """Write files into a new zip, uncompressed and without times: equal content gives equal bytes. One is made at a time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, make in parts.items():
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system = 3  # Unix, also when written elsewhere
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            file.writestr(info, make())
