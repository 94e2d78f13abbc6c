"""A small tokenizer in Gemma 4's format, with a chat template, for tests that need text."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

CONTROLS = (
    "<pad> <eos> <bos> <unk> <|turn> <turn|> <|channel> <channel|> <|think|> <|tool> <tool|> <|tool_call> "
    '<tool_call|> <|tool_response> <tool_response|> <|"|> <|image|> <|audio|> <|video|>'
).split()
BYTES = [f"<0x{value:02X}>" for value in range(256)]
ORDINARY_ADDED = ["\n\n", "<h1>"]  # added tokens that text may produce, as Gemma has them

TEXT = """
The quick brown fox jumps over the lazy dog while seventeen tokens wait for their turn. A model reads text and
writes text; a drafter guesses what the model will write next, and the model keeps every guess that is right.
def fibonacci(number): return number if number < 2 else fibonacci(number - 1) + fibonacci(number - 2)
What is the capital of France? Paris. How many legs has a spider? Eight. Why is the sky blue? Because short
waves scatter more than long ones. Please list three colours: red, green and blue. Thank you, that is all.
system user model thought call response declaration value name description parameters answer question
for index in range(10): print(index, "times", index, "is", index * index)  # squares, cubes, roots and powers
"""

# Gemma 4's turn format: thoughts dropped from history, tool results inside the model's turn.
CHAT_TEMPLATE = """\
{%- macro quote(text) -%}{{- '<|"|>' ~ text ~ '<|"|>' -}}{%- endmacro -%}
{%- macro write(data) -%}
  {%- if data is string -%}{{- quote(data) -}}
  {%- elif data is boolean -%}{{- data | string | lower -}}
  {%- elif data is mapping -%}
    {{- '{' -}}
    {%- for name, part in data | dictsort -%}
      {{- name ~ ':' ~ write(part) -}}{%- if not loop.last -%},{%- endif -%}
    {%- endfor -%}
    {{- '}' -}}
  {%- elif data is iterable -%}
    {{- '[' -}}
    {%- for part in data -%}{{- write(part) -}}{%- if not loop.last -%},{%- endif -%}{%- endfor -%}
    {{- ']' -}}
  {%- else -%}{{- data -}}
  {%- endif -%}
{%- endmacro -%}
{%- macro drop_thoughts(text) -%}
  {%- set kept = namespace(text='') -%}
  {%- for part in text.split('<channel|>') -%}
    {%- set kept.text = kept.text + part.split('<|channel>')[0] -%}
  {%- endfor -%}
  {{- kept.text | trim -}}
{%- endmacro -%}
{%- macro body(message) -%}
  {%- if message['content'] is string -%}
    {{- drop_thoughts(message['content']) if message['role'] == 'assistant' else message['content'] | trim -}}
  {%- else -%}
    {%- for item in message['content'] -%}{{- item['text'] | trim -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set state = namespace(rest=messages, waiting=false) -%}
{%- if messages[0]['role'] == 'system' or tools or enable_thinking is true -%}
  {{- '<|turn>system\\n' -}}
  {%- if enable_thinking is true -%}{{- '<|think|>\\n' -}}{%- endif -%}
  {%- if messages[0]['role'] == 'system' -%}
    {{- body(messages[0]) -}}
    {%- set state.rest = messages[1:] -%}
  {%- endif -%}
  {%- for tool in tools or [] -%}
    {%- set f = tool['function'] -%}
    {{- '<|tool>declaration:' ~ f['name'] -}}
    {{- '{description:' ~ quote(f['description']) ~ ',parameters:' ~ write(f['parameters']) ~ '}<tool|>' -}}
  {%- endfor -%}
  {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in state.rest -%}
  {%- if message['role'] == 'tool' -%}
    {{- '<|tool_response>response:' ~ (message['name'] or 'unknown') -}}
    {{- write(message['content'] if message['content'] is mapping else {'value': body(message)}) -}}
    {{- '<tool_response|>' -}}
  {%- else -%}
    {%- if not state.waiting -%}
      {{- '<|turn>' ~ ('model' if message['role'] == 'assistant' else message['role']) ~ '\\n' -}}
    {%- endif -%}
    {{- body(message) -}}
    {%- set state.waiting = message['tool_calls'] | length > 0 -%}
    {%- for call in message['tool_calls'] or [] -%}
      {{- '<|tool_call>call:' ~ call['function']['name'] ~ write(call['function']['arguments']) -}}
      {{- '<tool_call|>' -}}
    {%- endfor -%}
    {%- if not state.waiting -%}{{- '<turn|>\\n' -}}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not state.waiting -%}
  {{- '<|turn>model\\n' -}}
  {%- if enable_thinking is false -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""


def write_tokenizer(folder: Path, vocab_size: int = 512) -> tuple[int, ...]:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja.

    -> the EOS ids. The vocabulary has exactly `vocab_size` ids: control tokens, 256 bytes, characters, merges,
    and <unusedN> where the merges run out. Equal sizes give equal files.
    """
    tokens, merges = _learn(vocab_size)
    vocab = {token: index for index, token in enumerate(tokens)}
    added = [_added(token, vocab[token]) for token in [*CONTROLS, *ORDINARY_ADDED]]
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    model |= {"vocab": vocab, "merges": merges}
    space = {"String": " "}
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": space, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": space,
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": model,
    }
    eos_ids = tuple(vocab[text] for text in ("<eos>", "<turn|>", "<|tool_response>"))
    config = {"add_bos_token": False, "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    generation = {
        "bos_token_id": vocab["<bos>"],
        "eos_token_id": list(eos_ids),
        "do_sample": True,
        "top_k": 64,
    }
    generation |= {"pad_token_id": vocab["<pad>"], "temperature": 1.0, "top_p": 0.95}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return eos_ids


def _added(token: str, index: int) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": token, **flags, "special": token in CONTROLS}


def _learn(vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """-> tokens in id order, and byte-pair merges: the most frequent pair first, ties by its text."""
    words = [tuple(word) for word in re.findall(r"▁?[^▁\n]+", TEXT.replace(" ", "▁"))]
    frequent = [char for char, _ in Counter(c for word in words for c in word).most_common(39)]
    tokens = [*CONTROLS, *BYTES, *ORDINARY_ADDED, "\n", *sorted(frequent)]
    assert vocab_size >= len(tokens), f"controls, bytes and characters need {len(tokens)} ids"
    known, merges = set(tokens), []
    while len(tokens) < vocab_size:
        pairs = Counter(pair for word in words for pair in pairwise(word) if known.issuperset(pair))
        if not pairs:
            tokens.append(f"<unused{len(tokens)}>")
            continue
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        if "".join(best) not in known:
            tokens.append("".join(best))
            known.add("".join(best))
        words = [_merged(word, best) for word in words]
    return tokens, merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)
