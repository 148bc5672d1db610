"""Recording CUDA graphs."""

from __future__ import annotations

import gc

import pytest

from qdiff.graphs import holding_garbage


def test_no_garbage_is_collected_meanwhile() -> None:
    assert gc.isenabled()
    with holding_garbage():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), holding_garbage():
        raise KeyError
    assert gc.isenabled()


def test_what_was_off_stays_off() -> None:
    gc.disable()
    try:
        with holding_garbage():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
