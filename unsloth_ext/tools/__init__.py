"""Challenge D: tool calling with Llama 3.x, and the tokenizer settings that it stands on."""
