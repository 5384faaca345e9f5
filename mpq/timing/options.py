"""What the ops of one group may take together: tied ops move as one, each decision among its own formats."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mpq.timing.gain_model import Choices, Configuration


@dataclass(frozen=True)
class Options:
    """A group's decisions: `formats[d]` may be taken by the ops at `places[d]` of the group, all of them alike.

    Decisions are in the order of their first op; the base format comes first where it may be taken.
    """

    formats: tuple[tuple[str, ...], ...]
    places: tuple[tuple[int, ...], ...]

    @classmethod
    def free(cls, choices: Choices) -> Options:
        """Each op by itself; `choices` is what each may take."""
        return cls(tuple(map(tuple, choices)), tuple((i,) for i in range(len(choices))))

    @property
    def count(self) -> int:
        """How many configurations there are."""
        return math.prod(map(len, self.formats))

    def __iter__(self) -> Iterator[Configuration]:
        """Every configuration, the format of each op in the group's order; the first formats first."""
        return map(self._spread, itertools.product(*self.formats))

    def __contains__(self, configuration: Sequence[str]) -> bool:
        """Whether a configuration is one of them."""
        return all(
            len(taken := {configuration[i] for i in places}) == 1 and taken <= set(formats)
            for formats, places in zip(self.formats, self.places, strict=True)
        )

    def first(self) -> Configuration:
        """All ops in base, where they may be."""
        return self._spread([formats[0] for formats in self.formats])

    def changes(self) -> Iterator[Configuration]:
        """Every change of one decision from `first`."""
        chosen = [formats[0] for formats in self.formats]
        for d, formats in enumerate(self.formats):
            for f in formats[1:]:
                yield self._spread([*chosen[:d], f, *chosen[d + 1 :]])

    def whole(self) -> Iterator[Configuration]:
        """As much as can be in each format; a decision that cannot take it, in the last that it can."""
        for f in dict.fromkeys(f for formats in self.formats for f in formats[1:]):
            yield self._spread([f if f in formats else formats[-1] for formats in self.formats])

    def draw(self, rng: random.Random) -> Configuration:
        """Any of them."""
        return self._spread([rng.choice(formats) for formats in self.formats])

    def _spread(self, chosen: Sequence[str]) -> Configuration:
        of = {i: f for f, places in zip(chosen, self.places, strict=True) for i in places}
        return tuple(of[i] for i in range(len(of)))


# what a signature's groups may take: one kind of options, or several where groups differ
Alternatives: TypeAlias = Choices | Sequence[Options]


def alternatives(of: Alternatives) -> list[Options]:
    """Each kind of options; plain formats for each op are one, with every op by itself."""
    several = [option for option in of if isinstance(option, Options)]
    return several or [Options.free(of)]  # type: ignore[arg-type]
