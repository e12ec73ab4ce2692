//! The few bytes of netlink that the agent speaks: setting one interface up, and closing TCP connections.
//!
//! Messages are built and read as bytes, which needs neither unsafe code nor a library that knows all of rtnetlink:
//! those weigh more than the rest of process 1. Layouts are those of linux/netlink.h.

use std::io;

use rustix::{
    fd::OwnedFd,
    net::{
        AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send,
        socket_with,
    },
};

/// `NLM_F_REQUEST`
const REQUEST: u16 = 1;
/// `NLM_F_ACK`
const ACK: u16 = 4;
/// `NLM_F_CREATE | NLM_F_REPLACE`
pub(crate) const CREATE_OR_REPLACE: u16 = 0x500;
/// `NLM_F_ROOT | NLM_F_MATCH`
const DUMP: u16 = 0x300;

/// `NLMSG_ERROR`, which with the number 0 is an acknowledgement.
const ERROR: u16 = 2;
/// `NLMSG_DONE`, the end of a dump.
const DONE: u16 = 3;

const HEADER_LEN: usize = 16;
/// The kernel sends no more than this in one piece to a reader with so large a buffer (netlink(7)).
const BUFFER_LEN: usize = 32 << 10;

/// A socket of one netlink protocol. Calls block, for as long as the kernel takes to answer itself.
pub(crate) struct Netlink {
    socket: OwnedFd,
}

/// A request in the making.
pub(crate) struct Message {
    kind: u16,
    flags: u16,
    payload: Vec<u8>,
}

impl Message {
    /// A message of `kind` whose fixed part is `payload`.
    pub(crate) fn new(kind: u16, flags: u16, payload: Vec<u8>) -> Self {
        Self {
            kind,
            flags,
            payload,
        }
    }

    /// Appends an attribute of four bytes, the only size needed here.
    #[must_use]
    pub(crate) fn attribute(mut self, kind: u16, value: [u8; 4]) -> Self {
        self.payload.extend_from_slice(&8_u16.to_ne_bytes());
        self.payload.extend_from_slice(&kind.to_ne_bytes());
        self.payload.extend_from_slice(&value);
        self
    }

    fn bytes(&self, flags: u16) -> io::Result<Vec<u8>> {
        let length = u32::try_from(HEADER_LEN + self.payload.len()).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.payload.len());
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&self.kind.to_ne_bytes());
        bytes.extend_from_slice(&(REQUEST | flags | self.flags).to_ne_bytes());
        // The sequence number and the sender, which a socket used for one call at a time does not need.
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&self.payload);
        Ok(bytes)
    }
}

impl Netlink {
    pub(crate) fn open(protocol: Option<Protocol>) -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            protocol,
        )?;
        Ok(Self { socket })
    }

    /// Sends a request and waits for its acknowledgement.
    pub(crate) fn request(&self, message: &Message) -> io::Result<()> {
        send(&self.socket, &message.bytes(ACK)?, SendFlags::empty())?;
        self.replies(|_| ())
    }

    /// Sends a request for a list and gives the payload of each entry to `entry`.
    pub(crate) fn dump(&self, message: &Message, entry: impl FnMut(&[u8])) -> io::Result<()> {
        send(&self.socket, &message.bytes(DUMP)?, SendFlags::empty())?;
        self.replies(entry)
    }

    fn replies(&self, mut entry: impl FnMut(&[u8])) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER_LEN];
        loop {
            let (_, received) = recv(&self.socket, buffer.as_mut_slice(), RecvFlags::empty())?;
            let mut rest = buffer.get(..received).unwrap_or_default();
            while let Some((kind, payload, next)) = split_message(rest) {
                match kind {
                    DONE => return Ok(()),
                    ERROR => {
                        let errno = payload
                            .first_chunk()
                            .map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                        return if errno == 0 {
                            Ok(())
                        } else {
                            Err(io::Error::from_raw_os_error(-errno))
                        };
                    }
                    _ => entry(payload),
                }
                rest = next;
            }
        }
    }
}

/// The first message of `bytes`: its kind, its payload, and what follows it.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let payload = bytes.get(HEADER_LEN..length)?;
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, payload, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_split_at_aligned_lengths() {
        let mut bytes = Message::new(7, 0, vec![1, 2, 3, 4]).bytes(0).unwrap();
        bytes.extend(Message::new(DONE, 0, Vec::new()).bytes(0).unwrap());
        let (kind, payload, rest) = split_message(&bytes).unwrap();
        assert_eq!((kind, payload), (7, &[1, 2, 3, 4][..]));
        assert_eq!(split_message(rest).unwrap().0, DONE);
        assert!(split_message(&bytes[..10]).is_none());
    }

    #[test]
    fn the_kernel_lists_the_loopback_interface() {
        // RTM_GETLINK with an empty `struct ifinfomsg`.
        let netlink = Netlink::open(None).unwrap();
        let mut entries = 0;
        netlink
            .dump(&Message::new(18, 0, vec![0; 16]), |_| entries += 1)
            .unwrap();
        assert!(entries >= 1);
    }
}
