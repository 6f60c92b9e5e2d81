"""Models as folders of config.json and model.safetensors, here or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn

# What the mixin, json, safetensors, a config and load_state_dict raise for what they cannot read.
UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, RecursionError)


class HubModel(nn.Module, PyTorchModelHubMixin):
    """A module that takes one `config`, a dataclass. It is read back whole, or not at all."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """The model that `save_pretrained` wrote to a folder, or pushed to the Hub, in evaluation mode.

        Raises ValueError for a folder without such a model, whatever of it is missing or damaged, and for a path that
        is no folder and no name on the Hub either; what goes wrong between here and the Hub as huggingface_hub does.
        """
        path = Path(pretrained_model_name_or_path)
        try:
            # strict: the mixin's default leaves a weight that the file lacks at its random initial value.
            return super().from_pretrained(pretrained_model_name_or_path, **{"strict": True, **options})
        except HFValidationError as error:
            raise ValueError(f"{path} is neither a folder nor the name of a model on the Hub") from error
        except UNREADABLE as error:
            if not path.is_dir():
                raise
            raise ValueError(
                f"{path} does not hold a {cls.__name__} as save_pretrained writes it, a config.json and a "
                f"model.safetensors ({type(error).__name__}: {error})"
            ) from error
