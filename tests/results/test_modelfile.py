"""Ollama's Modelfile: the turns that a tokenizer's chats have."""

import pytest
from conftest import byte_tokenizer

from axolotl_loram.results.modelfile import modelfile, turns_of

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ first if loop.first }}{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NUMBERED = (
    "{% for m in messages %}{{ loop.index }}. {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
TEMPLATES = {
    "chatml": (
        CHATML,
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
        "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
        "{{ .Response }}<|im_end|>\n",
        "You are kind.",
    ),
    "llama-3": (
        LLAMA_3,
        "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n"
        "{{ .System }}<|eot_id|>{{ end }}<|start_header_id|>user<|end_header_id|>\n\n"
        "{{ .Prompt }}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "{{ .Response }}<|eot_id|>",
        "",
    ),
    "gemma": (
        GEMMA,
        "<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}"
        "<end_of_turn>\n<start_of_turn>model\n{{ .Response }}<end_of_turn>\n",
        "",
    ),
    "gemma-2": (
        REFUSING + GEMMA,
        "<start_of_turn>user\n{{ .Prompt }}<end_of_turn>\n<start_of_turn>model\n"
        "{{ .Response }}<end_of_turn>\n",
        "",
    ),
}


def tokenizer_in(folder, template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if template and "bos_token" in template:  # whose tokenizers begin every text so
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("template", "wanted", "default"), TEMPLATES.values(), ids=TEMPLATES)
def test_turns_become_ollamas(template, wanted, default, tmp_path):
    turns = turns_of(tokenizer_in(tmp_path, template))
    assert turns.template() == wanted and turns.default == default


@pytest.mark.parametrize("template", [NUMBERED, REFUSING + CHATML, "{{ oops", None])
def test_what_ollama_cannot_say_is_left_out(template, tmp_path):
    folder = tokenizer_in(tmp_path, template)
    assert turns_of(folder) is None
    text = modelfile(folder, folder, "adapter.gguf", None, "org/base")
    assert text.splitlines() == [
        "# put org/base beside this, as base.gguf",
        "FROM ./base.gguf",
        "ADAPTER ./adapter.gguf",
        "# no TEMPLATE: the tokenizer has none that Ollama's language can say",
    ]


def test_the_adapters_tokenizer_comes_first(tmp_path):
    base = tokenizer_in(tmp_path / "base", CHATML)
    adapter = tokenizer_in(tmp_path / "adapter", LLAMA_3)
    file = tmp_path / "base.gguf"
    lines = modelfile(adapter, base, "a.gguf", file, "org/base").splitlines()
    assert lines[0] == f"FROM {file}" and lines[2].startswith('TEMPLATE """{{ if .System }}<|start')
    (tmp_path / "none").mkdir()
    text = modelfile(tmp_path / "none", base, "a.gguf", file, "org/base")
    assert text.endswith('<|im_end|>\n"""\nSYSTEM """You are kind."""\n')
