# Three commands are all there is to know:
#   make demo        installs what is missing, builds, and runs the main job on real input
#   make test        installs what is missing, and passes every test
#   make test-host   the tests that need a kernel with device-mapper, ZFS and KVM, in a virtual Debian
# All need root, Debian 12 or newer, and its package registries. None needs working KVM.

SHELL := /bin/bash
TRIPLE := x86_64-unknown-linux-gnu
export PATH := $(HOME)/.cargo/bin:$(PATH)

.PHONY: demo test test-host bench build agent setup install clean

demo: build
	demo/run

test: setup
	cargo xtask check

test-host: setup
	cargo xtask test-host

bench: build
	cargo xtask bench

build: setup agent
	cargo build --release --package icebox
	install -m 755 target/$(TRIPLE)/agent/icebox-agent target/release/icebox-agent

agent: setup
	cargo xtask agent

setup:
	scripts/setup

install: build
	install -D -m 755 target/release/icebox /usr/bin/icebox
	install -D -m 755 target/release/icebox-agent /usr/lib/icebox/icebox-agent
	install -D -m 644 docs/icebox.toml /etc/icebox/icebox.toml.example

clean:
	cargo clean
