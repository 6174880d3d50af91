"""Functions on arrays, without input or output: crop, resample, normalise, tile, restore, measure."""
