"""The former place of `superexperts.training.rows`. It stays for one release."""

from __future__ import annotations

import warnings

from superexperts.training.rows import Example, Row, encode, prompt, read_rows, response

__all__ = ["Example", "Row", "encode", "prompt", "read_rows", "response"]

warnings.warn(
    "superexperts.sft_data is deprecated; import from superexperts.training.rows", DeprecationWarning, stacklevel=2
)
