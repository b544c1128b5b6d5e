"""ATen operators in the neutral vocabulary: one rule an operator, whichever overload, in place or not. One file a family."""

from collections.abc import Callable, Mapping

from swacompile.frontends import fx_compute, fx_elementwise, fx_lookups, fx_views
from swacompile.frontends.fx_call import Call, Result

OPERATORS: Mapping[str, Callable[[Call], Result]] = {
    **fx_elementwise.OPERATORS,
    **fx_views.OPERATORS,
    **fx_lookups.OPERATORS,
    **fx_compute.OPERATORS,
}
WRITE_BACK = fx_views.WRITE_BACK
PARTS = fx_views.PARTS
