"""Scoring a network that is being trained: after each epoch, and at the end on the test set."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raycifar.analysis.collapse import collapse
from raycifar.cluster.status import Phase
from raycifar.data.shards import Shard, load_shard
from raycifar.engine.config import TrainLoopConfig
from raycifar.engine.distributed import all_gather_rows, rank, world_size
from raycifar.engine.reporter import Reporter
from raycifar.engine.scoring import per_image, predict, score, score_without, to_predictions_file
from raycifar.engine.state import TrainingState
from raycifar.models.preprocess import preprocess
from raycifar.storage.run_folder import PREDICTIONS
from raycifar.storage.schemas import Diagnostics, EpochRecord

EXAMINED_IMAGES = 250  # training images that pass through a network that doesn't learn, to see why
PIXELS = 2**15  # of those that pass at a time
WARNED_EPOCHS = 3  # first epochs after which a network that doesn't learn is reported at once


@dataclass(frozen=True)
class Evaluator:
    """Scores the network of `state` on the images of all workers, which call it together."""

    config: TrainLoopConfig
    state: TrainingState
    reporter: Reporter
    train_eval_set: Shard  # training images, scored as validation images are
    val_set: Shard | None

    @property
    def num_images(self) -> int:
        """How many images are scored after each epoch, by all workers."""
        return self.config.num_val_images + len(self.train_eval_set) * world_size()

    def score_epoch(self) -> dict[str, Any]:
        """Return the scores in an epoch's record."""
        train_eval = score(self.predict(self.train_eval_set, "scoring training images")[1])
        scores = {f"train_eval_{name}": train_eval[name] for name in ("loss", "top1", "images")}
        return scores if self.val_set is None else scores | self.validate(self.val_set)

    def validate(self, val_set: Shard) -> dict[str, Any]:
        """Return the validation metrics, and keep in the state which images are classified correctly."""
        _, images = self.predict(val_set, "validating")
        scores = score(images)
        losses, correct = (
            all_gather_rows(images[name].float(), self.config.num_val_images) for name in ("loss", "top1")
        )
        before, self.state.val_correct = self.state.val_correct, correct
        return {
            **{f"val_{name}": scores[name] for name in ("loss", "top1", "top5")},
            "val_loss_se": (losses.cpu().double().std() / len(losses) ** 0.5).item(),
            "val_gained": None if before is None else int((correct > before).sum()),
            "val_lost": None if before is None else int((correct < before).sum()),
        }

    def score_test_set(self) -> dict[str, Any]:
        """Return the scores on the test set, and write the predictions."""
        self.reporter.phase(Phase.SCORING_TEST)
        test_set = load_shard("test", self.train_eval_set.images.device)
        logits, images = self.predict(test_set, Phase.SCORING_TEST)
        scores = score(images)
        logits, labels = (all_gather_rows(part, self.config.num_test_images) for part in (logits, test_set.labels))
        near_duplicates = self.config.near_duplicates
        if near_duplicates is not None:
            scores |= score_without(near_duplicates, (logits.argmax(1) == labels).cpu().numpy())
        if rank() == 0:
            self.config.folder.write(PREDICTIONS, to_predictions_file(logits, labels, near_duplicates))
        return scores

    def diagnose(self, record: EpochRecord, steps_so_far: int) -> Diagnostics | None:
        """Return diagnostics if the network isn't learning, else None; warn of that in the first epochs."""
        num_images = int(self.state.progress.totals.num_images)
        warning = collapse(record, num_images, steps_so_far)
        if warning is None:
            return None
        if record.epoch <= WARNED_EPOCHS:
            self.reporter.notice(f"Warning: {warning}")
        some = self.train_eval_set.head(EXAMINED_IMAGES)
        return examine(self.state.model, preprocess(some.images, self.state.architecture.preprocessing), some.labels)

    def predict(self, shard: Shard, doing: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits of this worker's images, and how they are scored: see `per_image`."""

        def progress(done: int) -> None:
            if self.reporter.due():
                self.reporter.part(doing, done * world_size(), len(shard) * world_size())

        state = self.state
        logits = predict(state.eval_model, shard.images, state.autocast, state.architecture.preprocessing, progress)
        return logits, per_image(logits, shard.labels, shard.coarse, self.config.superclass_of)


def examine(model: nn.Module, inputs: Tensor, labels: Tensor) -> Diagnostics:
    """Look for dead ReLUs and vanishing or exploding gradients, in float32; the network and its gradients don't change.

    Args:
        model: stays in evaluation mode. inputs: (n, 3, H, W) float32, preprocessed. labels: (n,) int64.

    Returns:
        dead_relus: by layer name, the fraction of a ReLU's channels that are 0 for all images and positions;
        gradient_norms: by name, of each trained layer's weights, from the input to the head.
    """
    largest: dict[str, Tensor] = {}  # output of each channel, by layer
    found: dict[str, Tensor] = {}  # of the images that pass; a layer that is called again, as in ResNet, counts last

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        found[name] = output.detach().amax([0, *range(2, output.ndim)])

    relus = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in relus]
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
    gradients = [torch.zeros_like(p) for p in weights.values()]
    at_a_time = max(1, PIXELS // inputs.shape[-1] ** 2)
    for some, their_labels in zip(inputs.split(at_a_time), labels.split(at_a_time), strict=True):
        loss = nn.functional.cross_entropy(model.eval()(some).float(), their_labels, reduction="sum") / len(inputs)
        torch._foreach_add_(gradients, torch.autograd.grad(loss, list(weights.values())))
        largest = {name: torch.maximum(values, largest.get(name, values)) for name, values in found.items()}
    for hook in hooks:
        hook.remove()
    norms = {name: gradient.norm().item() for name, gradient in zip(weights, gradients, strict=True)}
    dead: dict[str, float | None] = {name: (values <= 0).float().mean().item() for name, values in largest.items()}
    return {"dead_relus": dead, "gradient_norms": norms}
