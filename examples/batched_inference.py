"""Serve a model in batches: prepare on CPUs, score on model replicas with devices, finish on CPUs.

    raw images ──> cut (CPU task) ──> score (replica on a device) ──> finish (CPU task) ──> labels

The driver passes futures from stage to stage and sees the labels only. Each replica is an actor that brings the model's
weights to its device once. The scores of a batch are made in device memory; `finish` has no device, so that they come to
it in host memory: one copy, of the scores alone.

The driver keeps a bounded number of batches in flight, with `wait`: a slow stage holds it back, and memory stays bounded
however many batches there are. The next batch goes to the replica that has the fewest.

    python examples/batched_inference.py [--batches 200] [--replicas 2] [--in-flight 8] [--devices emulated:2]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Any

import numpy as np
from digits_data import CLASSES, HELD_OUT, Array, load, prepare, raw
from reporting import Moved, add_devices, positive, run, show
from rich.console import Console
from rich.progress import Progress

import afield

FEATURES = 512
TARGET = 0.95


def fit() -> list[Array]:
    """Return the weights of a network whose first layer is random and whose second is fitted by least squares."""
    digits = load()
    rng = np.random.default_rng(0)
    first = rng.normal(0, 1 / 6, (digits.images.shape[1], FEATURES)).astype(np.float32)
    offset = rng.normal(0, 1, FEATURES).astype(np.float32)
    features = np.maximum(digits.images @ first + offset, 0)
    wanted = np.eye(CLASSES, dtype=np.float32)[digits.labels]
    second = np.linalg.solve(features.T @ features + np.eye(FEATURES), features.T @ wanted)
    return [first, offset, second.astype(np.float32)]


@afield.remote
def cut(images: Array, start: int, size: int) -> Array:
    """Take a batch from the raw images and bring it to the form that the model wants."""
    rows = prepare(images.take(range(start, start + size), axis=0, mode="wrap"))
    batch = afield.empty(rows.shape, rows.dtype)  # memory of the host store: returning it copies nothing
    batch[:] = rows
    return batch


@afield.remote
class Replica:
    """A copy of the model on a device, or on a part of one."""

    def __init__(self, weights: list[Array]) -> None:
        self.xp = afield.array_module()
        self.weights = [self.xp.asarray(array) for array in weights]

    def score(self, batch: Array) -> Any:
        first, offset, second = self.weights
        return self.xp.maximum(self.xp.asarray(batch) @ first + offset, 0) @ second


@afield.remote
def finish(scores: Array) -> tuple[Array, Array]:
    """Return the most likely label of each image, and by how much it beats the second."""
    ordered = np.sort(scores, axis=1)
    return scores.argmax(1).astype(np.uint8), ordered[:, -1] - ordered[:, -2]


def share_of_a_device(replicas: int, devices: int) -> float:
    """Return the `num_gpus` of a replica when all are to run at once: whole devices, or equal parts of them."""
    on_each = math.ceil(replicas / devices)
    return int(10_000 / on_each) / 10_000  # amounts are counted in steps of 0.0001


class Flow:
    """Sends batches through the stages, `limit` of them at a time."""

    def __init__(self, images: afield.ObjectRef, replicas: list[Any], limit: int) -> None:
        self.images = images
        self.replicas = replicas
        self.limit = limit
        self.most = 0  # batches that were in flight at once
        self.served = [0] * len(replicas)
        self.answers: dict[int, tuple[Array, Array]] = {}
        self._flying: dict[afield.ObjectRef, tuple[int, int]] = {}  # answer -> which batch, and which replica has it
        self._load = [0] * len(replicas)

    def send(self, number: int, size: int) -> None:
        """Send a batch on its way; waits until fewer than `limit` are."""
        while len(self._flying) >= self.limit:
            self.take()
        chosen = self._load.index(min(self._load))
        scores = self.replicas[chosen].score.remote(cut.remote(self.images, number * size, size))
        self._flying[finish.remote(scores)] = number, chosen
        self._load[chosen] += 1
        self.most = max(self.most, len(self._flying))

    def take(self) -> bool:
        """Wait for a batch and keep its answer; return False if none is on its way."""
        if not self._flying:
            return False
        ready, _ = afield.wait(list(self._flying))
        for ref in ready:
            number, chosen = self._flying.pop(ref)
            self.answers[number] = afield.get(ref)
            self._load[chosen] -= 1
            self.served[chosen] += 1
        return True


def pipeline(options: argparse.Namespace, console: Console) -> int:
    """Answer all batches and print the figures; return 1 when the accuracy misses the target."""
    all_images, all_labels = raw()
    images, labels = all_images[-HELD_OUT:], all_labels[-HELD_OUT:]
    share = share_of_a_device(options.replicas, int(afield.cluster_resources()["GPU"]))
    weights = afield.put(fit())
    replicas = [Replica.options(num_gpus=share).remote(weights) for _ in range(options.replicas)]
    flow = Flow(afield.put(images), replicas, options.in_flight)
    moved = Moved()
    started = time.perf_counter()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("serving", total=options.batches)
        for number in range(options.batches):
            flow.send(number, options.batch_size)
            progress.update(bar, completed=len(flow.answers))
        while flow.take():
            progress.update(bar, completed=len(flow.answers))
    seconds = time.perf_counter() - started

    found = np.concatenate([flow.answers[number][0] for number in range(options.batches)])
    accuracy = float((found == np.resize(labels, len(found))).mean())
    figures: dict[str, str | float] = {
        "accuracy": round(accuracy, 4),
        "images": f"{len(found):,}",
        "images per second": f"{len(found) / seconds:,.0f}",
        "seconds": round(seconds, 2),
        "most batches in flight": flow.most,
        "devices of each replica": f"{share:g}",
        "batches of each replica": "+".join(map(str, flow.served)),
    }
    show("batched inference", figures, console)
    show("what moved, and what did not", moved.rows(), console, "bytes")
    return 0 if accuracy >= TARGET else 1


def main() -> int:
    """Run the pipeline as a program."""
    parser = argparse.ArgumentParser(description="Serve a digit classifier in batches with afield.")
    parser.add_argument("--batches", type=positive, default=200)
    parser.add_argument("--batch-size", type=positive, default=512, help="images in a batch")
    parser.add_argument("--replicas", type=positive, default=2, help="copies of the model; may be more than devices")
    parser.add_argument("--in-flight", type=positive, default=8, help="batches on their way at once, at most")
    add_devices(parser)
    return run(parser, pipeline)


if __name__ == "__main__":
    sys.exit(main())
