"""Sweep files: a small YAML that becomes a list of experiments, and the presets, which are such files.

    common: {dataset: digits, budget: 18 MiB}    # parameters of all; grid and runs override them
    grid:                                        # the product of these lists, the last varying fastest
      method: [lora, qlora, full]
      checkpointing: [none, planned]
      rank: [4, 16]                              # an option of lora and qlora; full is run once
    runs:                                        # and single experiments
      - {method: linear, checkpointing: none}
    exclude:                                     # except those that match all of one of these
      - {method: full, checkpointing: none}
    seeds: 3                                     # each with seeds 0, 1, 2; or a list: [0, 7]
    baselines:                                   # the same four keys, with parameters of `BaselineExperiment`
      common: {dataset: digits}
      grid: {protocol: [logreg, knn]}

At least one `grid` or list of `runs` is needed, all else is optional.  `grid` may also be a list of grids.
Parameters are those of `Experiment` and the options of its method and strategy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from reprlib import repr as short
from warnings import warn

import yaml

from toolkit.baselines.experiment import BaselineExperiment
from toolkit.batch.sweep import check_options, product
from toolkit.budget import parse_bytes
from toolkit.errors import InputError, check_name, one_line
from toolkit.experiment import Experiment, Parameters
from toolkit.files import read_bounded

PRESETS = Path(__file__).parent / "presets"
MOST = 100_000  # experiments of a file: building more takes longer than a person waits to see a mistake
MOST_EXCLUSIONS = 1_000
MOST_BYTES, MOST_DEPTH, MOST_NODES, MOST_DIGITS = 1_000_000, 20, 100_000, 30  # of a file, and of a number

_SECTION = ("common", "grid", "runs", "exclude")


def read_sweep(path: Path | str) -> list[Parameters]:
    """The experiments of a sweep file, each once: fine-tuning, then baselines, seed by seed.

    All experiments of one seed come before the next seed's, so that an interrupted sweep can be compared.
    Repeated experiments are left out with a warning.  A baseline that draws no random numbers has one seed.
    Raises `InputError` with file, key and remedy for a file that does not follow the rules above, and for an
    exclusion that matches nothing or leaves nothing.
    """
    try:
        sweep = dict(_mapping("the file", _load(Path(path)), (*_SECTION, "seeds", "baselines")))
        seeds = _seeds(sweep.pop("seeds")) if "seeds" in sweep else None
        baselines = _mapping("baselines", sweep.pop("baselines"), _SECTION) if "baselines" in sweep else None
        experiments = _experiments(Experiment, "", sweep, seeds) if sweep or not baselines else []
        if baselines:
            experiments += _experiments(BaselineExperiment, "baselines.", baselines, seeds)
        return experiments
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def presets() -> list[str]:
    """The names of the sweep files that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset(name: str) -> list[Parameters]:
    """The experiments of `presets/<name>.yaml`; raises `InputError` with the nearest match."""
    return read_sweep(PRESETS / f"{check_name('preset', name, presets())}.yaml")


def check_count(experiments: Sequence[Parameters], limit: int = 1000, yes: bool = False) -> None:
    """Raise `InputError` for more than `limit` experiments unless the user said `yes`."""
    if len(experiments) > limit and not yes:
        raise InputError(
            f"the sweep has {len(experiments):,} runs, more than {limit:,}; shorten its lists, "
            "or pass --yes to run them all."
        )


_PLAIN = [  # what text without quotes means in YAML 1.2
    (re.compile(r"~|null|Null|NULL|"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text[0] in "tT"),
    (re.compile(r"[-+]?[0-9]+(_[0-9]+)*"), int),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
]


class _Yaml:
    """The content of a YAML file: mappings, lists, and YAML 1.2's core types.

    PyYAML's own YAML 1.1 reads `no` and `off` as false, 1e-3 as text and 2026-01-01 as a date, and keeps the
    last of several equal keys without a word.  Files come from anywhere, so there are no tags, and whatever
    could take time or memory out of proportion (depth, numbers, repetition by aliases) has a limit.
    """

    def __init__(self, content: bytes):
        self._events = yaml.parse(content, yaml.SafeLoader)
        self._anchors: dict[str, tuple[object, int]] = {}  # values, and the nodes in them
        self._nodes = 0  # aliases count as what they stand for
        next(self._events)
        first = next(self._events)
        self.content = None if isinstance(first, yaml.StreamEndEvent) else self._value(next(self._events))
        if self._nodes and not isinstance(next(self._events), yaml.DocumentEndEvent):
            raise yaml.YAMLError("there is more behind the end")
        self._check(next(self._events, first), "several documents", yaml.StreamEndEvent)

    def _check(self, event: yaml.Event, problem: str, *right: type[yaml.Event]) -> None:
        if not isinstance(event, right):
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)

    def _value(self, event: yaml.Event, depth: int = 0) -> object:
        first = self._nodes
        self._nodes += 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                self._check(event, f"the alias {event.anchor!r} stands for nothing before it")
            value, nodes = self._anchors[event.anchor]
            self._nodes += nodes
        if depth > MOST_DEPTH or self._nodes > MOST_NODES:
            self._check(event, f"nested deeper than {MOST_DEPTH} or longer than {MOST_NODES:,} values")
        if isinstance(event, yaml.AliasEvent):
            return value
        if event.tag not in (None, "!"):
            self._check(event, f"the tag {event.tag!r}; leave it out")
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                value.append(self._value(item, depth + 1))
        else:
            value = {}
            while not isinstance(key := next(self._events), yaml.MappingEndEvent):
                self._check(key, "a key that is not a name", yaml.ScalarEvent)
                if key.value in value:
                    self._check(key, f"the key {short(key.value)} is there twice")
                value[key.value] = self._value(next(self._events), depth + 1)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self._nodes - first
        return value

    def _scalar(self, event: yaml.ScalarEvent) -> object:
        if event.implicit[0]:  # not quoted
            for pattern, convert in _PLAIN:
                if pattern.fullmatch(event.value):
                    if len(event.value) > MOST_DIGITS:
                        self._check(event, f"a number of more than {MOST_DIGITS} characters")
                    return convert(event.value)
        return event.value


def _load(path: Path) -> object:
    try:
        return _Yaml(read_bounded(path, MOST_BYTES)).content
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"cannot be read ({reason}); give the path of a sweep file.") from None
    except yaml.YAMLError as error:
        raise InputError(f"is not YAML; correct it: {one_line(error)}.") from None


def _experiments(
    kind: type[Parameters], at: str, section: dict, seeds: Sequence[int] | None
) -> list[Parameters]:
    """The experiments of one section; `at` precedes the names of its keys in messages."""
    names = kind.flat_types()
    common = _mapping(f"{at}common", section["common"], names) if "common" in section else {}
    products = []  # of lists; a single run is a product too
    for where, one in _grids(at, section):
        lists = _mapping(where, one, names)
        products.append({name: _filled(f"{where}.{name}", values, list) for name, values in lists.items()})
    for where, run in _numbered(at, section, "runs"):
        products.append(_one_each(_mapping(where, run, names)))
    if not products:
        raise InputError(f"{at}grid and {at}runs are both missing: nothing to run; give one of them.")
    products = [_one_each(common) | lists for lists in products]
    if seeds is not None and any("seed" in lists for lists in products):
        raise InputError(f"'seed' is a parameter in {at or 'the file'} next to 'seeds'; keep one of the two.")
    count = sum(math.prod(map(len, lists.values())) for lists in products) * len(seeds or [0])
    if count > MOST:
        raise InputError(f"names {count:,} experiments, more than {MOST:,}; shorten its lists.")

    experiments: dict[Parameters, None] = {}  # an ordered set
    for place, seed in enumerate([None] if seeds is None else seeds):
        one_seed = {} if seed is None else {"seed": [seed]}
        found = [e for lists in products for e in product(kind, **lists | one_seed)]
        repeated = len(found) - len(set(found))
        if repeated and place == 0:
            warn(f"{at}grid and {at}runs repeat {repeated} experiments; each is run once.", stacklevel=3)
        experiments |= dict.fromkeys(found)
    check_options({name for lists in products for name in lists}, experiments)
    exclusions = {where: _mapping(where, one, names) for where, one in _numbered(at, section, "exclude")}
    if len(exclusions) > MOST_EXCLUSIONS:
        raise InputError(
            f"{at}exclude has {len(exclusions):,} items, more than {MOST_EXCLUSIONS:,}; join some."
        )
    return _without(exclusions, list(experiments))


def _without(exclusions: dict[str, dict], experiments: list[Parameters]) -> list[Parameters]:
    """The experiments that match none of `exclusions`, whose keys are their places in the file."""
    values = [e.flat_dict() for e in experiments]
    left = list(zip(experiments, values))
    for where, exclusion in exclusions.items():
        if "budget" in exclusion:  # as experiments store it
            exclusion = exclusion | {"budget": parse_bytes(exclusion["budget"])}
        if not any(exclusion.items() <= own.items() for own in values):
            known = {name: {str(own[name]) for own in values if name in own} for name in exclusion}
            there = "; ".join(f"{name} is {short(values)}" for name, values in known.items())
            raise InputError(f"{where} matches no experiment: in this file {there}.  Correct or remove it.")
        left = [(e, own) for e, own in left if not exclusion.items() <= own.items()]
    if not left:
        raise InputError(f"{' and '.join(exclusions)} leave no experiment; remove the one that is too wide.")
    return [e for e, _ in left]


def _seeds(seeds: object) -> Sequence[int]:
    listed = range(seeds) if isinstance(seeds, int) and seeds is not True and seeds <= MOST else seeds
    if not isinstance(listed, (list, range)) or not listed:
        raise InputError(f"seeds must be a count from 1 to {MOST:,} or a list, got {short(seeds)}.")
    if len(set(map(str, listed))) < len(listed):
        raise InputError(f"seeds has the same one twice, {short(seeds)}; remove it.")
    return listed


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


def _grids(at: str, section: dict) -> list[tuple[str, object]]:
    """The grid of a section, or its grids, each with its place."""
    if isinstance(section.get("grid"), list):
        return _numbered(at, section, "grid")
    return [(f"{at}grid", section["grid"])] if "grid" in section else []


def _numbered(at: str, section: dict, key: str) -> list[tuple[str, object]]:
    """The items of the list `section[key]`, if it is there, each with its place from 1."""
    if key not in section:
        return []
    items = _filled(f"{at}{key}", section[key], list)
    return [(f"{at}{key}[{place}]", item) for place, item in enumerate(items, 1)]
