"""Chat templates of many model families, shortened to what they write for plain conversations.

Each stands with what it writes behind an answer when the user goes on, and with the tokens that
steer the model; those that are made of ordinary words have none.
"""

# ruff: noqa: E501  (lines of templates)

from __future__ import annotations

from dataclasses import dataclass

_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)
_NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A family's template.

    Attributes:
        template: as Jinja.
        closing: what stands behind an answer in the middle of a conversation.
        special: its control tokens that the tokenizer calls special.
        added: those that it only adds.
        lead: what the model writes in front of an answer.
        eos: the end-of-text token.
    """

    template: str
    closing: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    lead: str = ""
    eos: str = "</s>"
    bos: str = "<s>"


def _chatml(system: str = "", end: str = "") -> str:
    return (
        f"{system}{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}<|im_end|>"
        f"\n{{% endfor %}}{end}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


_IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "ChatML": Family(_chatml(), "<|im_end|>\n", _IM, eos="<|im_end|>"),
    "gpt-oss": Family(
        "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}",
        "<|end|>",
        ("<|start|>", "<|message|>", "<|end|>", "<|return|>"),
        eos="<|return|>",
    ),
    "Llama 2": Family(
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
        "{% set said = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set rest = messages %}{% set said = '' %}{% endif %}"
        "{% for m in rest %}" + _ALTERNATE + "{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + ((said if loop.first else '') + m.content).strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        " </s>",
        ("<s>", "</s>"),
        lead=" ",
    ),
    "Llama 3": Family(
        "{% for m in messages %}{% set content = '<|start_header_id|>' + m.role + "
        "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' %}"
        "{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
        ("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        eos="<|eot_id|>",
    ),
    "Mistral": Family(
        "{{ bos_token }}{% for m in messages %}" + _ALTERNATE + "{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
        "{% endfor %}",
        "</s>",
        ("<s>", "</s>"),
    ),
    "Mistral with tokens": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.role == 'system' %}"
        "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        lead=" ",
    ),
    "Mixtral": Family(
        "{{ bos_token }}{% for m in messages %}" + _ALTERNATE + "{% if m.role == 'user' %}"
        "{{ ' [INST] ' + m.content + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        ("<s>", "</s>"),
        lead=" ",
    ),
    "Qwen2": Family(
        _chatml(
            "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
            "<|im_end|>\n{% endif %}"
        ),
        "<|im_end|>\n",
        (*_IM, "<|endoftext|>"),
        eos="<|im_end|>",
    ),
    "Qwen3": Family(
        "{% set last = namespace(at=messages|length - 1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set last.at = loop.index0 %}{% endif %}"
        "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 > last.at and loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}",
        "<|im_end|>\n",
        (*_IM, "<|endoftext|>"),
        ("<think>", "</think>"),
        eos="<|im_end|>",
    ),
    "Gemma 2": Family(
        "{{ bos_token }}"
        + _NO_SYSTEM
        + "{% for m in messages %}"
        + _ALTERNATE
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
        "m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>\n",
        ("<s>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
    ),
    "Gemma 3": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% else %}"
        "{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        + _ALTERNATE
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ first if loop.first else '' }}{% if m.content is string %}{{ m.content | trim }}"
        "{% else %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}"
        "{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>\n",
        ("<s>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
    ),
    "Phi-3": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>\n",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
        eos="<|endoftext|>",
    ),
    "Phi-4": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + "
        "'<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        "<|im_end|>",
        (*_IM, "<|im_sep|>"),
        eos="<|im_end|>",
    ),
    "Phi-4-mini": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
        eos="<|endoftext|>",
    ),
    "SmolLM2": Family(
        _chatml(
            "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are SmolLM.<|im_end|>\n"
            "{% endif %}"
        ),
        "<|im_end|>\n",
        _IM,
        eos="<|im_end|>",
        bos="<|im_start|>",
    ),
    "DeepSeek V2": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ 'User: ' + m.content + '\n\n' }}{% elif m.role == 'assistant' %}"
        "{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.content + '\n\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        "<｜end▁of▁sentence｜>",
        ("<s>", "<｜end▁of▁sentence｜>"),
        lead=" ",
        eos="<｜end▁of▁sentence｜>",
    ),
    "DeepSeek V3": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
        "<｜end▁of▁sentence｜>",
        ("<s>", "<｜end▁of▁sentence｜>"),
        ("<｜User｜>", "<｜Assistant｜>"),
        eos="<｜end▁of▁sentence｜>",
    ),
    "Command R": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
        "{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}"
        ".get(m.role, '<|SYSTEM_TOKEN|>') + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        "<|END_OF_TURN_TOKEN|>",
        (
            *("<s>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
            *("<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        ),
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "Granite": Family(
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + "
        "'<|end_of_text|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
        "<|end_of_text|>\n",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        eos="<|end_of_text|>",
    ),
    "OLMo 2": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}"
        "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        "<|endoftext|>",
        ("<|endoftext|>",),
        eos="<|endoftext|>",
        bos="<|endoftext|>",
    ),
    "Falcon": Family(
        "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
        "{{ m.role | capitalize + ': ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}",
        "",
        ("<|endoftext|>",),
        lead=" ",
        eos="<|endoftext|>",
    ),
    "Falcon 3": Family(
        "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|' + m.role + '|>\n' + m.content"
        " + '\n' }}{% else %}{{ '<|assistant|>\n' + m.content + (eos_token if loop.last else "
        "eos_token + '\n') }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|endoftext|>",
        ("<|endoftext|>",),
        ("<|user|>", "<|assistant|>", "<|system|>"),
        eos="<|endoftext|>",
    ),
    "Zephyr": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        "</s>\n",
        ("<s>", "</s>"),
    ),
    "TinyLlama": Family(
        "{% for m in messages %}\n{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + eos_token }}"
        "{% elif m.role == 'system' %}{{ '<|system|>\n' + m.content + eos_token }}"
        "{% else %}{{ '<|assistant|>\n' + m.content + eos_token }}{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}\n{% endfor %}",
        "</s>",
        ("<s>", "</s>"),
        lead="\n",
    ),
    "Vicuna": Family(
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}"
        "{% else %}{{ 'A chat between a curious user and an assistant.' }}"
        "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
        "{{ ' USER: ' + m.content.strip() }}{% else %}"
        "{{ ' ASSISTANT: ' + m.content.strip() + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        "</s>",
        ("<s>", "</s>"),
        lead=" ",
    ),
    "Yi": Family(_chatml(), "<|im_end|>\n", (*_IM, "<|endoftext|>"), eos="<|im_end|>"),
    "InternLM 2": Family(
        "{{ bos_token }}" + _chatml(),
        "<|im_end|>\n",
        ("<s>", "</s>", *_IM),
    ),
    "StableLM": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|endoftext|>\n",
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"),
        eos="<|endoftext|>",
    ),
}
