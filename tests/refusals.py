"""What every refusal is held to: its kind and its whole text, which says what was found and what is accepted."""

import pytest


def refuses(call, kind, message):
    with pytest.raises(kind) as raised:
        call()
    assert str(raised.value) == message
