"""Search by cosine similarity, exact and approximate, for videos, moments and near-duplicates."""

import numpy as np
import pytest

from vivit_hf.inference import search
from vivit_hf.inference.feature_files import Features
from vivit_hf.inference.search import (
    NeighbourGraph,
    exact_nearest,
    find_duplicates,
    neighbour_graph,
    search_features,
    unit_vectors,
    video_vectors,
)


def make_features(vectors):
    """Features with these vectors, (videos, hidden), or per step (videos, steps, hidden) a second apart."""
    vectors = np.asarray(vectors, dtype=np.float32)
    count, is_step = len(vectors), vectors.ndim == 3
    steps = vectors.shape[1] if is_step else None
    settings = {"kind": "step" if is_step else "video", "hidden_size": vectors.shape[-1], "num_steps": steps}
    times = np.arange(count * steps, dtype=float).reshape(count, steps) if is_step else None
    nothing = np.full(count, np.nan)
    return Features(tuple(f"{i}.mp4" for i in range(count)), vectors, times, nothing, nothing, settings)


def clustered(count, hidden=32, clusters=500, seed=0):
    """Unit vectors around random centres, as features of videos of a few kinds are."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, hidden))
    return unit_vectors(centres[rng.integers(clusters, size=count)] + 0.4 * rng.standard_normal((count, hidden)))


def test_scores_are_cosine_similarities_the_best_first():
    rng = np.random.default_rng(0)
    vectors, query = rng.standard_normal((700, 20)), rng.standard_normal(20)
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    found = search_features(make_features(vectors), query, top_k=9)
    assert [one.index for one in found] == np.argsort(-cosines)[:9].tolist()
    np.testing.assert_allclose([one.score for one in found], np.sort(cosines)[::-1][:9], atol=1e-6)
    assert all(one.time is None for one in found)


def test_more_results_than_videos_are_all_of_them():
    found = search_features(make_features(np.eye(3)), np.array([0, 1, 0.5]), top_k=10)
    assert [one.index for one in found] == [1, 2, 0]


def test_of_steps_the_best_moment_of_each_video_is_found():
    rng = np.random.default_rng(0)
    vectors, query = rng.standard_normal((60, 7, 20)), rng.standard_normal((3, 20))
    mean = query.mean(axis=0)
    cosines = vectors @ mean / np.linalg.norm(vectors, axis=2) / np.linalg.norm(mean)
    found = search_features(make_features(vectors), query, top_k=60)
    order = np.argsort(-cosines.max(axis=1))
    assert [one.index for one in found] == order.tolist()
    assert [one.time for one in found] == [float(7 * video + cosines[video].argmax()) for video in order]


def test_a_video_with_many_good_moments_does_not_hide_the_others():
    vectors = np.zeros((4, 50, 3))
    vectors[0, :, 0], vectors[1:, :, 1] = 1, 1
    vectors[1:, 20, 0] = [[1], [2], [3]][0]
    found = search_features(make_features(vectors), np.array([1.0, 0, 0]), top_k=3)
    assert found[0].index == 0 and len({one.index for one in found}) == 3


def test_a_query_of_another_size_is_refused():
    for shape in ((4,), (2, 2, 3), ()):
        with pytest.raises(ValueError, match=r"expected \(3,\) or \(steps, 3\)"):
            search_features(make_features(np.eye(3)), np.ones(shape))


def test_a_vector_of_zeros_is_like_nothing():
    found = search_features(make_features([[0, 0], [-1, 0]]), np.array([1.0, 0]))
    assert [(one.index, one.score) for one in found] == [(0, 0.0), (1, -1.0)]


# Near-duplicates


def test_near_duplicates_are_grouped_with_their_best_scores():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((600, 64))
    vectors[500] = 3 * vectors[7]
    vectors[3] = vectors[400] + 0.05 * rng.standard_normal(64)
    vectors[550] = vectors[400] + 0.05 * rng.standard_normal(64)
    first, second = find_duplicates(make_features(vectors), threshold=0.95)
    assert first.indices == (3, 400, 550) and second.indices == (7, 500)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(600)
    np.testing.assert_allclose(first.scores, [cosines[i, [3, 400, 550]].max() for i in first.indices], atol=1e-5)
    np.testing.assert_allclose(second.scores, [1, 1], atol=1e-6)


def test_groups_are_joined_through_a_chain_of_similar_videos():
    angles = np.radians([0, 40, 8, 16, 120])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    (group,) = find_duplicates(make_features(vectors), threshold=np.cos(np.radians(9)))
    assert group.indices == (0, 2, 3)


def test_copies_of_one_video_are_one_group():
    (group,) = find_duplicates(make_features(np.ones((700, 4))))
    assert group.indices == tuple(range(700)) and min(group.scores) == pytest.approx(1)


def test_duplicates_per_step_are_those_of_the_mean():
    steps = np.random.default_rng(0).standard_normal((5, 6, 16))
    steps[4] = steps[1][::-1]
    (group,) = find_duplicates(make_features(steps))
    assert group.indices == (1, 4)


def test_without_duplicates_there_are_no_groups():
    assert find_duplicates(make_features(np.eye(5))) == []


# Many vectors


def test_a_graph_is_used_above_the_limit_alone(monkeypatch, tmp_path):
    vectors = clustered(300)
    assert neighbour_graph(vectors) is None
    monkeypatch.setattr(search, "MOST_EXACT", 299)
    assert isinstance(neighbour_graph(vectors), NeighbourGraph)


def test_the_graph_finds_nearly_all_of_the_exact_neighbours():
    """Measured: a recall of 1.000 among 20,000 vectors of 500 kinds."""
    vectors, queries = np.split(clustered(20_200), [20_000])
    scores, places = exact_nearest(vectors, queries, 10)
    found_scores, found = NeighbourGraph(vectors).nearest(queries, 10)
    recall = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(found, places, strict=True)])
    assert recall >= 0.99
    is_same = found == places
    np.testing.assert_allclose(found_scores[is_same], scores[is_same], atol=1e-5)
    assert (np.diff(found_scores, axis=1) <= 0).all()


def test_search_through_the_graph_gives_the_exact_results():
    features = make_features(clustered(3000).reshape(500, 6, 32))
    graph = NeighbourGraph(unit_vectors(features.vectors.reshape(-1, 32)))
    query = clustered(1, seed=2)[0]
    exact, found = (search_features(features, query, 8, one) for one in (None, graph))
    assert [(one.index, one.time) for one in found] == [(one.index, one.time) for one in exact]
    assert len(search_features(features, query, 500, graph)) >= 495


def test_duplicates_through_the_graph_are_the_exact_ones():
    vectors = np.concatenate([clustered(2000), clustered(2000)[::20]])
    features = make_features(vectors)
    exact = find_duplicates(features, threshold=0.999)
    found = find_duplicates(features, 0.999, NeighbourGraph(video_vectors(features)))
    assert len(exact) == 100 and [one.indices for one in found] == [one.indices for one in exact]


def test_equal_vectors_are_duplicates_at_the_threshold_1():
    vectors = clustered(200, hidden=96)
    features = make_features(3.7 * np.concatenate([vectors, vectors]))
    for graph in (None, NeighbourGraph(video_vectors(features))):
        found = find_duplicates(features, 1.0, graph)
        assert [one.indices for one in found] == [(index, 200 + index) for index in range(200)]


def test_the_graph_is_kept_and_made_anew_for_other_vectors(tmp_path):
    path = tmp_path / "f.parquet.usearch"
    vectors = clustered(500)
    NeighbourGraph(vectors, path)
    written = path.stat().st_mtime_ns
    kept = NeighbourGraph(vectors, path)
    assert path.stat().st_mtime_ns == written and kept.nearest(vectors[:3], 1)[1][:, 0].tolist() == [0, 1, 2]
    one_other = vectors.copy()
    one_other[5] = -vectors[5]
    assert NeighbourGraph(one_other, path).nearest(one_other[5:6], 1)[1].tolist() == [[5]]
    for others in (clustered(500, seed=3), clustered(400), clustered(500, hidden=16)):
        assert NeighbourGraph(others, path).nearest(others[:3], 1)[1][:, 0].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:1000])
    assert NeighbourGraph(vectors, path).nearest(vectors[:3], 1)[1][:, 0].tolist() == [0, 1, 2]


def test_without_usearch_all_vectors_are_compared(monkeypatch, caplog):
    monkeypatch.setattr(search, "MOST_EXACT", 10)
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    monkeypatch.setattr(search.logger, "propagate", True)
    assert neighbour_graph(clustered(11)) is None
    assert "pip install 'vivit-hf[search]'" in caplog.text
