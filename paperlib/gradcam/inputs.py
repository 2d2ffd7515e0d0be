"""The inputs of a network: one batch, several by position, or several by keyword."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from paperlib.inference import map_tensors, run_model
from paperlib.validation import check_images

# A batch, positional inputs, or keyword inputs
Images = Tensor | tuple[Any, ...] | Mapping[str, Any]


class Inputs(NamedTuple):
    """The inputs of a network, by position (an integer) or keyword.

    Fields:
        parts: all inputs.
        key: of the explained input.
        explained: that input, checked and detached.
    """

    parts: dict[int | str, Any]
    key: int | str
    explained: Tensor

    def run(self, model: nn.Module, explained: Tensor) -> Any:
        """Run the model with another explained input.

        A network may change its inputs in place, so all tensors are copies.

        Raises:
            ValueError: if the model raises an exception that wrong inputs cause.
        """
        parts = {
            key: explained.clone()
            if key == self.key
            else map_tensors(part, lambda tensor: tensor.detach().clone())
            for key, part in self.parts.items()
        }
        args = [part for key, part in parts.items() if not isinstance(key, str)]
        kwargs = {key: part for key, part in parts.items() if isinstance(key, str)}
        return run_model(model, explained, *args, **kwargs)


def read_inputs(images: Images, explain: int | str | None) -> Inputs:
    """Read the inputs of a network, and check the one to explain.

    Raises:
        ValueError: for an unknown input, or one that is not a finite batch.
    """
    if isinstance(images, tuple):
        parts = dict(enumerate(images))
    else:
        parts = dict(images) if isinstance(images, Mapping) else {0: images}
    keys = list(parts)
    key = keys[0] if explain is None and keys else explain
    if isinstance(key, Tensor) or key not in keys:
        raise ValueError(
            f"explain={explain!r} for the inputs {keys}; expected one of them"
        )
    return Inputs(parts, key, check_images(parts[key], any_axes=True))
