"""The former place of `load_adapter`, which model cards of earlier versions name. It stays for one release."""

from __future__ import annotations

import warnings

from superexperts.adapters.lora import load_adapter

__all__ = ["load_adapter"]

warnings.warn(
    "superexperts.lora is deprecated; import load_adapter from superexperts.adapters.lora",
    DeprecationWarning,
    stacklevel=2,
)
