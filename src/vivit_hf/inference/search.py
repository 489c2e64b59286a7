"""
Search features of videos by cosine similarity: the videos or moments that are most like a query, and near-duplicates.

Up to `MOST_EXACT` vectors are compared exactly. Above, usearch (an HNSW graph, Malkov and Yashunin, arXiv:1603.09320)
finds the neighbours, and their scores are exact.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.whole_files import written_whole
from .feature_files import Features


logger = logging.get_logger(__name__)

MOST_EXACT = 100_000
DUPLICATE_SCORE = 0.99
_BLOCK = 256  # rows of scores in memory at once
_ROUNDING = 1e-6  # by which the similarity of equal vectors can fall below 1
_NEIGHBOURS = 32  # per vector, among which an approximate search for duplicates looks


@dataclass(frozen=True)
class Match:
    """The index of a video, its cosine similarity to the query, and for features per step the time of the best step."""

    index: int
    score: float
    time: float | None = None


@dataclass(frozen=True)
class DuplicateGroup:
    """Near-duplicates: the indices of the videos, and the cosine similarity of each to the one most like it."""

    indices: tuple[int, ...]
    scores: tuple[float, ...]


class NeighbourGraph:
    """
    Unit vectors in a graph of neighbours, for approximate search.

    Args:
        vectors: float32 (vectors, hidden), of length 1.
        path: a file that keeps the graph. It is read if it holds these vectors, otherwise it is written.

    Raises:
        ImportError: without usearch.
    """

    def __init__(self, vectors: np.ndarray, path: str | os.PathLike[str] | None = None):
        from usearch.index import Index

        self.vectors = vectors
        # The nodes that are looked at for each vector: 2 to 4 times usearch's own numbers, for recall.
        settings: Any = {"ndim": vectors.shape[1], "metric": "ip", "dtype": "f32"}
        settings |= {"expansion_add": 128, "expansion_search": 128}
        self.graph: Any = Index(**settings)
        if path is not None and Path(path).exists():
            if self._holds(vectors, path):
                return
            self.graph = Index(**settings)
        self.graph.add(np.arange(len(vectors)), vectors)
        if path is not None:
            try:
                with written_whole(path) as unfinished:
                    self.graph.save(os.fspath(unfinished))
            except OSError as error:
                logger.warning(f"{os.fspath(path)} cannot be written ({error.strerror}): the graph is not kept.")

    def _holds(self, vectors: np.ndarray, path: str | os.PathLike[str]) -> bool:
        """Load a file, and return whether it holds these vectors."""
        try:
            self.graph.load(os.fspath(path))
        except RuntimeError:  # it is damaged
            return False
        if len(self.graph) != len(vectors) or self.graph.ndim != vectors.shape[1]:
            return False
        starts = range(0, len(vectors), _BLOCK)
        blocks = (
            (np.arange(start, min(start + _BLOCK, len(vectors))), vectors[start : start + _BLOCK]) for start in starts
        )
        return all(np.array_equal(self.graph.get(keys), block) for keys, block in blocks)

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what `exact_nearest` returns, for almost all of the nearest vectors."""
        found = self.graph.search(queries, k)
        places = np.asarray(found.keys).reshape(len(queries), -1).astype(np.int64)
        counts = getattr(found, "counts", places.shape[1])  # a single query has no places to fill up
        is_found = np.arange(places.shape[1]) < np.reshape(counts, (-1, 1))
        places = np.where(is_found, places, 0)
        scores = np.where(is_found, np.einsum("qkh,qh->qk", self.vectors[places], queries), -1)
        order = np.argsort(-scores, axis=1, kind="stable")
        return np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)


def exact_nearest(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Return the cosine similarities and indices of the nearest vectors, (queries, k) each, the nearest first.

    Args:
        vectors: float32 (vectors, hidden), of length 1.
        queries: float32 (queries, hidden), of length 1.
        k: neighbours, at most as many as there are vectors.
    """
    scores, places = [], []
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK] @ vectors.T
        best = np.sort(np.argpartition(-block, k - 1, axis=1)[:, :k], axis=1)
        found = np.take_along_axis(block, best, 1)
        order = np.argsort(-found, axis=1, kind="stable")
        scores.append(np.take_along_axis(found, order, 1))
        places.append(np.take_along_axis(best, order, 1))
    return np.concatenate(scores), np.concatenate(places)


def search_features(
    features: Features, query: np.ndarray, top_k: int = 5, graph: NeighbourGraph | None = None
) -> list[Match]:
    """
    Return the videos most like a query, the best first; of features per step, each with its best moment.

    Args:
        features: the features of the videos.
        query: float (hidden,), or (steps, hidden), whose mean is searched for.
        top_k: videos to return.
        graph: for an approximate search, see `neighbour_graph`; None compares all vectors.

    Raises:
        ValueError: if the query has another size than the features.
    """
    hidden = features.settings["hidden_size"]
    if query.shape[-1:] != (hidden,) or query.ndim > 2:
        raise ValueError(f"The query has the shape {query.shape}; expected ({hidden},) or (steps, {hidden}).")
    wanted = unit_vectors(query.reshape(-1, hidden).mean(axis=0, keepdims=True))
    steps = features.settings["num_steps"] or 1
    vectors = graph.vectors if graph is not None else unit_vectors(features.vectors.reshape(-1, hidden))
    count = len(vectors)
    best: dict[int, Match] = {}
    num_found = min(count, top_k * steps)  # of these, several can be steps of one video
    while num_found:
        found = exact_nearest(vectors, wanted, num_found) if graph is None else graph.nearest(wanted, num_found)
        for score, place in zip(found[0][0].tolist(), found[1][0].tolist(), strict=True):
            video, step = divmod(place, steps)
            time = None if features.times is None else float(features.times[video, step])
            best.setdefault(video, Match(video, score, time))
        num_found = 0 if len(best) >= top_k or num_found == count else min(count, 2 * num_found)
    return list(best.values())[:top_k]


def find_duplicates(
    features: Features, threshold: float = DUPLICATE_SCORE, graph: NeighbourGraph | None = None
) -> list[DuplicateGroup]:
    """
    Return groups in which every video has a near-duplicate: another video whose similarity is the threshold or more.

    Args:
        features: the features of the videos; those per step are averaged over the steps.
        threshold: cosine similarity, up to 1.
        graph: of the videos, for an approximate search, see `neighbour_graph`; None compares all pairs.
    """
    vectors = graph.vectors if graph is not None else video_vectors(features)
    labels = np.arange(len(vectors))
    scores = np.full(len(vectors), -np.inf, dtype=np.float32)
    for first, second, score in _close_pairs(vectors, threshold, graph):
        np.maximum.at(scores, first, score)
        np.maximum.at(scores, second, score)
        for row in np.unique(first[labels[first] != labels[second]]):
            joined = np.append(labels[second[first == row]], labels[row])
            labels[np.isin(labels, joined)] = joined.min()
    members = np.flatnonzero(np.isfinite(scores))
    groups = [members[labels[members] == label] for label in np.unique(labels[members])]
    return [DuplicateGroup(tuple(group.tolist()), tuple(scores[group].tolist())) for group in groups]


def _close_pairs(
    vectors: np.ndarray, threshold: float, graph: NeighbourGraph | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield pairs of different vectors with at least this similarity: the indices of both, and the similarity."""
    for start in range(0, len(vectors), _BLOCK):
        rows = vectors[start : start + _BLOCK]
        if graph is None:
            block = rows @ vectors[start:].T
            first, second = np.nonzero(np.triu(block >= threshold - _ROUNDING, k=1))
            yield first + start, second + start, block[first, second]
        else:
            found, places = graph.nearest(rows, min(len(vectors), _NEIGHBOURS))
            first = np.arange(start, start + len(rows))[:, None].repeat(places.shape[1], 1)
            is_pair = (found >= threshold - _ROUNDING) & (first != places)
            yield first[is_pair], places[is_pair], found[is_pair]


def neighbour_graph(vectors: np.ndarray, path: str | os.PathLike[str] | None = None) -> NeighbourGraph | None:
    """
    Return the graph for an approximate search; None for so few vectors that all are compared, or without usearch.

    Args:
        vectors: float32 (vectors, hidden), of length 1.
        path: see `NeighbourGraph`.
    """
    if len(vectors) <= MOST_EXACT:
        return None
    try:
        return NeighbourGraph(vectors, path)
    except ImportError:
        logger.warning(f"{len(vectors)} vectors are compared exactly: pip install 'vivit-hf[search]' is faster.")
        return None


def video_vectors(features: Features) -> np.ndarray:
    """Return a unit vector per video, float32 (videos, hidden); per step, that of the mean."""
    is_step = features.vectors.ndim == 3
    return unit_vectors(features.vectors.mean(axis=1) if is_step else features.vectors)


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (..., hidden) scaled to length 1, float32; zeros stay zeros."""
    vectors = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
