"""Labelled images from formulas: pretraining data without a photograph and without a download.

Three families, each class one fixed formula and each image one random instance of it:

* **fractals**: attractors of iterated function systems, drawn by the chaos game.  The idea of
  pretraining on them is Kataoka et al. 2020 (FractalDB, arXiv 2101.08515); drawing the maps through
  their singular values, so that most systems fill the picture, is Anderson & Farrell 2022
  (arXiv 2110.03091).
* **curves**: strokes along a random closed Fourier curve, or an arc of one.
* **textures**: band-pass noise plus a warped grating, passed through a pointwise function.  They
  teach spectra and orientations, which sparse shapes lack.

Colours are drawn per image and never tell the class.  Everything derives from one seed.
"""

from __future__ import annotations

import numpy as np

from toolkit.datasets import Splits, in_memory

HELD_OUT = 10  # images per class, for validation and again for test


def formula_splits(
    *, fractals: int, curves: int, textures: int, images_per_class: int, size: int, seed: int
) -> Splits:
    """Draw that many classes of each family, `images_per_class` of each for training."""
    names, parts = [], {split: ([], []) for split in ("train", "val", "test")}
    families = {
        "fractal": (_fractals, fractals),
        "curve": (_curves, curves),
        "texture": (_textures, textures),
    }
    for family, (draw, classes) in families.items():
        for number in range(classes):
            label = len(names)
            names.append(f"{family} {number}")
            rng = np.random.default_rng([seed, label])
            pictures = _colourise(rng, draw(rng, images_per_class + 2 * HELD_OUT, size))
            rows = {
                "test": slice(HELD_OUT),
                "val": slice(HELD_OUT, 2 * HELD_OUT),
                "train": slice(2 * HELD_OUT, None),
            }
            for split, chosen in rows.items():
                parts[split][0].append(pictures[chosen])
                parts[split][1].append(np.full(len(pictures[chosen]), label))
    arrays = {split: tuple(map(np.concatenate, lists)) for split, lists in parts.items()}
    return in_memory("formulas", arrays, names)


def _fractals(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """`count` instances of one iterated function system, (count, size, size) in 0..1."""
    while True:
        maps = _contractions(rng)
        probe = _render_points(_chaos_game(rng, maps[None]), size)[0]
        if (probe > 0).mean() > 0.15:  # a few dots in a corner carry no class
            break
    # An instance bends every coefficient by up to 10 %: shapes vary, the class stays recognisable.
    bend = 1 + rng.uniform(-0.1, 0.1, (count, *maps.shape))
    return _render_points(_rotate(rng, _chaos_game(rng, maps[None] * bend)), size)


def _contractions(rng: np.random.Generator) -> np.ndarray:
    """Affine maps (n, 2, 3) whose singular values sum to what fills a picture (2110.03091, sec. 3)."""
    n = int(rng.integers(2, 7))
    angles = rng.uniform(0, 2 * np.pi, (n, 2))
    singular = rng.uniform(0.15, 0.95, (n, 2))
    target = rng.uniform(0.5 * (5 + n), 0.5 * (6 + n)) / (singular[:, 0] + 0.5 * singular[:, 1]).sum()
    singular = np.clip(singular * target / 1.5, 0.1, 0.95)
    left, right = _rotation(angles[:, 0]), _rotation(angles[:, 1])
    linear = left @ (singular[:, :, None] * right)
    return np.concatenate([linear, rng.uniform(-1, 1, (n, 2, 1))], axis=2)


def _rotation(angle: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def _chaos_game(rng: np.random.Generator, maps: np.ndarray, walkers: int = 60, steps: int = 40) -> np.ndarray:
    """Points (count, walkers * kept steps, 2) on the attractors of `maps` (count, n, 2, 3)."""
    count, n = maps.shape[:2]
    weight = np.abs(np.linalg.det(maps[0, :, :, :2])) + 0.02
    point = np.zeros((count, walkers, 2))
    trail = []
    row = np.arange(count)[:, None]
    for step in range(steps):
        chosen = maps[row, rng.choice(n, (count, walkers), p=weight / weight.sum())]
        point = (chosen[..., :2] @ point[..., None])[..., 0] + chosen[..., 2]
        if step >= 10:  # the walk has reached the attractor
            trail.append(point)
    return np.concatenate(trail, axis=1)


def _rotate(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    turn = _rotation(rng.uniform(-0.4, 0.4, len(points)))
    return points @ turn


def _render_points(points: np.ndarray, size: int) -> np.ndarray:
    """Log density of the points on a grid, each picture stretched to 0..1."""
    low, high = np.quantile(points, 0.01, axis=1), np.quantile(points, 0.99, axis=1)
    span = (high - low).max(axis=1)[:, None, None] + 1e-9
    centre = ((high + low) / 2)[:, None]
    cell = np.floor(((points - centre) / span * 0.9 + 0.5) * size).astype(np.int64)
    inside = ((cell >= 0) & (cell < size)).all(axis=2)
    flat = cell[..., 1] * size + cell[..., 0] + np.arange(len(points))[:, None] * size * size
    density = np.bincount(flat[inside], minlength=len(points) * size * size).reshape(-1, size, size)
    grey = np.log1p(density)
    return grey / grey.max(axis=(1, 2), keepdims=True)


def _curves(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """`count` instances of one stroke, (count, size, size) in 0..1."""
    harmonics = np.arange(1, 5)
    weight = rng.standard_normal((2, 2, len(harmonics))) / harmonics**1.2  # (x or y, cos or sin, harmonic)
    start, length = rng.uniform(0, 2 * np.pi), rng.choice([1.0, rng.uniform(0.3, 0.8)])
    # An instance bends every coefficient by about 10 % of the largest, and has a pen of its own.
    bent = weight + 0.1 * np.abs(weight).max() * rng.standard_normal((count, *weight.shape))
    t = start + 2 * np.pi * length * np.linspace(0, 1, 600)
    waves = np.stack([np.cos(harmonics[:, None] * t), np.sin(harmonics[:, None] * t)])  # (2, harmonic, t)
    points = np.einsum("nxch,cht->ntx", bent, waves)
    pen = np.exp(rng.uniform(np.log(0.01), np.log(0.06), (count, 1, 1)))
    extent = np.ptp(points, axis=1).max(axis=1)[:, None, None]
    points = points.repeat(3, axis=1) + pen * extent * rng.standard_normal((count, 3 * len(t), 2))
    return _render_points(_rotate(rng, points), size)


_POINTWISE = (
    lambda x: x,
    lambda x: np.abs(x),
    lambda x: np.tanh(4 * x),
    lambda x: np.sin(3 * x),
    lambda x: np.maximum(x, 0) ** 2,
)


def _textures(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """`count` instances of one texture, (count, size, size) in 0..1."""
    frequency = np.exp(rng.uniform(np.log(0.03), np.log(0.4)))  # cycles per pixel
    bandwidth = rng.uniform(0.15, 0.9)  # of a log-normal radial profile
    orientation, anisotropy = rng.uniform(0, np.pi), rng.choice([0.0, rng.uniform(0, 3)])
    wave = np.exp(rng.uniform(np.log(0.04), np.log(0.35)))
    wave_angle, wave_weight = rng.uniform(0, np.pi), rng.choice([0.0, rng.uniform(0.5, 2)])
    warp = rng.uniform(0, 2)
    pointwise = _POINTWISE[rng.integers(len(_POINTWISE))]

    turn = rng.uniform(-0.2, 0.2, (count, 1, 1))
    zoom = np.exp(rng.uniform(-0.15, 0.15, (count, 1, 1)))
    fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    radius, angle = np.hypot(fx, fy)[None] + 1e-6, np.arctan2(fy, fx)[None]
    profile = np.exp(-((np.log(radius * zoom / frequency) / bandwidth) ** 2))
    profile = profile * np.exp(anisotropy * (np.cos(2 * (angle - orientation - turn)) - 1))
    noise = np.fft.rfft2(rng.standard_normal((count, size, size)))
    field = np.fft.irfft2(noise * profile, s=(size, size))
    field /= field.std(axis=(1, 2), keepdims=True) + 1e-9

    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    direction = wave_angle + turn
    phase = 2 * np.pi * (wave / zoom * (x * np.cos(direction) + y * np.sin(direction)))
    phase = phase + rng.uniform(0, 2 * np.pi, (count, 1, 1)) + warp * field
    grey = pointwise(field + wave_weight * np.sin(phase))
    low, high = np.quantile(grey, [0.02, 0.98], axis=(1, 2), keepdims=True)
    return np.clip((grey - low) / (high - low + 1e-9), 0, 1)


def _colourise(rng: np.random.Generator, grey: np.ndarray) -> np.ndarray:
    """Grey 0..1 (n, s, s) between two random colours, uint8 (n, 3, s, s); half of them stay grey."""
    count = len(grey)
    ends = rng.uniform(0, 255, (2, count, 3, 1, 1))
    ends[:, ::2] = ends[:, ::2].mean(axis=2, keepdims=True)
    # Two nearly equal colours would hide the shape: push the second 100 levels away, towards mid-range.
    too_close = np.abs(ends[0] - ends[1]).mean(axis=1, keepdims=True) < 60
    ends[1] = np.where(too_close, ends[0] + np.where(ends[0] < 128, 100, -100), ends[1])
    picture = ends[0] + grey[:, None] * (ends[1] - ends[0])
    picture += rng.normal(0, rng.uniform(0, 6, (count, 1, 1, 1)), picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)
