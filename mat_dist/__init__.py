"""mat_dist: distributed mutual adversarial training (MAT) of several classifiers."""

__version__ = "0.1.0"
