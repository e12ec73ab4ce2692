//! Closes the TCP connections that a restored guest remembers and nobody else does.
//!
//! The other ends of connections from before a capture are gone, or belong to the sandbox that was captured. Left
//! alone they would hang until a time-out, and several forks would speak for one connection. The kernel closes them
//! as if reset (`SOCK_DESTROY`); programs get an error at once and connect anew. Connections between two programs of
//! the guest have both ends in the snapshot and stay.
//!
//! Layouts are those of linux/inet_diag.h. It needs the modules `inet_diag` and `tcp_diag`, and
//! `CONFIG_INET_DIAG_DESTROY`, which Debian's kernels have.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use rustix::net::{AddressFamily, netlink::SOCK_DIAG};

use crate::netlink::{Message, Netlink};

/// `SOCK_DIAG_BY_FAMILY`
const LIST: u16 = 20;
/// `SOCK_DESTROY`
const DESTROY: u16 = 21;
/// `IPPROTO_TCP`
const TCP: u8 = 6;
/// Bits of the states of a connection that has two ends: all but TIME_WAIT (6), CLOSE (7) and LISTEN (10).
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

/// Length of `struct inet_diag_sockid`, and where it is in `struct inet_diag_msg`.
const ID_LEN: usize = 48;
const ID_OFFSET: usize = 4;

/// One connection as the kernel names it.
#[derive(Clone, Copy)]
struct Connection {
    family: u8,
    id: [u8; ID_LEN],
}

impl Connection {
    fn parse(entry: &[u8]) -> Option<Self> {
        let id = entry.get(ID_OFFSET..ID_OFFSET + ID_LEN)?.try_into().ok()?;
        Some(Self {
            family: *entry.first()?,
            id,
        })
    }

    fn local(&self) -> SocketAddr {
        SocketAddr::new(self.address(4), self.port(0))
    }

    fn remote(&self) -> SocketAddr {
        SocketAddr::new(self.address(20), self.port(2))
    }

    fn port(&self, offset: usize) -> u16 {
        u16::from_be_bytes([self.id[offset], self.id[offset + 1]])
    }

    fn address(&self, offset: usize) -> IpAddr {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.id[offset..offset + 16]);
        if u16::from(self.family) == AddressFamily::INET.as_raw() {
            IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))
        } else {
            Ipv6Addr::from(bytes).to_canonical()
        }
    }

    /// Whether both ends are in this guest.
    fn is_internal(&self) -> bool {
        self.remote().ip().is_loopback() || self.remote().ip() == self.local().ip()
    }
}

/// `struct inet_diag_req_v2`
fn request(kind: u16, family: u8, states: u32, id: &[u8; ID_LEN]) -> Message {
    let mut payload = vec![family, TCP, 0, 0];
    payload.extend_from_slice(&states.to_ne_bytes());
    payload.extend_from_slice(id);
    Message::new(kind, 0, payload)
}

/// Closes every connection to another machine but the one from `except`. Returns how many.
pub(super) fn close_external(except: SocketAddr) -> io::Result<u32> {
    let netlink = Netlink::open(Some(SOCK_DIAG))?;
    let mut connections = Vec::new();
    for family in [AddressFamily::INET, AddressFamily::INET6] {
        let family = u8::try_from(family.as_raw()).map_err(io::Error::other)?;
        netlink.dump(&request(LIST, family, CONNECTED, &[0; ID_LEN]), |entry| {
            connections.extend(Connection::parse(entry));
        })?;
    }
    let mut closed = 0;
    for connection in connections {
        if connection.is_internal() || connection.remote() == except {
            continue;
        }
        match netlink.request(&request(
            DESTROY,
            connection.family,
            u32::MAX,
            &connection.id,
        )) {
            Ok(()) => closed += 1,
            // It closed by itself in the meantime.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(closed)
}
