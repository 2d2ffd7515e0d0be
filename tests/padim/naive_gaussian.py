"""PaDiM's two equations, one position after the other, with NumPy and SciPy: what the
tests hold the fast code to.
"""

import numpy as np
import scipy.spatial.distance


def naive_statistics(x, epsilon=0.01):
    """Equation 1, one position after the other, by NumPy in float64."""
    x = x.double().numpy()
    covariances = [
        np.cov(x[:, i], rowvar=False).reshape(x.shape[2], -1) for i in range(x.shape[1])
    ]
    return x.mean(0), np.stack(covariances) + epsilon * np.eye(x.shape[2])


def naive_distance(x, mean, covariance):
    """Equation 2, one image and position after the other, by SciPy, with an inverse."""
    inverses = np.linalg.inv(covariance)
    mahalanobis = scipy.spatial.distance.mahalanobis
    return np.array([list(map(mahalanobis, im, mean, inverses)) for im in x])
