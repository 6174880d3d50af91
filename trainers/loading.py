"""Reading the patches that recipes ask for, and batches of them in order, whatever the number of threads."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from autoseg.contracts import Augmentation, Batch
from autoseg.errors import RunError
from autoseg.networks.hardware import is_out_of_memory
from autoseg.trainers.augment import DefaultAugmentation, NoAugmentation, make_augmentation
from autoseg.trainers.growth import make_sizes
from autoseg.trainers.sampling import PatchSource, Recipe, Recipes, in_three, make_sampler
from autoseg.types.plan import Configuration, Ints
from autoseg.types.run import TrainSpec

AHEAD_ON_DEVICE = 1  # batches beside the one that trains: they take its memory

Part = Callable[[int], slice]
Sent = tuple["Batch | list[Crop]", "torch.cuda.Event | None"]


@dataclass(frozen=True)
class Crop:
    """What was read for one recipe: tensors that cover its patch, and where the patch centre lies in them.

    `image_czyx` is float32, `label_zyx` int16; `previous_zyx` (int16) is the previous stage's segmentation, where the network
    takes it as input.
    """

    image_czyx: torch.Tensor
    label_zyx: torch.Tensor
    centre: NDArray[np.float64]
    recipe: Recipe
    previous_zyx: torch.Tensor | None = None

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Crop:
        """The crop with every tensor moved."""
        previous = None if self.previous_zyx is None else move(self.previous_zyx)
        return replace(self, image_czyx=move(self.image_czyx), label_zyx=move(self.label_zyx), previous_zyx=previous)


def read_crop(case: PatchSource, recipe: Recipe) -> Crop:
    """Read the box a recipe needs; outside the case the image and the previous segmentation are 0 and the label -1.

    Raises:
        RunError: the case cannot be read.
    """
    low, high = recipe.augmentation.source_box(recipe.start, recipe.params)
    inner = tuple(slice(min(max(a, 0), s), min(max(b, 0), s)) for a, b, s in zip(low, high, case.shape, strict=True))
    box = (inner[0], inner[1], inner[2])
    try:
        image, label = case.read_image(box), case.read_label(box)
        previous = case.read_previous(box) if recipe.augmentation.previous_labels else None
    except OSError as error:
        raise RunError(f"case {case.name} cannot be read any more: {error}") from error
    padding = [
        (s.start - a if s.stop > s.start else b - a, b - s.stop if s.stop > s.start else 0)
        for s, a, b in zip(box, low, high, strict=True)
    ]
    if any(p != (0, 0) for p in padding):
        image = np.pad(image, [(0, 0), *padding])
        label = np.pad(label, padding, constant_values=-1)
        previous = None if previous is None else np.pad(previous, padding)
    centre = np.asarray(recipe.start) + (np.asarray(recipe.patch) - 1) / 2 - np.asarray(low)
    earlier = None if previous is None else torch.from_numpy(previous)
    return Crop(torch.from_numpy(image), torch.from_numpy(label), centre, recipe, earlier)


class Loader:
    """Batches in order, read and augmented ahead by threads; with `threads` 0 they are made when asked for.

    In main memory a batch is made by one thread from beginning to end. For another device the threads only read crops into pinned
    memory; one more thread sends them and augments them there, on a stream of its own, while the device trains.
    """

    def __init__(self, recipes: Recipes, masked: tuple[bool, ...], device: torch.device, threads: int, dims: int) -> None:
        self.recipes, self.masked, self.device, self.dims = recipes, masked, device, dims
        self._pool = ThreadPoolExecutor(threads, "loader") if threads else None
        self._ahead = 2 * threads
        every = recipes.augmentations.values()
        self._here = device.type == "cpu" or any(getattr(a, "in_main_memory", False) for a in every)
        self._sender = ThreadPoolExecutor(1, "loader-sender") if threads and device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if self._sender else None  # type: ignore[no-untyped-call]

    def batches(self, stream: int, first: int, stop: int, part: Part | None = None) -> Generator[Batch]:
        """Yield batch `first`, `first + 1`, ... up to but not including `stop`, or of each the `part` that one of several ranks
        takes: a slice of its samples, as a function of its size.

        Raises:
            RecordError, RunError: a case is damaged or has vanished; the message names it.
        """
        if self._pool is None:
            for number in range(first, stop):
                yield self._finish(self._read(stream, number, part))
            return
        reading: deque[Future[list[Crop] | Batch]] = deque()
        sending: deque[Future[Sent]] = deque()
        following = first
        try:
            while reading or sending or following < stop:
                while following < stop and len(reading) < self._ahead:
                    reading.append(self._pool.submit(self._read, stream, following, part))
                    following += 1
                if self._sender is None:
                    yield self._finish(reading.popleft().result())
                    continue
                while reading and len(sending) <= AHEAD_ON_DEVICE:
                    sending.append(self._sender.submit(self._send, reading.popleft()))
                yield self._received(sending.popleft().result())
        finally:
            for waiting in (reading, sending):
                for future in waiting:
                    future.cancel()

    def close(self) -> None:
        """Stop the threads."""
        for pool in (self._pool, self._sender):
            if pool:
                pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, stream: int, number: int, part: Part | None) -> list[Crop] | Batch:
        """What a thread does for one batch: crops, or all of it where the augmentation works in main memory."""
        recipes = self.recipes
        crops = [read_crop(recipes.cases[recipe.case], recipe) for recipe in recipes.batch(stream, number, part)]
        if self._here:
            with one_torch_thread():
                batch = self._augmented(crops)
            return replace(batch, image=batch.image.pin_memory(), label=batch.label.pin_memory()) if self._sender else batch
        return [crop.moved(torch.Tensor.pin_memory) for crop in crops] if self._sender else crops

    def _finish(self, made: list[Crop] | Batch) -> Batch:
        """The batch on its device."""
        batch = made if isinstance(made, Batch) else self._augmented(made)
        return replace(batch, image=self._sent(batch.image), label=self._sent(batch.label))

    def _send(self, reading: Future[list[Crop] | Batch]) -> Sent:
        """The batch on its device and when it is there; where memory does not suffice what was read, and None."""
        made = reading.result()
        try:
            with torch.cuda.stream(self._stream):
                batch = self._finish(made)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
                return batch, event
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return made, None

    def _received(self, sent: Sent) -> Batch:
        """A batch that the stream which trains may use."""
        batch, event = sent
        if event is None or not isinstance(batch, Batch):  # between two steps there is more room than beside one
            torch.cuda.empty_cache()
            return self._finish(batch)
        training = torch.cuda.current_stream(self.device)
        training.wait_event(event)
        for tensor in (batch.image, batch.label):
            tensor.record_stream(training)
        return batch

    def _augmented(self, crops: list[Crop]) -> Batch:
        near = crops if self._here else [crop.moved(self._sent) for crop in crops]
        samples = [
            crop.recipe.augmentation.apply(
                crop.image_czyx, crop.label_zyx, crop.centre, crop.recipe.params, self.masked, crop.previous_zyx
            )
            for crop in near
        ]
        image, label = (torch.stack(column) for column in zip(*samples, strict=True))
        if self.dims == 2:
            image, label = image[:, :, 0], label[:, 0]
        return Batch(image, label, tuple(self.recipes.cases[crop.recipe.case].name for crop in crops))

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch computes in this thread alone: a sum then is the same bits however many cores and threads there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Wanted:
    """Whose patches a loader reads: what a run is, apart from its cases."""

    spec: TrainSpec
    configuration: Configuration
    fold: int
    channels: int
    previous_labels: int


def make_loader(wanted: Wanted, cases: Sequence[PatchSource], device: torch.device, threads: int) -> Loader:
    """Build the loader of a run's training or validation cases.

    Raises:
        PluginError: growth, sampler or augmentation is unknown or does not take its options.
    """
    spec, configuration = wanted.spec, wanted.configuration
    sizes = make_sizes(spec.growth, configuration, spec.batch_size or configuration.batch_size, spec.total_steps)
    mirror = spec.mirror_axes(configuration)

    def augmentation(patch: Ints) -> Augmentation:
        own = configuration.model_copy(update={"patch_size": patch})
        return make_augmentation(spec.augment, own, wanted.channels, mirror, wanted.previous_labels)

    planned = augmentation(configuration.patch_size)
    augmentations = {
        phase.patch: replace(planned, patch=in_three(phase.patch)) if isinstance(planned, DefaultAugmentation)  # keeps its rules
        else augmentation(phase.patch)
        for phase in sizes.phases
    }
    plain = NoAugmentation.from_configuration(configuration, wanted.channels, (), wanted.previous_labels)
    sampler = make_sampler(spec.sampler, cases)
    recipes = Recipes(cases, sampler, augmentations, plain, sizes, spec.sampler.foreground, spec.seed, wanted.fold)
    return Loader(recipes, configuration.use_mask_for_norm, device, threads, configuration.dims)
