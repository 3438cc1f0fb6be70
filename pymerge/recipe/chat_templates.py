"""The chat template of the output: "auto", a well-known prompt format by its name, or Jinja text."""

from __future__ import annotations

from typing import Any

from .problems import Path, Problems, did_you_mean

__all__ = ["AUTO", "BUILT_IN", "parse_chat_template", "template_text"]

AUTO = "auto"

_CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>{{ '\\n\\n' }}{{ message['content'] | trim }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}
{%- endif -%}
"""

# There is no role for a system message: it stands before the first user's.
_MISTRAL = """\
{{- bos_token -}}
{%- set waiting = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set waiting.system = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{ '[INST] ' + waiting.system + message['content'] + ' [/INST]' }}
{%- set waiting.system = '' -%}
{%- else -%}
{{ ' ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
"""

_ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- else -%}
{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Response:\\n' }}
{%- endif -%}
"""

# Only what the system and the assistant say is closed.
_EXAONE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ '[|user|]' + message['content'] + '\\n' }}
{%- else -%}
{{ '[|' + message['role'] + '|]' + message['content'] + '[|endofturn|]\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '[|assistant|]' }}
{%- endif -%}
"""

BUILT_IN = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}
"""Published prompt formats as templates for transformers, which renders them with trim_blocks and lstrip_blocks."""


def parse_chat_template(value: Any, path: Path, problems: Problems) -> str | None:
    """``chat_template`` as given, when it can be one."""
    if value is None:
        return None
    if isinstance(value, str) and (value == AUTO or value in BUILT_IN or "{" in value):
        return value
    options = (AUTO, *BUILT_IN)
    hint = did_you_mean(value, options) if isinstance(value, str) else ""
    problems.add(path, f"is {value!r}{hint or '; write ' + ', '.join(options) + ', or a Jinja template'}")
    return None


def template_text(value: str) -> str:
    """The Jinja text of anything but "auto"."""
    return BUILT_IN.get(value, value)
