"""`ModelConfig` to the config.json of a family, which transformers 4 and 5 read alike."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ..config import UNSCALED, ModelConfig
from .family import FAMILIES, SCALINGS, SIZES
from .read import PublishedModel, read_config, shortest_pattern


def family_of(config: ModelConfig) -> str:
    """Return the first family whose models can have these settings.

    Raises ValueError, with the settings at fault, if there is none.
    """
    wanted = as_published(config)
    closest: list[str] | None = None
    for family in FAMILIES:
        different = _differences(wanted, family)
        if not different:
            return family
        if closest is None or len(different) < len(closest):
            closest = different
    assert closest is not None
    listed = ", ".join(f"model.{name} = {getattr(wanted, name)!r}" for name in closest)
    raise ValueError(f"{listed}: no family of transformers has it with the other settings; train one of the families")


def as_published(config: ModelConfig) -> ModelConfig:
    """Return equal arithmetic in the settings that config.json can say: ntk is another base, z_loss is of training.

    Kinds of layers are in their shortest pattern, as they are read back. The size of the vocabulary is said elsewhere.
    """
    base, scaling = config.rope_base, config.rope_scaling
    if scaling.kind == "ntk" and not scaling.full_layers_only:
        # The base that `rope.frequencies` takes for ntk.
        base, scaling = base * scaling.factor ** (config.head_dim / (config.head_dim - 2)), UNSCALED
    pattern = shortest_pattern(_kinds(config))
    return replace(
        config,
        rope_base=base,
        rope_scaling=scaling,
        layer_pattern=pattern,
        window_tokens=config.window_tokens if "window" in pattern else 0,  # a pattern may name more kinds than layers
        vocab_size=0,
        z_loss=0.0,
    )


def _kinds(config: ModelConfig) -> list[str]:
    return [config.kind_of(layer) for layer in range(config.num_layers)]


def write_config(model: PublishedModel) -> dict[str, Any]:
    """Return config.json of a model. Raises ValueError if its family does not have all its settings."""
    model = replace(model, config=as_published(model.config))
    if different := _differences(model.config, model.family):
        raise ValueError(
            f"model.{different[0]} = {getattr(model.config, different[0])!r}: {model.family} has no such models; "
            "export as another family"
        )
    return _tree(model)


def _differences(config: ModelConfig, family: str) -> list[str]:
    """Return the settings that are lost when config.json of a family is written and read."""
    try:
        back = read_config(_tree(PublishedModel(family=family, config=config, vocab_size=1, max_tokens=1))).config
    except ValueError:  # nothing is read back, so that everything is lost
        return [field.name for field in fields(config)]
    return [field.name for field in fields(config) if getattr(back, field.name) != getattr(config, field.name)]


def _tree(model: PublishedModel) -> dict[str, Any]:
    config, family = model.config, FAMILIES[model.family]
    scaling, length = config.rope_scaling, model.max_tokens
    if scaling.kind == "yarn":  # transformers 4 takes the ratio of the two lengths for the factor
        length = round(scaling.factor * scaling.original_tokens)
    return {
        **model.other,
        "architectures": [family.architecture],
        "model_type": model.family,
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **dict.fromkeys(family.bias_keys, False),
        "vocab_size": model.vocab_size,
        "max_position_embeddings": length,
        **_layer_keys(family.layers_key, _kinds(config), config.window_tokens or None),
        **_rope_keys(config, nested=model.family == "olmo3"),
    }


def _layer_keys(key: str, kinds: list[str], window: int | None) -> dict[str, Any]:
    """Return the keys that say the kinds of all layers."""
    types = ["sliding_attention" if kind == "window" else "full_attention" for kind in kinds]
    match key:
        case "sliding_window":
            return {"sliding_window": window}
        case "use_sliding_window":
            first = types.index("sliding_attention") if window else len(types)  # layers from it on have the window
            keys = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": first}
            return {**keys, "layer_types": types}
        case "layer_types":
            return {"sliding_window": window, "layer_types": types}
        case "no_rope_layers":
            uses = [int(kind != "full_no_rope") for kind in kinds]
            return {"use_sliding_window": False, "sliding_window": None, "no_rope_layers": uses, "layer_types": types}
    return {}


def _rope_keys(config: ModelConfig, *, nested: bool) -> dict[str, Any]:
    """Return RoPE as transformers 4 reads it, in rope_theta and rope_scaling, and as 5 does, in rope_parameters."""
    scaling, theta = config.rope_scaling, {"rope_theta": config.rope_base}
    plain = {"rope_type": "default", **theta}
    if scaling.kind not in SCALINGS:
        parameters = {"full_attention": plain, "sliding_attention": plain} if nested else plain
        return {**theta, "rope_scaling": None, "rope_parameters": parameters}
    table: dict[str, Any] = {"rope_type": scaling.kind}
    for theirs, ours in SCALINGS[scaling.kind].items():
        value = getattr(scaling, ours)
        # attention_factor 0 and truncate true stand for what transformers does without the key.
        if value != getattr(UNSCALED, ours) or not theirs.startswith(("attention", "truncate")):
            table[theirs] = value
    full = {**table, **theta}
    parameters = {"full_attention": full, "sliding_attention": plain} if nested else full
    return {**theta, "rope_scaling": table, "rope_parameters": parameters}
