"""The profiles by name, what importing them costs, and life without Unsloth."""

import json


def test_importing_the_room_is_light(python):
    code = "import sys, unsloth_ext.tools as t; t.render; t.MessageError; print(*sys.modules)"
    modules = python(code).stdout.split()
    assert not {"torch", "transformers", "jinja2", "unsloth", "rich"} & set(modules)


def test_every_public_name_is_there():
    import unsloth_ext.tools as tools

    for name in tools._WHERE:
        assert getattr(tools, name) is not None and name in dir(tools)


def test_unsloth_is_not_imported(python):
    code = (
        "import sys, json\nfrom unsloth_ext.tools import render, PROFILES\n"
        "texts = [render([{'role': 'user', 'content': 'u'}], profile=p, tools=[{'name': 'f'}]) for p in PROFILES]\n"
        "assert not {'torch', 'transformers', 'unsloth'} & set(sys.modules)\nprint(json.dumps(texts))"
    )
    texts = json.loads(python(code).stdout)
    assert len(texts) == 4 and all('"name": "f"' in text for text in texts)


def test_without_unsloth_it_asks_for_the_template(python):
    code = (
        "import sys\nfrom unsloth_ext.patching import release\nsys.modules['unsloth'] = None\n"
        "from unsloth_ext.tools import render, chat_template\nuser = [{'role': 'user', 'content': 'u'}]\n"
        "print(render(user, profile='pythonic-3.2', tools=[{'name': 'f'}], date_string=False))\n"
        "print(render(user, profile='meta-3.1', tools=[{'name': 'f'}], preamble='Tools: '))\n"
        "for call in (lambda: render(user), lambda: chat_template('hf'), lambda: chat_template('meta-3.1')):\n"
        "    try: call()\n"
        "    except ValueError as error: print('REFUSED', error)\n"
    )
    said = python(code).stdout
    assert said.count("REFUSED base_template") == 3 and said.count('"name": "f"') == 2
