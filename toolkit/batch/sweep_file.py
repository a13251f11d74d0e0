"""Sweep files: a small YAML that becomes a list of experiments, and the presets, which are such files.

    common: {dataset: digits, budget: 18 MiB}    # parameters of all; what grid and runs say goes before
    grid:                                        # the product of these lists, the last varying fastest
      method: [lora, qlora, full]
      checkpointing: [none, planned]
    runs:                                        # and single experiments
      - {method: linear, checkpointing: none}
    exclude:                                     # less those that match all of one of these
      - {method: full, checkpointing: none}
    seeds: 3                                     # each with seeds 0, 1, 2; or a list: [0, 7]
    baselines:                                   # the same four keys, with parameters of `BaselineExperiment`
      common: {dataset: digits}
      grid: {protocol: [logreg, knn]}

At least one `grid` or list of `runs` is needed, all else is optional.  `grid` may also be a list of grids.
Parameters are those of `Experiment` and, by their own names, the options of methods and strategies: a method
ignores those of others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from reprlib import repr as short
from warnings import warn

import yaml

from toolkit.baselines.experiment import BaselineExperiment
from toolkit.batch.sweep import grid
from toolkit.budget import parse_bytes
from toolkit.errors import InputError, check_name
from toolkit.experiment import Experiment, Parameters

PRESETS = Path(__file__).parent / "presets"
MOST = 100_000  # experiments of a file: building more takes longer than a person waits to see a mistake

_SECTION = ("common", "grid", "runs", "exclude")
_KEYS = (*_SECTION, "seeds", "baselines")


def read_sweep(path: Path | str) -> list[Parameters]:
    """The experiments of a sweep file, each once: fine-tuning, then baselines, seed by seed.

    All experiments of one seed come before the next seed's, so that a sweep cut short can be compared.
    What the file names twice is left out with a warning.  A baseline that draws nothing has one seed.
    Raises `InputError` with file, key and remedy for a file that cannot be read as said above, and for an
    exclusion that matches nothing or leaves nothing.
    """
    try:
        sweep = _mapping("the file", _load(Path(path)), _KEYS)
        baselines = _mapping("baselines", sweep["baselines"], _SECTION) if "baselines" in sweep else {}
        tuned = {key: sweep[key] for key in _SECTION if key in sweep}
        seeds = _seeds(sweep)
        experiments = _experiments(Experiment, "", tuned, seeds) if tuned or not baselines else []
        if baselines:
            experiments += _experiments(BaselineExperiment, "baselines.", baselines, seeds)
        return experiments
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def preset(name: str) -> list[Parameters]:
    """The experiments of `presets/<name>.yaml`; raises `InputError` with the nearest match."""
    check_name("preset", name, sorted(path.stem for path in PRESETS.glob("*.yaml")))
    return read_sweep(PRESETS / f"{name}.yaml")


def check_count(experiments: Sequence[Parameters], limit: int = 1000, yes: bool = False) -> None:
    """Raise `InputError` for more than `limit` experiments that nobody said `yes` to."""
    if len(experiments) > limit and not yes:
        raise InputError(
            f"the sweep has {len(experiments):,} runs, more than {limit:,}; shorten its lists, "
            "or pass --yes to run them all."
        )


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: YAML would keep the last without a word."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands there twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return node


def _load(path: Path) -> object:
    try:
        return yaml.load(path.read_bytes(), Loader=_Loader)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}); give the path of a sweep file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 31st of February
        raise InputError(f"is no YAML; mend it: {' '.join(str(error).split())}.") from None


def _experiments(
    kind: type[Parameters], at: str, section: dict, seeds: Sequence[int] | None
) -> list[Parameters]:
    """The experiments of one section; `at`: what stands before the names of its keys in messages."""
    common = _parameters(kind, f"{at}common", section["common"]) if "common" in section else {}
    blocks = []  # of lists, whose product is taken; a single run is a product too
    for where, one in _grids(at, section):
        lists = _mapping(where, one, kind.flat_types())
        for name, values in lists.items():
            for value in _filled(f"{where}.{name}", values, list):
                _check_value(kind, f"{where}.{name}", name, value)
        blocks.append(lists)
    for where, run in _numbered(at, section, "runs"):
        blocks.append(_one_each(_parameters(kind, where, run)))
    if not blocks:
        raise InputError(f"{at}grid and {at}runs are both missing: nothing to run; give one of them.")
    if seeds is not None and any("seed" in block for block in (common, *blocks)):
        raise InputError(f"'seed' is a parameter in {at or 'the file'} beside 'seeds'; keep one of the two.")
    count = sum(math.prod(map(len, block.values())) for block in blocks) * len(seeds or [0])
    if count > MOST:
        raise InputError(f"names {count:,} experiments, more than {MOST:,}; shorten its lists.")

    blocks = [_one_each(common) | block for block in blocks]
    by_seed = [
        [e for block in blocks for e in grid(kind, **(block if seed is None else block | {"seed": [seed]}))]
        for seed in ([None] if seeds is None else seeds)
    ]
    doubled = len(by_seed[0]) - len(set(by_seed[0]))
    if doubled:
        warn(f"{at}grid and {at}runs repeat {doubled} experiments; each is run once.", stacklevel=3)
    experiments = list(dict.fromkeys(e for part in by_seed for e in part))
    exclusions = {
        where: _parameters(kind, where, exclusion) for where, exclusion in _numbered(at, section, "exclude")
    }
    return _without(exclusions, experiments)


def _grids(at: str, section: dict) -> list[tuple[str, object]]:
    """The grid of a section, or its grids, each with its place."""
    if isinstance(section.get("grid"), list) and section["grid"]:
        return _numbered(at, section, "grid")
    return [(f"{at}grid", section["grid"])] if "grid" in section else []


def _without(exclusions: dict[str, dict], experiments: list[Parameters]) -> list[Parameters]:
    """What is left of `experiments`; `exclusions`: by where they stand in the file."""
    excluded = set()
    for where, exclusion in exclusions.items():
        if "budget" in exclusion:  # as experiments store it
            exclusion = exclusion | {"budget": parse_bytes(exclusion["budget"])}
        matched = {e for e in experiments if exclusion.items() <= e.flat_dict().items()}
        if not matched:
            known = {name: {e.flat_dict().get(name) for e in experiments} for name in exclusion}
            there = "; ".join(f"{name} is {short(values)}" for name, values in known.items())
            raise InputError(f"{where} matches no experiment: in this file {there}.  Mend or remove it.")
        excluded |= matched
    left = [e for e in experiments if e not in excluded]
    if not left:
        raise InputError(f"{' and '.join(exclusions)} leave no experiment; mend or remove what excludes all.")
    return left


def _seeds(sweep: dict) -> Sequence[int] | None:
    """The seeds of the file, None if it leaves them to the parameters."""
    if "seeds" not in sweep:
        return None
    seeds = sweep["seeds"]
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds <= MOST:
        seeds = range(seeds)
    if not isinstance(seeds, (list, range)) or not seeds:
        raise InputError(f"seeds must be a count from 1 to {MOST:,} or a list, got {short(sweep['seeds'])}.")
    if len(set(map(str, seeds))) < len(seeds):
        raise InputError(f"seeds has the same one twice, {short(seeds)}; remove it.")
    return seeds


def _one_each(parameters: dict) -> dict[str, list]:
    return {name: [value] for name, value in parameters.items()}


def _filled(where: str, value: object, kind: type[dict] | type[list]) -> dict | list:
    if not isinstance(value, kind):
        what = {dict: "a mapping (name: value)", list: "a list ([a, b] or lines with '- ')"}[kind]
        raise InputError(f"{where} must be {what}, got {short(value)}.")
    if not value:
        raise InputError(f"{where} is empty; fill or remove it.")
    return value


def _mapping(where: str, value: object, valid: Iterable[str]) -> dict:
    for key in _filled(where, value, dict):
        check_name(f"key of {where}", key, valid)
    return value


def _numbered(at: str, section: dict, key: str) -> list[tuple[str, object]]:
    """The items of the list `section[key]`, if it is there, each with its place from 1."""
    if key not in section:
        return []
    items = _filled(f"{at}{key}", section[key], list)
    return [(f"{at}{key}[{place}]", item) for place, item in enumerate(items, 1)]


def _parameters(kind: type[Parameters], where: str, value: object) -> dict:
    for name, one in _mapping(where, value, kind.flat_types()).items():
        _check_value(kind, f"{where}.{name}", name, one)
    return value


def _check_value(kind: type[Parameters], where: str, name: str, value: object) -> None:
    """Refuse what YAML makes of a value that was meant otherwise; the experiment checks all else."""
    expected = kind.flat_types()[name]
    if isinstance(value, (list, dict)):
        raise InputError(f"{where} must be one value, got {short(value)}; a list of values belongs in grid.")
    if value is None:
        raise InputError(f"{where} has no value (so YAML reads nothing, ~ and null); fill or remove it.")
    if isinstance(value, bool) and expected != "bool":
        raise InputError(f"{where} is {value} (so YAML reads yes, no, on and off); put the word in quotes.")
    if isinstance(value, date):
        raise InputError(f"{where} is a date to YAML, {value}; put it in quotes.")
    if isinstance(value, str) and expected in ("int", "float"):
        raise InputError(
            f"{where} must be a number, got the text {value!r}; write it without quotes, 1e-3 as 1.0e-3."
        )
