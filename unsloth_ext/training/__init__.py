"""The main job: one QLoRA fine-tune through Unsloth, measured step by step, alone or beside pristine Unsloth.

Nothing here is imported until a command runs, and `unsloth` only inside the job: Unsloth wants to be imported before transformers, and
unsloth_ext before Unsloth.
"""
