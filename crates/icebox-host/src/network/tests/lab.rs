//! A host to experiment on, guests and an internet: all of them namespaces.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use icebox_engine::host::SlotNetwork;
use ipnet::Ipv4Net;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tempfile::TempDir;

use super::super::namespace::{self, Namespace};
use super::super::netlink::Netlink;
use super::super::slots::Hook;
use super::super::{
    GUEST_ADDRESS, GUEST_GATEWAY, GUEST_MAC, GUEST_PREFIX_LEN, NetworkConfig, NetworkSlots,
    open_tap, sys,
};
use crate::instance::Instance;
use crate::skip::skip_this;

/// How long a connection that must come about is tried. It takes well under a millisecond; but the first packet over a
/// link that has just come up may be lost, and is repeated after a second.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection is tried before it counts as refused by the rules, some of which drop and do not answer.
pub(super) const DOUBT: Duration = Duration::from_millis(400);
/// Where the stand-in for the internet is reached: public by every registry, and routed only inside the lab.
pub(super) const INTERNET: Ipv4Addr = Ipv4Addr::new(11, 1, 1, 1);

/// The network namespace of the calling thread, acting as a host's.
pub(super) struct Lab {
    directory: TempDir,
    runtime: tokio::runtime::Runtime,
    before: BTreeSet<String>,
}

/// Runs `test` in a lab, then requires that the lab's host is as it was. Needs root, and says so where it is missing.
pub(super) fn in_lab(test: impl FnOnce(&mut Lab) + Send) {
    if !rustix::process::geteuid().is_root() {
        skip_this("network namespaces need root");
        return;
    }
    thread::scope(|scope| {
        let lab = scope.spawn(|| {
            sys::unshare_network().expect("a namespace of its own");
            let mut host = Netlink::open().unwrap();
            let loopback = host.link("lo").unwrap().unwrap();
            host.set_link(loopback.index, None, None).unwrap();
            let mut lab = Lab {
                directory: tempfile::tempdir().unwrap(),
                // Its blocking threads are started from this one, so they are in the lab's namespace too.
                runtime: tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap(),
                before: BTreeSet::new(),
            };
            lab.before = lab.inventory();
            test(&mut lab);
            let after = lab.inventory();
            let leaked: Vec<_> = after.difference(&lab.before).collect();
            let lost: Vec<_> = lab.before.difference(&after).collect();
            assert!(leaked.is_empty(), "left on the host: {leaked:#?}");
            assert!(lost.is_empty(), "taken from the host: {lost:#?}");
        });
        if let Err(panic) = lab.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

impl Lab {
    pub(super) fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(super) fn config(&self, pool_size: usize) -> NetworkConfig {
        config(self.directory(), pool_size)
    }

    pub(super) fn open(&self, pool_size: usize) -> NetworkSlots {
        self.open_with(pool_size, Box::new(|_| Ok(())))
    }

    pub(super) fn open_with(&self, pool_size: usize, hook: Hook) -> NetworkSlots {
        NetworkSlots::open_with(&self.config(pool_size), hook).expect("network slots")
    }

    /// Everything of the host that a slot could leave behind: links, addresses, routes, rules, files, mounts.
    pub(super) fn inventory(&self) -> BTreeSet<String> {
        let mut host = Netlink::open().unwrap();
        let links = host.links().unwrap();
        let mut all: BTreeSet<String> = links
            .iter()
            .map(|link| format!("link {} group {}", link.name, link.group))
            .collect();
        for route in host.routes().unwrap() {
            let link = links.iter().find(|link| Some(link.index) == route.link);
            let name = link.map_or("-", |link| link.name.as_str());
            all.insert(format!("route {} dev {name}", route.destination));
        }
        let rules = Command::new("nft").args(["list", "ruleset"]).output();
        let rules = String::from_utf8(rules.unwrap().stdout).unwrap();
        all.extend(rules.lines().map(|line| format!("rule {}", line.trim())));
        for entry in std::fs::read_dir(self.directory()).unwrap() {
            all.insert(format!("file {}", entry.unwrap().path().display()));
        }
        let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let directory = self.directory().to_str().unwrap();
        all.extend(
            mounts
                .lines()
                .filter(|line| line.contains(directory))
                .map(|line| format!("mount {line}")),
        );
        all
    }
}

impl Drop for Lab {
    /// A test that failed must not leave mounts on the machine; one that passed left nothing.
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.directory()).unwrap() {
            let path = entry.unwrap().path();
            namespace::unbind(&path).unwrap();
        }
    }
}

/// The configuration of the installation in `directory`.
pub(super) fn config(directory: &Path, pool_size: usize) -> NetworkConfig {
    NetworkConfig {
        directory: directory.to_owned(),
        pool_size,
        ..NetworkConfig::new(Instance::of_data_directory(directory))
    }
}

/// Another network that is wired to the lab's host.
pub(super) struct Elsewhere(Namespace);

impl Elsewhere {
    /// A network with the address `own`, linked to the host by `link`, where the host has the address `host`.
    pub(super) fn new(link: &str, host_address: Ipv4Addr, own: Ipv4Addr) -> Self {
        let (namespace, mut inside) = Namespace::create(Netlink::open).unwrap();
        let mut host = Netlink::open().unwrap();
        host.add_veth(link, 0, "far", std::os::fd::AsFd::as_fd(&namespace))
            .unwrap();
        let near = host.link(link).unwrap().unwrap().index;
        let far = inside.link("far").unwrap().unwrap().index;
        inside.set_link(far, None, None).unwrap();
        // Asking makes the kernel finish bringing both ends up.
        for (netlink, name) in [(&mut host, link), (&mut inside, "far")] {
            netlink.link(name).unwrap().unwrap();
        }
        host.add_address(near, host_address, 32).unwrap();
        host.add_route(near, own.into(), None, Some(host_address))
            .unwrap();
        inside.add_address(far, own, 32).unwrap();
        inside
            .add_route(far, host_address.into(), None, Some(own))
            .unwrap();
        Self(namespace)
    }

    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> T {
        self.0.run(work).unwrap()
    }

    /// Takes the link away, so that the host is as before.
    pub(super) fn remove(self, link: &str) {
        assert!(Netlink::open().unwrap().delete_link(link).unwrap());
    }
}

/// A guest: a whole network stack of its own behind the slot's tap, as a VMM would put one there.
pub(super) struct Guest {
    namespace: Namespace,
    card: Arc<File>,
    pump: Option<(OwnedFd, JoinHandle<()>)>,
}

impl Guest {
    pub(super) fn boot(slot: &SlotNetwork) -> Self {
        let (namespace, card) = Namespace::create(|| -> io::Result<File> {
            let tap = sys::attach_tap("eth0")?;
            let mut netlink = Netlink::open()?;
            let link = netlink.link("eth0")?.unwrap().index;
            netlink.set_link(link, Some(GUEST_MAC), None)?;
            let loopback = netlink.link("lo")?.unwrap().index;
            netlink.set_link(loopback, None, None)?;
            netlink.add_address(link, GUEST_ADDRESS, GUEST_PREFIX_LEN)?;
            let network = Ipv4Net::new(GUEST_GATEWAY, GUEST_PREFIX_LEN).unwrap();
            netlink.add_route(link, network.trunc(), None, Some(GUEST_ADDRESS))?;
            netlink.add_route(link, Ipv4Net::default(), Some(GUEST_GATEWAY), None)?;
            Ok(tap)
        })
        .unwrap();
        let mut guest = Self {
            namespace,
            card: Arc::new(card),
            pump: None,
        };
        guest.plug_in(slot);
        guest
    }

    /// Connects the guest to a slot: what a VMM does that restores it.
    pub(super) fn plug_in(&mut self, slot: &SlotNetwork) {
        let tap = File::from(open_tap(&slot.namespace, &slot.tap).unwrap());
        let card = Arc::clone(&self.card);
        let (stopped, stop) = rustix::pipe::pipe().unwrap();
        let pump = thread::spawn(move || carry(&tap, &card, &stopped));
        self.pump = Some((stop, pump));
    }

    /// Disconnects the guest, which keeps all its connections in mind: what a pause does.
    pub(super) fn unplug(&mut self) {
        if let Some((stop, pump)) = self.pump.take() {
            drop(stop);
            pump.join().expect("the pump");
        }
    }

    pub(super) fn run<T: Send>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        self.namespace.run(work)
    }

    /// Answers every connection to `port` with `answer` until it is dropped.
    pub(super) fn serve(&self, port: u16, answer: &'static str) -> Service {
        let listener = self.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)));
        Service::start(listener.unwrap(), answer)
    }

    /// What the service at `to` answers to the guest.
    pub(super) fn ask(&self, to: SocketAddrV4) -> String {
        self.run(|| Ok(ask(to))).unwrap()
    }

    /// Whether the guest cannot connect to `to`.
    pub(super) fn is_refused(&self, to: SocketAddrV4) -> bool {
        self.run(|| Ok(is_refused(to))).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.unplug();
    }
}

/// Carries frames between two taps until the other end of `stopped` is closed.
fn carry(outer: &File, inner: &File, stopped: &OwnedFd) {
    let mut frame = vec![0; 70_000];
    loop {
        let mut ready = [
            PollFd::new(outer, PollFlags::IN),
            PollFd::new(inner, PollFlags::IN),
            PollFd::new(stopped, PollFlags::IN),
        ];
        poll(&mut ready, None).unwrap();
        if !ready[2].revents().is_empty() {
            return;
        }
        for (mut from, mut to) in [(outer, inner), (inner, outer)] {
            loop {
                match from.read(&mut frame) {
                    Ok(length) => to.write_all(&frame[..length]).unwrap(),
                    Err(error) if error.raw_os_error() == Some(Errno::AGAIN.raw_os_error()) => {
                        break;
                    }
                    Err(error) => panic!("a tap failed: {error}"),
                }
            }
        }
    }
}

/// Says one thing to everybody who connects.
pub(super) struct Service {
    address: SocketAddr,
    listener: TcpListener,
    worker: Option<JoinHandle<()>>,
}

impl Service {
    pub(super) fn start(listener: TcpListener, answer: &'static str) -> Self {
        let address = listener.local_addr().unwrap();
        let accepting = listener.try_clone().unwrap();
        let worker = thread::spawn(move || {
            // Ends when the listener is shut down.
            while let Ok((mut connection, _)) = accepting.accept() {
                connection.write_all(answer.as_bytes()).ok();
            }
        });
        Self {
            address,
            listener,
            worker: Some(worker),
        }
    }

    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both).unwrap();
        self.worker.take().unwrap().join().unwrap();
    }
}

/// What the service at `to` answers to the calling thread's namespace.
pub(super) fn ask(to: SocketAddrV4) -> String {
    let mut connection = TcpStream::connect_timeout(&to.into(), PATIENCE)
        .unwrap_or_else(|error| panic!("connect to {to}: {error}"));
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    answer
}

/// Whether the calling thread's namespace cannot connect to `to`.
pub(super) fn is_refused(to: SocketAddrV4) -> bool {
    TcpStream::connect_timeout(&to.into(), DOUBT).is_err()
}
