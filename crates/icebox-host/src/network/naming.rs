//! Names and addresses of a slot: pure functions of the installation, the prefix and the slot number.
//!
//! That a name can be computed is what lets a process that never set a slot up find it and remove it.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use icebox_engine::id::Slot;
use ipnet::Ipv4Net;

use crate::instance::Instance;

/// The tap device's name in every namespace.
pub const TAP: &str = "tap0";
/// The namespace's end of the link to the host.
pub(super) const UPLINK: &str = "eth0";
/// The guest's address in every sandbox, so that forks and restores need no reconfiguration in the guest.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The guest's gateway in every sandbox: the namespace's address on the tap.
pub const GUEST_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// Prefix length of both.
pub const GUEST_PREFIX_LEN: u8 = 30;
/// The guest's MAC address in every sandbox (locally administered).
pub const GUEST_MAC: [u8; 6] = [0x02, 0x1c, 0xeb, 0x0c, 0x00, 0x01];
/// The tap's MAC address in every sandbox: a restored guest has it in its neighbour table already.
pub(super) const TAP_MAC: [u8; 6] = [0x02, 0x1c, 0xeb, 0x0c, 0x00, 0x02];

/// The names and addresses of all slots of one installation.
///
/// ```text
/// slot n   namespace  <dir>/ibx<tag>-<n>          link on the host  ibx<tag>-<n>
///          addresses  a /31 (RFC 3021) of the prefix: first + 2n on the host, first + 2n + 1 the slot's own
/// ```
#[derive(Clone, Debug)]
pub(super) struct Naming {
    stem: String,
    table: String,
    prefix: Ipv4Net,
    directory: PathBuf,
}

/// One slot's names and addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SlotNames {
    pub(super) name: String,
    pub(super) namespace: PathBuf,
    /// The host's end of the link.
    pub(super) gateway: Ipv4Addr,
    /// The slot's own address: what the host uses to reach the guest.
    pub(super) address: Ipv4Addr,
}

impl Naming {
    pub(super) fn new(instance: &Instance, prefix: Ipv4Net, directory: &Path) -> Self {
        Self {
            stem: format!("ibx{instance}-"),
            table: format!("icebox_{instance}"),
            prefix: prefix.trunc(),
            directory: directory.to_owned(),
        }
    }

    /// What the names of all links and namespaces of this installation begin with, and no other's.
    pub(super) fn stem(&self) -> &str {
        &self.stem
    }

    /// The nftables table on the host.
    pub(super) fn table(&self) -> &str {
        &self.table
    }

    pub(super) fn prefix(&self) -> Ipv4Net {
        self.prefix
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// How many slots the prefix has room for: two addresses each, and at most what a slot number can count.
    pub(super) fn capacity(&self) -> u16 {
        let host_bits = u32::from(32 - self.prefix.prefix_len());
        let pairs = (1_u64 << host_bits) / 2;
        u16::try_from(pairs).unwrap_or(u16::MAX)
    }

    /// The name of the slot's namespace and of its link on the host: at most 15 characters, the kernel's limit for
    /// links. Defined for every number, so that what a wider prefix once had room for can still be removed.
    pub(super) fn name(&self, slot: Slot) -> String {
        format!("{}{slot}", self.stem)
    }

    /// Where the slot's namespace is published.
    pub(super) fn namespace(&self, slot: Slot) -> PathBuf {
        self.directory.join(self.name(slot))
    }

    /// The slot that a link or namespace of this name belongs to, if it is exactly one of ours.
    pub(super) fn parse(&self, name: &str) -> Option<Slot> {
        let slot = Slot(name.strip_prefix(&self.stem)?.parse().ok()?);
        // "+7" and "007" are not names we make.
        (self.name(slot) == name).then_some(slot)
    }

    /// The names and addresses of `slot`, or nothing when the prefix has no room for it (INV-47).
    pub(super) fn slot(&self, slot: Slot) -> Option<SlotNames> {
        if slot.0 >= self.capacity() {
            return None;
        }
        let gateway = u32::from(self.prefix.network()) + 2 * u32::from(slot.0);
        Some(SlotNames {
            name: self.name(slot),
            namespace: self.namespace(slot),
            gateway: Ipv4Addr::from(gateway),
            address: Ipv4Addr::from(gateway + 1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn naming(prefix: &str) -> Naming {
        Naming::new(
            &Instance::of_data_directory(Path::new("/var/lib/icebox")),
            prefix.parse().unwrap(),
            Path::new("/run/netns"),
        )
    }

    #[test]
    fn inv_47_slots_never_wrap_and_never_share() {
        for (prefix, capacity) in [
            ("10.213.0.0/16", 32768),
            ("10.213.0.0/24", 128),
            ("10.0.0.0/8", 65535),
            ("192.168.7.4/30", 2),
            ("192.168.7.4/31", 1),
            ("192.168.7.4/32", 0),
        ] {
            let naming = naming(prefix);
            assert_eq!(naming.capacity(), capacity, "{prefix}");
            assert_eq!(naming.slot(Slot(capacity)), None, "{prefix}");
            let (mut names, mut addresses) = (HashSet::new(), HashSet::new());
            for n in 0..capacity {
                let slot = naming.slot(Slot(n)).unwrap();
                assert!(slot.name.len() <= 15, "{}", slot.name);
                assert!(naming.prefix().contains(&slot.gateway));
                assert!(naming.prefix().contains(&slot.address));
                assert_eq!(naming.parse(&slot.name), Some(Slot(n)));
                assert!(names.insert(slot.name));
                assert!(addresses.insert(slot.gateway));
                assert!(addresses.insert(slot.address));
            }
        }
    }

    #[test]
    fn inv_48_only_exactly_our_names_are_ours() {
        let ours = naming("10.213.0.0/16");
        let stem = ours.stem();
        for foreign in [
            "eth0".to_owned(),
            stem.to_owned(),
            format!("{stem}x"),
            format!("{stem}+1"),
            format!("{stem}01"),
            format!("{stem}65536"),
            format!("{stem}99999999"),
            format!("x{stem}1"),
            "ibx000000-1".to_owned(),
        ] {
            assert_eq!(ours.parse(&foreign), None, "{foreign}");
        }
    }

    #[test]
    fn a_slot_keeps_its_address() {
        let slot = naming("10.213.0.0/16").slot(Slot(300)).unwrap();
        assert_eq!(slot.gateway, Ipv4Addr::new(10, 213, 2, 88));
        assert_eq!(slot.address, Ipv4Addr::new(10, 213, 2, 89));
        assert_eq!(slot.name, "ibx1596b0-300");
    }
}
