//! Links, addresses, routes and neighbours over one rtnetlink socket.
//!
//! A socket belongs for ever to the network namespace of the thread that opened it, so a prepared namespace is
//! configured later through the socket it was prepared with, without entering it again. Calls are synchronous and
//! take microseconds: the kernel answers within the `send`. Not for use on an async worker thread all the same, since
//! creating and deleting links can wait for other work under the kernel's rtnl lock.
//!
//! Errors are the kernel's errno; callers name the step and the slot.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// The multicast group of changes to links, linux/rtnetlink.h.
const RTNLGRP_LINK: u32 = 1;

/// A link, as far as we compare it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) group: u32,
    pub(super) up: bool,
}

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) destination: ipnet::Ipv4Net,
    pub(super) link: Option<u32>,
}

#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// A socket in the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// The link of this name, if there is one.
    pub(super) fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        match self.exchange(RouteNetlinkMessage::GetLink(message), NLM_F_ACK) {
            Ok(replies) => Ok(replies.into_iter().find_map(into_link)),
            Err(error) if is(&error, Errno::NODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All links.
    pub(super) fn links(&mut self) -> io::Result<Vec<Link>> {
        let replies = self.exchange(
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
            NLM_F_DUMP,
        )?;
        Ok(replies.into_iter().filter_map(into_link).collect())
    }

    /// Makes a veth pair: `name` here, up, with link group `group`; `peer_name` in the namespace `peer`, still down,
    /// because the kernel makes it first and refuses to bring up a veth without its other end.
    pub(super) fn add_veth(
        &mut self,
        name: &str,
        group: u32,
        peer_name: &str,
        peer: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let mut other = LinkMessage::default();
        other.attributes = vec![
            LinkAttribute::IfName(peer_name.into()),
            LinkAttribute::NetNsFd(peer.as_raw_fd()),
        ];
        let mut message = LinkMessage::default();
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::Group(group),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
            ]),
        ];
        self.request(
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Brings a link up, and sets what is given.
    pub(super) fn set_link(
        &mut self,
        index: u32,
        mac: Option<[u8; 6]>,
        group: Option<u32>,
    ) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        if let Some(mac) = mac {
            message.attributes.push(LinkAttribute::Address(mac.into()));
        }
        if let Some(group) = group {
            message.attributes.push(LinkAttribute::Group(group));
        }
        self.request(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Deletes the link of this name, and with a veth its peer. Says whether there was one.
    ///
    /// Returns when the link is gone from its namespace, which takes a millisecond. The kernel does not answer before
    /// it has freed the link too, after an RCU barrier: 20 to 40 ms that every pause would take longer. A thread of its
    /// own waits for that.
    pub(super) fn delete_link(&mut self, name: &str) -> io::Result<bool> {
        let Some(link) = self.link(name)? else {
            return Ok(false);
        };
        let events = Self::open()?;
        events.socket.add_membership(RTNLGRP_LINK)?;
        let mut requests = Self::open()?;
        let (answered, answering) = io::pipe()?;
        let deletion = thread::Builder::new()
            .name("icebox-unlink".into())
            .spawn(move || {
                // Closed when the answer is there, whatever it is.
                let _answering = answering;
                let mut message = LinkMessage::default();
                message.header.index = link.index;
                requests.request(RouteNetlinkMessage::DelLink(message), 0)
            })?;
        loop {
            let mut ready = [
                PollFd::new(&answered, PollFlags::IN),
                PollFd::new(&events.socket, PollFlags::IN),
            ];
            match poll(&mut ready, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            if ready[0].revents().is_empty() && events.saw_deletion(link.index)? {
                return Ok(true);
            }
            if !ready[0].revents().is_empty() {
                return match deletion.join() {
                    Ok(Ok(())) => Ok(true),
                    Ok(Err(error)) if is(&error, Errno::NODEV) => Ok(false),
                    Ok(Err(error)) => Err(error),
                    Err(panic) => std::panic::resume_unwind(panic),
                };
            }
        }
    }

    /// Whether the next datagram of events tells of the deletion of this link.
    fn saw_deletion(&self, index: u32) -> io::Result<bool> {
        let datagram = match self.socket.recv_from_full() {
            Ok((datagram, _)) => datagram,
            // Too many events at once: the answer to the request will do.
            Err(error) if is(&error, Errno::NOBUFS) => return Ok(false),
            Err(error) => return Err(error),
        };
        Ok(messages(&datagram).any(|message| {
            matches!(
                message,
                Ok(NetlinkMessage {
                    payload: NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)),
                    ..
                }) if link.header.index == index
            )
        }))
    }

    /// Gives a link an address; nothing if it has it. Makes no route for the prefix: those that are wanted are
    /// added by name, so that one of somebody else's is noticed.
    pub(super) fn add_address(
        &mut self,
        link: u32,
        address: Ipv4Addr,
        prefix_len: u8,
    ) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = prefix_len;
        message.header.scope = AddressScope::Universe;
        message.header.index = link;
        message.attributes = vec![
            AddressAttribute::Local(address.into()),
            AddressAttribute::Address(address.into()),
            AddressAttribute::Flags(AddressFlags::Noprefixroute),
        ];
        self.request(
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Takes an address from a link.
    #[cfg(test)]
    pub(super) fn remove_address(
        &mut self,
        link: u32,
        address: Ipv4Addr,
        prefix_len: u8,
    ) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = prefix_len;
        message.header.index = link;
        message.attributes = vec![AddressAttribute::Local(address.into())];
        self.request(RouteNetlinkMessage::DelAddress(message), 0)
    }

    /// Adds a route; `EEXIST` if the destination has one, whoever made it.
    pub(super) fn add_route(
        &mut self,
        link: u32,
        destination: ipnet::Ipv4Net,
        gateway: Option<Ipv4Addr>,
        source: Option<Ipv4Addr>,
    ) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.destination_prefix_length = destination.prefix_len();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = RouteType::Unicast;
        message.header.scope = match gateway {
            Some(_) => RouteScope::Universe,
            None => RouteScope::Link,
        };
        message.attributes.push(RouteAttribute::Oif(link));
        if destination.prefix_len() > 0 {
            let address = RouteAddress::Inet(destination.network());
            message
                .attributes
                .push(RouteAttribute::Destination(address));
        }
        if let Some(gateway) = gateway {
            let address = RouteAddress::Inet(gateway);
            message.attributes.push(RouteAttribute::Gateway(address));
        }
        if let Some(source) = source {
            let address = RouteAddress::Inet(source);
            message.attributes.push(RouteAttribute::PrefSource(address));
        }
        self.request(
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// The IPv4 routes of the main table.
    pub(super) fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        let replies = self.exchange(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)?;
        Ok(replies.into_iter().filter_map(into_route).collect())
    }

    /// Enters a neighbour for good, so that nobody has to answer for it.
    pub(super) fn add_neighbour(
        &mut self,
        link: u32,
        address: Ipv4Addr,
        mac: [u8; 6],
    ) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = link;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
            NeighbourAttribute::LinkLayerAddress(mac.into()),
        ];
        self.request(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange(message, flags | NLM_F_ACK).map(drop)
    }

    /// Sends one message and collects the replies up to its acknowledgement or the end of its dump.
    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut packet =
            NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        packet.header.flags = flags | NLM_F_REQUEST;
        packet.header.sequence_number = self.sequence;
        packet.finalize();
        let mut buffer = vec![0; packet.buffer_len()];
        packet.serialize(&mut buffer);
        self.socket.send(&buffer, 0)?;

        let mut replies = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for reply in messages(&datagram) {
                let reply = reply?;
                if reply.header.sequence_number != self.sequence {
                    // What is left of an exchange that failed half-way.
                    continue;
                }
                match reply.payload {
                    NetlinkPayload::InnerMessage(inner) => replies.push(inner),
                    NetlinkPayload::Done(_) => return Ok(replies),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(replies),
                            Some(_) => Err(error.to_io()),
                        };
                    }
                    _ => {}
                }
            }
        }
    }
}

/// The messages of one datagram.
fn messages(
    datagram: &[u8],
) -> impl Iterator<Item = io::Result<NetlinkMessage<RouteNetlinkMessage>>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let parsed = NetlinkMessage::deserialize(rest)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error));
        // NLMSG_ALIGN of netlink(7).
        let length = parsed.as_ref().map_or(usize::MAX, |message| {
            usize::try_from(message.header.length)
                .unwrap_or(usize::MAX)
                .saturating_add(3)
                & !3
        });
        rest = rest.get(length..).unwrap_or_default();
        Some(parsed)
    })
}

/// Whether `error` is this errno.
pub(super) fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn into_link(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        group: 0,
        up: message.header.flags.contains(LinkFlags::Up),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Group(group) => link.group = group,
            _ => {}
        }
    }
    Some(link)
}

fn into_route(message: RouteNetlinkMessage) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(message) = message else {
        return None;
    };
    if message.header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let mut destination = Ipv4Addr::UNSPECIFIED;
    let mut link = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = *address,
            RouteAttribute::Oif(index) => link = Some(*index),
            _ => {}
        }
    }
    let prefix_len = message.header.destination_prefix_length;
    Some(Route {
        destination: ipnet::Ipv4Net::new(destination, prefix_len).ok()?,
        link,
    })
}
