"""What each op may take, and which ops take one format: an engine's rules and the user's, resolved for one model."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import networkx as nx
import polars as pl

from mpq.errors import MpqError
from mpq.formats.scheme import get_scheme, of_cache
from mpq.program.engines import CACHE, ENGINES, KINDS, Rule
from mpq.program.memory import cached
from mpq.timing.options import Options

log = logging.getLogger("mpq")

if TYPE_CHECKING:
    from mpq.spec import ConstraintSpec, EngineName


@dataclass(frozen=True)
class Allowed:
    """For each op the formats that it may take, base first where it may stay there, and the decisions.

    A decision is the ops that take one format, in the model's order; every op is in one, and has its formats.
    """

    base: str
    formats: Mapping[str, tuple[str, ...]]
    decisions: tuple[tuple[str, ...], ...]

    def options(self, ops: Sequence[str]) -> Options:
        """What these ops may take together; those that nothing is known of stay in base."""
        decided = {op: d for d, together in enumerate(self.decisions) for op in together}
        places: dict[int | str, list[int]] = {}
        for i, op in enumerate(ops):
            places.setdefault(decided.get(op, op), []).append(i)
        formats = [self.formats.get(ops[of[0]], (self.base,)) for of in places.values()]
        return Options(tuple(formats), tuple(map(tuple, places.values())))

    def of(self, ops: Iterable[str]) -> Allowed:
        """The same for some of the ops. An op whose tie leaves it keeps the formats that the tie left it."""
        kept = set(ops)
        parts = (tuple(op for op in together if op in kept) for together in self.decisions)
        formats = {op: f for op, f in self.formats.items() if op in kept}
        return replace(self, formats=formats, decisions=tuple(part for part in parts if part))


def _fits(name: str, inputs: int) -> bool:
    """Whether rows of so many inputs are whole blocks, which is what files and kernels hold."""
    return all(not f.block[1] or inputs % f.block[1] == 0 for f in get_scheme(name).formats)


def options_by_signature(groups: pl.DataFrame, allowed: Allowed) -> dict[str, list[Options]]:
    """For each signature, in the model's order, what its groups may take: one kind of options, or several."""
    found: dict[str, list[Options]] = {}
    by_group = groups.sort("order").group_by(["signature", "group"], maintain_order=True)
    for (signature, _), rows in by_group:
        of = found.setdefault(str(signature), [])
        if (options := allowed.options(rows["op"].to_list())) not in of:
            of.append(options)
    return found


def rules_of(constraints: ConstraintSpec, engine: EngineName) -> list[Rule]:
    """The engine's rules, then the user's pins and ties; each has a name of its own."""
    return [
        *ENGINES[engine].rules,
        *(Rule(f"pin {p} to {' or '.join(f)}", (p,), f) for p, f in constraints.pin.items()),
        *(Rule(f"tie {' '.join(patterns)}", patterns) for patterns in constraints.tie),
    ]


def allowed(
    groups: pl.DataFrame,
    constraints: ConstraintSpec,
    engine: EngineName,
    formats: Mapping[str, Sequence[str]],
    base: str,
    leave_out: Iterable[str] = (),
) -> Allowed:
    """The rules resolved for the ops of a groups table: what each may take, and what takes one format.

    `formats` says what each kind of op (linear, bgemm) can be lowered to; a kind that it lacks is not
    decided and stays in base. A format with blocks is none for ops whose inputs are not whole blocks
    wide, one of the cache none for products that read no cache of their layer's own keys and values (memory.cached); where one is
    among the formats, both products of a layer are one decision. `leave_out` names rules that
    shall not hold (rules_of). Ties hold within a layer, told by the first number in an op's name.

    Raises MpqError for a user's pattern that matches no op, a pin to what is not among `formats`, and
    rules that leave an op no format, which are named.
    """
    out = set(leave_out)
    caches = set(of_cache(formats.get("bgemm", ())))
    rules = [rule for rule in rules_of(constraints, engine) if rule.name not in out]
    rules += [CACHE] if caches else []
    of_groups = groups.filter(pl.col("kind").is_in(KINDS)).sort("order")
    rows = of_groups.select("op", "kind", "in_features").rows()
    kinds = {op: kind for op, kind, _ in rows}
    held = cached(groups) if caches else frozenset()
    may: dict[str, tuple[str, ...]] = {}
    for op, kind, k in rows:
        lower = (f for f in dict.fromkeys(formats.get(kind, ())) if f != base and _fits(f, k))
        may[op] = (base, *(f for f in lower if f not in caches or op in held))
    if caches and (without := [op for op, kind, _ in rows if kind == "bgemm" and op not in held]):
        log.warning(
            "%s is not for %d products of attention, %s among them: the cache holds a latent there, or keys of several layers.",
            min(caches),
            len(without),
            without[0],
        )
    for name in dict.fromkeys(f for of in formats.values() for f in of):
        asked = [(op, k) for op, kind, k in rows if name in formats.get(kind, ())]
        if unfit := [op for op, k in asked if not _fits(name, k)]:
            log.warning(
                "%s is not for %d ops, %s among them: their inputs are no multiple of %d wide.",
                name,
                len(unfit),
                unfit[0],
                get_scheme(name).weights.block[1],
            )
    why: dict[str, list[str]] = {op: [] for op in may}
    together = nx.Graph()
    together.add_nodes_from(may)
    for rule in rules:
        matched = _matched(rule, kinds)
        if rule.formats is None:
            for of in _by_layer(matched):
                nx.add_path(together, of)
                for op in of if len(of) > 1 else ():
                    why[op].append(rule.name)
            continue
        wanted = {base if f == "base" else f for f in rule.formats}
        for op in matched:
            if kinds[op] not in formats:
                continue
            measured = dict.fromkeys((base, *formats[kinds[op]]))
            if not wanted & measured.keys():
                raise MpqError(
                    f"{op} cannot be in {' or '.join(sorted(wanted))} ({rule.name}): what is "
                    f"measured of it is {' and '.join(measured)}."
                )
            may[op] = tuple(f for f in may[op] if f in wanted)
            why[op].append(rule.name)
            if not may[op]:
                raise _contradiction([op], why)
    place = {op: i for i, op in enumerate(may)}
    parts = [sorted(part, key=place.__getitem__) for part in nx.connected_components(together)]
    for part in parts:
        left = tuple(f for f in may[part[0]] if all(f in may[op] for op in part))
        if not left:
            raise _contradiction(part, why)
        may.update(dict.fromkeys(part, left))
    return Allowed(base, may, tuple(tuple(part) for part in parts))


def broken(formats: Mapping[str, str], of: Allowed) -> list[str]:
    """What a plan (op → format) breaks, a sentence each: for plans that were edited, or made for another engine."""
    told = []
    for together in of.decisions:
        taken = {op: formats.get(op, of.base) for op in together}
        if len(set(taken.values())) > 1:
            told.append(f"{', '.join(f'{op} in {f}' for op, f in taken.items())} must be alike")
        told += [
            f"{op} may not be in {f}, but in {' or '.join(of.formats[op])}"
            for op, f in taken.items()
            if f not in of.formats[op]
        ]
    return told


def matches(pattern: str, op: str) -> bool:
    """Whether an op's whole name matches: a glob, or after `re:` a regular expression."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], op) is not None
    return fnmatchcase(op, pattern)


def _matched(rule: Rule, kinds: Mapping[str, str]) -> list[str]:
    of_kind = [op for op, kind in kinds.items() if kind in rule.kinds]
    for pattern in rule.patterns if not rule.source else ():
        if not any(matches(pattern, op) for op in of_kind):
            raise MpqError(
                f"constraints: no op matches {pattern}{_meant(pattern, of_kind)}: "
                "`mpq partition` lists the ops."
            )
    return [op for op in of_kind if any(matches(p, op) for p in rule.patterns)]


def _meant(pattern: str, ops: Iterable[str]) -> str:
    """What was likely meant: the name of an op, or the end of several names."""
    ends = [f"*.{op.rpartition('.')[2]}" if "." in op else op for op in ops]
    close = difflib.get_close_matches(pattern, list(dict.fromkeys([*ends, *ops])), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _by_layer(ops: Iterable[str]) -> list[list[str]]:
    layers: dict[str, list[str]] = {}
    for op in ops:
        found = re.match(r".*?(?<![^.])\d+(?=\.)", op)
        layers.setdefault(found[0] if found else "", []).append(op)
    return list(layers.values())


def _contradiction(ops: Sequence[str], why: Mapping[str, Sequence[str]]) -> MpqError:
    rules = list(dict.fromkeys(name for op in ops for name in why[op]))
    some = ", ".join(ops[:4]) + (", …" if len(ops) > 4 else "")
    return MpqError(
        f"The constraints leave no format for {some}: {'; '.join(rules)}. Take one of them away."
    )
