"""An adapter folder as its two files describe it, and whether it fits a model.

The tensors say where they belong: layers are taken from their keys, and ranks from the rows of A
where the config gives them by an expression. The config says how they are scaled, and must not
contradict them: PEFT itself silently drops tensors outside `target_modules`, and computes with
the bare base where the tensors of a layer are missing. Here both are problems.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from errors import BadAdapter, listed
from files import hash_contents, read_file
from lora.config import LoRAConfig, last_part, linear_layer, of_layer
from lora.foreign import CONFIG, FOLDER, WEIGHTS, check_folder
from lora.peft_settings import MERGE, Fault, Settings, plain_name, read_settings, refuse
from lora.peft_tensors import (
    DAMAGED,
    PREFIX,
    Tensors,
    bare,
    parse_tensors,
    same_values,
    sort_keys,
)

T = TypeVar("T")

LARGEST = 2**36  # bytes of weights; a whole state dict, which is read too, has a few 2**33
OTHER_BASE = "give the base it was trained on with --model, or another adapter"
INCOMPLETE = f"{OTHER_BASE}; if the base is right, the adapter is incomplete: copy it again"
OTHER_CONFIG = f"correct {CONFIG}, or copy the one that was saved with these tensors"
VISION = "it belongs to a vision-language model: give an adapter of a Qwen2 or Qwen2.5 text model"
CLASSIFIER = "it belongs to a classifier or a reward model: give an adapter of a language model"
ON_THE_HEAD = f"adapters of the embedding and the output head are not supported: {MERGE}"
TRAINED = f"more than adapters was trained, or tokens were added: {MERGE}"
OTHER_MATRICES = ("lora_a", "lora_b", "lora_down", "lora_up")
OTHER_PROGRAM = "save it in PEFT's format with the program that trained it"
ADAPTER_ONLY = "save only the adapter, with PEFT's model.save_pretrained(FOLDER)"
UNUSED_ENTRY = f"correct the name in {CONFIG}, or delete the entry if no layer needs it"


def peft_key(name: str) -> str:
    """PEFT's key for one of our trained parameters."""
    return PREFIX + name + (".weight" if name.endswith(("lora_A", "lora_B")) else "")


@dataclass(frozen=True)
class AdapterFolder:
    """Settings, tensors, and the hash of the very bytes that they were read from."""

    folder: Path
    sha256: str
    settings: Settings
    tensors: Tensors
    config: LoRAConfig

    @classmethod
    def read(cls, folder: Path) -> "AdapterFolder":
        """Read both files, each once.

        Raises BadAdapter for a folder that is something else, and for settings that cannot be
        honored or that contradict the tensors. Wrong tensors are left to `problems`.
        """
        check_folder(folder)
        config = read_file(folder / CONFIG, BadAdapter, FOLDER)
        weights = read_file(folder / WEIGHTS, BadAdapter, DAMAGED, most=LARGEST)
        settings = read_settings(folder, config)
        tensors = sort_keys(parse_tensors(folder / WEIGHTS, weights))
        if not tensors.layers:
            refuse(folder / WEIGHTS, [_no_layers(tensors)])
        if problems := list(_pattern_problems(settings, tensors)):
            refuse(folder / CONFIG, problems)
        ranks = _plain_pattern(settings.rank_pattern)
        alphas = _plain_pattern(settings.alpha_pattern)
        assert alphas is not None, "read_settings refuses expressions in alpha_pattern"
        sha256 = hash_contents(((CONFIG, config), (WEIGHTS, weights)))
        lora = LoRAConfig(
            r=settings.r,
            alpha=settings.alpha,
            dropout=settings.dropout,
            targets=_targets(settings, tensors),
            rslora=settings.rslora,
            dora=settings.dora,
            ranks=_by_name(tensors.ranks, settings.r) if ranks is None else ranks,
            alphas=alphas,
        )
        return cls(folder, sha256, settings, tensors, lora)

    def names_in(self, model: nn.Module) -> dict[str, str]:
        """Bare name -> full name of each layer with tensors that is a linear layer of `model`."""
        full = {
            bare(name): name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }
        return {name: full[name] for name in self.tensors.layers if name in full}

    def problems(self, model: nn.Module) -> list[Fault]:
        """What does not fit `model`, which may be on the meta device; values are not compared."""
        names, layers, found = self.names_in(model), self.tensors.layers, []
        for name in sorted(layers.keys() - names.keys()):
            found += [_unexpected(key) for key in layers[name].keys.values()]
        found += self.tensors.problems
        for name, full_name in sorted(names.items()):
            found += self._shape_problems(full_name, layers[name].keys, model)
        if not self.settings.has_expression:
            found += self._selection_problems(set(names.values()), model)
        state = _base_tensors(model)
        for key, name in self.tensors.others.items():
            if name not in state:
                found.append(_unexpected(key))
            elif (shape := self.tensors.shape(key)) != (ours := tuple(state[name].shape)):
                found.append(Fault(f"{key} is {shape}, and {ours} in the base", TRAINED))
        parts = {part for name in self.tensors.others.values() for part in name.split(".")}
        lacking = [m for m in self.settings.saved_modules if last_part(m) not in parts]
        if lacking:
            cause = f"modules_to_save is {', '.join(lacking)}, without tensors in {WEIGHTS}"
            found.append(Fault(cause, INCOMPLETE))
        return found

    def compare_others(self, model: nn.Module) -> tuple[list[Fault], list[str]]:
        """(problems, keys of equal tensors) of the tensors that are not an adapter's.

        They are compared with the base's own. PEFT also saves an embedding that it believes to be
        resized; a whole state dict holds every tensor of the base.
        """
        state, problems, equal = _base_tensors(model), [], []
        comparable = {
            key: state[name]
            for key, name in self.tensors.others.items()
            if name in state and self.tensors.shape(key) == tuple(state[name].shape)
        }  # all others are among `problems`
        for key, ours in comparable.items():
            if same_values(ours, self.tensors.values[key]):
                equal.append(key)
            else:
                problems.append(Fault(f"{key} differs from the base's own", TRAINED))
        return problems, equal

    def _shape_problems(
        self, name: str, keys: Mapping[str, str], model: nn.Module
    ) -> Iterator[Fault]:
        layer = linear_layer(model, name)
        rank = of_layer(name, self.config.ranks, self.config.r)
        rows = self.tensors.ranks.get(bare(name), rank)  # a wrong rank is one problem, not two
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (rank, layer.in_features),
            "lora_B": (layer.out_features, rows),
        }
        if self.config.dora:
            shapes["lora_magnitude_vector"] = (layer.out_features,)
        elif key := keys.get("lora_magnitude_vector"):
            yield Fault(f"{key} is not expected: use_dora is false", OTHER_CONFIG)
        for matrix, shape in shapes.items():
            if matrix not in keys:
                yield Fault(f"{peft_key(f'{name}.{matrix}')} is missing", INCOMPLETE)
                continue
            found = self.tensors.shape(keys[matrix])
            if found != shape and 0 not in found:  # an empty tensor has a problem of its own
                other_rank = matrix == "lora_A" and found[1:] == shape[1:]
                remedy = OTHER_CONFIG if other_rank else OTHER_BASE
                yield Fault(f"{keys[matrix]} is {found}, not {shape}", remedy)

    def _selection_problems(self, names: set[str], model: nn.Module) -> Iterator[Fault]:
        """Selected layers without tensors, and tensors of layers that are not selected."""
        adaptable = nn.Linear | nn.Embedding
        modules = (name for name, m in model.named_modules() if isinstance(m, adaptable))
        selected = {name for name in modules if self.settings.selects(name)}
        for name in sorted(selected - names):
            for matrix in ("lora_A", "lora_B"):
                remedy = ON_THE_HEAD if _is_table(name) else INCOMPLETE
                yield Fault(f"{peft_key(f'{name}.{matrix}')} is missing", remedy)
        for name in sorted(names - selected):
            keys = listed(self.tensors.layers[bare(name)].keys.values())
            cause = f"{keys}: not expected, by {self.settings.selection()}"
            yield Fault(cause, OTHER_CONFIG)


def _targets(settings: Settings, tensors: Tensors) -> tuple[str, ...]:
    """Name endings that select the layers with tensors: the config's own if these do."""
    if settings.selects_by_name:
        endings = {"all-linear"} | tensors.endings
        if used := tuple(target for target in settings.targets if target in endings):
            return used
    return tuple(tensors.layers)


def _plain_pattern(pattern: Mapping[str, T]) -> dict[str, T] | None:
    """The pattern with plain name endings as keys; None if a key is any other expression."""
    plain: dict[str, T] = {}
    for key, value in pattern.items():
        if (name := plain_name(key)) is None:
            return None
        plain.setdefault(name[0], value)  # the first match counts
    return plain


def _by_name(values: Mapping[str, T], default: T) -> dict[str, T]:
    """The values by the last parts of the layers' names, where these determine them."""
    by_last: dict[str, set[T]] = {}
    for name, value in values.items():
        by_last.setdefault(last_part(name), set()).add(value)
    shared = {end: next(iter(found)) for end, found in by_last.items() if len(found) == 1}
    own = {name: value for name, value in values.items() if last_part(name) not in shared}
    return {key: value for key, value in (own | shared).items() if value != default}


def _pattern_problems(settings: Settings, tensors: Tensors) -> Iterator[Fault]:
    """Entries of rank_pattern and alpha_pattern that match no layer with tensors."""
    paths = {layer.path for layer in tensors.layers.values()}
    for field in ("rank_pattern", "alpha_pattern"):
        unmatched = []
        for key in getattr(settings, field):
            name, is_full = plain_name(key) or (None, False)
            if name and name not in (paths if is_full else tensors.endings):
                unmatched.append(key)
        if unmatched:
            cause = f"{field}: no adapted layer is named {', '.join(unmatched)}"
            yield Fault(cause, UNUSED_ENTRY)
    if _plain_pattern(settings.rank_pattern) is not None:
        return
    ranks, allowed = set(tensors.ranks.values()), {settings.r, *settings.rank_pattern.values()}
    for key, rank in settings.rank_pattern.items():
        if rank not in ranks:
            yield Fault(f"rank_pattern: no layer has the rank {rank} of {key!r}", OTHER_CONFIG)
    if ranks - allowed:
        cause = f"layers have the ranks {sorted(ranks - allowed)}: neither r nor in rank_pattern"
        yield Fault(cause, OTHER_CONFIG)


def _unexpected(key: str) -> Fault:
    parts = key.split(".")
    if "language_model" in parts or "visual" in parts:
        remedy = VISION
    elif {"score", "classifier", "v_head"} & set(parts):
        remedy = CLASSIFIER
    elif ("lora_" in key and parts[-1] == "bias") or parts[-1].startswith("trainable_tokens"):
        remedy = TRAINED
    elif parts[-1] == "alpha" or any(part.startswith(OTHER_MATRICES) for part in parts):
        remedy = OTHER_PROGRAM
    elif "lora_" in key and _is_table(key):
        remedy = ON_THE_HEAD
    else:
        remedy = OTHER_BASE
    return Fault(f"{key} is not expected", remedy)


def _no_layers(tensors: Tensors) -> Fault:
    if not tensors.values:
        return Fault("it holds no tensors: what was trained was not saved", ADAPTER_ONLY)
    first = min(tensors.values)
    found = _unexpected(first)
    remedy = ADAPTER_ONLY if found.remedy == OTHER_BASE else found.remedy
    return Fault(f"it holds no tensors of PEFT's adapters, but {first}", remedy)


def _is_table(name: str) -> bool:
    return "embed_tokens" in name.split(".") or "lm_head" in name.split(".")


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the base by bare name; a tied head is found under both of its names."""
    tensors = {bare(name): tensor for name, tensor in model.state_dict().items()}
    if "lm_head.weight" not in tensors and hasattr(model, "head_weight"):
        tensors["lm_head.weight"] = model.head_weight
    return tensors
