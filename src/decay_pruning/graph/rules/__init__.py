"""Operation rules: how the axes of a result follow from those of the inputs, one entry for each kind of operator.

To teach the tracer an operator, write a function of an `Op` that ties what must stay equal and returns the axes of the
output (a list of lists for several outputs), put its name above it in the file of its family, and add a case to
`tests/test_rules.py`. An operator that has no entry fixes all its inputs, and the reason says its name.
"""

from decay_pruning.graph.rules import norms, parts, products, views
from decay_pruning.graph.rules._table import RULES, elementwise, rule, rule_of

__all__ = ["RULES", "elementwise", "norms", "parts", "products", "rule", "rule_of", "views"]
