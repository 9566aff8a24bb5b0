"""Writing a data set of street scenes in the layout of Cityscapes."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image
from rich.progress import track

from mmseg_imbalance.files import write_atomically
from mmseg_imbalance.scenes.street import make_image

RECIPE = 'longtail_cityscapes.json'
VERSION = 1  # to be raised when the same recipe gives other pixels
# Invented: real city names would make these pictures pass for Cityscapes itself.
CITIES = {'train': ('longtailingen', 'kleinklassen', 'seltenau'), 'val': ('pruefstadt',)}


def paths(out: Path, split: str, index: int) -> tuple[Path, Path]:
    """Where picture and train ids of one image lie."""
    city = CITIES[split][index % len(CITIES[split])]
    name = f'{city}_{index // len(CITIES[split]):06d}_000019'
    return (
        out / 'leftImg8bit' / split / city / f'{name}_leftImg8bit.png',
        out / 'gtFine' / split / city / f'{name}_gtFine_labelTrainIds.png',
    )


def write_image(job: tuple[Path, str, int, tuple[int, int], int]) -> None:
    """Generate one image and write both its files."""
    out, split, index, size, seed = job
    pair = make_image(seed, split, index, size)
    for array, path in zip(pair, paths(out, split, index), strict=True):
        with write_atomically(path, 'wb') as file:
            Image.fromarray(array).save(file, 'PNG')


def claim(out: Path, recipe: dict) -> None:
    """Note the recipe in `out`; ValueError if the folder holds anything made otherwise."""
    note = out / RECIPE
    if out.exists() and not out.is_dir():
        raise ValueError(f'{out} is a file. Give a folder.')
    if note.exists():
        try:
            old = json.loads(note.read_text())
            differing = [key for key in recipe if old.get(key) != recipe[key]]
        except (ValueError, AttributeError) as error:
            raise ValueError(f'{note} cannot be read ({error}). Give another folder.') from error
        if differing:
            was, now = ({key: values.get(key) for key in differing} for values in (old, recipe))
            raise ValueError(f'{out} was made with {was}, not {now}. Give another folder.')
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f'{out} is not empty and holds no {RECIPE}. Give a new or empty folder.')
    with write_atomically(note) as file:
        file.write(json.dumps(recipe, indent=2) + '\n')


def generate(
    out: str | Path,
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = (512, 256),
    seed: int = 0,
    workers: int | None = None,
) -> int:
    """Write what is missing of a generated data set into `out`.

    Args:
        out: folder; new, empty, or begun earlier with the same arguments.
        train, val: number of images of each split.
        size: (width, height) in pixels, at least (64, 32).
        seed: same seed, same pixels.
        workers: processes; None takes one per core, at most 8. More than one needs this module to
            be importable by name.

    Returns:
        Number of images written; 0 if all were there.

    Raises:
        ValueError: a number is out of range; `out` is a file, or holds something else or images
            of other arguments.
    """
    out = Path(out)
    for name, value, least in (
        ('train', train, 1), ('val', val, 1), ('width', size[0], 64), ('height', size[1], 32),
        ('seed', seed, 0), ('workers', 1 if workers is None else workers, 1),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f'{name} is {value}, allowed is {least} or more')
    recipe = {'version': VERSION, 'train': train, 'val': val, 'size': list(size), 'seed': seed}
    claim(out, recipe)
    jobs = [
        (out, split, index, tuple(size), seed)
        for split, count in (('train', train), ('val', val))
        for index in range(count)
        if not all(path.exists() for path in paths(out, split, index))
    ]
    workers = workers or min(os.cpu_count() or 1, 8, 1 + len(jobs) // 8)
    bar = {'description': 'street scenes', 'total': len(jobs), 'disable': not jobs}
    if workers == 1:
        for job in track(jobs, **bar):
            write_image(job)
    else:
        # Not forked from the caller, which may hold threads of torch; where it can be, from a server that has
        # imported this package once.
        method = 'forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn'
        context = multiprocessing.get_context(method)
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for _ in track(pool.map(write_image, jobs, chunksize=4), **bar):
                pass
    return len(jobs)
