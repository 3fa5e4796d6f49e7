"""Draws the demo corpus: moving shapes whose captions describe their motion; a clip is a pure function of its seed."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import numpy as np

# The vocabulary of the corpus. A caption has one word of each group, and describes everything except the position.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 54, 48),
    "green": (58, 184, 78),
    "blue": (52, 98, 232),
    "yellow": (244, 208, 44),
    "white": (244, 244, 240),
    "purple": (160, 66, 206),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS: dict[str, float] = {"slowly": 7.0, "quickly": 12.0}  # percent of the frame's width per second

CLIP_SECONDS = 4.5
SOURCE_FPS = 12.0


@dataclass(frozen=True)
class Style:
    """What makes clips harder than the demo's; every factor is off by default and independent of the others."""

    ground_texture: float = 0.0  # standard deviation of 1/f waves on the ground, pixels in 0 to 1
    shape_texture: float = 0.0  # the same on the shape; it moves with it
    pan: float = 0.0  # largest speed of the camera, in percent of the frame's width per second
    zoom: float = 0.0  # largest change of the camera's scale, in percent per second
    motion_in_caption: bool = True  # False: the caption leaves direction and speed open

    @property
    def digest(self) -> str:
        """Empty for the demo's own style, else eight hexadecimal digits."""
        return "" if self == PLAIN else hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:8]


PLAIN = Style()
_WAVES = 24


@dataclass(frozen=True)
class Scene:
    """The content of one demo clip; positions and radius are fractions of the frame's width."""

    colour: str
    shape: str
    direction: str
    speed: str
    start_xy: tuple[float, float]
    radius: float
    background: tuple[tuple[float, float, float], tuple[float, float, float]]
    background_angle: float
    style: Style = PLAIN
    seed: int = 0  # of what the style draws

    @property
    def caption(self) -> str:
        what = f"a {self.colour} {self.shape}"
        return f"{what} moving {self.direction} {self.speed}" if self.style.motion_in_caption else what


def draw_scene(seed: int, style: Style = PLAIN) -> Scene:
    """Returns the scene of a seed. The shape stays inside the frame for `CLIP_SECONDS` where the camera stands still.

    A style changes neither the shape nor its motion, so scenes of two styles differ in that factor only.
    """
    rng = np.random.default_rng([0x7121, seed])
    direction = str(rng.choice(list(DIRECTIONS)))
    speed = str(rng.choice(list(SPEEDS)))
    radius = float(rng.uniform(0.12, 0.17))
    travel = SPEEDS[speed] / 100 * CLIP_SECONDS
    start = rng.uniform(radius + 0.02, 0.98 - radius, size=2)
    dx, dy = DIRECTIONS[direction]
    for axis, step in enumerate((dx, dy)):
        low, high = radius + 0.02, 0.98 - radius
        if step > 0:
            start[axis] = rng.uniform(low, high - travel)
        elif step < 0:
            start[axis] = rng.uniform(low + travel, high)
    dark = rng.uniform(8, 90, size=3)
    return Scene(
        colour=str(rng.choice(list(COLOURS))),
        shape=str(rng.choice(SHAPES)),
        direction=direction,
        speed=speed,
        start_xy=(float(start[0]), float(start[1])),
        radius=radius,
        background=(tuple(dark.tolist()), tuple((dark + rng.uniform(-8, 70, size=3)).clip(0, 160).tolist())),
        background_angle=float(rng.uniform(0, 2 * np.pi)),
        style=style,
        seed=seed,
    )


def draw_frame(scene: Scene, seconds: float, size: int) -> np.ndarray:
    """Returns one frame of a scene at a time in seconds: uint8 [size, size, 3], edges anti-aliased over one pixel."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(grid, grid)
    style = scene.style
    if style.pan or style.zoom:
        x, y = _through_camera(scene, x, y, seconds)
    slope = (x - 0.5) * np.cos(scene.background_angle) + (y - 0.5) * np.sin(scene.background_angle)
    blend = (slope / np.sqrt(2) + 0.5)[..., None]
    first, second = (np.asarray(c, dtype=np.float32) for c in scene.background)
    background = first * (1 - blend) + second * blend
    if style.ground_texture:
        background = background + 255 * style.ground_texture * _waves(x, y, scene.seed, 1)

    dx, dy = DIRECTIONS[scene.direction]
    travelled = SPEEDS[scene.speed] / 100 * seconds
    u, v = x - (scene.start_xy[0] + dx * travelled), y - (scene.start_xy[1] + dy * travelled)
    cover = shape_cover(scene.shape, u, v, scene.radius, size)[..., None]
    colour = np.asarray(COLOURS[scene.colour], dtype=np.float32)
    if style.shape_texture:
        colour = colour + 255 * style.shape_texture * _waves(u, v, scene.seed, 2)
    return np.rint(background * (1 - cover) + colour * cover).clip(0, 255).astype(np.uint8)


def _through_camera(scene: Scene, x: np.ndarray, y: np.ndarray, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the scene that a camera shows at (x, y); at 0 seconds, and so in the photo, the same."""
    rng = np.random.default_rng([0x7122, scene.seed, 0])
    angle, speed, growth = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1), rng.choice([-1, 1]) * rng.uniform(0.3, 1)
    shift = scene.style.pan / 100 * speed * seconds
    scale = np.exp(scene.style.zoom / 100 * growth * seconds)
    return 0.5 + (x - 0.5) / scale + shift * np.cos(angle), 0.5 + (y - 0.5) / scale + shift * np.sin(angle)


def _waves(x: np.ndarray, y: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """Returns coloured plane waves whose amplitude falls as 1/f, [H, W, 3], of unit standard deviation, defined at all
    places, so that a texture moves by fractions of a pixel without being resampled."""
    rng = np.random.default_rng([0x7122, seed, purpose])
    frequency = np.exp(rng.uniform(np.log(1), np.log(12), _WAVES))  # periods in the frame's width
    angle, phase = rng.uniform(0, 2 * np.pi, (2, _WAVES))
    amplitude = rng.normal(0, 1, (_WAVES, 3)) / frequency[:, None]
    turns = np.multiply.outer(x, frequency * np.cos(angle)) + np.multiply.outer(y, frequency * np.sin(angle))
    texture = np.sin(2 * np.pi * turns + phase) @ amplitude
    return texture / np.sqrt((amplitude**2).sum(0).mean() / 2)


def shape_cover(shape: str, u: np.ndarray, v: np.ndarray, radius: float, size: int) -> np.ndarray:
    """Returns the share of each pixel that a shape covers, at offsets (u, v) from its place; fractions of the frame."""
    # Signed distance to the shape's edge (negative inside), in fractions of the frame.
    if shape == "circle":
        distance = np.hypot(u, v) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(u), np.abs(v)) - 0.88 * radius
    else:
        distance = np.maximum(v - 0.7 * radius, 0.87 * np.abs(u) - 0.5 * v - 0.6 * radius)
    return np.clip(0.5 - distance * size, 0, 1)


def draw_clip(
    seed: int, size: int, fps: float = SOURCE_FPS, seconds: float = CLIP_SECONDS, style: Style = PLAIN
) -> tuple[np.ndarray, str]:
    """Returns one captioned clip: (uint8 [F, size, size, 3], caption)."""
    scene = draw_scene(seed, style)
    times = np.arange(round(seconds * fps)) / fps
    return np.stack([draw_frame(scene, float(t), size) for t in times]), scene.caption
