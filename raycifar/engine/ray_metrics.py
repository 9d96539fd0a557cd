"""A run's figures as Ray's own metrics: on the dashboard, and for Prometheus at every node's metrics port."""

from typing import Any

from ray.util.metrics import Gauge

from raycifar.cluster.status import in_a_cluster

FIGURES = {
    "epoch": "The epoch under way, from 1.",
    "loss": "Training loss of the epoch under way so far, natural-log cross-entropy.",
    "top1": "Training accuracy of the epoch under way so far, a fraction.",
    "images_per_second": "Training images per second, over all workers.",
    "lr": "Learning rate.",
    "val_loss": "Validation loss of the last epoch.",
    "val_top1": "Validation top-1 accuracy of the last epoch, a fraction.",
}


class Gauges:
    """Shows the figures of one run; without a cluster there is nobody to show them to."""

    def __init__(self, run: str, model: str) -> None:
        self.tags = {"run": run, "model": model}
        tags = tuple(self.tags)
        self.gauges = {
            name: Gauge(f"raycifar_{name}", description=text, tag_keys=tags)
            for name, text in FIGURES.items()
            if in_a_cluster()
        }

    def show(self, figures: dict[str, Any]) -> None:
        for name, gauge in self.gauges.items():
            if (value := figures.get(name)) is not None:
                gauge.set(value, self.tags)
