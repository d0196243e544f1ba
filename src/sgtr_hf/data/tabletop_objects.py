"""The twelve classes of the tabletop scenes: shapes, sizes and how they may stand.

Lengths are in decimetres: the physics engine keeps its contact margins for unit-sized bodies, and
centimetre toys in metres would jitter.
"""

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pybullet
import pybullet_data
from numpy.typing import NDArray


ENTITY_NAMES = (
    "table",
    "tray",
    "box",
    "mug",
    "duck",
    "teddy",
    "ball",
    "brick",
    "block",
    "book",
    "can",
    "ring",
)
Array = NDArray[np.float64]
# Rotation that turns the y-up meshes of the wheel z-up.
_Y_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])


@dataclass(frozen=True)
class ObjectKind:
    """How one class is built and placed.

    Args:
        name: Its class.
        length: Range of its longest side.
        shape: Kind of geometry.
        proportions: Sides relative to the longest, for primitives and open boxes.
        mesh: File in `pybullet_data`, for meshes.
        y_up: Whether that mesh has its y axis upwards.
        mesh_texture: Texture file that belongs to the mesh.
        poses: Ways to stand, as axes that may point up ("z" is upright, "x" and "y" lying).
    """

    name: str
    length: tuple[float, float]
    shape: Literal["mesh", "cuboid", "cylinder", "ring", "open_box", "table"]
    proportions: tuple[float, float, float] = (1.0, 1.0, 1.0)
    mesh: str = ""
    y_up: bool = False
    mesh_texture: str = ""
    poses: tuple[str, ...] = ("z",)


KINDS = {
    kind.name: kind
    for kind in (
        ObjectKind("table", (3.0, 4.2), "table", (1.0, 0.72, 0.5)),
        ObjectKind("tray", (1.9, 2.6), "open_box", (1.0, 0.75, 0.12)),
        ObjectKind("box", (1.2, 1.7), "open_box", (1.0, 0.8, 0.55)),
        ObjectKind("mug", (0.8, 1.05), "mesh", mesh="objects/mug.obj", poses=("z", "z", "z", "y")),
        ObjectKind(
            "duck", (0.75, 1.1), "mesh", mesh="duck.obj", y_up=True, mesh_texture="duckCM.png"
        ),
        ObjectKind("teddy", (0.95, 1.4), "mesh", mesh="teddy2_VHACD_CHs.obj", y_up=True),
        ObjectKind("ball", (0.5, 0.85), "mesh", mesh="sphere_smooth.obj"),
        ObjectKind("brick", (0.6, 0.95), "mesh", mesh="lego/lego.obj", y_up=True),
        ObjectKind("block", (0.9, 1.3), "cuboid", (1.0, 0.36, 0.28), poses=("z", "z", "x", "y")),
        ObjectKind("book", (1.2, 1.7), "cuboid", (1.0, 0.72, 0.16), poses=("z", "z", "y")),
        ObjectKind("can", (0.75, 1.1), "cylinder", (0.62, 0.62, 1.0), poses=("z", "z", "z", "x")),
        ObjectKind("ring", (0.8, 1.1), "ring", (1.0, 1.0, 0.24)),
    )
}
NUM_TABLE_PARTS = 5


@dataclass(frozen=True)
class ShapePair:
    """Collision and visual shape of one body, and the half sides of its bounding box."""

    collision: int
    visual: int
    half_sides: Array


@dataclass(frozen=True)
class Mesh:
    """Triangles with texture coordinates, longest side 1, centred on the bounding box."""

    vertices: Array
    indices: NDArray[np.int64]
    texture_coordinates: Array
    normals: Array


def make_shapes(kind: ObjectKind, length: float, client: int) -> ShapePair:
    """Create the shapes of one size of a class; they serve any number of bodies."""
    half_sides = np.array(kind.proportions) * length / 2
    if kind.shape == "mesh":
        return _mesh_shapes(kind, length, client)
    if kind.shape == "cuboid":
        parts = [(np.zeros(3), half_sides)]
    elif kind.shape == "open_box":
        parts = _open_box_parts(half_sides)
    elif kind.shape == "table":
        parts = _table_parts(half_sides)
    elif kind.shape == "cylinder":
        return _cylinder_shapes(half_sides, client)
    else:
        return _ring_shapes(half_sides, client)
    return _cuboid_shapes(parts, half_sides, client)


def inner_half_sides(kind: ObjectKind, half_sides: Array) -> Array:
    """Half sides of the room inside an open box; zeros for other shapes."""
    if kind.shape != "open_box":
        return np.zeros(3)
    return half_sides - _wall(half_sides)


def _wall(half_sides: Array) -> float:
    return 0.03 * float(half_sides.max())


def _open_box_parts(half_sides: Array) -> list[tuple[Array, Array]]:
    """A floor and four walls, each as centre and half sides."""
    x, y, z = half_sides
    wall = _wall(half_sides)
    room_x, room_y = x - 2 * wall, y - 2 * wall
    # No two parts share a face, or the renderer could not tell which one is in front.
    parts = [(np.array([0, 0, wall - z]), np.array([room_x, room_y, wall]))]
    for side in (-1, 1):
        parts.append((np.array([side * (x - wall), 0, 0]), np.array([wall, y, z])))
        parts.append((np.array([0, side * (y - wall), 0]), np.array([room_x, wall, z])))
    return parts


def _table_parts(half_sides: Array) -> list[tuple[Array, Array]]:
    """A top and four legs."""
    x, y, z = half_sides
    top, leg = 0.06 * x, 0.05 * x
    parts = [(np.array([0, 0, z - top]), np.array([x, y, top]))]
    for side_x in (-1, 1):
        for side_y in (-1, 1):
            centre = np.array([side_x * (x - leg), side_y * (y - leg), -top])
            parts.append((centre, np.array([leg, leg, z - top])))
    return parts


def _cuboid_shapes(parts: list[tuple[Array, Array]], half_sides: Array, client: int) -> ShapePair:
    centres = [part[0].tolist() for part in parts]
    halves = [part[1].tolist() for part in parts]
    kinds = [pybullet.GEOM_BOX] * len(parts)
    collision = pybullet.createCollisionShapeArray(
        shapeTypes=kinds,
        halfExtents=halves,
        collisionFramePositions=centres,
        physicsClientId=client,
    )
    visual = pybullet.createVisualShapeArray(
        shapeTypes=kinds,
        halfExtents=halves,
        visualFramePositions=centres,
        physicsClientId=client,
    )
    return ShapePair(collision, visual, half_sides)


def _cylinder_shapes(half_sides: Array, client: int) -> ShapePair:
    radius, height = float(half_sides[0]), float(2 * half_sides[2])
    collision = pybullet.createCollisionShape(
        pybullet.GEOM_CYLINDER, radius=radius, height=height, physicsClientId=client
    )
    visual = pybullet.createVisualShape(
        pybullet.GEOM_CYLINDER, radius=radius, length=height, physicsClientId=client
    )
    return ShapePair(collision, visual, half_sides)


def _ring_shapes(half_sides: Array, client: int) -> ShapePair:
    """A torus; twelve spheres along it take the collisions, so that the hole stays open."""
    tube = float(half_sides[2])
    angles = np.arange(12) * 2 * np.pi / 12
    around = (half_sides[0] - tube) * np.stack((np.cos(angles), np.sin(angles), 0 * angles), axis=1)
    collision = pybullet.createCollisionShapeArray(
        shapeTypes=[pybullet.GEOM_SPHERE] * len(angles),
        radii=[tube] * len(angles),
        collisionFramePositions=around.tolist(),
        physicsClientId=client,
    )
    mesh = _torus_mesh(half_sides[0], tube)
    return ShapePair(collision, _mesh_visual(mesh, client), half_sides)


def _mesh_shapes(kind: ObjectKind, length: float, client: int) -> ShapePair:
    unit = load_mesh(kind.mesh, y_up=kind.y_up)
    mesh = Mesh(unit.vertices * length, unit.indices, unit.texture_coordinates, unit.normals)
    half_sides = np.abs(mesh.vertices).max(axis=0)
    if kind.name == "ball":
        collision = pybullet.createCollisionShape(
            pybullet.GEOM_SPHERE, radius=float(half_sides[0]), physicsClientId=client
        )
    else:
        corners = np.unique(mesh.vertices.round(4), axis=0)
        # Without faces the engine takes the convex hull of the corners.
        collision = pybullet.createCollisionShape(
            pybullet.GEOM_MESH, vertices=corners.tolist(), physicsClientId=client
        )
    return ShapePair(collision, _mesh_visual(mesh, client), half_sides)


def _mesh_visual(mesh: Mesh, client: int) -> int:
    return int(
        pybullet.createVisualShape(
            pybullet.GEOM_MESH,
            vertices=mesh.vertices.tolist(),
            indices=mesh.indices.tolist(),
            uvs=mesh.texture_coordinates.tolist(),
            normals=mesh.normals.tolist(),
            physicsClientId=client,
        )
    )


@cache
def load_mesh(file_name: str, *, y_up: bool) -> Mesh:
    """Read an OBJ file of `pybullet_data`, longest side 1, centred."""
    positions, coordinates, corners = _read_obj(Path(pybullet_data.getDataPath()) / file_name)
    vertices = positions[corners[:, 0]]
    if y_up:
        vertices = vertices @ _Y_UP.T
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    vertices = (vertices - (low + high) / 2) / (high - low).max()
    has_texture = len(coordinates) > 0 and (corners[:, 1] >= 0).all()
    texture = coordinates[corners[:, 1]] if has_texture else _sphere_coordinates(vertices)
    return Mesh(vertices, np.arange(len(vertices)), texture, _smooth_normals(vertices))


def _read_obj(path: Path) -> tuple[Array, Array, NDArray[np.int64]]:
    """Positions, texture coordinates, and per triangle corner the index into both (-1: none)."""
    positions: list[list[float]] = []
    coordinates: list[list[float]] = []
    corners: list[tuple[int, int]] = []
    for line in path.read_text(errors="replace").splitlines():
        kind, *values = line.split() or [""]
        if kind == "v":
            positions.append([float(value) for value in values[:3]])
        elif kind == "vt":
            coordinates.append([float(value) for value in values[:2]])
        elif kind == "f":
            polygon = [_parse_corner(value) for value in values]
            for second, third in itertools.pairwise(polygon[1:]):
                corners.extend((polygon[0], second, third))
    return np.array(positions), np.array(coordinates), np.array(corners, dtype=np.int64)


def _parse_corner(value: str) -> tuple[int, int]:
    position, _, rest = value.partition("/")
    texture = rest.partition("/")[0]
    return int(position) - 1, int(texture) - 1 if texture else -1


def _sphere_coordinates(vertices: Array) -> Array:
    directions = vertices / np.linalg.norm(vertices, axis=1, keepdims=True).clip(min=1e-9)
    longitude = np.arctan2(directions[:, 1], directions[:, 0]) / (2 * np.pi) + 0.5
    latitude = np.arcsin(directions[:, 2].clip(-1, 1)) / np.pi + 0.5
    return np.stack((longitude, latitude), axis=1)


def _smooth_normals(vertices: Array) -> Array:
    """Average the face normals of coinciding corners; vertices come three a face."""
    triangles = vertices.reshape(-1, 3, 3)
    face_normals = np.cross(
        triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    ).repeat(3, axis=0)
    _, places = np.unique(vertices.round(5), axis=0, return_inverse=True)
    places = places.reshape(-1)
    sums = np.zeros((places.max() + 1, 3))
    np.add.at(sums, places, face_normals)
    normals = sums[places]
    return np.asarray(normals / np.linalg.norm(normals, axis=1, keepdims=True).clip(min=1e-12))


def _torus_mesh(radius: float, tube: float, around: int = 20, across: int = 8) -> Mesh:
    """A torus lying in the xy plane; `radius` is the outer one."""
    u, v = np.meshgrid(
        np.arange(around + 1) / around, np.arange(across + 1) / across, indexing="ij"
    )
    angle, turn = 2 * np.pi * u, 2 * np.pi * v
    ring = radius - tube + tube * np.cos(turn)
    points = np.stack((ring * np.cos(angle), ring * np.sin(angle), tube * np.sin(turn)), axis=-1)
    squares = [
        (i, j, i + 1, j, i + 1, j + 1, i, j, i + 1, j + 1, i, j + 1)
        for i in range(around)
        for j in range(across)
    ]
    index = np.array(squares).reshape(-1, 2)
    vertices = points[index[:, 0], index[:, 1]]
    coordinates = np.stack((u, v), axis=-1)[index[:, 0], index[:, 1]]
    return Mesh(vertices, np.arange(len(vertices)), coordinates, _smooth_normals(vertices))
