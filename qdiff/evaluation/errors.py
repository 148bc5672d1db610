"""What an evaluation cannot be made of."""

from __future__ import annotations


class EvaluationError(ValueError):
    """Images, weights or options that do not serve; the message says what would."""
