import json
import pickle

import numpy as np
import pytest
import torch

from sgtr_hf.self_supervision.copy_detection import Whitening, copy_accuracy, originals_of
from sgtr_hf.self_supervision.image_retrieval import (
    RelevantImages,
    average_precision,
    read_benchmark,
    retrieval_accuracy,
)


def slow_average_precision(ranks, num_relevant):
    """The trapezoids, one result after the other."""
    total = 0.0
    for found, rank in enumerate(ranks):
        before = 1.0 if rank == 0 else found / rank
        total += (before + (found + 1) / (rank + 1)) / 2
    return total / num_relevant


def slow_figures(order, right, passed_over, cutoffs):
    """AP and precisions of one query, whose junk is taken out of the list by hand."""
    kept = [image for image in order if image not in passed_over]
    ranks = [rank for rank, image in enumerate(kept) if image in right]
    last = max(ranks) + 1
    precisions = []
    for cutoff in cutoffs:
        count = min(cutoff, last)
        precisions.append(sum(rank < count for rank in ranks) / count)
    return slow_average_precision(ranks, len(right)), precisions


def test_average_precision_of_hand_made_rankings():
    labels = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    precision, at = average_precision(labels, torch.tensor([2, 1, 1]), (1, 2))
    # Second: the only right one comes second, (0/1 + 1/2) / 2.
    torch.testing.assert_close(precision, torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64))
    assert at.tolist() == [[1.0, 1.0], [0.0, 0.5], [0.0, 0.0]]


def test_three_difficulties_follow_the_protocol():
    generator = np.random.default_rng(0)
    similarities = torch.tensor(generator.random((12, 40)))
    relevant = []
    for _ in range(12):
        images = generator.permutation(40)[:15].tolist()
        relevant.append(RelevantImages(images[:4], images[4:9], images[9:]))
    results = retrieval_accuracy(similarities, relevant)
    order = similarities.argsort(dim=1, descending=True).tolist()
    parts = {
        "easy": lambda r: (r.easy, {*r.junk, *r.hard}),
        "medium": lambda r: ([*r.easy, *r.hard], {*r.junk}),
        "hard": lambda r: (r.hard, {*r.junk, *r.easy}),
    }
    for difficulty, choose in parts.items():
        slow = [
            slow_figures(row, *choose(answer), (1, 5, 10))
            for row, answer in zip(order, relevant, strict=True)
        ]
        accuracy = results[difficulty]
        assert accuracy.mean_average_precision == pytest.approx(np.mean([ap for ap, _ in slow]))
        assert list(accuracy.mean_precision.values()) == pytest.approx(
            np.mean([at for _, at in slow], axis=0)
        )
        assert accuracy.average_precision == pytest.approx([ap for ap, _ in slow])


def test_queries_without_an_answer_do_not_count():
    similarities = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    relevant = [RelevantImages([0], [], []), RelevantImages([], [], [1])]
    results = retrieval_accuracy(similarities, relevant)
    assert results["medium"].mean_average_precision == 1.0
    assert results["medium"].average_precision == [1.0, None]
    assert results["hard"].mean_average_precision is None


def test_mistaken_answers_are_named():
    with pytest.raises(ValueError, match="answers for 1"):
        retrieval_accuracy(torch.zeros(2, 3), [RelevantImages([0], [], [])])
    with pytest.raises(ValueError, match="names images up to 3, the database has 3"):
        retrieval_accuracy(torch.zeros(1, 3), [RelevantImages([3], [], [])])


def entries():
    answer = {"easy": np.array([1, 0]), "hard": [], "junk": np.array([2]), "bbx": [0.0, 1.0]}
    return {"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [answer]}


def test_a_benchmark_is_read_from_pickle_and_json(tmp_path):
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(entries()))
    plain = json.dumps(entries(), default=lambda array: array.tolist())
    (tmp_path / "gnd.json").write_text(plain)
    benchmark = read_benchmark(tmp_path / "gnd.pkl")
    assert benchmark == read_benchmark(tmp_path / "gnd.json")
    assert benchmark.relevant == [RelevantImages([1, 0], [], [2])]


def test_a_pickle_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="wants to load builtins"):
        read_benchmark(tmp_path / "gnd.pkl")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [("a.json", "{}", "must hold `imlist`"), ("a.json", "no", "cannot be read"),
     ("b.pkl", "no", "cannot be read")],
)  # fmt: skip
def test_other_files_are_refused(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_benchmark(tmp_path / name)


def correlated_features():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    return torch.randn(4000, 6, generator=generator) @ mixing + 3


def test_whitened_features_are_independent_and_equally_wide():
    features = correlated_features()
    whitened = Whitening.fit(features, is_centred=True).apply(features)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(6), atol=1e-3, rtol=0)
    covariance = whitened.T @ whitened / len(whitened)
    torch.testing.assert_close(covariance, torch.eye(6), atol=1e-3, rtol=0)


def test_whitening_of_the_reference_is_not_centred():
    features = correlated_features()
    whitening = Whitening.fit(features)
    product = whitening.projection.double() @ (features.T @ features / len(features)).double()
    torch.testing.assert_close(
        product @ whitening.projection.double().T, torch.eye(6).double(), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(whitening.mean, features.mean(0))


def test_directions_without_variance_do_not_explode():
    features = torch.cat((correlated_features(), torch.zeros(4000, 1)), dim=1)
    assert torch.isfinite(Whitening.fit(features).apply(features)).all()
    assert torch.isfinite(Whitening.fit(features[:1]).apply(features[:1])).all()
    with pytest.raises(ValueError, match="at least one picture"):
        Whitening.fit(features[:0])


def test_copies_are_found_by_what_they_share():
    originals = torch.eye(5)
    copies = originals[[0, 1, 2]] + 0.1
    assert copy_accuracy(copies, originals, [[0], [1], [2]]).mean_average_precision == 1.0
    # The right one comes second: (0/1 + 1/2) / 2.
    wrong = copy_accuracy(torch.tensor([[1.0, 0.5, 0, 0, 0]]), originals, [[1]])
    assert wrong.mean_average_precision == pytest.approx(0.25)
    beyond = copy_accuracy(torch.tensor([[1.0, 0.5, 0, 0, 0]]), originals, [[1]], num_results=1)
    assert beyond.mean_average_precision == 0.0


def test_names_tell_the_original():
    assert originals_of(["x/2001_b.jpg", "200103.png"], ["2000.jpg", "o/200100.jpg"]) == [[1], [1]]
    assert originals_of(["ab"], ["ac"], prefix_length=1) == [[0]]
    with pytest.raises(ValueError, match=r"9999\.jpg has no original: none begins with '9999'"):
        originals_of(["9999.jpg"], ["2000.jpg"])
