"""Which patch is sample i: recipes are pure functions of seed, fold and number, whatever order they are asked for in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autoseg.contracts import Augmentation
from autoseg.errors import PluginError
from autoseg.plugins import resolve
from autoseg.trainers.augment import AugmentParams, DefaultAugmentation
from autoseg.trainers.growth import Phase, Sizes
from autoseg.types.plan import Ints
from autoseg.types.run import SamplerSpec

TRAINING, VALIDATION = 0, 1  # streams of random numbers: a run's two kinds of samples never share any
ROUNDS = 2  # random numbers that give the order of a round, never those of a sample
WIDE = 1_000_003  # sample numbers per batch where batches differ in size, more than any batch holds


class PatchSource(Protocol):
    """A preprocessed case that can be read in part."""

    @property
    def name(self) -> str:
        """The case."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """z, y, x."""
        ...

    @property
    def locations(self) -> Mapping[int, NDArray[np.integer]]:
        """Sampled voxels (n, 3), n > 0, of each target 1..K that is present; 0: annotated voxels where an ignore label exists."""
        ...

    @property
    def components(self) -> Mapping[int, Sequence[NDArray[np.integer]]]:
        """Voxels (n, 3) of each connected component of each target 1..K that is present; asked for by some samplers only."""
        ...

    def read_image(self, box: tuple[slice, slice, slice], /) -> NDArray[np.float32]:
        """(channel, z, y, x) of a box inside the case."""
        ...

    def read_label(self, box: tuple[slice, slice, slice], /) -> NDArray[np.int16]:
        """(z, y, x) of a box inside the case."""
        ...

    def read_previous(self, box: tuple[slice, slice, slice], /) -> NDArray[np.int16]:
        """(z, y, x) of a box inside the previous stage's segmentation; only asked for where the network takes it as input."""
        ...


@dataclass(frozen=True)
class Request:
    """What a sampler is asked for: the place of one patch.

    `forced` samples must hold foreground, and `turn` counts them within their stream. `key` says which run and stream the sample
    belongs to, for what a sampler must know beyond the one sample (the order of a round, for example).
    """

    patch: tuple[int, int, int]
    forced: bool
    turn: int
    key: tuple[int, ...]


def in_three(patch: Ints) -> tuple[int, int, int]:
    """A patch's size z, y, x; in 2D the first is 1."""
    z, y, x = patch if len(patch) == 3 else (1, *patch)
    return z, y, x


class Sampler(Protocol):
    """Draws places of patches: a pure function of the request and the random numbers of that one sample."""

    def place(self, request: Request, rng: np.random.Generator, /) -> tuple[int, Ints]:
        """The number of the case, and where in it the patch starts (z, y, x; it may lie partly outside)."""
        ...


@dataclass(frozen=True)
class ReferenceSampler:
    """nnU-Net's sampler: cases uniformly, then the classes of the case, then the voxels of the class."""

    cases: Sequence[PatchSource]

    def place(self, request: Request, rng: np.random.Generator, /) -> tuple[int, Ints]:
        """Forced patches are centred on a stored voxel of a class, others lie anywhere in the case (or on an annotated voxel)."""
        number = int(rng.integers(len(self.cases)))
        case = self.cases[number]
        locations = case.locations
        present = sorted(target for target in locations if target > 0)
        if request.forced and present:
            voxels = locations[present[int(rng.integers(len(present)))]]
            return number, centred(case.shape, request.patch, voxels[int(rng.integers(len(voxels)))])
        return number, anywhere(case, request.patch, rng)


@dataclass(frozen=True)
class BalancedSampler:
    """Every target, and every connected component of it, in turn; patches that are not forced lie anywhere in any case.

    Each run of as many forced samples as there are targets in the training cases visits every target once, in an order drawn for
    that round. Visits of a target take the cases that hold it in turn, and visits of a target in a case its components: one that
    is n voxels small comes as often as one a million times larger.
    """

    cases: Sequence[PatchSource]
    holding: Mapping[int, tuple[int, ...]] = field(init=False)  # the cases that hold each target

    def __post_init__(self) -> None:
        holding: dict[int, list[int]] = {}
        for number, case in enumerate(self.cases):
            for target in case.locations:
                if target > 0:
                    holding.setdefault(target, []).append(number)
        object.__setattr__(self, "holding", {target: tuple(holding[target]) for target in sorted(holding)})

    def place(self, request: Request, rng: np.random.Generator, /) -> tuple[int, Ints]:
        """Forced patches are centred on a voxel of the component whose turn it is."""
        if not request.forced or not self.holding:
            number = int(rng.integers(len(self.cases)))
            return number, anywhere(self.cases[number], request.patch, rng)
        visit, target = _in_turn(request.turn, list(self.holding), request.key)
        visit, number = _in_turn(visit, self.holding[target], (*request.key, target))
        case = self.cases[number]
        components = case.components[target]
        _, component = _in_turn(visit, range(len(components)), (*request.key, target, number))
        voxels = components[component]
        return number, centred(case.shape, request.patch, voxels[int(rng.integers(len(voxels)))])


def _in_turn(turn: int, things: Sequence[int], key: tuple[int, ...]) -> tuple[int, int]:
    """Which of `things` has this turn when each round visits all of them in an order of its own; and the round's number."""
    round_, place = divmod(turn, len(things))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, ROUNDS, round_])))
    return round_, things[int(rng.permutation(len(things))[place])]


def anywhere(case: PatchSource, patch: tuple[int, int, int], rng: np.random.Generator) -> Ints:
    """Start of a patch that lies anywhere in a case, centred on an annotated voxel where some are not."""
    locations = case.locations
    if 0 in locations:
        voxels = locations[0]
        return centred(case.shape, patch, voxels[int(rng.integers(len(voxels)))])
    lows = _lows(case.shape, patch)
    return tuple(
        low if s <= p else int(rng.integers(0, s - p + 1)) for s, p, low in zip(case.shape, patch, lows, strict=True)
    )


def centred(shape: Ints, patch: Ints, voxel: Sequence[int] | NDArray[np.integer]) -> Ints:
    """Start of a patch centred on a voxel; it may run past the far borders of the case, but not past the near ones."""
    return tuple(max(low, int(v) - p // 2) for v, p, low in zip(voxel, patch, _lows(shape, patch), strict=True))


def _lows(shape: Ints, patch: Ints) -> Ints:
    return tuple(min(0, -((p - s) // 2)) if s < p else 0 for s, p in zip(shape, patch, strict=True))


SAMPLERS: dict[str, Callable[..., Sampler]] = {"reference": ReferenceSampler, "balanced": BalancedSampler}


def make_sampler(spec: SamplerSpec, cases: Sequence[PatchSource]) -> Sampler:
    """Build the sampler of a run: a built-in one or a plug-in, called as kind(cases, **options).

    Raises:
        PluginError: unknown kind, or options that it does not take.
    """
    kind = resolve(spec.kind, SAMPLERS, "sampler")
    try:
        return kind(cases, **spec.options)
    except TypeError as error:
        raise PluginError(f"sampler {spec.kind!r} does not take the options {spec.options}: {error}") from None


@dataclass(frozen=True)
class Recipe:
    """Sample `index` of a stream: where its patch starts (may lie outside the case) and how it is augmented."""

    index: int
    case: int
    start: Ints
    params: Any
    augmentation: Augmentation

    @property
    def patch(self) -> tuple[int, int, int]:
        """Size of the patch."""
        return self.augmentation.patch


@dataclass(frozen=True)
class Recipes:
    """All recipes of a run, by number.

    With batches of one size, sample k of batch b has the number b * size + k; where they differ in size, b * 1000003 + k.
    The last `foreground` of each batch is forced. There is one augmentation for every size of patch; validation patches, which
    have the size of the run's end, stay as they are and go through `plain`.
    """

    cases: Sequence[PatchSource]
    sampler: Sampler
    augmentations: Mapping[Ints, Augmentation]
    plain: DefaultAugmentation
    sizes: Sizes
    foreground: float
    seed: int
    fold: int

    def batch(self, stream: int, number: int, part: Callable[[int], slice] | None = None) -> list[Recipe]:
        """The recipes of a batch, or of those of its samples that `part` of its size names."""
        phase = self.phase(stream, number)
        width = phase.batch if stream == VALIDATION or self.sizes.constant_batch else WIDE
        wanted = range(phase.batch)[part(phase.batch)] if part else range(phase.batch)
        first_forced = round(phase.batch * (1 - self.foreground))
        turn = self._forced_before(stream, number) - first_forced
        return [self._recipe(stream, number * width + k, phase, k >= first_forced, turn + k) for k in wanted]

    def over(self, total_steps: int) -> Recipes:
        """The recipes of a run of another length."""
        return replace(self, sizes=replace(self.sizes, total_steps=total_steps))

    def phase(self, stream: int, number: int) -> Phase:
        """The sizes of a batch; validation has those of the run's end."""
        return self.sizes.at(number) if stream == TRAINING else self.sizes.phases[-1]

    def _recipe(self, stream: int, index: int, phase: Phase, forced: bool, turn: int) -> Recipe:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.fold, stream, index])))
        augmentation = self.augmentations[phase.patch] if stream == TRAINING else self.plain
        request = Request(augmentation.patch, forced, turn, (self.seed, self.fold, stream))
        case, start = self.sampler.place(request, rng)
        params = augmentation.make_params(rng) if stream == TRAINING else AugmentParams()
        return Recipe(index, case, start, params, augmentation)

    def _forced_before(self, stream: int, number: int) -> int:
        """Forced samples in all batches before this one."""
        phases = self.sizes.phases if stream == TRAINING else self.sizes.phases[-1:]
        begins = [self.sizes.first_step(phase) for phase in phases] if stream == TRAINING else [0]
        ends = [*begins[1:], number]
        spans = [max(0, min(end, number) - begin) for begin, end in zip(begins, ends, strict=True)]
        return sum(span * (p.batch - round(p.batch * (1 - self.foreground))) for span, p in zip(spans, phases, strict=True))
