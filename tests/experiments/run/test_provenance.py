"""Where a number comes from."""

import pytest

from experiments.run import provenance
from patch.errors import UserError


def test_a_revision_that_is_named_is_a_whole_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTS_REVISION", "0123456789" * 4)
    assert provenance.revision.__wrapped__() == ("0123456789" * 4, None)
    for named in ("0123456", "main", "0123456789" * 4 + "0", "0123456789" * 4 + "\n"):
        monkeypatch.setenv("HTS_REVISION", named)
        with pytest.raises(UserError, match=r"(?s)HTS_REVISION=.*give what `git rev-parse HEAD` prints"):
            provenance.revision.__wrapped__()
