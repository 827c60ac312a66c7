"""Images in files: what they are read as, from their headers alone, and the column that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from interfuse.data.columns import Column, ImageFiles, Look, Pixels
from interfuse.errors import DataError, Problem
from interfuse.extras import require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_KEPT = 2**30  # bytes of decoded images up to which they are kept in memory


def images_of(files: Sequence[Path | None], look: Look, where: str) -> Column:
    """The column of these images, None where there is none: decoded at once where they fit in memory, else batch by batch."""
    mode, size = _look_through([file for file in files if file is not None], look, where)
    column = ImageFiles(files, mode, look, size)
    look.check(1 if mode == "L" else 3, where)
    if len(files) * size[0] * size[1] * (1 if mode == "L" else 3) > _KEPT:
        return column
    there = None if None not in files else np.array([file is not None for file in files])
    return Pixels(column.read(np.arange(len(files))), look, there)


def _look_through(files: Sequence[Path], look: Look, where: str) -> tuple[str, tuple[int, int]]:
    """The mode that all images are read in, and their size; only the files' headers are read."""
    opener = require("PIL.Image").open
    modes: dict[str, Path] = {}
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        try:
            with opener(file) as image:
                modes.setdefault(image.mode, file)
                sizes.setdefault(image.size, file)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                Problem(where, f"{file} isn't an image that can be read ({error})", "replace or remove it")
            ) from None
    deep = [f"{file} (mode {mode})" for mode, file in modes.items() if mode.startswith(("I", "F"))]
    if deep:
        raise DataError(Problem(where, f"more than 8 bits a channel: {', '.join(deep)}", "8 bits, or an npz of floats"))
    if look.size is None and len(sizes) > 1:
        (a, file_a), (b, file_b) = list(sizes.items())[:2]
        wrong = f"image sizes differ: {file_a} is {a[0]}x{a[1]}, {file_b} is {b[0]}x{b[1]}"
        raise DataError(Problem(where, wrong, "set image_size, and all are resized to it"))
    size = (look.size, look.size) if look.size is not None else next(iter(sizes))
    return ("L" if all(mode in ("L", "1") for mode in modes) else "RGB"), size
