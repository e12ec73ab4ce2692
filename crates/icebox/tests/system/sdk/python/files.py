"""Files, changes to them, and addresses of them."""

import hashlib
import inspect
import io
import json
import os
import re

from e2b import InvalidArgumentException, NotEnoughSpaceException, NotFoundException

from common import API, ask, raises, row


@row
def files_are_written_and_read_in_every_way(box):
    info = box.files.write("deep/er/text.txt", "hello")
    assert (info.path, info.name) == ("/home/user/deep/er/text.txt", "text.txt")
    assert box.files.read("deep/er/text.txt") == "hello"
    raw = bytes(range(256)) * 1000
    box.files.write("/tmp/raw", raw)
    assert bytes(box.files.read("/tmp/raw", format="bytes")) == raw
    assert b"".join(box.files.read("/tmp/raw", format="stream")) == raw
    written = box.files.write_files([{"path": f"/tmp/many/{n}", "data": f"{n}"} for n in range(3)])
    assert [it.path for it in written] == ["/tmp/many/0", "/tmp/many/1", "/tmp/many/2"]
    assert box.files.write_files([]) == []
    box.files.write("/tmp/stream", io.BytesIO(raw))
    assert box.commands.run("sha256sum < /tmp/raw; sha256sum < /tmp/stream").stdout.split()[::2] == [
        hashlib.sha256(raw).hexdigest()
    ] * 2
    if "gzip" in inspect.signature(box.files.write).parameters:
        box.files.write("/tmp/packed", "packed" * 1000, gzip=True)
        assert box.files.read("/tmp/packed", gzip=True) == "packed" * 1000
    box.files.write("deep/er/text.txt", "")
    assert box.files.read("deep/er/text.txt") == ""
    assert len(box.files.read("/proc/sys/kernel/random/boot_id")) == 37
    raises(NotFoundException, lambda: box.files.read("/not/there"), "does not exist")
    raises(InvalidArgumentException, lambda: box.files.read("/tmp"))
    root = box.files.write("/root/secret", "x", user="root")
    assert root.path == "/root/secret"
    assert box.commands.run("stat -c '%U %a' /root/secret", user="root").stdout == "root 644\n"
    assert box.commands.run("stat -c '%U %G %a' /home/user/deep/er/text.txt").stdout == "user user 644\n"


@row
def files_have_metadata(box):
    if "metadata" not in inspect.signature(box.files.write).parameters:
        return
    box.files.write("/home/user/labelled", "x", metadata={"Colour": "blue", "n": "1"})
    assert box.files.get_info("/home/user/labelled").metadata == {"colour": "blue", "n": "1"}
    box.files.write("/home/user/labelled", "x", metadata={"n": "2"})
    assert box.files.get_info("/home/user/labelled").metadata == {"n": "2"}


@row
def directories_are_listed_made_moved_and_removed(box):
    files = box.files
    assert files.make_dir("/home/user/tree/a/b") is True
    assert files.make_dir("/home/user/tree/a/b") is False
    files.write("/home/user/tree/a/file", "1234")
    box.commands.run("ln -s a/file tree/link && chmod 750 tree/a")
    top = {it.name: it for it in files.list("/home/user/tree")}
    assert set(top) == {"a", "link"}
    assert top["a"].permissions == "drwxr-x---" and top["a"].mode == 0o750
    assert top["a"].owner == top["a"].group == "user"
    assert top["link"].symlink_target == "/home/user/tree/a/file"
    names = [it.path for it in files.list("/home/user/tree", depth=3)]
    assert names == [f"/home/user/tree/{it}" for it in ("a", "a/b", "a/file", "link")], names
    info = files.get_info("/home/user/tree/a/file")
    assert info.size == 4 and info.permissions == "-rw-r--r--" and info.type.value == "file"
    moved = files.rename("/home/user/tree/a/file", "/home/user/tree/new/file")
    assert moved.path == "/home/user/tree/new/file"
    assert not files.exists("/home/user/tree/a/file") and files.exists("/home/user/tree/new/file")
    files.remove("/home/user/tree")
    assert not files.exists("/home/user/tree")
    files.remove("/home/user/tree")
    raises(NotFoundException, lambda: files.rename("/not/there", "/home/user/x"))
    raises(NotFoundException, lambda: files.get_info("/not/there"))
    raises(NotFoundException, lambda: files.list("/not/there"))
    raises(InvalidArgumentException, lambda: files.list("/home/user/.bashrc"))


@row
def changes_are_seen(box):
    box.files.make_dir("/home/user/seen/deep")
    watch = box.files.watch_dir("/home/user/seen", recursive=True)
    box.files.write("/home/user/seen/deep/file", "x")
    events = [(it.type.value, it.name) for it in watch.get_new_events()]
    assert ("create", "deep/file") in events and ("write", "deep/file") in events, events
    box.files.rename("/home/user/seen/deep/file", "/home/user/seen/other")
    box.files.remove("/home/user/seen/other")
    kinds = {it.type.value for it in watch.get_new_events()}
    assert {"rename", "remove"} <= kinds, kinds
    watch.stop()
    raises(NotFoundException, lambda: box.files.watch_dir("/not/there"))
    raises(InvalidArgumentException, lambda: box.files.watch_dir("/etc/hostname"))
    # New directories are watched, too, and who asks for it is told what is there.
    options = {"include_entry": True} if "include_entry" in inspect.signature(box.files.watch_dir).parameters else {}
    watch = box.files.watch_dir("/home/user/seen", recursive=True, **options)
    box.files.write("/home/user/seen/new/er/file", "x")
    box.commands.run("chmod 600 seen/new/er/file")
    events = [it for it in watch.get_new_events() if it.name == "new/er/file"]
    assert {"create", "chmod"} <= {it.type.value for it in events}, events
    if options:
        assert events[-1].entry.path == "/home/user/seen/new/er/file", events[-1]
    watch.stop()


@row
def a_full_disk_is_told(box):
    box.commands.run("mkdir -p /mnt/small && mount -t tmpfs -o size=64k tmpfs /mnt/small", user="root")
    raises(NotEnoughSpaceException, lambda: box.files.write("/mnt/small/large", b"x" * 1_000_000, user="root"))
    box.commands.run("umount /mnt/small", user="root")


@row
def signed_urls_need_nothing_else(box):
    box.files.write("/home/user/signed file", "signed")
    url = box.download_url("/home/user/signed file", user="user")
    status, _, body = ask("GET", url)
    assert (status, body) == (200, b"signed"), body
    url = box.download_url("/home/user/signed file", user="user", use_signature_expiration=60)
    assert ask("GET", url)[2] == b"signed"
    status, headers, body = ask("GET", url, {"Range": "bytes=1-3"})
    assert (status, body, headers["Content-Range"]) == (206, b"ign", "bytes 1-3/6")
    late = box.download_url("/home/user/signed file", user="user", use_signature_expiration=-60)
    status, _, body = ask("GET", late)
    assert (status, json.loads(body)["message"]) == (401, "signature is already expired")
    for wrong, why in [
        (re.sub("signature=[^&]*", "signature=v1_no", url), "invalid signature"),
        (url.replace("signed+file", "other").replace("signed%20file", "other"), "invalid signature"),
        (API + "/files?path=%2Fetc%2Fpasswd", "missing signature query parameter"),
    ]:
        status, _, body = ask("GET", wrong)
        assert (status, json.loads(body)["message"]) == (401, why), (wrong, body)
    upload = box.upload_url("/home/user/uploaded", user="user")
    boundary = "----boundary"
    form = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nsent\r\n--{boundary}--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    status, _, body = ask("POST", upload, headers, form.encode())
    assert status == 200 and json.loads(body)[0]["path"] == "/home/user/uploaded", body
    assert box.files.read("/home/user/uploaded") == "sent"


def peak(pid):
    """The most memory that a process of this machine has had, in KiB."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(it.split()[1]) for it in status if it.startswith("VmHWM:"))


@row
def large_files_take_no_memory(box):
    if "Iterable" not in str(inspect.signature(box.files.write).parameters["data"].annotation):
        return
    daemon, piece, pieces = os.environ["ICEBOX_DAEMON_PID"], bytes(range(256)) * 4096, 128
    # The agent is process 1, and what it has begun of the same program.
    agents = "for it in /proc/[0-9]*; do [ $it/exe -ef /proc/1/exe ] && echo $it; done; true"
    agents = box.commands.run(agents, user="root").stdout.split()
    for it in agents:
        box.commands.run(f"echo 5 > {it}/clear_refs", user="root")
    with open(f"/proc/{daemon}/clear_refs", "w") as file:
        file.write("5")
    peaks = lambda: box.commands.run(f"grep -h VmHWM {' '.join(it + '/status' for it in agents)}", user="root").stdout
    in_guest = lambda: [int(it.split()[1]) for it in peaks().splitlines()]
    before = [peak(daemon), *in_guest()]
    box.files.write("/home/user/large", (piece for _ in range(pieces)), use_octet_stream=True)
    read = hashlib.sha256()
    for it in box.files.read("/home/user/large", format="stream"):
        read.update(it)
    sent = hashlib.sha256()
    for _ in range(pieces):
        sent.update(piece)
    assert read.digest() == sent.digest()
    grown = [after - before for before, after in zip(before, [peak(daemon), *in_guest()])]
    assert len(grown) > 1 and max(grown) < 32 << 10, grown
    box.files.remove("/home/user/large")
