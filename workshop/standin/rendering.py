"""Scenes of the i-CLEVR kind, rendered with Mitsuba 3.

The scene follows CLEVR (Johnson et al. 2017, https://arxiv.org/abs/1612.06890) as its sequential
variant i-CLEVR uses it (El-Nouby et al. 2019, https://arxiv.org/abs/1811.09845): matte cubes,
spheres and cylinders of one size on a gray ground plane, a sun, ambient light and three area lamps;
the first object is at the origin. Camera and lamps are jittered from scene to scene. Intensities,
sizes and the roughness of the ground plane were fitted to pictures of the real set.

Mitsuba is an optional dependency (requirements-dev.txt); nothing else needs it.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lab7.dataset import IMAGE_SIZE
from lab7.errors import UserError

FULL_SIZE = (320, 240)  # width, height of the original pictures, in which visibility is counted
MIN_VISIBLE_PIXELS = 200  # of each object at FULL_SIZE, CLEVR's own rule
RENDER_SIZE = (128, 96)  # pixels rendered, then squeezed to 64×64 as the course does from 320×240
SAMPLES_PER_PIXEL = 25

REFLECTANCE = dict(  # 8-bit values taken as linear reflectance
    gray=(87, 87, 87), red=(173, 35, 35), blue=(42, 75, 215), green=(29, 105, 20),
    brown=(129, 74, 25), purple=(129, 38, 192), cyan=(41, 208, 208), yellow=(255, 238, 51),
)  # fmt: skip
CUBE_HALF, CUBE_BEVEL = 0.585, 0.09
SPHERE_RADIUS = 0.615
CYLINDER_RADIUS, CYLINDER_HALF, CYLINDER_BEVEL = 0.58, 0.63, 0.05

CAMERA = (7.48, -6.51, 5.34)  # looks at the origin
CAMERA_JITTER = 0.5  # uniform ± on each axis
FIELD_OF_VIEW = 2 * math.degrees(math.atan(16 / 35))  # horizontal, degrees
LAMP_JITTER = 1.0  # uniform ± on each axis
LAMP_SPREAD = 0.15  # a lamp is four tiny squares this far from its center: soft shadows, no body
LAMP_SQUARE = 0.02  # half a side of such a square
LAMPS = (  # position, point aimed at, radiant intensity (r, g, b): key, fill, back
    ((6.45, -2.91, 4.26), (0.25, 1.16, -0.08), (22.7, 20.9, 17.8)),
    ((-4.67, -4.01, 3.01), (1.98, -0.25, 0.89), (4.93, 5.43, 7.15)),
    ((-1.17, 2.65, 5.82), (-0.01, -1.44, 1.48), (14.0, 14.0, 14.0)),
)
LAMP_WEIGHTS = (3.0, 2.0, 2.5)  # how often each is sampled, against 3 for the sun, 2 for ambient
SUN_FROM, SUN_IRRADIANCE = (11.66, -6.63, 25.8), 0.365
AMBIENT_RADIANCE = 0.05
GROUND_REFLECTANCE, GROUND_ROUGHNESS, GROUND_SPECULAR = 0.78, 0.7, 0.177

POSITION_RANGE = 3.0  # objects after the first: uniform in ± this, in both axes
MIN_DISTANCE = 2.5  # between centers
MIN_MARGIN = 0.3  # CLEVR: along the camera's left-right and front-behind axes
FAR_THINNING = 5.0  # fewer objects far behind: kept with probability 1 + front / this


@dataclass(frozen=True)
class SceneObject:
    """One object on the ground: its label, position and rotation about the vertical (degrees)."""

    label: str
    x: float
    y: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """Objects in the order they are added, with offsets of the camera (3,) and the lamps (3, 3)."""

    objects: tuple[SceneObject, ...]
    camera_offset: tuple[float, ...]
    lamp_offsets: tuple[tuple[float, ...], ...]

    def first(self, count: int) -> "Scene":
        """The same scene with only its first `count` objects."""
        return Scene(self.objects[:count], self.camera_offset, self.lamp_offsets)


def sample_scene(labels: Sequence[str], rng: np.random.Generator) -> Scene:
    """Place the labels' objects at random so that each shows at least 200 pixels at 320×240.

    Args:
        labels: One to five labels; the first object is at the origin.
        rng: Source of all randomness.
    """
    while True:
        scene = Scene(
            tuple(_place(labels, rng)),
            tuple(rng.uniform(-CAMERA_JITTER, CAMERA_JITTER, 3)),
            tuple(map(tuple, rng.uniform(-LAMP_JITTER, LAMP_JITTER, (len(LAMPS), 3)))),
        )
        if len(labels) == 1 or visible_pixels(scene).min() >= MIN_VISIBLE_PIXELS:
            return scene


def _place(labels: Sequence[str], rng: np.random.Generator) -> list[SceneObject]:
    """Rejection sampling of positions under CLEVR's distance and margin rules."""
    front = np.array(CAMERA[:2]) / np.linalg.norm(CAMERA[:2])
    axes = np.array([front, [-front[1], front[0]]])
    while True:
        positions = rng.uniform(-POSITION_RANGE, POSITION_RANGE, (len(labels), 2))
        positions[0] = 0
        kept = rng.uniform(size=len(labels)) < 1 + positions @ front / FAR_THINNING
        pairs = itertools.combinations(positions, 2)
        if kept.all() and all(_apart(a - b, axes) for a, b in pairs):
            break
    angles = rng.uniform(0, 360, len(labels))
    return [
        SceneObject(label, float(x), float(y), float(angle))
        for label, (x, y), angle in zip(labels, positions, angles, strict=True)
    ]


def _apart(offset: np.ndarray, axes: np.ndarray) -> bool:
    """Whether two objects this far from each other can both be placed."""
    return np.linalg.norm(offset) >= MIN_DISTANCE and np.abs(axes @ offset).min() >= MIN_MARGIN


def visible_pixels(scene: Scene) -> np.ndarray:
    """Count the pixels that show each object at 320×240, shape (n,)."""
    mi = _mitsuba()
    integrator = {"type": "aov", "aovs": "index:shape_index"}
    image = np.array(mi.render(_build(scene, integrator, FULL_SIZE, 1, lights=False), seed=0))
    index = np.rint(image[..., -1]).astype(int)
    return np.bincount(index.ravel(), minlength=len(scene.objects) + 1)[1 : len(scene.objects) + 1]


def project(scene: Scene) -> np.ndarray:
    """Project the center of each object into the picture.

    Returns:
        (n, 2) float64: pixels from the left and from the top of the 64×64 picture, 0 … 64.
    """
    camera = np.add(CAMERA, scene.camera_offset)
    ahead = -camera / np.linalg.norm(camera)  # it looks at the origin
    right = np.cross(ahead, [0, 0, 1])
    right /= np.linalg.norm(right)
    heights = {"cube": CUBE_HALF, "sphere": SPHERE_RADIUS, "cylinder": CYLINDER_HALF}
    points = [(o.x, o.y, heights[o.label.split()[1]]) for o in scene.objects]
    seen = np.subtract(points, camera) @ np.stack([right, np.cross(right, ahead), ahead], axis=1)
    across, up, depth = seen.T
    half_width = depth * math.tan(math.radians(FIELD_OF_VIEW / 2))
    half_height = half_width * FULL_SIZE[1] / FULL_SIZE[0]
    return IMAGE_SIZE / 2 * np.stack([1 + across / half_width, 1 - up / half_height], axis=1)


def render(scene: Scene, seed: int = 0, samples_per_pixel: int = SAMPLES_PER_PIXEL) -> np.ndarray:
    """Render a scene as the course's pictures look after loading.

    Args:
        scene: What to draw.
        seed: Of the renderer's sampling noise.
        samples_per_pixel: A square number; 25 leave noise of about one gray level.

    Returns:
        uint8 sRGB picture (64, 64, 3), squeezed from 4:3 without keeping the aspect.
    """
    mi = _mitsuba()
    integrator = {"type": "path", "max_depth": 4, "hide_emitters": True}
    linear = mi.render(
        _build(scene, integrator, RENDER_SIZE, samples_per_pixel, seed=seed), seed=seed
    )
    picture = Image.fromarray(_srgb(np.array(linear)[..., :3]))
    return np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))


def _srgb(linear: np.ndarray) -> np.ndarray:
    """Linear radiance to 8-bit sRGB (IEC 61966-2-1)."""
    linear = linear.clip(0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * curve).astype(np.uint8)


@functools.cache
def _mitsuba():
    """Mitsuba with its scalar variant, which needs no compiler and repeats bit for bit."""
    try:
        import mitsuba
    except ImportError:
        raise UserError(
            "rendering needs Mitsuba 3, which is not installed: pip install -r requirements-dev.txt"
        ) from None
    mitsuba.set_variant("scalar_rgb")
    mitsuba.set_log_level(mitsuba.LogLevel.Error)
    return mitsuba


def _build(scene: Scene, integrator: dict, size: tuple[int, int], spp: int, seed=0, lights=True):
    """Assemble the Mitsuba scene; objects come first, so that their shape indices are 1, 2, …"""
    mi = _mitsuba()
    look_at = mi.ScalarTransform4f().look_at
    camera = [c + o for c, o in zip(CAMERA, scene.camera_offset, strict=True)]
    width, height = size
    parts = {f"object{i}": _shape(o) for i, o in enumerate(scene.objects)}
    parts |= {
        "type": "scene",
        "integrator": integrator,
        "ground": {
            "type": "rectangle",
            "to_world": mi.ScalarTransform4f().scale(200),
            "bsdf": {
                "type": "principled",
                "base_color": _rgb(GROUND_REFLECTANCE),
                "roughness": GROUND_ROUGHNESS,
                "specular": GROUND_SPECULAR,
            },
        },
        "sensor": {
            "type": "perspective",
            "fov": FIELD_OF_VIEW,
            "fov_axis": "x",
            "to_world": look_at(camera, [0, 0, 0], [0, 0, 1]),
            "film": {
                "type": "hdrfilm", "width": width, "height": height,
                "rfilter": {"type": "box"}, "component_format": "float32",
            },
            "sampler": {"type": "multijitter", "sample_count": spp, "seed": seed},
        },
    }  # fmt: skip
    parts |= _lights(scene.lamp_offsets) if lights else {}
    # Mitsuba keeps the order of finished parts only; the order decides which light is sampled.
    return mi.load_dict(
        {key: mi.load_dict(part) if isinstance(part, dict) else part for key, part in parts.items()}
    )


def _rgb(value) -> dict:
    return {"type": "rgb", "value": [float(v) for v in np.broadcast_to(value, 3)]}


def _lights(lamp_offsets) -> dict:
    """Sun, ambient light and the lamps.

    Each lamp is four tiny one-sided squares, too small to cast a shadow of their own: the lamps
    of the original (Blender's) have no body.
    """
    mi = _mitsuba()
    transform = mi.ScalarTransform4f
    lights = {
        "ambient": {"type": "constant", "radiance": _rgb(AMBIENT_RADIANCE), "sampling_weight": 2.0},
        "sun": {
            "type": "directional",
            "direction": [-c for c in SUN_FROM],
            "irradiance": _rgb(SUN_IRRADIANCE),
            "sampling_weight": 3.0,
        },
    }
    area = 4 * (2 * LAMP_SQUARE) ** 2
    for k, (position, aim, intensity) in enumerate(LAMPS):
        axis = np.subtract(aim, position)
        center = np.add(position, lamp_offsets[k])
        frame = transform().look_at(list(center), list(center + axis), [0, 0, 1])
        for u, v in itertools.product((-LAMP_SPREAD, LAMP_SPREAD), repeat=2):
            lights[f"lamp{k}{u:+}{v:+}".replace(".", "_")] = {
                "type": "rectangle",
                "to_world": frame
                @ transform().translate([u, v, 0])
                @ transform().scale(LAMP_SQUARE),
                "bsdf": {"type": "diffuse", "reflectance": _rgb(0)},
                "emitter": {
                    "type": "area",
                    "radiance": _rgb(np.divide(intensity, area)),
                    "sampling_weight": LAMP_WEIGHTS[k] / 4,
                },
            }
    return lights


def _shape(item: SceneObject):
    """Mitsuba's shape for one object, standing on the ground."""
    mi = _mitsuba()
    color, kind = item.label.split()
    bsdf = {"type": "diffuse", "reflectance": _rgb(np.divide(REFLECTANCE[color], 255))}
    if kind == "sphere":
        center = [item.x, item.y, SPHERE_RADIUS]
        return {"type": "sphere", "center": center, "radius": SPHERE_RADIUS, "bsdf": bsdf}
    points, normals, faces = _rounded_cube() if kind == "cube" else _rounded_cylinder()
    c, s = math.cos(math.radians(item.angle)), math.sin(math.radians(item.angle))
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    props = mi.Properties()
    props["bsdf"] = mi.load_dict(bsdf)
    mesh = mi.Mesh(kind, len(points), len(faces), has_vertex_normals=True, props=props)
    params = mi.traverse(mesh)
    height = CUBE_HALF if kind == "cube" else CYLINDER_HALF
    params["vertex_positions"] = (points @ rotation.T + [item.x, item.y, height]).ravel()
    params["vertex_normals"] = (normals @ rotation.T).ravel()
    params["faces"] = faces.ravel()
    params.update()
    return mesh


@functools.cache
def _rounded_cube(steps: int = 5):
    """Points, normals, triangles of the bevelled cube: a small sphere swept over a box."""
    slope = np.tan(np.linspace(-np.pi / 4, np.pi / 4, 2 * steps))
    inner = (CUBE_HALF - CUBE_BEVEL) * np.repeat([-1.0, 1.0], steps)
    points, normals, faces = [], [], []
    i, j = (a.ravel() for a in np.indices((2 * steps, 2 * steps)))
    face = np.ones(len(i))
    for axis, sign in itertools.product(range(3), (-1.0, 1.0)):
        direction = np.roll(np.stack([sign * face, slope[i], slope[j]], 1), axis, 1)
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        corner = np.stack([sign * (CUBE_HALF - CUBE_BEVEL) * face, inner[i], inner[j]], 1)
        corner = np.roll(corner, axis, 1)
        faces.append(_grid_triangles(2 * steps, 2 * steps)[:, :: int(sign)] + len(i) * len(points))
        points.append(corner + CUBE_BEVEL * direction)
        normals.append(direction)
    return np.concatenate(points), np.concatenate(normals), np.concatenate(faces)


@functools.cache
def _rounded_cylinder(segments: int = 48, steps: int = 4):
    """Points, normals, triangles of the bevelled cylinder: a profile turned about the z axis."""
    turn = np.linspace(0, np.pi / 2, steps)
    out, up = np.sin(turn), np.cos(turn)
    radius = CYLINDER_RADIUS - CYLINDER_BEVEL * (1 - out)
    height = CYLINDER_HALF - CYLINDER_BEVEL * (1 - up)
    # Columns: radius, z, normal's radius, normal's z.
    top = np.vstack([[0, CYLINDER_HALF, 0, 1], np.stack([radius, height, out, up], 1)])
    profile = np.concatenate([top, top[::-1] * [1, -1, 1, -1]])
    angle = np.linspace(0, 2 * np.pi, segments + 1)[:, None]
    spin = np.cos(angle), np.sin(angle)
    points = np.stack([profile[:, 0] * s for s in spin] + [profile[:, 1] + 0 * angle], -1)
    normals = np.stack([profile[:, 2] * s for s in spin] + [profile[:, 3] + 0 * angle], -1)
    faces = _grid_triangles(segments + 1, len(profile))[:, ::-1]
    return points.reshape(-1, 3), normals.reshape(-1, 3), faces


def _grid_triangles(rows: int, columns: int) -> np.ndarray:
    """Two triangles for each cell of a grid of points, shape (2 (rows - 1)(columns - 1), 3)."""
    corner = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = corner[:-1, :-1], corner[1:, :-1], corner[1:, 1:], corner[:-1, 1:]
    return np.stack([a, b, c, a, c, d], -1).reshape(-1, 3)
