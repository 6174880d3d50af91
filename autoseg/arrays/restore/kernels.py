"""The compiled loops of restoring; imported only when there is something to restore.

A source plane is a flat array with an offset and strides (elements) of class and row; columns are adjacent.
"""

from __future__ import annotations

import numpy as np

from autoseg.arrays.restore.scalars import (
    Int,
    Numbers,
    Real,
    as_float,
    as_order,
    exp,
    from_order,
    kernel,
    lerp,
    order_type,
    rounded,
)

_TILE = 8192  # voxels whose best class is kept while classes are passed
_ONE = np.float32(1)
_HALF = np.float32(0.5)


@kernel
def decide_source(
    out: Numbers, peaks: Numbers, first: Int, last: Int, flat: Numbers, offset: Int, by_class: Int, by_row: Int, classes: Int,
    regions: bool, half: bool,
) -> None:
    """Write the decision at rows `first` to `last` - 1 of a source plane to `out` (rows, columns) int16.

    The largest logit of each class in each row goes to `peaks` (rows, classes) float32.
    """
    width = out.shape[1]
    step = max(1, _TILE // width)
    best = np.empty((step, width), order_type(flat))
    for begin in range(first, last, step):
        end = min(last, begin + step)
        for c in range(classes):
            for y in range(begin, end):
                start = offset + c * by_class + y * by_row
                source, row, top = flat[start:start + width], out[y], best[y - begin]
                peak = as_order(source, 0, half)
                if regions:
                    for x in range(width):
                        found, before = as_order(source, x, half), np.int16(0) if c == 0 else row[x]
                        peak = max(peak, found)
                        row[x] = np.int16(c + 1) if found > 0 else before
                elif c == 0:
                    for x in range(width):
                        found = as_order(source, x, half)
                        peak = max(peak, found)
                        top[x], row[x] = found, 0
                else:
                    for x in range(width):
                        found = as_order(source, x, half)
                        peak = max(peak, found)
                        better = found > top[x]
                        top[x] = found if better else top[x]
                        row[x] = np.int16(c) if better else row[x]
                peaks[y, c] = from_order(flat, peak)


@kernel
def _settle(
    row: Numbers, a: Int, b: Int, near: Numbers, far: Numbers, deep: bool, low_x: Numbers, across: bool, mixed: Numbers,
) -> None:
    """Write the decision at each column of the output between source rows a and b, -1 where corners differ."""
    width = near.shape[1]
    first, second, third, fourth = near[a], near[b], far[a], far[b]
    for x in range(width):
        mixed[x] = first[x] if first[x] == second[x] else np.int16(-1)
    if deep:
        for x in range(width):
            mixed[x] = mixed[x] if (first[x] == third[x]) & (first[x] == fourth[x]) else np.int16(-1)
    if across:
        for x in range(width - 1):
            mixed[x] = mixed[x] if mixed[x] == mixed[x + 1] else np.int16(-1)
    for i in range(len(row)):
        row[i] = mixed[low_x[i]]


@kernel
def _spots(
    wanted: Numbers, low_x: Numbers, high_x: Numbers, weight_x: Numbers, places: Numbers, left: Numbers, right: Numbers,
    weight: Numbers,
) -> Int:
    """Gather the columns where `wanted` is negative with their taps, and return how many there are."""
    count = 0
    for x in range(len(wanted)):
        if wanted[x] < 0:
            places[count], left[count], right[count], weight[count] = x, low_x[x], high_x[x], weight_x[x]
            count += 1
    return count


@kernel
def _blend(out: Numbers, begin: Int, end: Int, flat: Numbers, upper: Int, lower: Int, down: Real) -> None:
    """Write columns `begin` to `end` - 1 of a source row between two others, which begin at numbers `upper` and `lower`.

    Unsigned indices spare numba's check for negative ones, which would keep the loop from being vectorised.
    """
    first, one, two = np.uint64(begin), np.uint64(upper + begin), np.uint64(lower + begin)
    if down == 0 or upper == lower:
        for x in range(np.uint64(end - begin)):
            out[first + x] = as_float(flat, one + x)
    else:
        for x in range(np.uint64(end - begin)):
            out[first + x] = lerp(as_float(flat, one + x), as_float(flat, two + x), down)


@kernel
def _interpolated(
    values: Numbers, count: Int, c: Int, a: Int, b: Int, down: Real, left: Numbers, right: Numbers, weight: Numbers,
    deep: Real, flat0: Numbers, plane0: Numbers, flat1: Numbers, plane1: Numbers, front: Numbers, back: Numbers,
) -> None:
    """Write logits of class c at `count` output columns to `values`; `front` and `back` (source width) are scratch."""
    begin, end = np.int64(left[0]), np.int64(right[count - 1]) + 1
    start = plane0[0] + c * plane0[1]
    _blend(front, begin, end, flat0, start + a * plane0[2], start + b * plane0[2], down)
    if deep != 0:
        start = plane1[0] + c * plane1[1]
        _blend(back, begin, end, flat1, start + a * plane1[2], start + b * plane1[2], down)
        for x in range(np.uint64(begin), np.uint64(end)):
            front[x] = lerp(front[x], back[x], deep)
    for i in range(count):
        values[i] = lerp(front[left[i]], front[right[i]], weight[i])


@kernel
def _mark(
    leading: Numbers, regions: bool, count: Int, a: Int, b: Int, left: Numbers, right: Numbers, near: Numbers, far: Numbers,
) -> None:
    """Say which classes win at corners of mixed cells; of regions all that may be are computed in order."""
    leading[:] = False
    if not regions:
        for i in range(count):
            for x in (left[i], right[i]):
                leading[near[a, x]] = leading[near[b, x]] = leading[far[a, x]] = leading[far[b, x]] = True


@kernel
def _compete(values: Numbers, count: Int, c: Int, regions: bool, half: bool, best: Numbers, winner: Numbers) -> None:
    """Let class c win where its value is larger, or equal and no earlier class has it; a region where it is above 0."""
    if half:
        for i in range(count):
            values[i] = rounded(values[i])
    mine = np.int16(c)
    if regions:
        for i in range(count):
            winner[i] = np.int16(mine + 1) if values[i] > 0 else winner[i]
    else:
        for i in range(count):
            better = (values[i] > best[i]) | ((values[i] == best[i]) & (mine < winner[i]))
            best[i] = values[i] if better else best[i]
            winner[i] = mine if better else winner[i]


@kernel
def label_rows(
    out: Numbers, first: Int, last: Int, table: Numbers, classes: Int, regions: bool, half: bool, near: Numbers, far: Numbers,
    low_y: Numbers, high_y: Numbers, weight_y: Numbers, low_x: Numbers, high_x: Numbers, weight_x: Numbers, across: bool,
    deep: Real, flat0: Numbers, plane0: Numbers, peaks0: Numbers, flat1: Numbers, plane1: Numbers, peaks1: Numbers,
) -> None:
    """Write labels of rows `first` to `last` - 1 of an output plane; `near` and `far` are the decisions of its source planes.

    A class whose largest logit in the source rows is below what leading classes reach everywhere cannot win and is passed over.
    """
    width, source = out.shape[1], near.shape[1]
    mixed, front, back = np.empty(source, np.int16), np.empty(source, np.float32), np.empty(source, np.float32)
    settled, places, weight = np.empty(width, np.int16), np.empty(width, np.uint32), np.empty(width, np.float32)
    left, right = np.empty(width, np.uint32), np.empty(width, np.uint32)
    values, best, winner = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.int16)
    pattern, leading = np.empty(width, out.dtype), np.empty(classes, np.bool_)
    count = 0
    for y in range(first, last):
        a, b = np.int64(low_y[y]), np.int64(high_y[y])
        if y == first or low_y[y] != low_y[y - 1] or high_y[y] != high_y[y - 1]:
            _settle(settled, a, b, near, far, deep != 0, low_x, across, mixed)
            count = _spots(settled, low_x, high_x, weight_x, places, left, right, weight)
            _mark(leading, regions, count, a, b, left, right, near, far)
            for x in range(width):
                pattern[x] = table[max(settled[x], 0)]
        line = out[y]
        for x in range(width):
            line[x] = pattern[x]
        if count == 0:
            continue
        for i in range(count):
            best[i], winner[i] = -np.inf, 0
        reached = np.float32(0)
        for late in range(2):
            for c in range(classes):
                if leading[c] == late:
                    continue
                if late:
                    most = max(max(peaks0[a, c], peaks0[b, c]), max(peaks1[a, c], peaks1[b, c]))
                    if most < reached or (regions and most <= 0):
                        continue
                _interpolated(
                    values, count, c, a, b, weight_y[y], left, right, weight, deep, flat0, plane0, flat1, plane1, front, back,
                )
                _compete(values, count, c, regions, half, best, winner)
            if late == 0 and not regions:
                reached = best[0]
                for i in range(count):
                    reached = min(reached, best[i])
        for i in range(count):
            line[places[i]] = table[winner[i]]


@kernel
def settle_rows(
    out: Numbers, first: Int, last: Int, fresh: bool, near: Numbers, far: Numbers, low_y: Numbers, high_y: Numbers,
    low_x: Numbers, across: bool, deep: Real,
) -> None:
    """Write decisions to rows of `out` (rows, columns) int16, -1 where corners, or what stands there unless `fresh`, differ."""
    width = out.shape[1]
    mixed, settled = np.empty(near.shape[1], np.int16), np.empty(width, np.int16)
    for y in range(first, last):
        if y == first or low_y[y] != low_y[y - 1] or high_y[y] != high_y[y - 1]:
            _settle(settled, low_y[y], high_y[y], near, far, deep != 0, low_x, across, mixed)
        line = out[y]
        for x in range(width):
            line[x] = settled[x] if fresh or line[x] == settled[x] else np.int16(-1)


@kernel
def add_rows(
    out: Numbers, top: Int, first: Int, last: Int, settled: Numbers, everywhere: bool, share: Real, scale: Real, regions: bool,
    low_y: Numbers, high_y: Numbers, weight_y: Numbers, low_x: Numbers, high_x: Numbers, weight_x: Numbers,
    deep: Real, flat0: Numbers, plane0: Numbers, flat1: Numbers, plane1: Numbers,
) -> None:
    """Add `share` times the probabilities of logits times `scale` to `out` (classes, rows, columns) float32.

    Row 0 of `out` is output row `top`; only places where `settled` is -1 are computed unless `everywhere`.
    """
    classes, _, width = out.shape
    source = np.int64(high_x[width - 1]) + 1
    front, back = np.empty(source, np.float32), np.empty(source, np.float32)
    places, left, right = np.empty(width, np.uint32), np.empty(width, np.uint32), np.empty(width, np.uint32)
    weight, values = np.empty(width, np.float32), np.empty((classes, width), np.float32)
    largest, total = np.empty(width, np.float32), np.empty(width, np.float32)
    all_columns = np.full(width, -1, np.int16)
    for y in range(first, last):
        wanted = all_columns if everywhere else settled[y]
        count = _spots(wanted, low_x, high_x, weight_x, places, left, right, weight)
        if count == 0:
            continue
        for i in range(count):
            largest[i], total[i] = -np.inf, 0
        for c in range(classes):
            row = values[c]
            _interpolated(
                row, count, c, np.int64(low_y[y]), np.int64(high_y[y]), weight_y[y], left, right, weight, deep,
                flat0, plane0, flat1, plane1, front, back,
            )
            for i in range(count):
                row[i] *= scale
                largest[i] = max(largest[i], row[i])
        for c in range(classes):
            row = values[c]
            if regions:
                for i in range(count):
                    row[i] = share / (_ONE + exp(-row[i]))
            else:
                for i in range(count):
                    row[i] = exp(row[i] - largest[i])
                    total[i] += row[i]
        if not regions:
            for i in range(count):
                total[i] = share / total[i]
        for c in range(classes):
            row, line = values[c], out[c, y - top]
            if not regions:
                for i in range(count):
                    row[i] *= total[i]
            if count == width:
                for i in range(width):
                    line[i] += row[i]
            else:
                for i in range(count):
                    line[places[i]] += row[i]


@kernel
def decide_rows(
    out: Numbers, top: Int, first: Int, last: Int, table: Numbers, settled: Numbers, everywhere: bool, mean: Numbers,
    regions: bool,
) -> None:
    """Write labels of some rows: what is `settled`, else by mean probabilities (classes, rows from `top` on, columns)."""
    classes, _, width = mean.shape
    best, winner = np.empty(width, np.float32), np.empty(width, np.int16)
    for y in range(first, last):
        for x in range(width):
            best[x], winner[x] = _HALF if regions else -np.inf, 0
        for c in range(classes):
            row = mean[c, y - top]
            if regions:
                for x in range(width):
                    winner[x] = np.int16(c + 1) if row[x] > _HALF else winner[x]
            else:
                for x in range(width):
                    better = row[x] > best[x]
                    best[x] = row[x] if better else best[x]
                    winner[x] = np.int16(c) if better else winner[x]
        for x in range(width):
            out[y, x] = table[winner[x] if everywhere or settled[y, x] < 0 else settled[y, x]]
