"""A small database server: loads a real table into memory, and answers SQL over TCP, one statement per line.

The table is what Debian says about the packages that this very system is made of (/var/lib/dpkg/status).
"""
import json
import os
import socketserver
import sqlite3
import time

STATUS = "/var/lib/dpkg/status"
PORT = 5432
BORN = time.monotonic()


def packages():
    """Yields (name, version, section, KiB) for each installed package."""
    fields = {}
    with open(STATUS, encoding="utf-8") as status:
        for line in status:
            if line == "\n":
                if "Installed-Size" in fields:
                    yield (fields["Package"], fields["Version"], fields["Section"], int(fields["Installed-Size"]))
                fields = {}
            elif not line[0].isspace():
                key, _, value = line.partition(":")
                fields[key] = value.strip()


database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
database.execute("create table packages (name text, version text, section text, kib integer)")
database.executemany("insert into packages values (?, ?, ?, ?)", packages())
database.create_function("pid", 0, os.getpid)
database.create_function("seconds_alive", 0, lambda: int(time.monotonic() - BORN))
database.create_function("now", 0, lambda: int(time.time()))
database.create_function("machine_id", 0, lambda: open("/etc/machine-id", encoding="ascii").read().strip())


class Session(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            try:
                answer = database.execute(line.decode()).fetchall()
            except sqlite3.Error as error:
                answer = [[f"error: {error}"]]
            self.wfile.write("".join("|".join(map(str, row)) + "\n" for row in answer).encode() + b"\n")


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


with Server(("0.0.0.0", PORT), Session) as server:
    print(f"serving {database.execute('select count(*) from packages').fetchone()[0]} packages on port {PORT}", flush=True)
    server.serve_forever()
