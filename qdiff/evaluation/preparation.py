"""Photographs of any size made into the square images that a model was trained on: cut to the middle, then resized.

The order and the arithmetic are those of latent-diffusion's LSUN data sets (Rombach et al. 2022): the largest central
square, from the row and column that integer division gives, in 8 bits; then Pillow's filter, which on the way down
widens with the factor and so averages what it drops. ``docs/evaluation.md`` measures other ways.
"""

from __future__ import annotations

from PIL import Image

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "nearest": Image.Resampling.NEAREST,
}
DEFAULT_FILTER = "bicubic"


def center_square(image: Image.Image) -> Image.Image:
    """The largest central square; where one pixel is over, it is dropped on the right or at the bottom."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def square_image(image: Image.Image, size: int, method: str = DEFAULT_FILTER) -> Image.Image:
    """The central square at ``size`` x ``size``. An image of that size already is returned as it is.

    Args:
        image: of mode L or RGB.
        method: one of :data:`FILTERS`.
    """
    square = center_square(image)
    return square if square.size == (size, size) else square.resize((size, size), FILTERS[method])
