#!/usr/bin/env python3
"""The floor: what QEMU itself costs, without Icebox.

Starts QEMU directly, with the kernel, initramfs, root image, memory size, devices and agent that Icebox uses, in a
network namespace with a tap, and does by hand what the driver does: boot, save, restore. No box, no cgroup, no
manifest. A save's time is given without the fsync that makes it durable ("total") and with it ("durable"). The
benchmark divides Icebox's times by these.

"First exec" is the same in both: a `process.Process/Start` of `true` by the agent in the guest, asked for again and
again from the moment QEMU is started until it has succeeded.

Needs root. Python's standard library only. Prints one JSON document.
"""

import argparse
import base64
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

PAGE = 4096
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI_VNET_HDR = 0x0002 | 0x1000 | 0x4000
GUEST, GATEWAY, AGENT_PORT = "169.254.0.21", "169.254.0.22", 49983
TOKEN = "0" * 64
# What the driver passes (crates/icebox-host/src/vmm/qemu/command.rs); a floor under another machine is no floor.
MACHINE = ("microvm,{irqchip}acpi=on,rtc={rtc},pit=off,pic=off,pcie=off,usb=off,auto-kernel-cmdline=off,"
           "memory-backend=ram,mem-merge=off,dump-guest-core=off")
ACCELERATORS = {
    "tcg": (MACHINE.format(irqchip="", rtc="on"), "tcg,thread=multi,tb-size=32", "max,-la57",
            " mitigations=off tsc_early_khz={khz}"),
    "kvm": (MACHINE.format(irqchip="kernel-irqchip=on,ioapic2=off,", rtc="off"), "kvm", "host", ""),
}
COMMAND_LINE = "console=ttyS0 quiet loglevel=4 reboot=t panic=-1 cryptomgr.notests"


def tsc_khz():
    """The time stamp counter's frequency, as the kernel found it."""
    with open("/proc/cpuinfo") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("cpu MHz"):
                return round(float(line.split(":")[1]) * 1000)
    sys.exit("no CPU frequency in /proc/cpuinfo")


def make_network():
    """Moves this process into a network namespace of its own, with a tap."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        sys.exit(f"cannot make a network namespace: {os.strerror(ctypes.get_errno())}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"tap0", IFF_TAP_NO_PI_VNET_HDR))
    for command in ("link set lo up", "link set tap0 up", f"address add {GATEWAY}/30 dev tap0"):
        subprocess.run(["ip", *command.split()], check=True)
    os.set_inheritable(tap, True)
    return tap


class Qmp:
    """QEMU's monitor."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self.socket.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.0005)
        self.lines = self.socket.makefile("rw")
        self.lines.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        self.lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.lines.flush()
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                sys.exit(f"QEMU refused {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]


class Machine:
    """One QEMU process."""

    def __init__(self, args, tap, disk, memory=None, state=None):
        self.args, self.memory = args, memory
        machine, accelerator, cpu, extra = ACCELERATORS[args.accelerator]
        path = os.path.join(args.directory, "qmp.sock")
        if os.path.exists(path):
            os.unlink(path)
        size = f"{args.memory_mib}M"
        command = [args.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                   "-machine", machine, "-accel", accelerator, "-cpu", cpu, "-smp", "1", "-m", size,
                   "-global", "migration.send-configuration=off",
                   "-chardev", f"file,id=console,path={args.directory}/console", "-serial", "chardev:console",
                   "-qmp", f"unix:{path},server=on,wait=off",
                   "-blockdev", json.dumps({"driver": "raw", "node-name": "base", "read-only": True,
                                            "file": {"driver": "file", "filename": args.image}}),
                   "-blockdev", json.dumps({"driver": "qcow2", "node-name": "head", "backing": "base",
                                            "discard": "unmap", "file": {"driver": "file", "filename": disk}}),
                   "-device", "virtio-blk-device,drive=head",
                   "-netdev", f"tap,id=net0,fd={tap}", "-device", f"virtio-net-device,netdev=net0,mac={args.mac}",
                   "-device", "virtio-rng-device", "-device", "virtio-balloon-device"]
        if state is None:
            line = COMMAND_LINE + extra.format(khz=tsc_khz()) + f" icebox.token={TOKEN}"
            command += ["-object", f"memory-backend-ram,id=ram,size={size},merge=off,dump=off",
                        "-kernel", args.kernel, "-initrd", args.initramfs, "-append", line]
        else:
            command += ["-object", f"memory-backend-file,id=ram,size={size},mem-path={memory[0]},"
                                   "share=off,readonly=on,rom=off,merge=off,dump=off",
                        "-S", "-incoming", "defer"]
        self.process = subprocess.Popen(command, pass_fds=[tap], stdin=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        self.qmp = Qmp(path)
        if state is not None:
            if memory[1]:
                self.write_pages(memory[1])
            self.qmp("migrate-incoming", uri=f"file:{state}")
            while self.qmp("query-status")["status"] == "inmigrate":
                pass
            self.qmp("cont")

    def ram(self):
        """Address of the guest's memory in the process."""
        if self.memory:
            inode = os.stat(self.memory[0]).st_ino
            with open(f"/proc/{self.process.pid}/maps") as maps:
                for line in maps:
                    fields = line.split()
                    if int(fields[4]) == inode and fields[1] == "rw-p":
                        return int(fields[0].split("-")[0], 16)
        answer = self.qmp("human-monitor-command", **{"command-line": "gpa2hva 0"})
        return int(answer.rsplit(" ", 1)[1], 16)

    def write_pages(self, pages):
        with open(f"/proc/{self.process.pid}/mem", "r+b", buffering=0) as memory:
            start = self.ram()
            for number, page in pages:
                os.pwrite(memory.fileno(), page, start + number * PAGE)

    def save(self, name):
        """Device state and changed pages. Returns times in ms and where everything is."""
        times, clock = {}, time.perf_counter()

        def lap(what):
            nonlocal clock
            now = time.perf_counter()
            times[what], clock = round((now - clock) * 1000, 3), now

        self.qmp("stop")
        lap("stop")
        state = os.path.join(self.args.directory, f"{name}.state")
        self.qmp("xen-save-devices-state", filename=state, live=False)
        lap("deviceState")
        start, total = self.ram(), (self.args.memory_mib << 20) // PAGE
        with open(f"/proc/{self.process.pid}/pagemap", "rb", buffering=0) as pagemap:
            entries = memoryview(os.pread(pagemap.fileno(), total * 8, start // PAGE * 8)).cast("Q")
        changed = [n for n, entry in enumerate(entries) if entry >> 62 and not entry >> 61 & 1]
        lap("findPages")
        base = os.path.join(self.args.directory, f"{name}.memory")
        kept, zero, stored = [], bytes(PAGE), 0
        with open(f"/proc/{self.process.pid}/mem", "rb", buffering=0) as memory, open(base, "wb", buffering=0) as out:
            out.truncate(total * PAGE)
            at = 0
            while at < len(changed):
                end = at + 1
                while end < len(changed) and end - at < 256 and changed[end] == changed[end - 1] + 1:
                    end += 1
                data = os.pread(memory.fileno(), (end - at) * PAGE, start + changed[at] * PAGE)
                for i in range(end - at):
                    page = data[i * PAGE:(i + 1) * PAGE]
                    if self.memory:
                        kept.append((changed[at + i], page))
                    if page != zero:
                        stored += 1
                        os.pwrite(out.fileno(), page, changed[at + i] * PAGE)
                at = end
        lap("writePages")
        times["total"] = round(sum(times.values()), 3)
        for path in (state, base):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        clock, before = time.perf_counter(), clock
        times["durable"] = round(times["total"] + (clock - before) * 1000, 3)
        memory = (self.memory[0], kept) if self.memory else (base, None)
        return {"ms": times, "changedPages": len(changed), "storedPages": stored}, memory, state

    def usage(self):
        """Memory of the process, and of its guest-memory mapping, in KiB."""
        start, found = f"{self.ram():x}-", {}
        with open(f"/proc/{self.process.pid}/smaps") as smaps:
            inside = False
            for line in smaps:
                fields = line.split()
                if "-" in fields[0] and not fields[0].endswith(":"):
                    inside = line.startswith(start)
                elif fields[0] in ("Pss:", "Anonymous:"):
                    key = fields[0][:-1].lower()
                    found[f"process{key.title()}Kib"] = found.get(f"process{key.title()}Kib", 0) + int(fields[1])
                    if inside:
                        found[f"guestMemory{key.title()}Kib"] = int(fields[1])
        return found

    def end(self):
        self.process.kill()
        self.process.wait()


def exec_true():
    """Asks the agent to run `true`. True when it has."""
    body = json.dumps({"process": {"cmd": "/bin/true", "args": [], "envs": {}}, "stdin": False}).encode()
    body = b"\0" + struct.pack(">I", len(body)) + body
    request = (f"POST /process.Process/Start HTTP/1.1\r\nHost: {GUEST}\r\nConnection: close\r\n"
               f"Content-Type: application/connect+json\r\nConnect-Protocol-Version: 1\r\n"
               f"X-Access-Token: {TOKEN}\r\nAuthorization: Basic {base64.b64encode(b'root:').decode()}\r\n"
               f"Content-Length: {len(body)}\r\n\r\n").encode() + body
    try:
        with socket.create_connection((GUEST, AGENT_PORT), timeout=0.2) as connection:
            connection.settimeout(30)
            connection.sendall(request)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
    except OSError:
        return False
    if b" 200 " not in answer.split(b"\r\n", 1)[0]:
        sys.exit(f"the agent refused: {answer[:300]!r}")
    return b'"exited":true' in answer and b'"error"' not in answer


def first_exec(begin, within=120):
    while not exec_true():
        if time.perf_counter() - begin > within:
            sys.exit(f"the guest did not become ready within {within} s")
        time.sleep(0.001)
    return round((time.perf_counter() - begin) * 1000, 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--initramfs", required=True)
    parser.add_argument("--image", required=True, help="root file system, raw; it is not written to")
    parser.add_argument("--memory-mib", type=int, default=512)
    parser.add_argument("--accelerator", choices=sorted(ACCELERATORS), default="tcg")
    parser.add_argument("--mac", default="02:1c:eb:0c:00:01", help="the guest's; what the agent expects")
    parser.add_argument("--boots", type=int, default=3, help="cold boots; the last one is saved")
    parser.add_argument("--rounds", type=int, default=5, help="restores, each followed by a save")
    parser.add_argument("--idle", type=float, default=3.0, help="seconds between a restore and its save")
    parser.add_argument("--qemu", default="qemu-system-x86_64")
    parser.add_argument("--directory", help="where files go; on the same file system as Icebox's data")
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("needs root")
    args.directory = tempfile.mkdtemp(prefix="icebox-floor-", dir=args.directory)
    machine = None
    try:
        tap = make_network()
        size = str(os.stat(args.image).st_size)
        result = {"accelerator": args.accelerator, "memoryMib": args.memory_mib, "boot": {"firstExecMs": []},
                  "restores": []}
        for number in range(args.boots):
            if machine:
                machine.end()
            disk = os.path.join(args.directory, f"head-{number}.qcow2")
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, size], check=True)
            begin = time.perf_counter()
            machine = Machine(args, tap, disk)
            result["boot"]["firstExecMs"].append(first_exec(begin))
        time.sleep(args.idle)
        result["boot"]["usage"] = machine.usage()
        result["boot"]["save"], memory, state = machine.save("boot")
        machine.end()
        for number in range(args.rounds):
            begin = time.perf_counter()
            machine = Machine(args, tap, disk, memory, state)
            running = round((time.perf_counter() - begin) * 1000, 3)
            ready = first_exec(begin)
            time.sleep(args.idle)
            entry = {"runningMs": running, "firstExecMs": ready, "usage": machine.usage()}
            entry["save"], memory, state = machine.save(f"round-{number}")
            result["restores"].append(entry)
            machine.end()
        json.dump(result, sys.stdout, indent=2)
        print()
    finally:
        if machine and machine.process.poll() is None:
            machine.end()
        shutil.rmtree(args.directory)


if __name__ == "__main__":
    main()
