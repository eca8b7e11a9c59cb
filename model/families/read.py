"""config.json of a Hugging Face directory to `ModelConfig`; whatever is not exactly supported is refused by its key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from annotated_types import Interval

from ..config import UNSCALED, ModelConfig, RopeScaling
from .family import FAMILIES, FIXED, IGNORED, REFUSED, SCALINGS, SIZES, Family


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A model as the config.json of a Hugging Face directory describes it."""

    family: str
    """The model's `model_type`, a key of `FAMILIES`."""
    config: ModelConfig
    vocab_size: int
    """Rows of the model's embedding, without padding."""
    max_tokens: int
    """Longest context that the model claims (max_position_embeddings)."""
    other: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that change nothing in training, such as token ids."""


def read_config(tree: Mapping[str, Any]) -> PublishedModel:
    """Return the model of a config.json, as transformers 4 or 5 wrote it.

    Raises ValueError, with the key at fault, for a model that LongRing does not compute exactly as transformers 5 does.
    """
    name = str(tree.get("model_type"))
    if name not in FAMILIES:
        why = REFUSED.get(name, "is not a supported family")
        raise ValueError(f"config.json: model_type = {name!r:.80}: {why}; import a model of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    keys = _Keys(tree)
    for key, value in {**FIXED, **dict.fromkeys(family.bias_keys, False)}.items():
        keys.must_be(key, value)
    vocab_size, max_tokens = (
        checked(key, keys.get(key), _POSITIVE) for key in ("vocab_size", "max_position_embeddings")
    )
    sizes = _sizes(keys, name)
    base, scaling = _rope(keys, max_tokens, nested=name == "olmo3")
    kinds, window = _layers(keys, family, sizes["num_layers"])
    other = {key: keys.get(key) for key in tree if key in IGNORED}
    keys.check_all_known()  # after the last key that is read above
    config = ModelConfig(
        **sizes,
        **family.settings,
        rope_base=base,
        rope_scaling=scaling,
        layer_pattern=shortest_pattern(kinds),  # type: ignore[arg-type]
        window_tokens=window if "window" in kinds else 0,
    )
    return PublishedModel(family=name, config=config, vocab_size=vocab_size, max_tokens=max_tokens, other=other)


def shortest_pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the shortest beginning of `kinds` that repeats up to their end."""
    for length in range(1, len(kinds) + 1):
        if all(kind == kinds[i % length] for i, kind in enumerate(kinds)):
            return tuple(kinds[:length])
    return ("full",)


_OLMO3_WINDOWED_BASE = 500_000.0
"""RoPE base that transformers 5 gives windowed layers of OLMo 3 where config.json has no rope_parameters."""
_POSITIVE = Annotated[int, Interval(ge=1, le=2**40)]
_HINTS = {kind: get_type_hints(kind, include_extras=True) for kind in (ModelConfig, RopeScaling)}


def checked(key: str, value: Any, hint: Any) -> Any:
    """Return the value of a key. Raises ValueError unless it has the type of `hint` and lies in its range."""
    kind, *bounds = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**53 else value  # beyond it a float is not exact: refused below
    if type(value) is not kind:  # not isinstance: true is no number
        raise ValueError(f"config.json: {key} = {value!r:.80}: must be of type {kind.__name__}; correct it")
    for interval in bounds:
        low = interval.ge if interval.ge is not None else interval.gt
        if not low <= value <= interval.le or value == interval.gt:
            raise ValueError(f"config.json: {key} = {value!r:.80}: must be from {low} to {interval.le}; correct it")
    return value


class _Keys:
    """The keys of config.json, and which of them have been read."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._tree = tree
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """Return the value of a key; None if it is absent, which in transformers means the same."""
        self._read.add(key)
        return self._tree.get(key)

    def has(self, key: str) -> bool:
        """Return whether a key is present, with null or a value."""
        return key in self._tree

    def must_be(self, key: str, expected: Any) -> None:
        """Raise ValueError if the key is present with another value."""
        if key in self._tree and self.get(key) != expected:
            raise ValueError(
                f"config.json: {key} = {self._tree[key]!r:.80}: only {expected!r} is supported; import another model"
            )

    def check_all_known(self) -> None:
        """Raise ValueError for a key that nothing has read."""
        for key, value in self._tree.items():
            if key not in self._read and value is not None:
                raise ValueError(
                    f"config.json: {key!r:.80} = {value!r:.80}: unknown, and may change what the model computes; if it "
                    "does not, remove it"
                )


def _sizes(keys: _Keys, name: str) -> dict[str, Any]:
    """Return the settings that config.json says in one key each."""
    sizes = {ours: (theirs, keys.get(theirs)) for theirs, ours in SIZES.items()}
    # Values that transformers 4 and 5 take for null; without the key, some families have other numbers.
    if keys.has("num_key_value_heads") and sizes["num_kv_heads"][1] is None:
        sizes["num_kv_heads"] = sizes["num_heads"]
    if sizes["tied_head"][1] is None:
        sizes["tied_head"] = ("tie_word_embeddings", FAMILIES[name].tied_by_default)
    # Without head_dim transformers takes 128 for Qwen 3, and hidden_size / num_attention_heads for the others.
    optional = ("init_std",) if name == "qwen3" else ("init_std", "head_dim")
    found = {}
    for ours, (theirs, value) in sizes.items():
        if value is not None:
            found[ours] = checked(theirs, value, _HINTS[ModelConfig][ours])
        elif ours not in optional:
            raise ValueError(f"config.json: {theirs}: missing; add it")
    return found


def _layers(keys: _Keys, family: Family, num_layers: int) -> tuple[list[str], int]:
    """Return the kind of every layer, and the attention window of those that have one."""
    window, types = keys.get("sliding_window"), keys.get("layer_types")
    if family.layers_key == "sliding_window" and not keys.has("sliding_window"):
        raise ValueError(
            "config.json: sliding_window: missing, and transformers then takes 4096; add it, null for none"
        )
    kinds = ["full"] * num_layers
    match family.layers_key:
        case "sliding_window" if window is not None:
            kinds = ["window"] * num_layers
        case "use_sliding_window":
            if not keys.get("use_sliding_window"):
                window = None
            elif types is None:
                first = checked("max_window_layers", keys.get("max_window_layers"), int)
                kinds = ["window" if layer >= first else "full" for layer in range(num_layers)]
        case "layer_types":
            kinds = ["full" if layer % 4 == 3 else "window" for layer in range(num_layers)]  # transformers' default
        case "no_rope_layers":
            keys.must_be("use_sliding_window", False)
            period, uses = keys.get("no_rope_layer_interval"), keys.get("no_rope_layers")
            period = 4 if period is None else checked("no_rope_layer_interval", period, _POSITIVE)
            # 1 means that a layer has RoPE.
            uses = [(layer + 1) % period != 0 for layer in range(num_layers)] if uses is None else uses
            if not isinstance(uses, list) or len(uses) != num_layers:
                raise ValueError(f"config.json: no_rope_layers: must have {num_layers} entries; correct it")
            kinds = ["full" if has_rope else "full_no_rope" for has_rope in uses]
    if types is not None:
        # The list decides where the family goes by it. Elsewhere it may only say what the other keys say.
        names = {"full_attention": "full", "sliding_attention": "window"}
        if not isinstance(types, list) or len(types) != num_layers or any(str(kind) not in names for kind in types):
            raise ValueError(
                f"config.json: layer_types: must have {num_layers} entries, {' or '.join(names)}; correct it"
            )
        listed = [names[kind] for kind in types]
        if family.layers_key == "layer_types" or (family.layers_key == "use_sliding_window" and window):
            kinds = listed
        elif "window" in listed:
            raise ValueError("config.json: layer_types: has sliding_attention, which this family does not; correct it")
    return kinds, checked("sliding_window", window, _POSITIVE) if "window" in kinds else 0


def _rope(keys: _Keys, length: int, *, nested: bool) -> tuple[float, RopeScaling]:
    """Return the base and the scaling; `length` is max_position_embeddings.

    `nested`: full and windowed layers have tables of their own (OLMo 3).
    """
    # Base and scaling as transformers 5 reads them, then as 4 does; they must be equal.
    found: list[tuple[float, RopeScaling]] = []
    theta, scaling, parameters = (keys.get(key) for key in ("rope_theta", "rope_scaling", "rope_parameters"))
    if parameters is not None:  # transformers 5
        where = "rope_parameters"
        if nested:
            if not isinstance(parameters, Mapping) or set(parameters) != {"full_attention", "sliding_attention"}:
                raise ValueError(
                    "config.json: rope_parameters: must have full_attention and sliding_attention, since transformers "
                    "ignores others; nest them"
                )
            windowed = _parameters(parameters["sliding_attention"], theta, length, f"{where}.sliding_attention")
            parameters, where = parameters["full_attention"], f"{where}.full_attention"
            if windowed != (_parameters(parameters, theta, length, where)[0], UNSCALED):
                raise ValueError(
                    "config.json: rope_parameters.sliding_attention: must have the rope_theta of full_attention and no "
                    "scaling; import another model"
                )
        found.append(_parameters(parameters, theta, length, where))
    elif nested and theta not in (None, _OLMO3_WINDOWED_BASE):
        raise ValueError(
            f"config.json: rope_theta = {theta!r:.80}: transformers 4 takes it for all layers, and 5 takes "
            f"{_OLMO3_WINDOWED_BASE:.0f} for those with a window; add rope_parameters, with full_attention and "
            "sliding_attention"
        )
    base = found[0][0] if found and theta is None else theta
    if base is not None and (scaling is not None or not found):  # transformers 4
        found.append(_parameters({} if scaling is None else scaling, base, length, "rope_scaling"))
    if not found:
        raise ValueError("config.json: rope_theta: missing, and transformers 4 and 5 differ in what it then is; add it")
    if any(other != found[0] for other in found) or theta not in (None, found[0][0]):
        raise ValueError("config.json: rope_parameters: differs from rope_theta and rope_scaling; remove one of them")
    base, read = found[0]
    if nested and read.kind != "none":
        if not read.truncate:
            raise ValueError("config.json: truncate = false: transformers ignores it in this family; remove it")
        read = RopeScaling(**{**vars(read), "full_layers_only": True})
    return base, read


def _parameters(table: Any, theta: Any, length: int, where: str) -> tuple[float, RopeScaling]:
    """Return base and scaling of one table of RoPE parameters; `length` is max_position_embeddings."""
    if not isinstance(table, Mapping):
        raise ValueError(f"config.json: {where} = {table!r:.80}: must be a table; correct it")
    table = {key: value for key, value in table.items() if value is not None}
    base = checked("rope_theta", table.pop("rope_theta", theta), _HINTS[ModelConfig]["rope_base"])
    kind = str(table.pop("rope_type", table.pop("type", "default")))
    if kind not in ("default", *SCALINGS):
        raise ValueError(
            f"config.json: {where}.rope_type = {kind!r:.80}: only default, {', '.join(SCALINGS)} are supported; import "
            "another model"
        )
    if table.pop("partial_rotary_factor", 1) != 1:
        raise ValueError(f"config.json: {where}.partial_rotary_factor: only 1 is supported; import another model")
    if kind == "default":
        if table:
            raise ValueError(f"config.json: {where}.{min(table)!r:.80}: unknown with rope_type default; remove it")
        return base, UNSCALED
    known = SCALINGS[kind]
    # transformers has no defaults for these.
    needed = [key for key in known if key in ("factor", "low_freq_factor", "high_freq_factor")]
    if "original_max_position_embeddings" in known:
        table.setdefault("original_max_position_embeddings", length)
    if kind == "yarn":
        original = checked(f"{where}.original", table["original_max_position_embeddings"], _POSITIVE)
        table.setdefault("factor", length / original)  # as in transformers, where it is missing
        scales = [checked(f"{where}.{key}", table.pop(key, 0), float) for key in ("mscale", "mscale_all_dim")]
        if all(scales):  # transformers gives one factor for both
            stretch = 0.1 * math.log(max(1.0, checked(f"{where}.factor", table["factor"], float)))
            table.setdefault("attention_factor", (scales[0] * stretch + 1) / (scales[1] * stretch + 1))
    for key in (*needed, *table):
        if key not in known:
            raise ValueError(f"config.json: {where}.{key!r:.80}: unknown with rope_type {kind}; remove it")
        if key not in table:
            raise ValueError(f"config.json: {where}.{key}: missing with rope_type {kind}; add it")
    hints = _HINTS[RopeScaling]
    settings = {known[key]: checked(f"{where}.{key}", value, hints[known[key]]) for key, value in table.items()}
    return base, RopeScaling(kind=kind, **settings)  # type: ignore[arg-type]
