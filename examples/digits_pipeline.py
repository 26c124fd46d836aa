"""Train a digit classifier data-parallel with weights that live in device memory, then serve it from an actor.

The driver never touches a weight or a gradient. Each shard of the training images is put on a device once; then the
training of all epochs is submitted at once, as a graph of futures:

    shard 0 ──> gradient ──┐
    shard 1 ──> gradient ──┼──> descend ──> weights ──> gradient ...
    weights ───────────────┘

Shards, weights and gradients are device arrays. A task on the device where one lies reads it in place. A task on the
other device gets a copy, straight from device to device, which stays there for the tasks that follow. What a task makes
is in the store from the start: returning it copies nothing. The table at the end counts all of this.

On emulated devices the arrays are in shared memory and NumPy computes; with `--devices cuda` they are CuPy's.

    python examples/digits_pipeline.py [--epochs 10] [--shards 2] [--devices emulated:2]
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
from digits_data import CLASSES, load
from reporting import Moved, add_devices, positive, run, show
from rich.console import Console
from rich.progress import track

import afield

STEPS = 12  # Updates per epoch: each looks at another twelfth of every shard.
HIDDEN, RATE, MOMENTUM = 256, 0.2, 0.9
TARGET = 0.95

Arrays = list[Any]  # NumPy's on the host; CuPy's, or emulated ones with the same methods, on devices


def first_weights(pixels: int) -> Arrays:
    """Return the weights of a network with one hidden layer, and their zero momentum."""
    rng = np.random.default_rng(2)
    shapes = [(pixels, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,)]
    weights = [rng.normal(0, np.sqrt(2 / s[0]), s) if len(s) == 2 else np.zeros(s) for s in shapes]
    return [w.astype(np.float32) for w in weights] + [np.zeros(s, np.float32) for s in shapes]


@afield.remote(num_gpus=1)
def upload(*arrays: Any) -> Arrays:
    """Bring host arrays to the device of this task."""
    xp = afield.array_module()
    return [xp.asarray(array) for array in arrays]


@afield.remote(num_gpus=1)
def gradient(weights: Arrays, shard: Arrays, step: int) -> tuple[Arrays, float]:
    """Return the gradient of the loss on one slice of a shard, and the loss."""
    xp = afield.array_module()
    images, wanted = shard[0][step::STEPS], shard[1][step::STEPS]
    w1, b1, w2, b2 = weights[:4]
    hidden = xp.maximum(images @ w1 + b1, 0)
    scores = hidden @ w2 + b2
    chances = xp.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    loss = -xp.log((chances * wanted).sum(1) + 1e-9).mean()
    error = (chances - wanted) / len(images)
    back = (error @ w2.T) * (hidden > 0)
    return [images.T @ back, back.sum(0), hidden.T @ error, error.sum(0)], float(loss)


@afield.remote(num_gpus=1, num_returns=2)
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
        self.weights = weights  # read in place: the memory is that which the last `descend` wrote

    def predict(self, images: Any) -> Any:
        xp = afield.array_module()
        w1, b1, w2, b2 = self.weights[:4]
        return (xp.maximum(xp.asarray(images) @ w1 + b1, 0) @ w2 + b2).argmax(1)


def pipeline(options: argparse.Namespace, console: Console) -> int:
    """Train, serve and print the figures; return 1 when the accuracy misses the target."""
    digits = load()
    wanted = np.eye(CLASSES, dtype=np.float32)[digits.labels]
    moved = Moved()
    started = time.perf_counter()
    parts = zip(np.array_split(digits.images, options.shards), np.array_split(wanted, options.shards), strict=True)
    shards = [upload.remote(images, labels) for images, labels in parts]
    weights = upload.remote(*first_weights(digits.images.shape[1]))

    losses = []
    for step in range(options.epochs * STEPS):
        gradients = [gradient.remote(weights, shard, step % STEPS) for shard in shards]
        weights, loss = descend.remote(weights, *gradients)
        losses.append(loss)
    for loss in track(losses, "training", console=console, disable=not console.is_terminal, transient=True):
        last_loss = afield.get(loss)
    trained = time.perf_counter()

    classifier = Classifier.remote(weights)
    batches = np.array_split(digits.test_images, 12)
    answers = afield.get([classifier.predict.remote(batch) for batch in batches])
    accuracy = float((np.concatenate(answers) == digits.test_labels).mean())
    figures: dict[str, str | float] = {
        "accuracy": round(accuracy, 4),
        "last loss": round(last_loss, 4),
        "steps per second": round(len(losses) / (trained - started), 1),
        "seconds": round(time.perf_counter() - started, 2),
        "tasks": len(shards) + 1 + len(losses) * (len(shards) + 1) + len(batches),
        "devices": f"{afield.cluster_resources()['GPU']:g}",
    }
    show("handwritten digits", figures, console)
    show("what moved, and what did not", moved.rows(), console, "bytes")
    return 0 if accuracy >= TARGET else 1


def main() -> int:
    """Run the pipeline as a program."""
    parser = argparse.ArgumentParser(description="Train and serve a digit classifier with afield.")
    parser.add_argument("--epochs", type=positive, default=10)
    parser.add_argument("--shards", type=positive, default=2, help="how many parts the training images are cut into")
    add_devices(parser)
    return run(parser, pipeline)


if __name__ == "__main__":
    sys.exit(main())
