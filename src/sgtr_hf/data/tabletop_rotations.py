"""Rotations of the tabletop scenes' bodies."""

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]

# Rotations that bring an own axis upright.
LYING = {
    "z": np.eye(3),
    "x": np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    "y": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]]),
}


def turn_about_vertical(angle: float) -> Array:
    """Rotation matrix of a turn by `angle` radians about the z axis."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def frame_with_axis_up(up: Array, own_axis: int, lean_axis: int) -> Array:
    """A rotation whose column `own_axis` is `up`, with its thin side towards the lean."""
    level = np.zeros(3)
    level[1 - lean_axis] = 1.0
    columns = [np.zeros(3)] * 3
    columns[own_axis] = up
    second, third = (own_axis + 1) % 3, (own_axis + 2) % 3
    columns[second] = level
    columns[third] = np.cross(up, level)
    return np.stack(columns, axis=1)


def quaternion_of(rotation: Array) -> list[float]:
    """x, y, z, w of a rotation matrix (Shepperd's method by the largest diagonal term)."""
    trace = np.trace(rotation)
    candidates = np.array([*np.diag(rotation), trace])
    choice = int(candidates.argmax())
    if choice == 3:
        xyz = [
            rotation[2, 1] - rotation[1, 2],
            rotation[0, 2] - rotation[2, 0],
            rotation[1, 0] - rotation[0, 1],
        ]
        quaternion = np.array([*xyz, 1 + trace])
    else:
        i, j, k = choice, (choice + 1) % 3, (choice + 2) % 3
        quaternion = np.zeros(4)
        quaternion[i] = 1 - trace + 2 * rotation[i, i]
        quaternion[j] = rotation[j, i] + rotation[i, j]
        quaternion[k] = rotation[k, i] + rotation[i, k]
        quaternion[3] = rotation[k, j] - rotation[j, k]
    return [float(value) for value in quaternion / np.linalg.norm(quaternion)]
