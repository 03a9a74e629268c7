"""k-means on Gram matrices against scikit-learn's on the points themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from merging.kmeans import inertia, kmeans, lloyd, means, plus_plus


def gram(points):
    return torch.tensor(points @ points.T)[None]


def sklearn_labels(points, centres, rounds):
    model = KMeans(len(centres), init=points[centres], n_init=1, max_iter=rounds, tol=0, algorithm="lloyd")
    return model.fit(points).labels_


def blobs(seed, n, groups, width):
    random = np.random.default_rng(seed)
    middle = 3 * random.standard_normal((groups, width))
    return middle[random.integers(groups, size=n)] + random.standard_normal((n, width))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # scikit-learn's, where the rounds end on an empty one
@given(seed=st.integers(0, 10**6), n=st.integers(4, 40), k=st.integers(1, 8), rounds=st.integers(1, 12))
def test_lloyd_assigns_as_scikit_learn_from_the_same_start(seed, n, k, rounds):
    points = blobs(seed, n, 4, 6)
    centres = np.random.default_rng(seed).permutation(n)[: min(k, n)]
    labels = lloyd(gram(points), torch.tensor(centres)[None], rounds)
    np.testing.assert_array_equal(labels[0].numpy(), sklearn_labels(points, centres, rounds))


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_rounds_are_counted_as_scikit_learn_counts_them(rounds):
    points = np.random.default_rng(4).standard_normal((80, 3))  # without groups, so far from settled after three rounds
    centres = np.arange(5)
    labels = lloyd(gram(points), torch.tensor(centres)[None], rounds)
    np.testing.assert_array_equal(labels[0].numpy(), sklearn_labels(points, centres, rounds))
    assert not np.array_equal(labels[0].numpy(), sklearn_labels(points, centres, rounds + 1))


@pytest.mark.parametrize("seed", range(12))
def test_an_empty_cluster_is_refilled_as_scikit_learn_does(seed):
    """Two first centres at one place leave one of them without points."""
    points = blobs(seed, 15, 4, 6)
    points[1] = points[0]
    centres = np.array([0, 1, 5, 8])
    labels = lloyd(gram(points), torch.tensor(centres)[None], 10)
    np.testing.assert_array_equal(labels[0].numpy(), sklearn_labels(points, centres, 10))


@pytest.mark.parametrize("seed", range(4))
def test_no_cluster_stays_empty_where_points_are_distinct(seed):
    points = blobs(seed, 12, 3, 4)
    points[1] = points[0]
    labels = lloyd(gram(points), torch.tensor([[0, 1, 4, 7]]), 20)
    assert labels[0].unique().numel() == 4


@given(seed=st.integers(0, 10**6), n=st.integers(8, 40), k=st.integers(2, 8))
def test_the_result_is_as_good_as_scikit_learns(seed, n, k):
    points = blobs(seed, n, 5, 6)
    labels = kmeans(gram(points), k, restarts=8, rounds=50, seed=0)
    best = KMeans(k, n_init=10, random_state=0).fit(points).inertia_
    assert inertia(gram(points), labels, k).item() <= 1.15 * best + 1e-9


def test_the_best_restart_is_kept():
    points = blobs(3, 40, 8, 3)
    inertias = [inertia(gram(points), kmeans(gram(points), 8, restarts=r, rounds=30, seed=1), 8).item() for r in (1, 4, 16, 64)]
    assert inertias == sorted(inertias, reverse=True)
    assert inertias[-1] < inertias[0]


@given(seed=st.integers(0, 10**6), k=st.integers(1, 5))
def test_inertia_is_the_sum_of_squared_distances_to_the_means(seed, k):
    points = blobs(seed, 12, 3, 5)
    labels = np.random.default_rng(seed).integers(k, size=12)
    wanted = sum(((points[labels == c] - points[labels == c].mean(axis=0)) ** 2).sum() for c in range(k) if (labels == c).any())
    assert inertia(gram(points), torch.tensor(labels)[None], k).item() == pytest.approx(wanted)


def test_means_average_the_members_and_leave_empty_clusters_zero():
    wanted = torch.tensor([[0.5, 0, 0.5, 0], [0, 0, 0, 0], [0, 0.5, 0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(means(torch.tensor([[0, 2, 0, 2]]), 3)[0], wanted)


@given(seed=st.integers(0, 10**6))
def test_the_order_of_the_points_does_not_matter(seed):
    points = blobs(seed, 20, 4, 6)
    order = np.random.default_rng(seed).permutation(20)
    straight = kmeans(gram(points), 4, restarts=3, rounds=20, seed=0)[0][torch.tensor(order)]
    shuffled = kmeans(gram(points[order]), 4, restarts=3, rounds=20, seed=0)[0]
    assert torch.equal(straight, shuffled)


def test_problems_of_a_batch_do_not_touch_each_other():
    many = [blobs(seed, 16, 4, 6) for seed in range(5)]
    batch = torch.cat([gram(points) for points in many])
    together = kmeans(batch, 4, restarts=3, rounds=20, seed=2)
    alone = torch.cat([kmeans(gram(points), 4, restarts=3, rounds=20, seed=2) for points in many])
    assert torch.equal(together, alone)


def test_the_seed_alone_decides_the_draws():
    points = blobs(1, 40, 12, 3)
    torch.manual_seed(1)
    first = kmeans(gram(points), 8, restarts=1, rounds=1, seed=0)
    torch.manual_seed(2)
    assert torch.equal(first, kmeans(gram(points), 8, restarts=1, rounds=1, seed=0))
    assert any(not torch.equal(first, kmeans(gram(points), 8, restarts=1, rounds=1, seed=seed)) for seed in range(1, 5))


@given(seed=st.integers(0, 10**6), k=st.integers(1, 10), distinct=st.integers(1, 10))
def test_first_centres_are_distinct_points_even_among_duplicates(seed, k, distinct):
    points = blobs(seed, distinct, 3, 4)[np.arange(10) % distinct]
    draws = torch.rand(k, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centres = plus_plus(gram(points), draws)[0].tolist()
    assert len(set(centres)) == k
    # Duplicates are taken only once every distinct point is a centre.
    assert len({centre % distinct for centre in centres}) == min(k, distinct)


def test_the_noise_of_a_gram_matrix_makes_no_copy_a_centre():
    """Copies are at distance 0 but for float32 noise: they must not be drawn while there are other points."""
    points = blobs(0, 3, 3, 4)[[0, 0, 0, 1, 2]]
    noise = 1e-8 * torch.arange(25, dtype=torch.float64).reshape(5, 5).cos()
    noisy = gram(points) * (1 + noise + noise.T)
    draws = torch.zeros(3, 1, dtype=torch.float64)  # the first point of any weight at all
    assert plus_plus(noisy, draws)[0].tolist() == [0, 3, 4]


def test_far_points_are_likelier_first_centres_by_the_square_of_their_distance():
    """Points at 0, 1 and 3 on a line; from 0, the draw falls on 1 with 1/10 and on 3 with 9/10."""
    points = np.array([[0.0], [1.0], [3.0]])
    draws = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    second = plus_plus(gram(points).expand(1000, -1, -1), torch.stack([torch.zeros(1000, dtype=torch.float64), draws]))[:, 1]
    assert torch.bincount(second, minlength=3).tolist() == [0, 100, 900]


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_zeros_and_duplicates_are_no_trouble(k):
    points = np.zeros((6, 4))
    points[3:5] = 1.0
    labels = kmeans(gram(points), k, restarts=2, rounds=10, seed=0)[0]
    assert labels.min() >= 0
    assert labels.max() < k
    if k >= 2:
        assert inertia(gram(points), labels[None], k).item() == pytest.approx(0, abs=1e-12)


def test_one_huge_point_hides_no_group():
    points = blobs(2, 12, 1, 5)
    points[:6] += 20
    points[11] = 1e5
    labels = kmeans(gram(points), 3, restarts=4, rounds=20, seed=0)[0].tolist()
    assert len(set(labels[:6])) == len(set(labels[6:11])) == 1
    assert len({labels[0], labels[6], labels[11]}) == 3
