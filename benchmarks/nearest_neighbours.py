"""Times the search of nearest neighbours beside the matrix product that it cannot do without.

Both see the same features, in turns; the product alone is computed in the same blocks. Run it on an
idle machine:

    python benchmarks/nearest_neighbours.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sgtr_hf.self_supervision.nearest_neighbours import find_neighbours, vote


NUM_CLASSES = 1000
QUERY_ROWS = 250


def multiply(queries: Tensor, bank: Tensor) -> None:
    """Compute all similarities of features of length 1, and keep none."""
    transposed = bank.T
    for rows in queries.split(QUERY_ROWS):
        rows @ transposed


def classify(queries: Tensor, bank: Tensor, labels: Tensor, neighbours: int) -> Tensor:
    """Search and vote, normalisation included."""
    found = find_neighbours(queries, bank, neighbours)
    return vote(found, labels, neighbours, NUM_CLASSES).argmax(1)


def seconds(run: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def make_features(count: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clustered features as a trained model has them, and their classes."""
    centres = torch.randn(NUM_CLASSES, width, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    noise = torch.randn(count, width, generator=generator)
    return normalize(centres[labels] + noise, dim=1), labels


def main() -> None:
    """Print the median times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, default=10000)
    parser.add_argument("--bank", type=int, default=50000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    queries, _ = make_features(options.queries, options.width, generator)
    bank, labels = make_features(options.bank, options.width, generator)
    operations = 2 * options.queries * options.bank * options.width
    print(f"{options.queries} queries, {options.bank} x {options.width} features, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    for neighbours in options.neighbours:
        times: dict[str, list[float]] = {"product": [], "neighbours": []}
        for repeat in range(options.repeats + 1):
            for name, run in (
                ("product", lambda: multiply(queries, bank)),
                ("neighbours", lambda k=neighbours: classify(queries, bank, labels, k)),
            ):
                taken = seconds(run)
                # The first turn warms up.
                if repeat:
                    times[name].append(taken)
        product, search = (statistics.median(taken) for taken in times.values())
        print(
            f"k = {neighbours}: product {product:.2f} s, {operations / product / 1e9:.0f} GFLOP/s; "
            f"classification {search:.2f} s, ratio {search / product:.3f}"
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
