"""LLaVA's templates in Jinja, for the processor that is saved with a model.

Training does not use them (see data/conversation.py); a test holds both to the same text. Pictures that stand before
the text of a turn are followed by a line break, as LLaVA trains; later ones stand where they are. The tokenizer adds
the first BOS.
"""

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_CHATML = "Answer the questions."

_CONTENT = (
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{ content | replace('<image>', 'IMAGE') }}{%- else -%}"
    "{%- set ns = namespace(leading=true) -%}"
    "{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- if ns.leading -%}{{ '\\n' }}{%- endif -%}"
    "{%- elif part['type'] == 'text' -%}{%- set ns.leading = false -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = text_of(messages[0]['content']) -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = DEFAULT -%}{%- set turns = messages -%}{%- endif -%}"
)


def _template(default_system: str, body: str) -> str:
    return _CONTENT + _SYSTEM.replace("DEFAULT", repr(default_system)) + body


def _inst(default_system: str, between: str) -> str:
    return _template(
        default_system,
        "{%- for message in turns -%}"
        "{%- if message['role'] == 'user' -%}"
        "{%- if not loop.first -%}{{ '" + between + "' }}{%- endif -%}{{ '[INST] ' }}"
        "{%- if loop.first and system -%}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif -%}"
        "{{ text_of(message['content']) + ' [/INST]' }}"
        "{%- else -%}{{ ' ' + text_of(message['content']) + ' </s>' }}{%- endif -%}"
        "{%- endfor -%}",
    )


_TEMPLATES: dict[str, str] = {
    "v1": _template(
        _VICUNA,
        "{{ system + ' ' }}"
        "{%- for message in turns -%}"
        "{%- if message['role'] == 'user' -%}{{ 'USER: ' + text_of(message['content']) + ' ASSISTANT:' }}"
        "{%- else -%}{{ ' ' + text_of(message['content']) + '</s>' }}{%- endif -%}"
        "{%- endfor -%}",
    ),
    "plain": _CONTENT
    + (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        "{{ '<image>' * (text_of(message['content']).split('<image>') | length - 1) }}"
        "{%- elif message['role'] == 'assistant' -%}{{ text_of(message['content']) + '\\n' }}{%- endif -%}"
        "{%- endfor -%}"
    ),
    "llava_llama_2": _inst(_LLAMA_2, "<s>"),
    "mistral_instruct": _inst("", ""),
    "chatml": _template(
        _CHATML,
        "{{ '<|im_start|>system\\n' + system + '<|im_end|>' }}"
        "{%- for message in turns -%}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + text_of(message['content']) + '<|im_end|>' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}",
    ),
}
"""By the names of `model.template`. In v1 and the [INST] ones a user's turn itself ends in the generation prompt."""


def chat_template(name: str, space_behind_picture: bool) -> str:
    """The template of that name.

    Args:
        name: Of `model.template`.
        space_behind_picture: Training begins a new text behind a picture, before which a SentencePiece tokenizer puts a
            space. True writes it out, for tokenizers that put none behind special tokens.
    """
    return _TEMPLATES[name].replace("IMAGE", "<image> " if space_behind_picture else "<image>")
