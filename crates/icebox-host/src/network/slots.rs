//! Setting slots up and taking them down: the steps, in order, and their undoing. Everything here blocks.
//!
//! A slot is set up from a *spare*: a namespace in which everything is done that does not depend on the slot's number.
//!
//! ```text
//!   spare   namespace · sysctls · tap, its address, the guest as neighbour · rules        ~ms, off the hot path
//!   slot    link (both ends up) · host address, route · slot address, route · publish     rtnetlink and one mount
//! ```
//!
//! Publishing is the commit point: before it nothing but this process holds the namespace, so a kill -9 at any step
//! leaves at most an empty file, and the kernel removes namespace, tap and link. After it the slot is whole, so one
//! that is found published is only checked and completed, never rebuilt under a running VMM.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Mutex;

use icebox_engine::host::{Egress, Removed};
use icebox_engine::id::Slot;
use ipnet::Ipv4Net;
use rustix::io::Errno;

use super::error::{Cause, Failure, NetworkError, Step};
use super::namespace::{self, Namespace};
use super::naming::{
    GUEST_ADDRESS, GUEST_GATEWAY, GUEST_MAC, GUEST_PREFIX_LEN, Naming, SlotNames, TAP, TAP_MAC,
    UPLINK,
};
use super::netlink::{self, Link, Netlink};
use super::rules;
use super::sys;

const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
/// IPv6 is dropped by the rules; switching it off as well keeps the kernel from talking on its own (router
/// solicitations, duplicate address detection). A kernel without IPv6 has no such file.
const DISABLE_IPV6: [&str; 2] = [
    "/proc/sys/net/ipv6/conf/all/disable_ipv6",
    "/proc/sys/net/ipv6/conf/default/disable_ipv6",
];
/// Routes this wide are default routes in disguise (VPNs split the default route into halves), not somebody's network.
const WIDEST_NETWORK: u8 = 7;
/// Two slots may share a lock; one slot never has two.
const LOCKS: usize = 64;

/// A namespace ready to be given to a slot. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Spare {
    namespace: Namespace,
    netlink: Netlink,
}

/// Called before each step, and once more when the last has succeeded. A fault injected here is one of the step.
pub(super) type Hook = Box<dyn Fn(Option<Step>) -> io::Result<()> + Send + Sync>;

pub(super) struct Slots {
    naming: Naming,
    locks: [Mutex<()>; LOCKS],
    hook: Hook,
}

impl Slots {
    pub(super) fn new(naming: Naming, hook: Hook) -> Self {
        Self {
            naming,
            locks: std::array::from_fn(|_| Mutex::new(())),
            hook,
        }
    }

    pub(super) fn naming(&self) -> &Naming {
        &self.naming
    }

    pub(super) fn names(&self, slot: Slot) -> Result<SlotNames, NetworkError> {
        self.naming.slot(slot).ok_or(NetworkError::OutOfRange {
            slot,
            prefix: self.naming.prefix(),
            capacity: self.naming.capacity(),
        })
    }

    /// Makes a spare. If any step fails, the namespace goes with its last descriptor, and all that is in it.
    pub(super) fn prepare(&self) -> Result<Spare, Failure> {
        (self.hook)(Some(Step::Namespace))?;
        let (namespace, netlink) = Namespace::create(|| -> Result<Netlink, Failure> {
            self.step(Step::Sysctls, || {
                fs::write(IP_FORWARD, "1")?;
                for path in DISABLE_IPV6 {
                    match fs::write(path, "1") {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => {
                            return Err(error.into());
                        }
                        _ => {}
                    }
                }
                Ok(())
            })?;
            let (mut netlink, tap) = self.step(Step::Tap, || {
                let tap = sys::attach_tap(TAP)?;
                sys::persist_tap(&tap)?;
                drop(tap);
                let mut netlink = Netlink::open()?;
                let tap = existing(netlink.link(TAP)?)?;
                netlink.set_link(tap.index, Some(TAP_MAC), None)?;
                Ok((netlink, tap.index))
            })?;
            self.step(Step::TapAddress, || {
                netlink.add_address(tap, GUEST_GATEWAY, GUEST_PREFIX_LEN)?;
                Ok(netlink.add_route(tap, guest_network()?, None, Some(GUEST_GATEWAY))?)
            })?;
            self.step(Step::Neighbour, || {
                // Nobody has to ask: a guest that is not up yet would cost the first connection a second.
                Ok(netlink.add_neighbour(tap, GUEST_ADDRESS, GUEST_MAC)?)
            })?;
            self.step(Step::SlotRules, || Ok(rules::apply_slot(&self.naming)?))?;
            Ok(netlink)
        })?;
        Ok(Spare { namespace, netlink })
    }

    /// Ensures that `slot` is set up with exactly this policy. `spare` is called if a namespace is needed.
    pub(super) fn ensure(
        &self,
        slot: Slot,
        egress: Egress,
        spare: impl FnOnce() -> Result<Spare, Failure>,
    ) -> Result<SlotNames, NetworkError> {
        let names = self.names(slot)?;
        let _lock = self.lock(slot);
        let mut undo = Vec::new();
        match self.set_up(&names, egress, spare, &mut undo) {
            Ok(()) => Ok(names),
            Err(failure) => {
                let unwind = undo
                    .into_iter()
                    .rev()
                    .filter_map(|step| self.undo(&names, step).err())
                    .collect();
                Err(NetworkError::SetUp {
                    slot,
                    failure,
                    unwind,
                })
            }
        }
    }

    /// `undo` receives what this call made, so that a failure takes away nothing that was there before.
    fn set_up(
        &self,
        names: &SlotNames,
        egress: Egress,
        spare: impl FnOnce() -> Result<Spare, Failure>,
        undo: &mut Vec<Step>,
    ) -> Result<(), Failure> {
        let group = match egress {
            Egress::Deny => 0,
            Egress::Internet => {
                self.step(Step::Forwarding, || Ok(switch_forwarding_on()?))?;
                rules::EGRESS_GROUP
            }
        };
        let published = Namespace::open(&names.namespace).map_err(|source| Failure {
            step: Step::Publish,
            cause: source.into(),
        })?;
        let is_published = published.is_some();
        let (namespace, mut inside) = match published {
            Some(namespace) => {
                let netlink = namespace.run(Netlink::open)?;
                (namespace, netlink)
            }
            None => {
                let Spare { namespace, netlink } = spare()?;
                (namespace, netlink)
            }
        };
        let mut host = Netlink::open()?;

        let (link, uplink) = self.step(Step::Link, || {
            if inside.link(UPLINK)?.is_none() {
                // A link of this name on the host leads to a namespace that nothing publishes: a stray.
                host.delete_link(&names.name)?;
                undo.push(Step::Link);
                host.add_veth(&names.name, group, UPLINK, namespace.as_fd())?;
            }
            let mut link = existing(host.link(&names.name)?)?;
            let mut uplink = existing(inside.link(UPLINK)?)?;
            if link.group != group || !link.up {
                host.set_link(link.index, None, Some(group))?;
                link = existing(host.link(&names.name)?)?;
            }
            if !uplink.up {
                inside.set_link(uplink.index, None, None)?;
                // Not for what they say: asking for a link makes the kernel (6.8) finish bringing it up, where a packet
                // sent before would be dropped and repeated a second later.
                uplink = existing(inside.link(UPLINK)?)?;
                link = existing(host.link(&names.name)?)?;
            }
            Ok((link.index, uplink.index))
        })?;
        self.step(Step::LinkForwarding, || {
            // On this link alone: what comes out of it then reaches the rules that refuse it aloud, where a host that
            // forwards nothing would drop it in silence.
            let file = format!("/proc/sys/net/ipv4/conf/{}/forwarding", names.name);
            Ok(fs::write(file, "1")?)
        })?;
        self.step(Step::GatewayAddress, || {
            Ok(host.add_address(link, names.gateway, 32)?)
        })?;
        self.step(Step::HostRoute, || {
            let slot = Ipv4Net::from(names.address);
            match host.add_route(link, slot, None, Some(names.gateway)) {
                Err(error) if netlink::is(&error, Errno::EXIST) => {
                    match owner_of(&mut host, slot, link)? {
                        None => Ok(()),
                        Some(by) => Err(Cause::AddressTaken {
                            destination: slot,
                            by,
                        }),
                    }
                }
                result => Ok(result?),
            }
        })?;
        self.step(Step::SlotAddress, || {
            Ok(inside.add_address(uplink, names.address, 32)?)
        })?;
        self.step(Step::SlotRoute, || {
            let gateway = Ipv4Net::from(names.gateway);
            unless_exists(inside.add_route(uplink, gateway, None, None))?;
            let everywhere = Ipv4Net::default();
            let route = inside.add_route(uplink, everywhere, Some(names.gateway), None);
            Ok(unless_exists(route)?)
        })?;
        if !is_published {
            self.step(Step::Publish, || {
                undo.push(Step::Publish);
                Ok(namespace.publish(&names.namespace)?)
            })?;
        }
        (self.hook)(None).map_err(|source| Failure {
            step: Step::Publish,
            cause: source.into(),
        })
    }

    fn undo(&self, names: &SlotNames, step: Step) -> Result<(), Failure> {
        match step {
            Step::Publish => {
                let unpublished = self.unpublish(&names.namespace);
                let unlinked = self.unlink(&names.namespace);
                unpublished.and(unlinked).map(drop)
            }
            // Addresses and routes go with the link, all else with the namespace.
            _ => self.delete_link(&names.name).map(drop),
        }
    }

    /// Ensures that nothing of `slot` is on the host. Tries every step, whatever fails.
    pub(super) fn release(&self, slot: Slot) -> Result<Removed, NetworkError> {
        let _lock = self.lock(slot);
        let namespace = self.naming.namespace(slot);
        let mut removed = Removed::AlreadyAbsent;
        let mut failures = Vec::new();
        // The link first: what is still running in there is cut off from that moment.
        for result in [
            self.delete_link(&self.naming.name(slot)),
            self.unpublish(&namespace),
            self.unlink(&namespace),
        ] {
            match result {
                Ok(true) => removed = Removed::Removed,
                Ok(false) => {}
                Err(failure) => failures.push(failure),
            }
        }
        if failures.is_empty() {
            Ok(removed)
        } else {
            Err(NetworkError::TakeDown { slot, failures })
        }
    }

    fn delete_link(&self, name: &str) -> Result<bool, Failure> {
        self.step(Step::DeleteLink, || Ok(Netlink::open()?.delete_link(name)?))
    }

    fn unpublish(&self, namespace: &Path) -> Result<bool, Failure> {
        self.step(Step::Unpublish, || Ok(namespace::unbind(namespace)?))
    }

    fn unlink(&self, namespace: &Path) -> Result<bool, Failure> {
        self.step(Step::Unlink, || Ok(namespace::unlink(namespace)?))
    }

    /// Slots that have a link, a namespace or a file on the host, in order.
    pub(super) fn list(&self) -> Result<Vec<Slot>, NetworkError> {
        let mut slots: Vec<Slot> = self
            .links()
            .and_then(|links| Ok((links, self.files()?)))
            .map(|(links, files)| links.into_iter().chain(files).collect())
            .map_err(NetworkError::List)?;
        slots.sort_unstable();
        slots.dedup();
        Ok(slots)
    }

    fn links(&self) -> io::Result<Vec<Slot>> {
        let links = Netlink::open()?.links()?;
        Ok(links
            .iter()
            .filter_map(|link| self.naming.parse(&link.name))
            .collect())
    }

    fn files(&self) -> io::Result<Vec<Slot>> {
        let entries = match fs::read_dir(self.naming.directory()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        entries
            .map(|entry| Ok(self.naming.parse(&entry?.file_name().to_string_lossy())))
            .filter_map(Result::transpose)
            .collect()
    }

    /// Refuses a prefix that this host routes elsewhere already.
    pub(super) fn check_prefix(&self) -> Result<(), NetworkError> {
        let prefix = self.naming.prefix();
        let mut host = Netlink::open().map_err(NetworkError::Look)?;
        let links = host.links().map_err(NetworkError::Look)?;
        for route in host.routes().map_err(NetworkError::Look)? {
            let other = route.destination;
            let overlaps = prefix.contains(&other) || other.contains(&prefix);
            if !overlaps || other.prefix_len() <= WIDEST_NETWORK {
                continue;
            }
            let by = link_name(&links, route.link);
            if self.naming.parse(&by).is_none() {
                return Err(NetworkError::PrefixTaken { prefix, other, by });
            }
        }
        Ok(())
    }

    fn step<T>(&self, step: Step, effect: impl FnOnce() -> Result<T, Cause>) -> Result<T, Failure> {
        let fail = |cause| Failure { step, cause };
        (self.hook)(Some(step)).map_err(|error| fail(error.into()))?;
        effect().map_err(fail)
    }

    fn lock(&self, slot: Slot) -> std::sync::MutexGuard<'_, ()> {
        let lock = &self.locks[usize::from(slot.0) % LOCKS];
        // The lock guards no data that a panic could have left half-changed.
        lock.lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Switches forwarding between interfaces on. Never off again (INV-48): others may have come to rely on it.
fn switch_forwarding_on() -> io::Result<()> {
    if fs::read_to_string(IP_FORWARD)?.trim() == "0" {
        fs::write(IP_FORWARD, "1")?;
        tracing::warn!(
            "switched net.ipv4.ip_forward on, which sandboxes with internet access need; it stays on"
        );
    }
    Ok(())
}

/// Whose route to `destination` is in the way of ours over `link`; nobody's, if it is ours.
fn owner_of(host: &mut Netlink, destination: Ipv4Net, link: u32) -> io::Result<Option<String>> {
    let routes = host.routes()?;
    let mut theirs = routes
        .iter()
        .filter(|route| route.destination == destination);
    match theirs.find(|route| route.link != Some(link)) {
        None => Ok(None),
        Some(route) => Ok(Some(link_name(&host.links()?, route.link))),
    }
}

fn link_name(links: &[Link], index: Option<u32>) -> String {
    links
        .iter()
        .find(|link| Some(link.index) == index)
        .map_or_else(|| "no interface".to_owned(), |link| link.name.clone())
}

fn existing(link: Option<Link>) -> io::Result<Link> {
    link.ok_or_else(|| Errno::NODEV.into())
}

fn unless_exists(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if netlink::is(&error, Errno::EXIST) => Ok(()),
        result => result,
    }
}

fn guest_network() -> io::Result<Ipv4Net> {
    Ipv4Net::new(GUEST_GATEWAY, GUEST_PREFIX_LEN)
        .map(|network| network.trunc())
        .map_err(io::Error::other)
}
