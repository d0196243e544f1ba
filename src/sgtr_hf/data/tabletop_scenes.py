"""Tabletop scenes: bodies dropped by the physics engine, seen by a software camera."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pybullet
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .tabletop_objects import (
    ENTITY_NAMES,
    KINDS,
    NUM_TABLE_PARTS,
    ObjectKind,
    ShapePair,
    inner_half_sides,
    make_shapes,
)
from .tabletop_relations import FLOOR, NEIGHBOUR_GAP, CameraAxes, Contacts, PlacedObject, annotate
from .tabletop_rotations import LYING, frame_with_axis_up, quaternion_of, turn_about_vertical
from .tabletop_textures import random_color, write_textures


NUM_TEXTURES = 60
SIZES_PER_KIND = 4
# 0.45 s: enough to fall over and come to rest.
PHYSICS_STEPS = 80
TIME_STEP = 1 / 180
# Decimetres; the margins of hulls overlap by less.
MAX_PENETRATION = 0.05
# Visible pixels, at 256 x 256, below which an object is not annotated.
MIN_VISIBLE_PIXELS = 90
SMALL_NAMES = ("mug", "duck", "teddy", "ball", "brick", "block", "book", "can", "ring")
LEANING_NAMES = ("book", "book", "block", "brick", "can", "ring")
FITS_IN_BOX = ("duck", "ball", "brick", "block", "can", "ring", "mug")
Array = NDArray[np.float64]


class Scene(NamedTuple):
    """A picture and its annotation."""

    image: Image.Image
    boxes: Array
    """(E, 4) x1, y1, x2, y2 of the visible parts, in pixels."""
    labels: list[int]
    relations: list[tuple[int, int, int]]
    """Subject, object, predicate."""


@dataclass
class _Body:
    kind: ObjectKind
    shapes: ShapePair
    identifier: int


class TabletopRenderer:
    """One physics world that makes scene after scene; each depends on its seed alone.

    Args:
        texture_folder: An empty folder for the textures.
        size: Width and height of the pictures in pixels.
    """

    def __init__(self, texture_folder: Path, size: tuple[int, int] = (256, 256)) -> None:
        self.size = size
        self._identifiers: list[int] = []
        self.client = pybullet.connect(pybullet.DIRECT)
        pybullet.setGravity(0, 0, -98, physicsClientId=self.client)
        pybullet.setPhysicsEngineParameter(
            fixedTimeStep=TIME_STEP,
            numSolverIterations=20,
            deterministicOverlappingPairs=1,
            physicsClientId=self.client,
        )
        self.textures = [
            pybullet.loadTexture(str(path), physicsClientId=self.client)
            for path in write_textures(texture_folder, NUM_TEXTURES)
        ]
        self.shapes = {
            name: [
                make_shapes(kind, float(length), self.client)
                for length in np.linspace(*kind.length, SIZES_PER_KIND)
            ]
            for name, kind in KINDS.items()
        }
        floor_sides = [12, 12, 0.5]
        self._floor_shapes = (
            pybullet.createCollisionShape(
                pybullet.GEOM_BOX, halfExtents=floor_sides, physicsClientId=self.client
            ),
            pybullet.createVisualShape(
                pybullet.GEOM_BOX, halfExtents=floor_sides, physicsClientId=self.client
            ),
        )

    def close(self) -> None:
        """End the physics engine's client."""
        pybullet.disconnect(physicsClientId=self.client)

    def render(self, seed: np.random.SeedSequence) -> Scene:
        """Make the scene that belongs to a seed."""
        generator = np.random.default_rng(seed)
        while True:
            self._identifiers.clear()
            floor = self._add_floor(generator)
            bodies = self._place(generator)
            for _ in range(PHYSICS_STEPS):
                pybullet.stepSimulation(physicsClientId=self.client)
            scene = self._photograph(bodies, generator)
            for body in (floor, *(body.identifier for body in bodies)):
                pybullet.removeBody(body, physicsClientId=self.client)
            # A view with fewer than three things says nothing; the generator goes on from here.
            if len(scene.labels) >= 3 and scene.relations:
                return scene

    def _add_floor(self, generator: np.random.Generator) -> int:
        floor = pybullet.createMultiBody(
            0, *self._floor_shapes, basePosition=[0, 0, -0.5], physicsClientId=self.client
        )
        self._paint(floor, generator, parts=1)
        return int(floor)

    def _place(self, generator: np.random.Generator) -> list[_Body]:
        """Put a table (mostly), things that carry or hold others, and small things."""
        bodies: list[_Body] = []
        anchors = [np.zeros(3)]
        if generator.uniform() < 0.62:
            table = self._add(generator, "table", np.zeros(3), upright=True)
            bodies.append(table)
            anchors.append(np.array([0, 0, 2 * table.shapes.half_sides[2]]))
        spread = (1.3, 0.9) if bodies else (1.5, 1.3)
        for name in generator.choice(
            ["tray", "box", "book", "block", "teddy", ""], 2, p=[0.16, 0.3, 0.2, 0.1, 0.08, 0.16]
        ):
            if name:
                ground = anchors[-1] if generator.uniform() < 0.75 else anchors[0]
                where = ground + self._offset(generator, spread)
                bodies.append(self._add(generator, str(name), where, upright=True))
        for _ in range(int(generator.integers(3, 6))):
            self._add_small(generator, bodies, anchors, spread)
        return bodies

    def _offset(self, generator: np.random.Generator, spread: tuple[float, float]) -> Array:
        return np.array([generator.uniform(-s, s) for s in spread] + [0.02])

    def _add_small(
        self,
        generator: np.random.Generator,
        bodies: list[_Body],
        anchors: list[Array],
        spread: tuple[float, float],
    ) -> None:
        """Add one thing on a ground, on, in or against another thing, or under the table."""
        hosts = [body for body in bodies if body.kind.name != "table"]
        mode = generator.choice(
            ["ground", "stack", "inside", "lean", "below"], p=[0.36, 0.24, 0.16, 0.14, 0.10]
        )
        name = str(generator.choice(SMALL_NAMES))
        boxes = [body for body in hosts if body.kind.name == "box"]
        if mode == "below" and bodies and bodies[0].kind.name == "table":
            where = anchors[0] + self._offset(generator, (1.2, 0.8))
            bodies.append(self._add(generator, name, where))
        elif mode == "inside" and boxes:
            name = str(generator.choice(FITS_IN_BOX))
            bodies.append(self._add_above(generator, name, boxes[-1], scatter=0.15))
        elif mode == "stack" and hosts:
            host = hosts[int(generator.integers(len(hosts)))]
            bodies.append(self._add_above(generator, name, host, scatter=0.35))
        elif mode == "lean" and hosts:
            host = hosts[int(generator.integers(len(hosts)))]
            self._add_leaning(generator, str(generator.choice(LEANING_NAMES)), host, bodies)
        else:
            ground = anchors[-1] if generator.uniform() < 0.8 else anchors[0]
            where = ground + self._offset(generator, spread)
            bodies.append(self._add(generator, name, where))

    def _add_above(
        self, generator: np.random.Generator, name: str, host: _Body, scatter: float
    ) -> _Body:
        low, high = pybullet.getAABB(host.identifier, physicsClientId=self.client)
        centre = (np.array(low) + np.array(high)) / 2
        reach = (np.array(high) - np.array(low)) / 2 * scatter
        where = np.array(
            [
                generator.uniform(centre[0] - reach[0], centre[0] + reach[0]),
                generator.uniform(centre[1] - reach[1], centre[1] + reach[1]),
                high[2] + 0.02,
            ]
        )
        return self._add(generator, name, where)

    def _add_leaning(
        self, generator: np.random.Generator, name: str, host: _Body, bodies: list[_Body]
    ) -> None:
        """Stand a thing on its short side beside the host, tipped towards it."""
        low, high = (
            np.array(corner)
            for corner in pybullet.getAABB(host.identifier, physicsClientId=self.client)
        )
        kind, shapes = KINDS[name], self._draw_shapes(generator, name)
        axis = int(generator.integers(2))
        side = generator.choice([-1.0, 1.0])
        long_side = shapes.half_sides.max()
        tilt = np.radians(generator.uniform(20, 40))
        # The thing's longest side points up and is then tipped by `tilt` towards the host.
        up = np.zeros(3)
        up[axis], up[2] = -side * np.sin(tilt), np.cos(tilt)
        distance = (high[axis] - low[axis]) / 2 + long_side * np.sin(tilt) + 0.12
        where = (low + high) / 2
        where[axis] += side * distance
        where[1 - axis] += generator.uniform(-0.2, 0.2)
        where[2] = low[2] + long_side * np.cos(tilt) + 0.08
        orientation = frame_with_axis_up(up, int(np.argmax(shapes.half_sides)), axis)
        bodies.append(self._create(generator, kind, shapes, where, orientation))

    def _draw_shapes(self, generator: np.random.Generator, name: str) -> ShapePair:
        return self.shapes[name][int(generator.integers(SIZES_PER_KIND))]

    def _add(
        self,
        generator: np.random.Generator,
        name: str,
        ground: Array,
        *,
        upright: bool = False,
    ) -> _Body:
        """Add a thing so that its underside is at `ground`, with a random turn."""
        kind, shapes = KINDS[name], self._draw_shapes(generator, name)
        up_axis = "z" if upright else str(generator.choice(kind.poses))
        turn = generator.uniform(0, 2 * np.pi)
        if name == "table":
            turn = generator.normal(0, 0.25)
        rotation = turn_about_vertical(turn) @ LYING[up_axis]
        height = float(np.abs(rotation[2]) @ shapes.half_sides)
        where = ground + np.array([0, 0, height])
        body = self._create(generator, kind, shapes, where, rotation)
        self._lift_out(body)
        return body

    def _lift_out(self, body: _Body) -> None:
        """Move a new body on top of what it would intersect; physics never untangles the two."""
        for _ in range(3):
            overlapped = [
                other
                for other in self._identifiers
                if other != body.identifier
                and any(
                    point[8] < -MAX_PENETRATION
                    for point in pybullet.getClosestPoints(
                        body.identifier, other, 0, physicsClientId=self.client
                    )
                )
            ]
            if not overlapped:
                return
            tops = [
                pybullet.getAABB(other, physicsClientId=self.client)[1][2] for other in overlapped
            ]
            low, _ = pybullet.getAABB(body.identifier, physicsClientId=self.client)
            position, orientation = pybullet.getBasePositionAndOrientation(
                body.identifier, physicsClientId=self.client
            )
            raised = [position[0], position[1], position[2] + max(tops) - low[2]]
            pybullet.resetBasePositionAndOrientation(
                body.identifier, raised, orientation, physicsClientId=self.client
            )

    def _create(
        self,
        generator: np.random.Generator,
        kind: ObjectKind,
        shapes: ShapePair,
        where: Array,
        rotation: Array,
    ) -> _Body:
        is_table = kind.name == "table"
        volume = float(np.prod(shapes.half_sides))
        identifier = pybullet.createMultiBody(
            0 if is_table else 0.2 + volume,
            shapes.collision,
            shapes.visual,
            basePosition=where.tolist(),
            baseOrientation=quaternion_of(rotation),
            physicsClientId=self.client,
        )
        pybullet.changeDynamics(
            identifier,
            -1,
            lateralFriction=0.9,
            rollingFriction=0.02,
            spinningFriction=0.02,
            linearDamping=0.3,
            angularDamping=0.6,
            physicsClientId=self.client,
        )
        self._paint(identifier, generator, parts=_NUM_PARTS.get(kind.shape, 1), kind=kind)
        self._identifiers.append(int(identifier))
        return _Body(kind, shapes, int(identifier))

    def _paint(
        self,
        body: int,
        generator: np.random.Generator,
        parts: int,
        kind: ObjectKind | None = None,
    ) -> None:
        """Give a body one texture, tinted."""
        texture = self.textures[int(generator.integers(len(self.textures)))]
        tint = [*(0.65 + 0.35 * random_color(generator, (0.0, 0.5))), 1.0]
        if kind is not None and kind.name in ("duck", "teddy", "brick", "mug"):
            # These have a colour of their own: a plain texture, tinted strongly.
            texture = self.textures[5 + 6 * int(generator.integers(len(self.textures) // 6))]
        for shape_index in range(parts):
            pybullet.changeVisualShape(
                body,
                -1,
                shapeIndex=shape_index,
                textureUniqueId=texture,
                rgbaColor=tint,
                physicsClientId=self.client,
            )

    def _photograph(self, bodies: list[_Body], generator: np.random.Generator) -> Scene:
        target, eye = self._aim(bodies, generator)
        view = pybullet.computeViewMatrix(eye.tolist(), target.tolist(), [0, 0, 1])
        width, height = self.size
        projection = pybullet.computeProjectionMatrixFOV(
            generator.uniform(36, 46), width / height, 0.5, 40
        )
        light = np.array([generator.uniform(-4, 4), generator.uniform(-6, 1), 8])
        _, _, pixels, _, mask = pybullet.getCameraImage(
            width,
            height,
            view,
            projection,
            shadow=1,
            lightDirection=light.tolist(),
            lightColor=generator.uniform(0.85, 1.0, 3).tolist(),
            lightDistance=12,
            lightAmbientCoeff=generator.uniform(0.55, 0.8),
            lightDiffuseCoeff=generator.uniform(0.3, 0.5),
            lightSpecularCoeff=generator.uniform(0, 0.3),
            renderer=pybullet.ER_TINY_RENDERER,
            physicsClientId=self.client,
        )
        picture = np.asarray(pixels, dtype=np.uint8).reshape(height, width, 4)[..., :3]
        mask = np.asarray(mask).reshape(height, width)
        visible, boxes, areas = self._visible(bodies, mask)
        away = target - eye
        away[2] = 0
        away /= np.linalg.norm(away)
        camera = CameraAxes(right=np.array([away[1], -away[0], 0]), away=away)
        objects, contacts = self._measure(visible, areas)
        return Scene(
            image=_develop(picture, mask, generator),
            boxes=boxes,
            labels=[ENTITY_NAMES.index(body.kind.name) for body in visible],
            relations=annotate(objects, contacts, camera),
        )

    def _aim(self, bodies: list[_Body], generator: np.random.Generator) -> tuple[Array, Array]:
        """Point and place of the camera: near, and looking down at the middle of the things."""
        middles = []
        for body in bodies:
            low, high = pybullet.getAABB(body.identifier, physicsClientId=self.client)
            middles.append((np.array(low) + np.array(high)) / 2)
        near = [middle for middle in middles if np.abs(middle[:2]).max() < 3]
        target = np.mean(near or middles, axis=0) + generator.normal(0, [0.25, 0.25, 0.1])
        azimuth = -np.pi / 2 + generator.normal(0, 0.6)
        elevation = np.radians(generator.uniform(18, 50))
        distance = generator.uniform(5.5, 8.5)
        direction = np.array(
            [
                np.cos(elevation) * np.cos(azimuth),
                np.cos(elevation) * np.sin(azimuth),
                np.sin(elevation),
            ]
        )
        return target, target + distance * direction

    def _visible(
        self, bodies: list[_Body], mask: NDArray[np.int64]
    ) -> tuple[list[_Body], Array, list[int]]:
        """Bodies with enough visible pixels, their boxes and pixel counts."""
        scale = mask.size / 256**2
        visible, boxes, areas = [], [], []
        for body in bodies:
            is_body = mask == body.identifier
            area = int(np.count_nonzero(is_body))
            if area < MIN_VISIBLE_PIXELS * scale:
                continue
            rows, columns = (np.flatnonzero(is_body.any(axis)) for axis in (1, 0))
            visible.append(body)
            areas.append(area)
            boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        return visible, np.array(boxes, dtype=np.float64).reshape(-1, 4), areas

    def _measure(
        self, bodies: list[_Body], areas: list[int]
    ) -> tuple[list[PlacedObject], Contacts]:
        index_of = {body.identifier: index for index, body in enumerate(bodies)}
        objects = []
        count = len(bodies)
        contacts = Contacts(np.full((count, count), np.inf), np.zeros((count, count)))
        for index, body in enumerate(bodies):
            objects.append(self._place_of(body, areas[index], contacts.sideways, index_of))
            for other in range(index):
                points = pybullet.getClosestPoints(
                    body.identifier,
                    bodies[other].identifier,
                    NEIGHBOUR_GAP,
                    physicsClientId=self.client,
                )
                if points:
                    gap = min(point[8] for point in points)
                    contacts.gap[index, other] = contacts.gap[other, index] = gap
        return objects, contacts

    def _place_of(
        self, body: _Body, area: int, sideways: Array, index_of: dict[int, int]
    ) -> PlacedObject:
        position, quaternion = pybullet.getBasePositionAndOrientation(
            body.identifier, physicsClientId=self.client
        )
        rotation = np.array(pybullet.getMatrixFromQuaternion(quaternion)).reshape(3, 3)
        low, high = pybullet.getAABB(body.identifier, physicsClientId=self.client)
        lifts: dict[int, float] = {}
        for point in pybullet.getContactPoints(bodyA=body.identifier, physicsClientId=self.client):
            other, normal, force = point[2], np.array(point[7]), point[9]
            lifts[other] = lifts.get(other, 0.0) + force * normal[2]
            if other in index_of:
                own = index_of[body.identifier]
                push = force * np.linalg.norm(normal[:2])
                # Only a push that is mostly horizontal holds a leaning thing.
                if abs(normal[2]) < 0.8:
                    sideways[own, index_of[other]] += push
        # Things that lie on a body push it down; only what pushes up carries it.
        carriers = {other: lift for other, lift in lifts.items() if lift > 0}
        carrier = max(carriers, key=lambda other: carriers[other], default=-1)
        nearest_axis = np.abs(rotation[2]).max()
        return PlacedObject(
            name=body.kind.name,
            centre=np.array(position) if body.kind.shape != "mesh" else (np.array(low) + high) / 2,
            half_extents=(np.array(high) - low) / 2,
            half_sides=body.shapes.half_sides,
            rotation=rotation,
            inner_half_sides=inner_half_sides(body.kind, body.shapes.half_sides),
            support=index_of.get(carrier, FLOOR),
            tilt=float(np.degrees(np.arccos(min(nearest_axis, 1.0)))) if _can_lean(body) else 0.0,
            pixel_area=area,
        )


_NUM_PARTS = {"table": NUM_TABLE_PARTS, "open_box": 5}


def _can_lean(body: _Body) -> bool:
    return body.kind.name in LEANING_NAMES


def _develop(
    picture: NDArray[np.uint8], mask: NDArray[np.int64], generator: np.random.Generator
) -> Image.Image:
    """Fill the background, and add exposure, blur and noise."""
    values = picture.astype(np.float64)
    rows = np.linspace(0, 1, picture.shape[0])[:, None, None]
    sky = 255 * (
        rows * random_color(generator, (0.0, 0.4)) + (1 - rows) * random_color(generator, (0, 0.4))
    )
    is_sky = mask < 0
    values[is_sky] = np.broadcast_to(sky, values.shape)[is_sky]
    values *= generator.uniform(0.85, 1.15)
    values += generator.normal(0, 8)
    values += generator.normal(0, generator.uniform(0, 6), values.shape)
    image = Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(float(generator.uniform(0, 0.7))))
