"""A run's metrics for Prometheus, at each node's metrics port; `jobs/grafana.json` draws them."""

from typing import Any

from ray.util.metrics import Gauge

from raycifar.cluster.status import in_a_cluster

METRICS = {
    "epoch": "The current epoch, from 1.",
    "loss": "Training loss of the current epoch, natural-log cross-entropy.",
    "top1": "Training accuracy of the current epoch, a fraction.",
    "images_per_second": "Training images per second, over all workers.",
    "lr": "Learning rate.",
    "val_loss": "Validation loss of the last epoch.",
    "val_top1": "Validation top-1 accuracy of the last epoch, a fraction.",
}


class Gauges:
    """The gauges of one run; there are none outside a cluster."""

    def __init__(self, run: str, model: str) -> None:
        self.values: dict[str, float] = {}
        self.tags = {"run": run, "model": model}
        tags = tuple(self.tags)
        self.gauges = {
            name: Gauge(f"raycifar_{name}", description=text, tag_keys=tags)
            for name, text in METRICS.items()
            if in_a_cluster()
        }

    def set(self, metrics: dict[str, Any]) -> None:
        """Set what is known of `metrics`, and all others again: Ray drops a gauge that isn't set for some seconds."""
        self.values |= {name: metrics[name] for name in self.gauges if metrics.get(name) is not None}
        for name, value in self.values.items():
            self.gauges[name].set(value, self.tags)
