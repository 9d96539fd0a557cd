"""One trial of a comparison, and how it stands."""

import uuid
from dataclasses import dataclass, field

from raycifar.cluster.status import StatusStore
from raycifar.models.recipe import Recipe


@dataclass
class Trial:
    """A model, a seed and a recipe to be trained."""

    name: str
    model: str
    seed: int
    recipe: Recipe
    search: bool
    setting: str = ""  # how the recipe differs from the model's
    status: str = "waiting"  # then running, and finished, stopped (by ASHA) or failed
    reason: str | None = None
    status_store: StatusStore = field(default_factory=lambda: StatusStore(uuid.uuid4().hex))

    @property
    def over(self) -> bool:
        return self.status in ("finished", "stopped", "failed")
