"""Reading a patch file: subject, text, trailers, files and hunks."""

import pytest

from unsloth_ext.errors import UsageError
from unsloth_ext.series.mail import MailPatch, split_message

MAIL = b"""From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: Dev <dev@example.org>
Date: Sat, 21 Nov 2026 02:33:46 +0000
Subject: [PATCH] =?UTF-8?q?A=20subject=20with=20=C3=A9=20that=20is=20so=20long?=
 =?UTF-8?q?=20that=20it=20is=20folded?=
MIME-Version: 1.0

Why: because.

Fixes #12

Forwarded: https://example.org/1
Applies-To: unsloth >=2026.1,
  <2027
Room-Code: a.b:c -> d/e.py
Unsloth-Ext-Patch: loss.square

diff --git a/a.py b/a.py
index 1111111111111111111111111111111111111111..2222222222222222222222222222222222222222 100644
--- a/a.py
+++ b/a.py
@@ -1,3 +1,3 @@ def f():
 x
--- a comment of sql
+++ a sum
 y
@@ -9 +9 @@
-a
+b
diff --git a/new.py b/new.py
new file mode 100644
index 0000000000000000000000000000000000000000..3333333333333333333333333333333333333333
--- /dev/null
+++ b/new.py
@@ -0,0 +1 @@
+new
"""


def test_a_mail_is_read():
    patch = MailPatch("0012-A-subject.patch", MAIL)
    assert patch.subject == "A subject with é that is so long that it is folded"
    assert patch.description == "Why: because.\n\nFixes #12"
    assert patch.stem == "A-subject" and patch.id == "loss.square"
    assert patch.all("Applies-To") == ["unsloth >=2026.1, <2027"]
    assert patch.pairs("Room-Code") == [("a.b:c", "d/e.py")]
    assert patch.files == ["a.py", "new.py"]
    assert [(h.file, h.start, len(h.lines)) for h in patch.hunks] == [("a.py", 1, 4), ("a.py", 9, 2), ("new.py", 0, 1)]
    assert patch.changed_lines["a.py"] == ["--- a comment of sql", "+++ a sum", "-a", "+b"]


def test_applies_to_speaks_of_its_own_package():
    patch = MailPatch("p", MAIL)
    assert patch.applies_to("unsloth", "2026.1.2") and not patch.applies_to("unsloth", "2027.1.1")
    assert patch.applies_to("unsloth_zoo", "1.0")
    with pytest.raises(UsageError, match="Write it as"):
        MailPatch("p", MAIL.replace(b">=2026.1,", b"about 2026,")).applies_to("unsloth", "1")


def test_only_a_last_paragraph_of_trailers_counts():
    assert split_message("Subject\n\nKey: value\n\nText: here\nand more") == (
        "Subject\n\nKey: value\n\nText: here\nand more",
        [],
    )
    assert split_message("Subject\n\nKey: value")[1] == [("Key", "value")]


def test_a_pair_without_an_arrow_is_an_error():
    with pytest.raises(UsageError, match="SOURCE -> TARGET"):
        MailPatch("p", MAIL.replace(b"a.b:c -> d/e.py", b"a.b:c d/e.py")).pairs("Room-Code")
