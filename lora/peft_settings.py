"""PEFT's `adapter_config.json`: what its fields mean, and which of them cannot be honored.

PEFT lets an adapter's config select layers by regular expressions. Those are never run, because one
can take minutes: where the config has one, the tensors alone say which layers are adapted and with
which rank (`peft_format.py`). What the config spells out in plain names is compared with the
tensors. Format: peft 0.21, `LoraConfig`; fields of other versions are refused if they are in use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from errors import BadAdapter, listed
from files import parse_json
from lora.config import ends_in
from lora.foreign import CONFIG, FOLDER, mlx_adapter

# Fields of features that change the forward pass, with the values that mean "not used". An absent
# field is not used either.
UNUSED: dict[str, tuple] = {
    "bias": ("none",),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None,),
    "lora_bias": (False,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "megatron_config": (None,),
    # These initial values leave the base as it is.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
}
# Fields that `read_settings` reads.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
        "alpha_pattern", "modules_to_save", "base_model_name_or_path", "revision"}  # fmt: skip
# Fields that say how an adapter was made, and do not change what it computes. `fan_in_fan_out` is
# for other layers than nn.Linear: PEFT ignores it there.
HARMLESS = {"task_type", "inference_mode", "auto_mapping", "peft_version", "fan_in_fan_out",
            "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
            "velora_config", "qalora_group_size", "runtime_config",
            "ensure_weight_tying"}  # fmt: skip
# Initializations that subtract the initial adapter from the base, so that the trained adapter does
# not fit the published base. PEFT can convert them, given the adapter from before training.
CONVERTIBLE = ("pissa", "corda", "olora", "lora_ga")

LONGEST = 2**14  # entries of a list, characters of a text; matching takes time with both

MERGE = "merge it with PEFT (merge_and_unload, save_pretrained) and give the result with --model"
CONVERT = (
    "convert it to a plain adapter with PEFT: save_pretrained(FOLDER,"
    " path_initial_model_for_weight_conversion=FOLDER_OF_THE_INITIAL_ADAPTER)"
)
UNSUPPORTED = (
    "supported are LoRA and DoRA on linear layers, without trained biases or other features; "
    + MERGE
)
PROMPTS = "it has prompts, but no weights to merge: use it with PEFT, or train a LoRA adapter"
UNKNOWN = (
    f"if the adapter does not use it, delete it from {CONFIG}; else {MERGE}, using the version of"
    " PEFT that saved it"
)
PLAIN_KEYS = f"write the names of the layers in its place in {CONFIG}, such as 'layers.0.q_proj'"


class Fault(NamedTuple):
    """Something that cannot be honored, and what the user can do about it."""

    cause: str
    remedy: str


@dataclass(frozen=True)
class Settings:
    """What `adapter_config.json` says, validated; its layers are not yet compared with tensors.

    `targets` and `excluded` are name endings, () where the config has an expression or nothing.
    """

    r: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    targets: tuple[str, ...]
    excluded: tuple[str, ...]
    has_expression: bool  # whether layers are selected or excluded by an expression
    layers: tuple[int, ...]  # the only numbers of layers that are adapted; () for all
    layers_pattern: tuple[str, ...]  # names before that number, such as `layers`; () for any
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    saved_modules: tuple[str, ...]  # trained as a whole and saved with the adapter
    base: str | None
    revision: str | None

    @property
    def selects_by_name(self) -> bool:
        """Whether `targets` alone say which layers are adapted."""
        return not (self.has_expression or self.excluded or self.layers)

    def selects(self, name: str) -> bool:
        """Whether PEFT adapts the layer `name`, as far as no expression would have to be run."""
        assert not self.has_expression
        if any(ends_in(name, end) for end in self.excluded):
            return False
        if name in self.targets:
            return True  # a full name counts whatever its layer's number
        if self.layers and _layer_number(name, self.layers_pattern) not in self.layers:
            return False
        if self.targets == ("all-linear",):
            return not ends_in(name, "lm_head") and not ends_in(name, "embed_tokens")
        return any(ends_in(name, end) for end in self.targets)

    def selection(self) -> str:
        """The fields that select layers, for people."""
        text = f"target_modules {', '.join(self.targets)}"
        if self.excluded:
            text += f", exclude_modules {', '.join(self.excluded)}"
        if self.layers:
            text += f", layers_to_transform {', '.join(map(str, self.layers))}"
        return text


def read_settings(folder: Path, config: bytes) -> Settings:
    """What `config`, the content of the config in an adapter folder, means.

    Raises BadAdapter, listing every setting that is malformed or not supported.
    """
    path = folder / CONFIG
    raw = parse_json(path, config, BadAdapter, FOLDER)
    if "peft_type" not in raw and raw.keys() & {"lora_parameters", "fine_tune_type"}:
        raise mlx_adapter(folder)
    if problems := _problems(raw):
        refuse(path, problems)
    targets, excluded = (raw.get(key) or () for key in ("target_modules", "exclude_modules"))
    has_expression = isinstance(excluded, str) or _is_expression(targets)
    return Settings(
        r=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout", 0.0),
        rslora=raw.get("use_rslora") or False,
        dora=raw.get("use_dora") or False,
        targets=() if _is_expression(targets) else _as_tuple(targets),
        excluded=() if isinstance(excluded, str) else tuple(excluded),
        has_expression=has_expression,
        layers=_as_tuple(raw.get("layers_to_transform")),
        layers_pattern=_as_tuple(raw.get("layers_pattern")),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        saved_modules=_as_tuple(raw.get("modules_to_save")),
        base=_text_or_none(raw.get("base_model_name_or_path")),
        revision=_text_or_none(raw.get("revision")),
    )


def refuse(where: Path | str, problems: list[Fault]) -> NoReturn:
    """Raise BadAdapter with all problems and the remedy of each kind."""
    remedies = dict.fromkeys(problem.remedy for problem in problems)
    raise BadAdapter(
        f"{where}: {listed(problem.cause for problem in problems)}", "; ".join(remedies)
    )


def plain_name(key: str) -> tuple[str, bool] | None:
    r"""(layer name, whether it is a full name) of a key of `rank_pattern` or `alpha_pattern`.

    PEFT matches `(.*\.)?(KEY)$`. A plain name is therefore a name ending, `^NAME` a full name, and
    `.*\.NAME` a name ending again. None for any other expression.
    """
    name = key.removesuffix("$").replace(r"\.", ".")
    is_full = name.startswith("^")
    name = name.removeprefix("^")
    if name.startswith(".*."):
        name, is_full = name.removeprefix(".*."), False
    return (name, is_full) if _is_name(name) else None


def _problems(raw: dict[str, Any]) -> list[Fault]:
    """Everything in the config that cannot be honored."""
    if (kind := raw.get("peft_type")) != "LORA":
        has_prompts = isinstance(kind, str) and kind.endswith(("PROMPT", "_TUNING", "CPT"))
        remedy = PROMPTS if has_prompts and kind != "LN_TUNING" else UNSUPPORTED
        return [Fault(f"peft_type is {kind!r}, not 'LORA'", remedy)]
    long = [field for field, value in raw.items() if isinstance(value, list | dict | str)
            and len(value) > LONGEST]  # fmt: skip
    if long:
        return [Fault(f"{', '.join(long)}: more than {LONGEST:,} entries", UNSUPPORTED)]
    wrong = []
    if not _is_rank(raw.get("r")):
        wrong.append(f"r is {raw.get('r')!r}")
    if not _is_alpha(raw.get("lora_alpha")):
        wrong.append(f"lora_alpha is {raw.get('lora_alpha')!r}")
    wrong += [
        f"{field} is {raw[field]!r}, not an object of numbers by module name"
        for field, is_number in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha))
        if raw.get(field) is not None and not _is_pattern(raw[field], is_number)
    ]
    dropout = raw.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        wrong.append(f"lora_dropout is {dropout!r}")
    wrong += [
        f"{field} is {raw[field]!r}"
        for field in ("use_rslora", "use_dora")
        if not isinstance(raw.get(field) or False, bool)
    ]
    wrong += _selection_problems(raw)
    problems = [Fault(cause, f"correct {CONFIG}, or save the adapter again") for cause in wrong]
    if not wrong and (keys := [k for k in raw.get("alpha_pattern") or () if not plain_name(k)]):
        cause = f"alpha_pattern has {listed(map(repr, keys))}: an expression, which is not run"
        problems.append(Fault(cause, PLAIN_KEYS))
    for field, unused in UNUSED.items():
        if raw.get(field) is not None and raw[field] not in unused:
            is_convertible = str(raw[field]).casefold().startswith(CONVERTIBLE)
            remedy = CONVERT if is_convertible else UNSUPPORTED
            problems.append(Fault(f"{field} is {raw[field]!r}", remedy))
    known = UNUSED.keys() | READ | HARMLESS
    problems += [
        Fault(f"{field} is {value!r}, a setting of another version of PEFT", UNKNOWN)
        for field, value in raw.items()
        if field not in known and not _is_off(value)
    ]
    return problems


def _selection_problems(raw: dict[str, Any]) -> list[str]:
    wrong = []
    targets = raw.get("target_modules")
    if not targets or not (isinstance(targets, str) or _are_names(targets)):
        wrong.append(f"target_modules is {targets!r}, not a list of module names or an expression")
    excluded = raw.get("exclude_modules")
    if excluded and not (isinstance(excluded, str) or _are_names(excluded)):
        wrong.append(f"exclude_modules is {excluded!r}, not a list of module names")
    layers, pattern = raw.get("layers_to_transform"), raw.get("layers_pattern")
    if layers is not None and not all(map(_is_index, _as_tuple(layers))):
        wrong.append(f"layers_to_transform is {layers!r}, not a list of layer numbers")
    if pattern and (not _are_names(_as_tuple(pattern)) or layers in (None, [])):
        wrong.append(f"layers_pattern is {pattern!r}, which needs names and layers_to_transform")
    saved = raw.get("modules_to_save")
    if saved and not _are_names(saved):
        wrong.append(f"modules_to_save is {saved!r}, not a list of module names")
    return wrong


def _is_expression(targets: object) -> bool:
    return isinstance(targets, str) and targets != "all-linear"


def _is_off(value: object) -> bool:
    """Whether a setting of unknown meaning is certainly not in use."""
    return value is None or value is False or value in ("", [], {})


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_pattern(value: object, is_number: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def _are_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_name, value))


def _is_name(value: object) -> bool:
    parts = value.split(".") if isinstance(value, str) else [""]
    return all(part.replace("_", "a").isalnum() for part in parts)


def _as_tuple(value: Any) -> tuple:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _layer_number(name: str, patterns: tuple[str, ...]) -> int | None:
    """3 of model.layers.3.self_attn.q_proj: the first number after a name in `patterns`."""
    parts = name.split(".")
    for place in range(1, len(parts) - 1):
        before = ".".join(parts[:place])
        is_layer = not patterns or any(ends_in(before, pattern) for pattern in patterns)
        if parts[place].isdecimal() and is_layer:
            return int(parts[place])
    return None
