"""A line on the terminal that says how far a run is, how fast, and how long it will take."""

import re
from collections.abc import Mapping

from tqdm import tqdm


# More would not fit on a line.
_NUM_PARTS = 4


class ProgressBar:
    """Counts updates; the time that is left is `tqdm`'s estimate.

    Args:
        num_updates: Of the run.
        done: Before a resumption.
        enabled: False in all processes but the first.
    """

    def __init__(self, num_updates: int, done: int, *, enabled: bool) -> None:
        self._bar = tqdm(total=num_updates, initial=done, unit="update", disable=not enabled)

    def advance(self, epoch: int) -> None:
        """Count an update.

        Args:
            epoch: That the update belongs to, from 0.
        """
        self._bar.set_description(f"epoch {epoch + 1}", refresh=False)
        self._bar.update()

    def show(self, values: Mapping[str, float]) -> None:
        """Show loss, its largest parts and images a second, as a line of the log has them."""
        self._bar.set_postfix_str(describe(values))

    def close(self) -> None:
        """Leave the line as it is."""
        self._bar.close()


def describe(values: Mapping[str, float]) -> str:
    """Say what a line of the log says, in short."""
    parts = {
        name.removeprefix("loss_"): value
        for name, value in values.items()
        # Auxiliary levels have a number.
        if name.startswith("loss_") and not re.search(r"_\d+(_|$)", name)
    }
    largest = sorted(parts, key=lambda name: parts[name], reverse=True)[:_NUM_PARTS]
    entries = [f"loss {values['loss']:.3f}"]
    entries += [f"{name} {parts[name]:.3f}" for name in largest]
    return ", ".join([*entries, f"{values['images_per_second']:.1f} images/s"])
