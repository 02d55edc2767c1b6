"""Chat templates of the structure of published models', each with the kind of tokenizer that its model has.

They were written for these tests and keep what makes each special: where the system's text and the tools go, how
answers end, what the generation prompt is, what becomes of the thinking of earlier answers, which texts and tokens the
template adds by itself.
"""

from typing import NamedTuple

from drafter.models.source import TemplateSettings
from tests.templates import LLAMA2
from tests.tokenizer_kinds import KINDS, tokenizer_of_kind

WORDS = KINDS[1]  # byte-level BPE whose regular expression splits the text into words first
GENERATION = "{% if add_generation_prompt %}"
LLAMA31 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\n{% if tools %}Environment: ipython\n{% endif %}"
    "Today Date: {{ date_string }}\n\n{{ system }}<|eot_id|>"
    "{% if tools and tools_in_user_message | default(true) %}"
    "{% if not messages %}{{ raise_exception('no first user message for the tools') }}{% endif %}"
    "<|start_header_id|>user<|end_header_id|>\n\nAnswer with a call of one of these functions.\n\n"
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}{{ messages[0].content | trim }}<|eot_id|>"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only one call at a time') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}{% endif %}<|eot_id|>"
    "{% endfor %}" + GENERATION + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Qwen2.5 and Qwen3 write tools, calls and results alike.
QWEN_TOOLS = (
    "\n\n# Tools\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{%- elif messages[0].role == 'system' -%}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n"
)
QWEN_CALLS = (
    "{% if m.tool_calls %}{% for call in m.tool_calls %}{% if not loop.first or content %}{{ '\\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}{% endif %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}\n"
    "<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
)
QWEN25 = (
    "{%- if tools -%}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}You are helpful.{% endif %}" + QWEN_TOOLS
    + "{%- else -%}<|im_start|>system\nYou are helpful.<|im_end|>\n{%- endif -%}"
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'user' or m.role == 'system' and not loop.first %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ content }}" + QWEN_CALLS
    + GENERATION + "<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
QWEN3 = (
    "{%- if tools -%}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    + QWEN_TOOLS + "{%- endif -%}"
    "{% set last = namespace(query=0) %}{% for m in messages %}"
    "{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}{% set last.query = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'user' or m.role == 'system' and not loop.first %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}{% set thinking = m.reasoning_content | default('') %}"
    "{% if '</think>' in content %}{% set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.index0 > last.query and (loop.last or thinking) %}"
    "<think>\n{{ thinking }}\n</think>\n\n{% endif %}{{ content }}" + QWEN_CALLS
    + GENERATION + "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)  # fmt: skip
GEMMA3 = (
    "{{ bos_token }}{% set prefix = '' %}{% if messages[0].role == 'system' %}"
    "{% set prefix = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ prefix if loop.first }}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}" + GENERATION + "<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set system = '' %}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ system if loop.last }}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}"
    "{% if not call.id or call.id | length != 9 %}{{ raise_exception('Tool call IDs must have 9 letters') }}{% endif %}"
    "{{ dict(call.function, id=call.id) | tojson }}{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    '{% else %}[TOOL_RESULTS] {"content": {{ m.content | tojson }}}[/TOOL_RESULTS]{% endif %}{% endfor %}'
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    + GENERATION + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)  # fmt: skip
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    + GENERATION + "<|im_start|>assistant<|im_sep|>{% endif %}"
)  # fmt: skip
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}"
    "{% endfor %}" + GENERATION + "<｜Assistant｜><think>\n{% endif %}"
)
GPT_OSS = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}\n\n"
    "Reasoning: {{ reasoning_effort | default('medium') }}<|end|>"
    "{% if messages[0].role == 'system' %}<|start|>developer<|message|># Instructions\n\n{{ messages[0].content }}<|end|>"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    + GENERATION + "<|start|>assistant{% endif %}"
)  # fmt: skip


class Family(NamedTuple):
    """A chat template with its tokenizer's kind and tokens.

    Attributes:
        template: the chat template.
        kind: the kind of tokenizer; see tests/tokenizer_kinds.py.
        bos: the token before a text, or None.
        eos: the token after a text.
        end: the token that ends an answer.
        opening: the text with which a prompt ends, behind the user's message.
        control: other control tokens.
        ordinary: added tokens that are no control tokens.
        rstrip: control tokens that strip white space behind them.
        kwargs: JSON of the template's arguments.
        system: the template takes a message of the system.
        tools: the template takes tools.
        answer: how an answer is written: "{}" for its text.
    """

    template: str
    kind: str
    bos: str | None
    eos: str
    end: str
    opening: str
    control: tuple[str, ...] = ()
    ordinary: tuple[str, ...] = ()
    rstrip: tuple[str, ...] = ()
    kwargs: str = "{}"
    system: bool = True
    tools: bool = False
    answer: str = "{}"

    def tokenizer(self, kind=None):
        """Return a tokenizer of the family's own kind, or of another."""
        return tokenizer_of_kind(
            kind or self.kind, self.template, self.bos, self.eos, (self.end, *self.control), self.ordinary,
            self.rstrip, TemplateSettings(self.kwargs),
        )  # fmt: skip


HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>")
MISTRAL_CONTROL = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
                   "[/TOOL_RESULTS]")  # fmt: skip
PHI_CONTROL = ("<|system|>", "<|user|>", "<|assistant|>")
IM = ("<|im_start|>",)
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
FAMILIES = {
    "llama 2": Family(LLAMA2, "prepend", "<s>", "</s>", "</s>", " [/INST]", answer="{} "),
    "llama 3.1": Family(
        LLAMA31, WORDS, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", HEADERS, tools=True,
        kwargs='{"date_string": "26 Jul 2024"}',
    ),
    "qwen2.5": Family(QWEN25, WORDS, None, "<|im_end|>", "<|im_end|>", ASSISTANT, IM, THINK[2:], tools=True),
    "qwen3": Family(QWEN3, WORDS, None, "<|im_end|>", "<|im_end|>", ASSISTANT, IM, THINK, tools=True,
                    answer="<think>\nHm.\n</think>\n\n{}"),
    "qwen3 without thinking": Family(
        QWEN3, WORDS, None, "<|im_end|>", "<|im_end|>", ASSISTANT + "<think>\n\n</think>\n\n", IM, THINK,
        tools=True, kwargs='{"enable_thinking": false}',
    ),
    "gemma 3": Family(GEMMA3, "none", "<bos>", "<eos>", "<end_of_turn>", "<end_of_turn>\n<start_of_turn>model\n",
                      ("<start_of_turn>",)),
    "mistral": Family(MISTRAL, "first", "<s>", "</s>", "</s>", "[/INST]", MISTRAL_CONTROL, tools=True, answer=" {}"),
    "phi-3": Family(PHI3, "prepend", "<s>", "<|endoftext|>", "<|end|>", "<|end|><|assistant|>", PHI_CONTROL,
                    rstrip=(*PHI_CONTROL, "<|end|>")),
    "phi-4": Family(PHI4, WORDS, "<|endoftext|>", "<|im_end|>", "<|im_end|>",
                    "<|im_end|><|im_start|>assistant<|im_sep|>", (*IM, "<|im_sep|>")),
    "deepseek r1 distill": Family(
        DEEPSEEK_R1, WORDS, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
        "<｜Assistant｜><think>\n", ("<｜User｜>", "<｜Assistant｜>"), THINK[:2], answer="Hm.\n</think>\n\n{}",
    ),
    "gpt-oss": Family(GPT_OSS, WORDS, "<|startoftext|>", "<|return|>", "<|return|>", "<|end|><|start|>assistant",
                      ("<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
                      answer="<|channel|>final<|message|>{}"),
}  # fmt: skip
