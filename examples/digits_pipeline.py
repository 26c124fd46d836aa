"""Train a digit classifier data-parallel, then serve it from an actor: the whole of afield in one short program.

The driver never touches a weight or a gradient. It cuts the training images into shards and stores each once (`put`);
then it submits the training of all epochs at once as a graph of futures:

    shard 0 ──> gradient ──┐
    shard 1 ──> gradient ──┼──> step ──> weights ──> gradient ...
    weights ───────────────┘

Every gradient is a task on a GPU. Tasks read shards and weights where they lie in shared memory, without a copy.

    python examples/digits_pipeline.py [--epochs 10] [--shards 2] [--devices emulated:2]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import afield

STEPS = 12  # Updates per epoch: each looks at another twelfth of every shard.
HIDDEN, RATE, MOMENTUM = 256, 0.2, 0.9
TARGET = 0.95

Arrays = list[np.ndarray[Any, Any]]


def load() -> tuple[Arrays, Arrays]:
    """Return images and labels to train on, each image with eight shifted copies, and images and labels held out."""
    digits = load_digits()
    images = np.pad(digits.images.astype(np.float32) / 8 - 1, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    order = np.random.default_rng(0).permutation(len(images))
    held_out, training = order[:360], order[360:]
    shifted = []
    for up in (-1, 0, 1):
        for left in (-1, 0, 1):  # The mean of an image and itself one pixel further is a shift by half a pixel.
            shifted.append((images[training] + np.roll(images[training], (up, left), (1, 2))) / 2)
    shuffle = np.random.default_rng(1).permutation(9 * len(training))
    many = np.concatenate(shifted).reshape(len(shuffle), -1)[shuffle]
    labels = np.tile(digits.target[training], 9)[shuffle]
    return [many, labels], [images[held_out].reshape(len(held_out), -1), digits.target[held_out]]


def first_weights(pixels: int) -> Arrays:
    """Return the weights of a network with one hidden layer, and their zero momentum."""
    rng = np.random.default_rng(2)
    shapes = [(pixels, HIDDEN), (HIDDEN,), (HIDDEN, 10), (10,)]
    weights = [rng.normal(0, np.sqrt(2 / s[0]), s) if len(s) == 2 else np.zeros(s) for s in shapes]
    return [w.astype(np.float32) for w in weights] + [np.zeros(s, np.float32) for s in shapes]


@afield.remote(num_gpus=1)
def gradient(weights: Arrays, shard: Arrays, step: int) -> tuple[Arrays, float]:
    """Return the gradient of the loss on one slice of a shard, and the loss."""
    images, labels = shard[0][step::STEPS], shard[1][step::STEPS]
    w1, b1, w2, b2 = weights[:4]
    hidden = np.maximum(images @ w1 + b1, 0)
    scores = hidden @ w2 + b2
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    loss = float(-np.log(chances[rows, labels] + 1e-9).mean())
    chances[rows, labels] -= 1
    error = chances / len(labels)
    back = (error @ w2.T) * (hidden > 0)
    return [images.T @ back, back.sum(0), hidden.T @ error, error.sum(0)], loss


@afield.remote(num_returns=2)
def descend(weights: Arrays, *gradients: tuple[Arrays, float]) -> tuple[Arrays, float]:
    """Average the gradients, take one step downhill, and return the new weights and the mean loss."""
    means = [sum(parts) / len(gradients) for parts in zip(*(arrays for arrays, _ in gradients), strict=True)]
    speed = [MOMENTUM * old - RATE * new for old, new in zip(weights[4:], means, strict=True)]
    moved = [weight + change for weight, change in zip(weights[:4], speed, strict=True)]
    return moved + speed, sum(loss for _, loss in gradients) / len(gradients)


@afield.remote(num_gpus=1)
class Classifier:
    """Holds the trained weights on its device and answers batches of images."""

    def __init__(self, weights: Arrays) -> None:
        self.weights = weights

    def predict(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        w1, b1, w2, b2 = self.weights[:4]
        return (np.maximum(images @ w1 + b1, 0) @ w2 + b2).argmax(1)


def run(epochs: int, shard_count: int, show: Console) -> dict[str, str | float]:
    """Train, serve and return the figures of the table."""
    started = time.perf_counter()
    (images, labels), (test_images, test_labels) = load()
    parts = zip(np.array_split(images, shard_count), np.array_split(labels, shard_count), strict=True)
    shards = [afield.put([some_images, some_labels]) for some_images, some_labels in parts]
    weights = afield.put(first_weights(images.shape[1]))

    losses = []
    for update in range(epochs * STEPS):
        gradients = [gradient.remote(weights, shard, update % STEPS) for shard in shards]
        weights, loss = descend.remote(weights, *gradients)
        losses.append(loss)
    for loss in track(losses, "training", console=show, disable=not show.is_terminal, transient=True):
        last_loss = afield.get(loss)

    classifier = Classifier.remote(weights)
    batches = np.array_split(test_images, 12)
    answers = afield.get([classifier.predict.remote(batch) for batch in batches])
    accuracy = float((np.concatenate(answers) == test_labels).mean())
    return {
        "accuracy": round(accuracy, 4),
        "last loss": round(last_loss, 4),
        "tasks run": len(losses) * (shard_count + 1) + len(batches),
        "bytes shared without a copy": f"{afield.stats()['bytes_shared']:,}",
        "seconds": round(time.perf_counter() - started, 2),
        "devices": f"{afield.cluster_resources()['GPU']:g}",
    }


def main() -> int:
    """Run the pipeline and print its table; the exit status is 1 when the accuracy misses the target."""
    parser = argparse.ArgumentParser(description="Train and serve a digit classifier with afield.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--devices", default=os.environ.get("AFIELD_DEVICES"), help="such as emulated:2")
    options = parser.parse_args()
    if min(options.epochs, options.shards) < 1:
        parser.error("--epochs and --shards must be at least 1")
    console = Console()
    if options.devices is None:
        options.devices = "emulated:2"
        print("No devices are configured (AFIELD_DEVICES): two emulated ones stand in for GPUs.")
    afield.init(devices=options.devices)
    try:
        figures = run(options.epochs, options.shards, console)
    finally:
        afield.shutdown()
    if console.is_terminal:
        table = Table("handwritten digits", "result")
        for name, figure in figures.items():
            table.add_row(name, str(figure))
        console.print(table)
    else:
        for name, figure in figures.items():
            print(f"{name:28} {figure:>12}")
    return 0 if float(figures["accuracy"]) >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
