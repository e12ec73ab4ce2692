#!/usr/bin/env python3
"""The floor of the other VMMs: what Cloud Hypervisor and Firecracker cost by themselves, without Icebox.

Starts the VMM directly, with the kernel, initramfs, root image, memory size, devices and agent that Icebox uses, in a
network namespace with a tap, and drives it over its own API: boot, save while it runs, save, restore that, save while it
runs, save, and so on. No box, no cgroup, no manifest, no copy of what it has saved. `floor.py` does the same with QEMU, and
says what "first exec" is.

No memory is restored twice but by those at once, as under Icebox. It matters where a processor is emulated: the code of a
guest is translated for the pages that it is in, and a second guest on the same file finds it translated.

"Still" is for how long the vCPUs stand still for a save: from asking for the pause until the resume is answered. The
first such save of a machine is not among the measurements: Cloud Hypervisor may still be loading its memory, and what
Firecracker then writes is counted from there.

Needs root. Python's standard library only. Prints one JSON document.
"""

import argparse
import ctypes
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time

from floor import CLONE_NEWNET, GATEWAY, IFF_TAP_NO_PI_VNET_HDR, TOKEN, TUNSETIFF, first_exec

# What the drivers pass (crates/icebox-host/src/vmm/{cloud_hypervisor,firecracker}/config.rs).
COMMAND_LINE = "console=ttyS0 quiet loglevel=4 panic=-1 cryptomgr.notests"
DISK = "disk"
STILL_LOADING = "on-demand memory restore is still in progress"


def make_network():
    """Moves this process into a network namespace of its own, with a tap that a VMM can open by its name."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        sys.exit(f"cannot make a network namespace: {os.strerror(ctypes.get_errno())}")
    for command in ("tuntap add dev tap0 mode tap vnet_hdr", "link set lo up", "link set tap0 up",
                    f"address add {GATEWAY}/30 dev tap0"):
        subprocess.run(["ip", *command.split()], check=True)


def open_tap():
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"tap0", IFF_TAP_NO_PI_VNET_HDR))
    return tap


class Machine:
    """One VMM process and its API."""

    prefix = ""

    def __init__(self, args):
        self.args = args
        self.socket = os.path.join(args.directory, "api.sock")
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        console = open(os.path.join(args.directory, "console"), "wb")
        # Where it is told of a disk, it finds that of its own directory: saves name it, and are restored more than once.
        self.process = subprocess.Popen([args.program, *self.arguments()], stdin=subprocess.DEVNULL, stdout=console,
                                        stderr=console, cwd=args.directory)
        console.close()
        while True:
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(self.socket)
                return
            except (FileNotFoundError, ConnectionRefusedError):
                if self.process.poll() is not None:
                    sys.exit(f"{args.program} ended: {self.said()}")
                time.sleep(0.0005)

    def said(self):
        with open(os.path.join(self.args.directory, "console"), errors="replace") as console:
            return console.read()[-2000:]

    def ask(self, path, body=None, method="PUT", descriptors=()):
        """One request. Returns None, or the words of a refusal."""
        text = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n"
        if text:
            head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n"
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.socket)
            socket.send_fds(connection, [(head + "\r\n").encode() + text], list(descriptors))
            answer = b""
            while b"\r\n\r\n" not in answer:
                chunk = connection.recv(65536)
                if not chunk:
                    sys.exit(f"{self.args.program} ended at {path}: {self.said()}")
                answer += chunk
            status, rest = answer.split(b"\r\n", 1)
            if status.split()[1].startswith(b"2"):
                return None
            head, words = rest.split(b"\r\n\r\n", 1)
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            while length and len(words) < int(length[0].split(b":")[1]):
                words += connection.recv(65536)
            return words.decode(errors="replace")

    def tell(self, path, body=None, method="PUT", descriptors=()):
        refusal = self.ask(path, body, method, descriptors)
        if refusal is not None:
            sys.exit(f"{self.args.program} refused {path}: {refusal}")

    def save_area(self):
        """An empty directory for a save."""
        area = os.path.join(self.args.directory, "save")
        shutil.rmtree(area, ignore_errors=True)
        os.mkdir(area)
        return area

    def save_running(self, differential):
        """For how long the vCPUs stand still for a save, in ms."""
        area = self.save_area()
        begin = time.perf_counter()
        self.pause()
        self.save(area, differential)
        self.resume()
        return round((time.perf_counter() - begin) * 1000, 3)

    def save_running_twice(self, differential):
        """The second of two, some time apart."""
        self.loaded()
        self.save_running(differential)
        time.sleep(self.args.idle)
        return self.save_running(differential)

    def save_and_end(self, area):
        """Leaves a save in `area`, in the place of an older one, which it may be running from."""
        newer = f"{area}.new"
        os.mkdir(newer)
        self.pause()
        self.save(newer, False)
        self.end()
        shutil.rmtree(area, ignore_errors=True)
        os.rename(newer, area)

    def loaded(self):
        """Waits until all memory is there."""

    def end(self):
        self.process.kill()
        self.process.wait()


class CloudHypervisor(Machine):
    prefix = "/api/v1/"

    def arguments(self):
        return ["--api-socket", f"path={self.socket}"]

    def boot(self):
        args = self.args
        self.tell("vm.create", {
            "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
            "memory": {"size": args.memory_mib << 20, "thp": False},
            "payload": {"kernel": args.kernel, "initramfs": args.initramfs,
                        "cmdline": f"{COMMAND_LINE} reboot=t icebox.token={TOKEN}"},
            "disks": [{"id": "disk0", "path": DISK, "image_type": "Raw", "direct": False}],
            "rng": {"src": "/dev/urandom"},
            "balloon": {"id": "balloon0", "size": 0, "free_page_reporting": True},
            "serial": {"mode": "Tty"},
            "console": {"mode": "Off"},
        })
        tap = open_tap()
        self.tell("vm.add-net", {"id": "net0", "mac": args.mac}, descriptors=[tap])
        os.close(tap)
        self.tell("vm.boot")

    def restore(self, area):
        tap = open_tap()
        self.tell("vm.restore", {"source_url": f"file://{area}", "memory_restore_mode": "OnDemand",
                                 "net_fds": [{"id": "net0", "num_fds": 1}]}, descriptors=[tap])
        os.close(tap)
        self.resume()

    def loaded(self):
        while STILL_LOADING in (self.ask("vm.snapshot", {"destination_url": "file:///nowhere"}) or ""):
            time.sleep(0.01)

    def pause(self):
        self.tell("vm.pause")

    def resume(self):
        self.tell("vm.resume")

    def save(self, area, _differential):
        self.tell("vm.snapshot", {"destination_url": f"file://{area}"})


class Firecracker(Machine):
    def arguments(self):
        return ["--api-sock", self.socket, "--level", "Error"]

    def boot(self):
        args = self.args
        line = (f"{COMMAND_LINE} reboot=k i8042.noaux i8042.nomux i8042.dumbkbd icebox.off=reset"
                f" icebox.token={TOKEN}")
        for path, body in [
            ("/machine-config", {"vcpu_count": 1, "mem_size_mib": args.memory_mib, "smt": False,
                                 "track_dirty_pages": False}),
            ("/boot-source", {"kernel_image_path": args.kernel, "initrd_path": args.initramfs, "boot_args": line}),
            ("/drives/disk0", {"drive_id": "disk0", "path_on_host": DISK, "is_root_device": False,
                               "is_read_only": False, "cache_type": "Writeback", "io_engine": "Sync"}),
            ("/network-interfaces/net0", {"iface_id": "net0", "guest_mac": args.mac, "host_dev_name": "tap0"}),
            ("/entropy", {}),
            ("/balloon", {"amount_mib": 0, "deflate_on_oom": True, "stats_polling_interval_s": 0,
                          "free_page_reporting": True}),
            ("/actions", {"action_type": "InstanceStart"}),
        ]:
            self.tell(path, body)

    def restore(self, area):
        self.tell("/snapshot/load", {
            "snapshot_path": os.path.join(area, "state"),
            "mem_backend": {"backend_path": os.path.join(area, "memory"), "backend_type": "File"},
            "track_dirty_pages": True, "resume_vm": True,
        })

    def pause(self):
        self.tell("/vm", {"state": "Paused"}, method="PATCH")

    def resume(self):
        self.tell("/vm", {"state": "Resumed"}, method="PATCH")

    def save(self, area, differential):
        self.tell("/snapshot/create", {"snapshot_type": "Diff" if differential else "Full",
                                       "snapshot_path": os.path.join(area, "state"),
                                       "mem_file_path": os.path.join(area, "memory")})


VMMS = {"cloud-hypervisor": CloudHypervisor, "firecracker": Firecracker}


def clone(source, to):
    subprocess.run(["cp", "--sparse=auto", "--reflink=auto", source, to], check=True)
    os.chmod(to, 0o600)


def restored_at_once(args, kind, saved, saved_disk):
    """How long until as many machines as that, all of one save, have run a command, each in a network of its own."""
    begin_read, begin_write = os.pipe()
    done_read, done_write = os.pipe()
    parent, children = args.directory, []
    for number in range(args.at_once):
        args.directory = os.path.join(parent, str(number))
        os.mkdir(args.directory)
        clone(saved_disk, os.path.join(args.directory, DISK))
        child = os.fork()
        if child:
            children.append(child)
            continue
        machine = None
        try:
            make_network()
            os.write(done_write, b".")
            os.read(begin_read, 1)
            machine = kind(args)
            machine.restore(saved)
            first_exec(time.perf_counter(), 600)
            os.write(done_write, b".")
            # Runs on until all have.
            os.read(begin_read, 1)
        finally:
            if machine:
                machine.end()
            os._exit(0)
    os.close(done_write)
    args.directory = parent

    def all_done():
        for _ in children:
            if os.read(done_read, 1) != b".":
                sys.exit("a machine of many failed")

    all_done()
    begin = time.perf_counter()
    os.write(begin_write, b"." * len(children))
    all_done()
    took = round((time.perf_counter() - begin) * 1000, 3)
    os.write(begin_write, b"." * len(children))
    for child in children:
        os.waitpid(child, 0)
    return took


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vmm", choices=sorted(VMMS), required=True)
    parser.add_argument("--program", required=True)
    parser.add_argument("--kernel", required=True, help="for Firecracker an ELF file")
    parser.add_argument("--initramfs", required=True)
    parser.add_argument("--image", required=True, help="root file system, raw; it is not written to")
    parser.add_argument("--memory-mib", type=int, default=256)
    parser.add_argument("--mac", default="02:1c:eb:0c:00:01", help="the guest's; what the agent expects")
    parser.add_argument("--rounds", type=int, default=2, help="restores")
    parser.add_argument("--at-once", type=int, default=10, help="then so many restores at once")
    parser.add_argument("--idle", type=float, default=3.0, help="seconds before each save")
    parser.add_argument("--directory", help="where files go; on the same file system as Icebox's data")
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("needs root")
    args.directory = tempfile.mkdtemp(prefix="icebox-floor-", dir=args.directory)
    disk = os.path.join(args.directory, DISK)
    saved, saved_disk = os.path.join(args.directory, "saved"), os.path.join(args.directory, "saved-disk")
    machine, kind = None, VMMS[args.vmm]
    try:
        make_network()
        clone(args.image, disk)
        begin = time.perf_counter()
        machine = kind(args)
        machine.boot()
        result = {"bootMs": first_exec(begin), "restoreMs": [], "restoredStillMs": []}
        time.sleep(args.idle)
        result["bootedStillMs"] = machine.save_running_twice(False)
        machine.save_and_end(saved)
        for _ in range(args.rounds):
            begin = time.perf_counter()
            machine = kind(args)
            machine.restore(saved)
            result["restoreMs"].append(first_exec(begin))
            time.sleep(args.idle)
            result["restoredStillMs"].append(machine.save_running_twice(True))
            machine.save_and_end(saved)
        clone(disk, saved_disk)
        result["atOnceMs"] = restored_at_once(args, kind, saved, saved_disk)
        json.dump(result, sys.stdout, indent=2)
        print()
    finally:
        if machine and machine.process.poll() is None:
            machine.end()
        shutil.rmtree(args.directory)


if __name__ == "__main__":
    main()
