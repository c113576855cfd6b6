"""What ``User`` means, as Docker resolves it: its own rules as a table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serpentine.errors import UserNotFound
from serpentine.run.users import User, resolve_user

PASSWD = b"""\
root:x:0:0:root:/root:/bin/sh
# a comment:x:5:5::/comment:
app:x:1000:100:App:/home/app:/bin/sh

second:x:1000:200::/home/second:/bin/sh
  spaced:x:1001:101::/home/spaced:/bin/sh
homeless:x:1002:102
bare:x:1003:103:::
12:x:1004:104::/home/twelve:
+:x:::::
garbage
half:x:12
letters:x:a:b::/home/letters:
superscript:x:\xc2\xb2:1::/:
negative:x:-1:-1::/home/negative:
\xff\xfe:x:1005:105::/home/latin:
"""
GROUP = b"""\
root:x:0:
users:x:100:
wheel:x:10:root,app
audio:x:29:app
twin:x:100:second
video:x:44:homeless, app
77:x:45:
nobody
broken:x:b:app
short:x:46
wheel:x:11:app
"""


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("", User(0, 0, (0, 10), "/root")),
        ("root", User(0, 0, (0, 10), "/root")),
        ("0", User(0, 0, (0, 10), "/root")),
        ("app", User(1000, 100, (100, 10, 29, 11), "/home/app")),
        # Docker does not strip the names of members: "video" is not one of the groups.
        # Of two accounts with one number the first counts, also for the groups.
        ("1000", User(1000, 100, (100, 10, 29, 11), "/home/app")),
        ("second", User(1000, 200, (200, 100), "/home/second")),
        ("spaced", User(1001, 101, (101,), "/home/spaced")),
        ("homeless", User(1002, 102, (102, 44), "/")),
        ("bare", User(1003, 103, (103,), "/")),
        # What is a number is a number, even if somebody is called like that.
        ("12", User(12, 0, (0,), "/")),
        ("1004", User(1004, 104, (104,), "/home/twelve")),
        # A number that is in no file is legal; its group is root's.
        ("4242", User(4242, 0, (0,), "/")),
        ("2147483647", User(2147483647, 0, (0,), "/")),
        # A group that was asked for is the only one.
        ("app:audio", User(1000, 29, (29,), "/home/app")),
        ("app:29", User(1000, 29, (29,), "/home/app")),
        ("1000:4242", User(1000, 4242, (4242,), "/home/app")),
        ("4242:4243", User(4242, 4243, (4243,), "/")),
        ("4242:users", User(4242, 100, (100,), "/")),
        ("app:wheel", User(1000, 10, (10,), "/home/app")),
        ("app:77", User(1000, 77, (77,), "/home/app")),
        ("app:short", User(1000, 46, (46,), "/home/app")),
        (":audio", User(0, 29, (29,), "/root")),
        (":5", User(0, 5, (5,), "/root")),
        ("second:", User(1000, 200, (200, 100), "/home/second")),
        (":", User(0, 0, (0, 10), "/root")),
        ("0" * 10_000 + "12:012", User(12, 12, (12,), "/")),
    ],
)
def test_table(text, user):
    assert resolve_user(text, PASSWD, GROUP) == user


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nobody", "'nobody'"),
        ("App", "'App'"),
        ("garbage", "'garbage'"),
        ("half", "'half'"),
        ("letters", "'letters'"),
        ("superscript", "'superscript'"),
        ("negative", "'negative'"),
        ("# a comment", "comment"),
        ("+", "'+'"),
        ("-1", "'-1'"),
        ("²", "'²'"),
        ("2147483648", "2147483648"),
        ("99999999999999999999999", "99999999999999999999"),
        ("9" * 10_000, "99999999999999999999"),
        ("app:nobody", "'nobody'"),
        ("app:broken", "'broken'"),
        ("app:-1", "'-1'"),
        ("app:4294967295", "4294967295"),
        ("app:audio:x", "'audio:x'"),
    ],
)
def test_not_there(text, named):
    with pytest.raises(UserNotFound) as caught:
        resolve_user(text, PASSWD, GROUP)
    assert named in str(caught.value)
    assert caught.value.hint
    assert caught.value.exit_code == 125


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("", User(0, 0, (0,), "/")),
        ("0", User(0, 0, (0,), "/")),
        ("7", User(7, 0, (0,), "/")),
        ("7:8", User(7, 8, (8,), "/")),
    ],
)
@pytest.mark.parametrize("files", [(None, None), (b"", b""), (b"\n#\n", b"::::\n")])
def test_images_without_the_files(text, user, files):
    assert resolve_user(text, *files) == user


@pytest.mark.parametrize("text", ["root", "app", "7:users"])
def test_names_need_the_files(text):
    with pytest.raises(UserNotFound):
        resolve_user(text, None, None)


@given(st.text(), st.binary() | st.none(), st.binary() | st.none())
def test_anything_is_a_user_or_an_error(text, passwd, group):
    try:
        user = resolve_user(text, passwd, group)
    except UserNotFound:
        return
    assert all(0 <= n < 2**31 for n in (user.uid, user.gid, *user.groups))
    assert user.home


@given(st.integers(2**31, 2**70))
def test_numbers_in_the_files_are_checked(number):
    """The runtime takes 32 bits: what an image's file says may be more."""
    passwd = b"big:x:%d:1::/:\nok:x:1:%d::/:\n" % (number, number)
    group = b"big:x:%d:ok\n" % number
    for text in ("big", "ok", "ok:big"):
        with pytest.raises(UserNotFound):
            resolve_user(text, passwd, group)
