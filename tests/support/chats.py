"""Chat templates of the kinds that public models have, small."""

from __future__ import annotations

__all__ = ["OPENS_THOUGHTS", "PARTS", "PLAIN", "QWEN", "RAISES"]

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Content as text; BOS is written by the template."""
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Shows content only if it is a list of parts."""
RAISES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
QWEN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
"""Has a switch for thinking."""
OPENS_THOUGHTS = PLAIN + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
