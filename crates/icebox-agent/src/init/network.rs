//! The guest's one network interface, configured as the host expects it.

use std::{fs, io, net::Ipv4Addr, path::Path};

use icebox_agent_api::cmdline;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};

use super::KernelParameters;
use crate::netlink::{CREATE_OR_REPLACE, Message, Netlink};

/// `RTM_NEWLINK`, `RTM_NEWADDR`, `RTM_NEWROUTE` of linux/rtnetlink.h.
const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
/// `IFA_ADDRESS`, `IFA_LOCAL`, `RTA_OIF`, `RTA_GATEWAY`
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
/// `AF_INET`
const INET: u8 = 2;
/// `IFF_UP`
const UP: u32 = 1;
/// `RT_TABLE_MAIN`, `RTPROT_BOOT`, `RTN_UNICAST`
const TABLE_MAIN: u8 = 254;
const PROTOCOL_BOOT: u8 = 3;
const UNICAST: u8 = 1;

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// An interface could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("failed to {operation}")]
pub(super) struct NetworkError {
    operation: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> NetworkError {
    move |source| NetworkError {
        operation,
        source: source.into(),
    }
}

/// Sets up the loopback interface and `eth0`. A guest without `eth0`, or with `icebox.address=none`, is left without.
pub(super) fn set_up(parameters: &KernelParameters) -> Result<(), NetworkError> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let netlink = Netlink::open(None).map_err(failed("open a netlink socket"))?;
    let probe = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(failed("open a socket"))?;
    let index = |name| netdevice::name_to_index(&probe, name);

    link_up(
        &netlink,
        index("lo").map_err(failed("find the loopback interface"))?,
    )
    .map_err(failed("bring the loopback interface up"))?;

    let address = parameters
        .get(cmdline::ADDRESS)
        .unwrap_or(cmdline::DEFAULT_ADDRESS);
    let Ok(eth0) = index("eth0") else {
        return Ok(());
    };
    if address == "none" {
        return Ok(());
    }
    let (ip, prefix) = parse_address(address)
        .ok_or_else(invalid)
        .map_err(failed("read the address"))?;
    let gateway = parameters
        .get(cmdline::GATEWAY)
        .unwrap_or(cmdline::DEFAULT_GATEWAY);
    let gateway: Ipv4Addr = gateway
        .parse()
        .map_err(|_| invalid())
        .map_err(failed("read the gateway"))?;
    quiet_ipv6();
    add_address(&netlink, eth0, ip, prefix).map_err(failed("give eth0 its address"))?;
    link_up(&netlink, eth0).map_err(failed("bring eth0 up"))?;
    add_default_route(&netlink, eth0, gateway).map_err(failed("set the default route"))
}

/// The link carries IPv4 only. IPv6 would still ask for routers, and so wake a guest that is at rest.
fn quiet_ipv6() {
    // A kernel without IPv6 has no such file.
    fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1").ok();
}

fn parse_address(text: &str) -> Option<(Ipv4Addr, u8)> {
    let (ip, prefix) = text.split_once('/')?;
    Some((
        ip.parse().ok()?,
        prefix.parse().ok().filter(|prefix| *prefix <= 32)?,
    ))
}

/// `struct ifinfomsg`: family, padding, type, index, flags, mask of flags to change.
fn link_up(netlink: &Netlink, index: u32) -> io::Result<()> {
    let mut payload = vec![0; 4];
    payload.extend_from_slice(&index.to_ne_bytes());
    payload.extend_from_slice(&UP.to_ne_bytes());
    payload.extend_from_slice(&UP.to_ne_bytes());
    netlink.request(&Message::new(NEW_LINK, 0, payload))
}

/// `struct ifaddrmsg`: family, prefix length, flags, scope, index.
fn add_address(netlink: &Netlink, index: u32, ip: Ipv4Addr, prefix: u8) -> io::Result<()> {
    let mut payload = vec![INET, prefix, 0, 0];
    payload.extend_from_slice(&index.to_ne_bytes());
    let message = Message::new(NEW_ADDRESS, CREATE_OR_REPLACE, payload);
    netlink.request(
        &message
            .attribute(IFA_LOCAL, ip.octets())
            .attribute(IFA_ADDRESS, ip.octets()),
    )
}

/// `struct rtmsg`: family, lengths of destination and source, type of service, table, protocol, scope, type, flags.
fn add_default_route(netlink: &Netlink, index: u32, gateway: Ipv4Addr) -> io::Result<()> {
    let mut payload = vec![INET, 0, 0, 0, TABLE_MAIN, PROTOCOL_BOOT, 0, UNICAST];
    payload.extend_from_slice(&[0; 4]);
    let message = Message::new(NEW_ROUTE, CREATE_OR_REPLACE, payload);
    netlink.request(
        &message
            .attribute(RTA_GATEWAY, gateway.octets())
            .attribute(RTA_OIF, index.to_ne_bytes()),
    )
}

/// Says where names are looked up, if the image does not: its file is missing, a link to one that is made by a
/// service which does not run here, or names no server.
pub(super) fn name_servers(parameters: &KernelParameters) -> io::Result<()> {
    let path = Path::new(RESOLV_CONF);
    let Some(servers) = parameters.get(cmdline::DNS) else {
        return Ok(());
    };
    let current = fs::read_to_string(path).unwrap_or_default();
    if current.lines().any(|line| line.starts_with("nameserver")) {
        return Ok(());
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let lines: String = servers
        .split(',')
        .map(|server| format!("nameserver {server}\n"))
        .collect();
    fs::write(path, lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_prefix_length() {
        assert_eq!(
            parse_address(cmdline::DEFAULT_ADDRESS),
            Some((Ipv4Addr::new(169, 254, 0, 21), 30))
        );
        for invalid in ["169.254.0.21", "1.2.3.4/33", "x/30", ""] {
            assert_eq!(parse_address(invalid), None);
        }
    }
}
