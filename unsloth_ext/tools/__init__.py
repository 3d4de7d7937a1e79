"""Challenge D: tool calling with Llama 3.x, and the tokenizer settings that it stands on.

Names are imported when they are first asked for, so that `import unsloth_ext` stays light.
"""

from importlib import import_module

# What the room offers, and the file that holds it.
_WHERE = {
    "MessageError": "messages",
    "normalize": "messages",
    "tool_schemas": "messages",
    "without_filling": "messages",
    "PROFILES": "profiles",
    "Profile": "profiles",
    "render": "profiles",
    "Segment": "reference",
    "segments": "reference",
    "chat_template": "templates",
    "installed_template": "templates",
    "strip_generation_markers": "llama_template",
    "apply_edits": "llama_template",
    "Encoded": "encoding",
    "encode": "encoding",
    "install_guard": "guard",
    "is_guarded": "guard",
    "remove_guard": "guard",
    "parse": "parsing",
    "ParseError": "parsing",
    "ParsedMessage": "parsing",
    "ToolCall": "parsing",
    "Delta": "streaming",
    "StreamingParser": "streaming",
    "install_response_schema": "response_schema",
    "run_tool_loop": "tool_loop",
    "is_llama3": "special_tokens",
    "restore_special_tokens": "special_tokens",
    "widen_generation_config": "stop_ids",
    "widen_sampling_params": "stop_ids",
    "widen_vllm_engine": "stop_ids",
}


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_WHERE})
