"""The patch series: the same changes as the run-time patches, as git patches for a checkout of upstream.

`patches/<name>/` holds one ordered list a package. The tools here keep it true: the base is a release from PyPI (base.py), code
and tests are carried from this repository into the patches (rooms.py), files come out byte for byte the same everywhere
(export.py), a rehearsal goes before every change to a person's tree (rehearse.py, apply.py), and another release is one command
away (rebase.py). `unsloth-ext patches --help` lists the commands.

For other tools: `base.pristine_tree(package, version)` is a release as installed, `base.pristine_repository(package, version)`
the same as a git repository, `upstream_format.format_like_upstream(text)` upstream's formatter.
"""
