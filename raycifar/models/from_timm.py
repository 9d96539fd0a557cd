"""Any of timm's architectures: github.com/huggingface/pytorch-image-models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raycifar.errors import RequestError
from raycifar.models import Preprocessing

try:
    import timm
    from timm.data import resolve_model_data_config
    from timm.models import group_parameters
except ImportError as error:
    raise RequestError("models named timm:NAME need the package timm: pip install 'raycifar[timm]'.") from error


@dataclass(frozen=True)
class FromTimm:
    """The networks of one of timm's architectures, with the interface of `models.Builtin`.

    Raises:
        RequestError: timm has no such model, or no such weights of it.
    """

    name: str
    initial_weights_from_images: ClassVar[None] = None

    def __post_init__(self) -> None:
        architecture, _, tag = self.name.partition(".")
        if not timm.is_model(architecture):
            near = ", ".join(timm.list_models(f"*{self.name[:6]}*")[:5]) or "see timm.list_models()"
            raise RequestError(f"timm has no model named {self.name!r}: {near}.")
        known = timm.list_models(f"{architecture}.*", include_tags=True)
        if tag and self.name not in known:
            names = ", ".join(name for name in known if name != architecture) or "it has none"
            raise RequestError(f"timm has no weights {tag!r} of {architecture}: {names}.")

    def is_for_small_images(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        return False

    def build(self, num_classes: int, dropout: float, large_stem: bool, size: int, **options: Any) -> nn.Module:
        network: Any = timm.create_model(self.name, pretrained=False, num_classes=num_classes, drop_rate=dropout)
        if has_fixed_size(network):
            network.set_input_size(img_size=(size, size))
        return network

    def rescale(self, tensors: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
        """Return published weights for images of another size: position embeddings are interpolated."""
        network: Any = timm.create_model(self.name, pretrained=False)
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        if not has_fixed_size(network) or any(shapes.get(name) != value.shape for name, value in tensors.items()):
            return dict(tensors)
        network.load_state_dict(dict(tensors), strict=False)
        network.set_input_size(img_size=(size, size))
        return {name: value for name, value in network.state_dict().items() if name in tensors}

    def heads(self, network: Any) -> tuple[str, ...]:
        heads = network.pretrained_cfg["classifier"]
        return tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))

    def layers(self, network: Any) -> list[list[str]]:
        heads = self.heads(network)
        groups = group_parameters(network, network.group_matcher(coarse=True))
        body = [[name for name in groups[depth] if not name.startswith(heads)] for depth in sorted(groups)]
        return [*filter(None, body), [name for name, _ in network.named_parameters() if name.startswith(heads)]]

    def imagenet_preprocessing(self, size: int) -> Preprocessing:
        with torch.device("meta"):
            pixels = resolve_model_data_config(timm.create_model(self.name, pretrained=False))
        return Preprocessing(size, tuple(pixels["mean"]), tuple(pixels["std"]), pixels["interpolation"])

    def imagenet_weights(self) -> dict[str, Tensor]:
        return timm.create_model(self.name, pretrained=True).state_dict()


def has_fixed_size(network: Any) -> bool:
    """Return whether the network takes images of a single size, which can be set, as transformers do."""
    return bool(network.pretrained_cfg.get("fixed_input_size")) and hasattr(network, "set_input_size")
