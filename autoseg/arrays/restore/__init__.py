"""From logits on the network's grid to labels or probabilities on the grid of the image file.

Logits are interpolated linearly (half-pixel centres, the border repeats; the nearest slice along an axis that is too coarse),
plane after plane, and decided at once: no float array of classes times volume exists unless probabilities are asked for. Where
all source voxels around a place decide alike the place is theirs, since linear weights are convex: only other places are
interpolated. In main memory this is compiled; on an accelerator, and where compiling is impossible, torch does it.
"""

from autoseg.arrays.restore.ensemble import (
    restore_ensemble,
    restore_labels,
    restore_planes,
    restore_probabilities,
)
from autoseg.arrays.restore.sources import LogitSource, Regions, RestoredPlane, WholeLogits

__all__ = [
    "LogitSource", "Regions", "RestoredPlane", "WholeLogits", "restore_ensemble", "restore_labels", "restore_planes",
    "restore_probabilities",
]
