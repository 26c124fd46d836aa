"""Handwritten digits for the examples: scikit-learn's 1,797 images, which it brings along, so that nothing is downloaded."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

SIDE = 10  # Pixels of a prepared image, which has an empty margin: 8 x 8 in the middle of 10 x 10.
CLASSES = 10
HELD_OUT = 360  # Images that no model is trained on.


class Digits(NamedTuple):
    """Images as rows of SIDE x SIDE pixels from -1 to 1, in float32; labels from 0 to 9."""

    images: Array
    labels: Array
    test_images: Array
    test_labels: Array


def raw() -> tuple[Array, Array]:
    """Return all images as they are, 8 x 8 pixels from 0 to 16, in an order in which the last HELD_OUT are held out; labels."""
    from sklearn.datasets import load_digits  # here: workers use this module too, and it takes seconds to import

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    order = np.roll(order, -HELD_OUT)
    return digits.images[order].astype(np.uint8), digits.target[order]


def prepare(images: Array) -> Array:
    """Return raw images with a margin of a pixel, as rows of numbers from -1 to 1."""
    scaled = images.astype(np.float32) / 8 - 1
    padded = np.pad(scaled, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    return padded.reshape(len(images), -1)


def load() -> Digits:
    """Return images to train on, each in nine copies that are shifted by half a pixel or not at all, and those held out."""
    images, labels = raw()
    rows = prepare(images)
    training = rows[:-HELD_OUT].reshape(-1, SIDE, SIDE)
    shifted = [
        # The mean of an image and itself one pixel further is a shift by half a pixel.
        (training + np.roll(training, (up, left), (1, 2))) / 2
        for up in (-1, 0, 1)
        for left in (-1, 0, 1)
    ]
    shuffle = np.random.default_rng(1).permutation(9 * len(training))
    many = np.concatenate(shifted).reshape(len(shuffle), -1)[shuffle]
    return Digits(many, np.tile(labels[:-HELD_OUT], 9)[shuffle], rows[-HELD_OUT:], labels[-HELD_OUT:])
