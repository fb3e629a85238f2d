"""Chat templates that rim_lens carries as data: for tokenizers that come without one.

Written here from the formats' public descriptions; each names its source. `ChatFormat` does not need them to
render (its formats hold the same facts piece by piece); it is checked against them.
"""

from __future__ import annotations

# The toy organism: words apart by one space, the opener held by the generation prompt, neither system turn nor
# end-of-turn token. An earlier turn keeps its answer behind an empty think block.
TOY_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ ' ' if not loop.first }}"
    "{%- if message['role'] == 'user' -%}{{ '<user> ' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<assistant> <think> </think> ' + message['content'].split('</think>')[-1].strip() }}"
    "{%- else -%}{{ raise_exception('the toy has user and assistant turns only') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ ' <assistant> <think>' }}"
    "{{ ' </think>' if enable_thinking is defined and enable_thinking is false }}"
    "{%- endif -%}"
)

# DeepSeek-R1 style. Source: the DeepSeek-R1 model card (system text right after the BOS, <｜User｜> and
# <｜Assistant｜> without an end-of-turn token after the request, earlier reasoning dropped; "Usage Recommendations":
# every response is made to begin with "<think>\n").
R1_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages if message['role'] == 'system' -%}{{ message['content'] }}{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<｜User｜>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\\n' }}{%- endif -%}"
)

# gpt-oss. Source: "OpenAI Harmony Response Format" (OpenAI Cookbook, 2025-08-05): a system message with the model's
# identity and channels, the caller's instructions in a developer message, earlier reasoning dropped, and <|end|>
# in place of the <|return|> of an earlier answer. The date line of the public example is left out.
HARMONY_TEMPLATE = (
    "{{- '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\n"
    "Knowledge cutoff: 2024-06\\n\\nReasoning: medium\\n\\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{ '<|start|>developer<|message|># Instructions\\n\\n' + message['content'] + '<|end|>' }}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ '<|start|>user<|message|>' + message['content'] + '<|end|>' }}"
    "{%- else -%}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] + '<|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"
)
