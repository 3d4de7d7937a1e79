"""Challenge E: memory-efficient backprop through the language-model head."""
