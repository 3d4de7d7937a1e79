"""What Unsloth's GRPO trainers copy in the place of a scoring function's source: a call of the function itself.

Unsloth writes trainers to a file, with the source of `RL_REPLACEMENTS`' functions in it, and keeps that file. So the text below
names nothing but unsloth_zoo: it serves with unsloth_ext, with its patches off, and after it is gone.
"""


def chunked_hidden_states_selective_log_softmax(*args, **kwargs):
    from unsloth_zoo import rl_replacements

    return rl_replacements.chunked_hidden_states_selective_log_softmax(*args, **kwargs)


def chunked_hidden_states_selective_log_softmax_recompute(*args, **kwargs):
    from unsloth_zoo import rl_replacements

    return rl_replacements.chunked_hidden_states_selective_log_softmax_recompute(*args, **kwargs)
