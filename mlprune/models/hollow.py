"""Loads hollow models. A hollow model is a Hugging Face model of which only one shard's layers are loaded.

Its other layers are placeholders. Hugging Face's own loader reads the weights, so tied weights, converted keys,
rebuilt buffers and sharded checkpoints are handled there: the class removes layers at the end of `__init__`,
before weights are read. How the layers are run is in `replay`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mlprune.errors import ModelError
from mlprune.models.quantization import loading_options
from mlprune.models.quiet import quiet_transformers
from mlprune.models.source import ModelSource

# model_type -> whether its layers return a tuple. tests/test_replay.py checks that each family gives results
# that are bit-identical to those of the whole model. To add a family, add a line here and a config in
# tests/tiny_models.py.
FAMILIES = {
    "bloom": True,
    "gemma": False,
    "gemma2": False,
    "gemma3_text": False,
    "gpt2": False,
    "gpt_neox": False,
    "llama": False,
    "mistral": False,
    "mixtral": False,
    "olmo2": False,
    "opt": False,
    "phi3": False,
    "qwen2": False,
    "qwen3": False,
    "qwen3_moe": False,
    "smollm3": False,
    "xglm": False,
}


def check_family(config: PretrainedConfig, name: str) -> None:
    """Raise ModelError unless the model can be cut into shards: only hidden states may pass between its layers."""
    family = config.model_type
    shared = [
        key
        for key in ("num_kv_shared_layers", "hidden_size_per_layer_input")
        if getattr(config.get_text_config(), key, 0)
    ]
    if shared:
        remedy = f"its layers share state ({', '.join(shared)}), so it cannot be cut into shards"
        raise ModelError("model.path", f"{name!r} ({family})", remedy)
    if family not in FAMILIES:
        remedy = f"unsupported family; supported: {', '.join(FAMILIES)}"
        raise ModelError("model.path", f"{name!r} ({family})", remedy)


def layer_count(config: PretrainedConfig) -> int:
    """Return the number of decoder layers."""
    return int(config.get_text_config().num_hidden_layers)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the causal language model class for a configuration of a supported family."""
    cls: type[PreTrainedModel] = AutoModelForCausalLM._model_mapping[type(config)]
    return cls


def decoder_layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """Return the name and the module of the decoder layers: the shallowest ModuleList of `count` entries."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    name, layers = min(lists, key=lambda item: item[0].count("."))
    return name, layers


@dataclass(frozen=True)
class Span:
    """The decoder layers [first, end) of a model of `count` layers."""

    first: int
    end: int
    count: int

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.count

    @property
    def layers(self) -> range:
        return range(self.first, self.end)


@dataclass(frozen=True)
class LoadedPart:
    """The part of a model that is loaded. Small modules (norms, position embeddings) are always loaded too."""

    layers: range
    embedding: bool
    head: bool

    @classmethod
    def whole(cls, span: Span) -> LoadedPart:
        """Return everything of a shard."""
        return cls(span.layers, span.is_first, span.is_last)

    @classmethod
    def shell(cls, span: Span) -> LoadedPart:
        """Return a shard without its layers."""
        return cls(range(0), span.is_first, span.is_last)

    @classmethod
    def layer(cls, index: int) -> LoadedPart:
        """Return one decoder layer alone."""
        return cls(range(index, index + 1), False, False)


class Placeholder(nn.Module):
    """Replaces a layer that is not loaded, and has its plain attributes, which the model's forward reads."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if isinstance(value, str | int | float | bool) and name not in vars(self):
                setattr(self, name, value)


def hollow_out(model: PreTrainedModel, part: LoadedPart) -> None:
    """Remove what `part` does not include: other layers, the embedding, the head. The rest is small and stays."""
    _, layers = decoder_layers(model, layer_count(model.config))
    for index, layer in enumerate(layers):
        if index not in part.layers:
            layers[index] = Placeholder(layer)
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    if not (part.embedding or (part.head and tied)):
        _replace(model, model.get_input_embeddings())
    if not part.head:
        _replace(model, model.get_output_embeddings())
    names = dict(model.named_parameters(remove_duplicate=False))
    model.all_tied_weights_keys = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if target in names and source in names
    }


def _replace(model: nn.Module, unused: nn.Module) -> None:
    name = next(name for name, module in model.named_modules() if module is unused)
    model.set_submodule(name, nn.Identity())


def load_hollow(
    source: ModelSource, part: LoadedPart, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Return the model of `source` with only the weights of `part` in memory, in evaluation mode on `device`.

    Raises ModelError if the checkpoint lacks a weight of the part.
    """
    config = source.config()
    cls = model_class(config)

    def init(self: PreTrainedModel, config: PretrainedConfig, *args: object, **kwargs: object) -> None:
        cls.__init__(self, config, *args, **kwargs)
        hollow_out(self, part)

    members = {"__init__": init, "__module__": cls.__module__, "_keys_to_ignore_on_load_unexpected": [".*"]}
    hollow: type[PreTrainedModel] = type(cls.__name__, (cls,), members)
    with quiet_transformers():
        model, info = hollow.from_pretrained(
            source.folder,
            dtype=dtype,
            use_safetensors=None if source.allow_pickle else True,
            output_loading_info=True,
            **loading_options(config),
        )
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError("model.path", repr(source.name), f"the checkpoint lacks {missing[0]}{more}")
    if loading_options(config):  # then transformers keeps the dtype of the weights that it does not convert
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    loaded: PreTrainedModel = model.eval().requires_grad_(False).to(device)
    return loaded


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the whole model on the meta device: shapes without weights."""
    with quiet_transformers(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model
