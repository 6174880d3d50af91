"""Label values as they are on disk and as the network sees them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from autoseg.types.record import Record

_TABLE = 1 << 16  # label values are looked up in a table up to this range


class Label(Record):
    """One structure: its name and its integer value in the label files."""

    name: str
    value: int


class Region(Record):
    """A union of labels that is predicted as one output, for example a whole tumour."""

    name: str
    values: tuple[int, ...]


class Labels(Record):
    """All labels of a data set, background first, values as stored on disk in rising order.

    Inside, background is 0, foreground labels are 1..K in the order given and the ignore label is K+1. With `regions` the
    network has one sigmoid output per region; `region_order[i]` is the value written where region i is found, later entries
    overwrite earlier ones (nnU-Net's regions_class_order).
    """

    background: Label = Label(name="background", value=0)
    foreground: tuple[Label, ...]
    ignore: Label | None = None
    regions: tuple[Region, ...] = ()
    region_order: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Labels:
        values = [label.value for label in (self.background, *self.foreground)] + ([self.ignore.value] if self.ignore else [])
        if len(set(values)) != len(values):
            raise ValueError(f"label values must differ from one another, found {values}")
        if not self.foreground:
            raise ValueError("at least one foreground label is needed")
        known = {label.value for label in self.foreground}
        for region in self.regions:
            if not region.values or not set(region.values) <= known:
                raise ValueError(f"region {region.name!r} must hold declared foreground values, found {region.values}")
        if self.regions and len(self.region_order) != len(self.regions):
            raise ValueError(f"region_order needs one value for each of {len(self.regions)} regions, found {self.region_order}")
        if self.regions and not set(self.region_order) <= known:
            raise ValueError(f"region_order must hold declared foreground values, found {self.region_order}")
        return self

    @property
    def declared_count(self) -> int:
        """Number of entries a dataset.json would declare (background and ignore included); the planner counts with it."""
        return 1 + len(self.regions or self.foreground) + (self.ignore is not None)

    @property
    def output_count(self) -> int:
        """Channels of the network's output: regions, or background plus foreground labels."""
        return len(self.regions) if self.regions else 1 + len(self.foreground)

    @property
    def ignore_index(self) -> int | None:
        """Inside value of the ignore label."""
        return len(self.foreground) + 1 if self.ignore else None

    @property
    def values(self) -> tuple[int, ...]:
        """Disk values by inside index: background, foreground, then ignore if there is one."""
        return (self.background.value, *(label.value for label in self.foreground), *([self.ignore.value] if self.ignore else []))

    @property
    def targets(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What is measured and sampled: (name, inside indices) of each region, or of each foreground label."""
        if self.regions:
            index = {label.value: i + 1 for i, label in enumerate(self.foreground)}
            return tuple((r.name, tuple(index[v] for v in r.values)) for r in self.regions)
        return tuple((label.name, (i + 1,)) for i, label in enumerate(self.foreground))

    def annotated(self, names: Iterable[str] | None) -> tuple[int, ...]:
        """Indices of the targets that are annotated where the foreground labels of these names are; None: all of them.

        A region is annotated when each of its labels is.
        """
        if names is None:
            return tuple(range(len(self.targets)))
        given = set(names)
        known = {i for i, label in enumerate(self.foreground, start=1) if label.name in given}
        return tuple(number for number, (_, indices) in enumerate(self.targets) if set(indices) <= known)

    def encode(self, label_zyx: NDArray[np.integer]) -> NDArray[np.int16]:
        """Disk values to inside indices, any shape. Raises ValueError for a value that is not declared."""
        values = np.asarray(self.values)
        array = np.asarray(label_zyx)
        low, high = min(0, int(array.min(initial=0))), max(0, int(array.max(initial=0)))
        if high - low > _TABLE:  # values far apart: those that are there are few
            there, array = np.unique(array, return_inverse=True)
        else:
            there, array = np.arange(low, high + 1), array.astype(np.intp) - low
        order = np.argsort(values)
        place = np.clip(np.searchsorted(values[order], there), 0, len(values) - 1)
        index = np.where(values[order[place]] == there, order[place], -1).astype(np.int16)
        encoded: NDArray[np.int16] = np.take(index, array).reshape(np.shape(label_zyx))
        if encoded.min(initial=0) < 0:
            found = np.unique(np.asarray(label_zyx)[encoded < 0])[:10].tolist()
            raise ValueError(f"label values {found} are not declared (declared: {sorted(self.values)})")
        return encoded

    def decode(self, index_zyx: NDArray[np.integer]) -> NDArray[np.integer]:
        """Inside indices (0..K) to disk values, in the smallest integer type that holds them all."""
        values = np.asarray(self.values[: len(self.foreground) + 1])
        low, high = int(values.min()), int(values.max())
        kinds = (np.uint8, np.uint16, np.int32) if low >= 0 else (np.int8, np.int16, np.int32)
        kind = next((k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max), np.int64)
        table: NDArray[np.integer] = values.astype(kind)
        return np.asarray(table[index_zyx])
