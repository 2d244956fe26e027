"""What an epoch ends with must be numbers: weights and validation figures, before they are written.

In go a selector and the figures of its epoch; out comes nothing, or the error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lever_data.errors import LeverError
from lever_train.selector.model import Selector


def require_finite(selector: Selector, figures: Mapping[str, float], place: str) -> None:
    """Refuse an epoch that left NaN or infinity, which a loss need not show: it is the loss before
    a step that is checked, and the last step has none after it.

    Args:
        figures: of the epoch; those of validation count.
        place: the epoch and the step, as the error names them.

    Raises:
        LeverError: a parameter or a validation figure is not finite; it names the first.
    """
    for name, parameter in selector.named_parameters():
        if not parameter.isfinite().all():
            raise LeverError(
                f"the weights are not finite after {place}",
                where=name,
                hint="the last good checkpoint stays; lower the learning rate or the weight decay",
            )
    for name, value in figures.items():
        if name.startswith("val_") and not math.isfinite(value):
            raise LeverError(
                f"a validation figure is not finite after {place}",
                where=name,
                value=value,
                hint="the last good checkpoint stays; look at the rewards and log-probabilities "
                "of the validation queries, or lower the learning rate",
            )
