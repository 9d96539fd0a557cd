"""A trial of a comparison, and its status."""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from raycifar.cluster.status import StatusStore
from raycifar.models.recipe import Recipe
from raycifar.redaction import redact


class TrialStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"  # by ASHA, because other trials of the model were better
    FAILED = "failed"


@dataclass
class Trial:
    name: str
    model: str
    seed: int
    recipe: Recipe
    search: bool
    setting: str = ""  # how the recipe differs from the model's
    status: TrialStatus = TrialStatus.WAITING
    reason: str | None = None
    status_store: StatusStore = field(default_factory=StatusStore)

    @property
    def over(self) -> bool:
        return self.status not in (TrialStatus.WAITING, TrialStatus.RUNNING)

    def to_config(self) -> dict[str, "Trial"]:
        """Return the configuration of Ray Tune's trial that runs this one."""
        recipe = replace(self.recipe, pretrained=redact(self.recipe.pretrained))  # Ray keeps it; the weights are read
        return {"trial": replace(self, recipe=recipe)}
