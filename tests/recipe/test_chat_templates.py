"""The built-in chat templates, rendered as transformers renders them, against the published formats written out by hand."""

import pytest

from pymerge.recipe import RecipeError, load_recipe
from pymerge.recipe.chat_templates import BUILT_IN, template_text

TURNS = [("system", "Be brief."), ("user", "Hi {you}"), ("assistant", "Hello"), ("user", "Bye")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]

EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {you}<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Hi {you}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Bye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi {you} [/INST] Hello</s>[INST] Bye [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHi {you}\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi {you}\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_format(name):
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(template_text(name))
    render = {"messages": MESSAGES, "bos_token": "<s>", "eos_token": "</s>"}
    assert template.render(**render, add_generation_prompt=True) == EXPECTED[name]
    assert EXPECTED[name].startswith(template.render(**render, add_generation_prompt=False))


def test_what_a_recipe_may_say():
    recipe = {"merge_method": "linear", "models": [{"model": "a"}]}
    for good in ("auto", *BUILT_IN, "{{ messages }}"):
        assert load_recipe({**recipe, "chat_template": good}).chat_template == good
    assert template_text("{{ messages }}") == "{{ messages }}"
    for bad, message in (("lama3", "did you mean 'llama3'"), ("hello", "write auto"), (3, "is 3; write auto")):
        with pytest.raises(RecipeError, match=message):
            load_recipe({**recipe, "chat_template": bad})
