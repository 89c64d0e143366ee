"""Tokenizers and chat templates of several kinds, and conversations, for the tests of conversations."""

import json
from pathlib import Path

from minimind_data.tokenizer.places import SHIPPED

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

THOUGHTS = """{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- set thought = message.reasoning_content or '' %}
    {%- if message.role == 'assistant' %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + (call | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}"""

HEADERS = """{{- '<|begin|>' }}
{%- for message in messages %}
    {{- '<|header|>' + message.role + '<|header_end|>\\n\\n' + message.content | trim + '<|turn_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|header_end|>\\n\\n' }}{%- endif %}"""

NAMED = """{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

BRACKETS = """{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must take turns') }}
    {%- endif %}
    {%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}{{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

SAID = """{%- for message in messages %}
    {{- 'The ' + message.role + ' says: ' + message.content + '<|over|>' }}
{%- endfor %}"""

MARKED = """{% for message in messages %}
{% if message.role == 'assistant' %}
Answer: {% generation %}{{ message.content }}
{% endgeneration %}
{% else %}
{{ message.role }}: {{ message.content }}
{% endif %}
{% endfor %}"""

PARTS = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}{{- message.content }}
    {%- else %}
        {%- for part in message.content or [] %}
            {%- if part.type == 'image' %}{{- '<|vision_start|><|vision_end|>' }}
            {%- elif part.type == 'text' %}{{- part.text | trim }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

NAMES = {
    "chatml": {},
    "parts": {},
    "thoughts": {},
    "headers": {"<|object_ref_start|>": "<|begin|>", "<|object_ref_end|>": "<|header|>",
                "<|box_start|>": "<|header_end|>", "<|box_end|>": "<|turn_end|>"},
    "named": {"<|object_ref_start|>": "<|user|>", "<|object_ref_end|>": "<|assistant|>",
              "<|box_start|>": "<|system|>", "<|box_end|>": "<|end|>"},
    "brackets": {"<|object_ref_start|>": "[INST]", "<|object_ref_end|>": "[/INST]"},
    "said": {"<|object_ref_start|>": "<|over|>"},
    "marked": {},
}  # fmt: skip
TEMPLATES = {
    "chatml": CHATML,
    "parts": PARTS,
    "thoughts": THOUGHTS,
    "headers": HEADERS,
    "named": NAMED,
    "brackets": BRACKETS,
    "said": SAID,
    "marked": MARKED,
}
OPENS = {
    "chatml": "<|im_start|>assistant\n",
    "parts": "<|im_start|>assistant\n",
    "thoughts": "<|im_start|>assistant\n",
    "headers": "<|header|>assistant<|header_end|>\n\n",
    "named": "<|assistant|>\n",
    "brackets": "[/INST]",
    "said": "<|over|>The assistant says:",
}
CLOSES = {
    "chatml": "<|im_end|>\n",
    "parts": "<|im_end|>\n",
    "thoughts": "<|im_end|>\n",
    "headers": "<|turn_end|>",
    "named": "<|end|>\n",
    "brackets": "<|im_end|>",
    "said": "<|over|>",
}
PLAIN = [
    {"role": "user", "content": "What is an owl?"},
    {"role": "assistant", "content": "A bird that hunts at night."},
    {"role": "user", "content": "猫头鹰吃什么？"},
    {"role": "assistant", "content": "老鼠和昆虫，也吃小鸟。"},
]


def make_tokenizer(folder: Path, kind: str, template: str | None = None) -> Path:
    """Write the default tokenizer with some of its special tokens renamed, and a chat template of this kind."""
    folder.mkdir(parents=True, exist_ok=True)
    told = json.loads((SHIPPED["default"] / "tokenizer.json").read_text("utf-8"))
    names = NAMES[kind]
    for token in told["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocab = told["model"]["vocab"]
    told["model"]["vocab"] = {names.get(token, token): token_id for token, token_id in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(told, ensure_ascii=False), "utf-8")
    config = json.loads((SHIPPED["default"] / "tokenizer_config.json").read_text("utf-8"))
    config["chat_template"] = TEMPLATES[kind] if template is None else template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder
