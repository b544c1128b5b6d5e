"""Give every replacement the conditions on sizes that it needs at run time; refuse those whose conditions nobody can look at.

1. A value that the mask is made of must have the attention's batch. Where the model's input may have a batch of 1, the model is read
   again with that 1 in its place: if the same replacement comes out, both are allowed, and the operand is expanded.
2. A size that cannot be looked at: refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations

from swacompile.attention import Refutation
from swacompile.graph import Graph
from swacompile.index_expr import ONE
from swacompile.passes.guards import Extent, Guards, Unguardable, batches_of_sources, guards_of
from swacompile.passes.operands import plain
from swacompile.passes.plan_rewrite import Replacement
from swacompile.passes.read_masks import Reading, read_masks

Outcome = Replacement | Refutation
MOST_SOURCES = 2  # Inputs of one mask whose batches are tried as 1, alone and together.


def guard_rewrite(
    reading: Reading,
    outcomes: tuple[Outcome, ...],
    *,
    trusted: bool,
    plan_again: Callable[[Reading], tuple[Outcome, ...]],
) -> tuple[Outcome, ...]:
    """The outcomes with guards. `trusted`: the runtime checks extents that the model declares as numbers.

    `plan_again` gives the outcomes, without guards, for another reading of the model.
    """
    others = _OtherReadings(reading=reading, trusted=trusted, plan_again=plan_again)
    return tuple(outcome if isinstance(outcome, Refutation) else others.guarded(outcome) for outcome in outcomes)


@dataclass(slots=True, kw_only=True)
class _OtherReadings:
    """The model with some batches as 1; each is read once."""

    reading: Reading
    trusted: bool
    plan_again: Callable[[Reading], tuple[Outcome, ...]]
    _known: dict[frozenset[Extent], tuple[Reading, dict[str, Outcome]]] = field(default_factory=dict)

    def guarded(self, plan: Replacement) -> Outcome:
        try:
            guards = self._guards(self.reading, plan)
            batches = batches_of_sources(self.reading, plan.site)
            if self._may_be_one(plan, guards, batches):
                guards = self._guards(self.reading, plan, batches)
        except Unguardable as error:
            return Refutation(
                code="guarded", node=plan.site.node, kind=plan.proof.kind, band=plan.proof.mask,
                reason=f"the band {plan.proof.mask} holds for some sizes only, and a rewritten model could not check that: {error}",
            )  # fmt: skip
        shapes = [self.reading.extents(operand.value) or () for operand in (plan.key_padding, plan.segments) if operand]
        batch, keys = (self.reading.sizes.resolve(axis.args[0]) for axis in (plan.site.axes.batch, plan.site.axes.key))
        # An axis that differs by what the model itself says needs no condition, but the same treatment.
        expands = guards.expands or any(shape[0] == ONE != batch for shape in shapes)
        cuts = any(
            (shape[0] != ONE and plain(shape[0]) != plain(batch)) or plain(shape[-1]) != plain(keys) for shape in shapes
        )
        return replace(plan, guards=replace(guards, expands=expands or cuts, cuts=cuts))

    def _guards(self, reading: Reading, plan: Replacement, one: frozenset[Extent] = frozenset()) -> Guards:
        return guards_of(reading, plan.site, plan.proof, trusted=self.trusted, one=one)

    def _may_be_one(self, plan: Replacement, guards: Guards, batches: frozenset[Extent]) -> bool:
        """Whether the replacement is the same if any of these batches is 1."""
        if (
            not (plan.key_padding or plan.segments or plan.bias)
            or not self.trusted
            or not 0 < len(batches) <= MOST_SOURCES
        ):
            return False
        subsets = (frozenset(chosen) for n in range(1, len(batches) + 1) for chosen in combinations(batches, n))
        return all(self._is_same(plan, guards, chosen) for chosen in subsets)

    def _is_same(self, plan: Replacement, guards: Guards, ones: frozenset[Extent]) -> bool:
        if ones not in self._known:
            other = read_masks(_with_ones(self.reading, ones))
            self._known[ones] = other, {_node(outcome): outcome for outcome in self.plan_again(other)}
        other, outcomes = self._known[ones]
        found = outcomes.get(plan.site.node)
        if not isinstance(found, Replacement) or _essence(found) != _essence(plan):
            return False
        needed = {guard.condition for guard in self._guards(other, found).conditions}
        return needed <= {guard.condition for guard in guards.conditions}


def _with_ones(reading: Reading, ones: frozenset[Extent]) -> Graph:
    graph = reading.graph
    types = dict(graph.types)
    for extent in ones:
        assert isinstance(extent.value, str)
        dims = list(types[extent.value].dims or ())
        dims[extent.axis] = ONE
        types[extent.value] = replace(types[extent.value], dims=tuple(dims))
    return replace(graph, types=types)


def _node(outcome: Outcome) -> str:
    return outcome.node if isinstance(outcome, Refutation) else outcome.site.node


def _essence(plan: Replacement) -> tuple[object, ...]:
    """What a frontend writes. A bias may have a batch of 1 as it is."""
    site, proof, bias = plan.site, plan.proof, plan.bias and (plan.bias.value, plan.bias.fits[-3:])
    return (
        plan.left_window_size, plan.right_window_size, plan.key_padding, plan.segments, bias, plan.alibi_slopes, plan.offset,
        proof.kind, proof.mask, site.query, site.key, site.value, site.output, site.merged_output, site.output_layout, site.heads, site.kv_heads, site.dtype,
        site.scale, site.softcap, site.sinks,
    )  # fmt: skip
