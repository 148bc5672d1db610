"""Text formats from strangers, where fuzzing files does not reach."""

from __future__ import annotations

import pytest

from ddim.untrusted import MAX_DEPTH, UntrustedFileError, parse_json


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a": ', "}"), ('[{"a": ', "}]")])
def test_how_deep_json_may_be_nested(start: str, end: str) -> None:
    """Deeper files are refused when they are read: some versions of Python parse what then cannot be gone through."""
    times = MAX_DEPTH // len(end)
    for core in ("1", '"a"', "null"):
        text = start * times + core + end * times
        found = parse_json(text)
        for _ in range(MAX_DEPTH):
            found = found["a"] if isinstance(found, dict) else found[0]
        assert found == parse_json(core)
        for more in (1, 5000, 100_000):
            with pytest.raises(UntrustedFileError, match="nested too deeply"):
                parse_json("[" * more + text + "]" * more)
