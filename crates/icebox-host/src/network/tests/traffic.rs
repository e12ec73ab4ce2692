//! Who reaches whom. Each refusal has its counterpart that goes through, so that a broken path is not taken for a rule.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use icebox_engine::host::{Egress, Network as _, SlotNetwork};
use icebox_engine::id::Slot;

use super::super::namespace::Namespace;
use super::super::netlink::Netlink;
use super::super::rules;
use super::lab::{
    DOUBT, Elsewhere, Guest, INTERNET, Lab, PATIENCE, Service, ask, in_lab, is_refused,
};
use crate::network::NetworkSlots;
use crate::skip::skip_this;

fn ensure(lab: &Lab, network: &NetworkSlots, slot: u16, egress: Egress) -> SlotNetwork {
    lab.run(network.ensure(Slot(slot), egress)).unwrap()
}

/// How long the next datagram is, if one comes within `wait`.
fn receive(socket: &UdpSocket, wait: Duration) -> std::io::Result<usize> {
    socket.set_read_timeout(Some(wait))?;
    socket.recv(&mut [0; 32])
}

fn tear_down(lab: &Lab, network: NetworkSlots, slots: &[u16]) {
    for slot in slots {
        lab.run(network.release(Slot(*slot))).unwrap();
    }
    lab.run(network.close()).unwrap();
}

#[test]
fn the_host_reaches_every_guest_at_its_slots_address() {
    in_lab(|lab| {
        let network = lab.open(0);
        let slots = [0, 1, 300].map(|slot| ensure(lab, &network, slot, Egress::Deny));
        let guests = [0, 1, 2].map(|n| Guest::boot(&slots[n]));
        let names = ["zero", "one", "three hundred"];
        let services = [0, 1, 2].map(|n| guests[n].serve(80, names[n]));
        for (slot, name) in slots.iter().zip(names) {
            assert_eq!(ask(SocketAddrV4::new(slot.host_address, 80)), name);
        }
        drop((services, guests));
        tear_down(lab, network, &[0, 1, 300]);
    });
}

#[test]
fn a_connection_does_not_wait_for_the_guest_to_be_known() {
    // Sooner than the kernel repeats an ARP request or a SYN.
    const SOON: Duration = Duration::from_millis(900);
    in_lab(|lab| {
        let network = lab.open(0);
        let answers_soon = |slot| {
            let slot = ensure(lab, &network, slot, Egress::Deny);
            // Before the guest is there: it must not leave anything behind that delays the next.
            assert!(is_refused(SocketAddrV4::new(slot.host_address, 80)));
            let guest = Guest::boot(&slot);
            let _service = guest.serve(80, "here");
            let start = Instant::now();
            assert_eq!(ask(SocketAddrV4::new(slot.host_address, 80)), "here");
            start.elapsed() < SOON
        };
        // One of them may have been slow for want of a processor.
        assert!((0..3).any(answers_soon));
        tear_down(lab, network, &[0, 1, 2]);
    });
}

#[test]
fn inv_42_a_sandbox_reaches_no_host_service() {
    in_lab(|lab| {
        let network = lab.open(0);
        let slot = ensure(lab, &network, 0, Egress::Internet);
        let guest = Guest::boot(&slot);
        let service = Service::start(TcpListener::bind("0.0.0.0:0").unwrap(), "host");
        let datagrams = UdpSocket::bind("0.0.0.0:0").unwrap();
        // All of the host's own addresses: on the link, on another interface, public or not.
        let mut host = Netlink::open().unwrap();
        let loopback = host.link("lo").unwrap().unwrap().index;
        let gateway = Ipv4Addr::from(u32::from(slot.host_address) - 1);
        let public = Ipv4Addr::new(11, 2, 2, 2);
        let private = Ipv4Addr::new(192, 168, 77, 1);
        let metadata = Ipv4Addr::new(169, 254, 169, 254);
        for address in [public, private, metadata] {
            host.add_address(loopback, address, 32).unwrap();
        }
        let addresses = [gateway, public, private, metadata];
        let send = |to: Ipv4Addr, wait| {
            let to = SocketAddrV4::new(to, datagrams.local_addr().unwrap().port());
            guest
                .run(|| UdpSocket::bind("0.0.0.0:0")?.send_to(b"knock", to))
                .unwrap();
            receive(&datagrams, wait)
        };
        for address in addresses {
            let to = SocketAddrV4::new(address, service.port());
            assert!(guest.is_refused(to), "tcp to the host");
            send(address, DOUBT).expect_err("udp to the host");
        }
        // Without the rules each of them goes through: it is they that refuse.
        rules::remove_host(network.slots.naming()).unwrap();
        for address in addresses {
            let to = SocketAddrV4::new(address, service.port());
            assert_eq!(guest.ask(to), "host", "{address}");
            assert_eq!(send(address, PATIENCE).unwrap(), 5, "{address}");
        }
        for address in [public, private, metadata] {
            host.remove_address(loopback, address, 32).unwrap();
        }
        drop((service, guest));
        tear_down(lab, network, &[0]);
    });
}

#[test]
fn inv_42_sandboxes_do_not_reach_each_other() {
    in_lab(|lab| {
        let network = lab.open(0);
        let slots = [4, 5].map(|slot| ensure(lab, &network, slot, Egress::Internet));
        let guests = [0, 1].map(|n| Guest::boot(&slots[n]));
        let services = [0, 1].map(|n| guests[n].serve(49983, "agent"));
        for (from, to) in [(0, 1), (1, 0)] {
            let to = SocketAddrV4::new(slots[to].host_address, 49983);
            assert!(guests[from].is_refused(to), "a sandbox reached another");
            // The host does reach it, so it is there.
            assert_eq!(ask(to), "agent");
        }
        rules::remove_host(network.slots.naming()).unwrap();
        let to = SocketAddrV4::new(slots[1].host_address, 49983);
        assert_eq!(guests[0].ask(to), "agent");
        drop((services, guests));
        tear_down(lab, network, &[4, 5]);
    });
}

#[test]
fn inv_42_egress_is_refused_until_it_is_allowed_and_from_when_it_is_not() {
    in_lab(|lab| {
        let network = lab.open(0);
        let internet = Elsewhere::new("wan", Ipv4Addr::new(11, 1, 1, 2), INTERNET);
        let listener = internet.run(|| TcpListener::bind("0.0.0.0:443"));
        let service = Service::start(listener, "web");
        let to = SocketAddrV4::new(INTERNET, 443);

        let slot = ensure(lab, &network, 0, Egress::Deny);
        let guest = Guest::boot(&slot);
        assert!(guest.is_refused(to), "egress without permission");
        assert_eq!(ensure(lab, &network, 0, Egress::Internet), slot);
        assert_eq!(guest.ask(to), "web");
        // The far side has no route to slots: it answered the host's own address.
        assert_eq!(ensure(lab, &network, 0, Egress::Deny), slot);
        assert!(guest.is_refused(to), "egress after it was withdrawn");
        // The permission is the slot's own.
        let other = ensure(lab, &network, 1, Egress::Internet);
        let other_guest = Guest::boot(&other);
        assert_eq!(other_guest.ask(to), "web");
        assert!(guest.is_refused(to), "egress by another's permission");

        drop((service, guest, other_guest));
        internet.remove("wan");
        tear_down(lab, network, &[0, 1]);
    });
}

#[test]
fn inv_42_permission_for_the_internet_is_none_for_private_networks_and_metadata() {
    in_lab(|lab| {
        let network = lab.open(0);
        let slot = ensure(lab, &network, 0, Egress::Internet);
        let guest = Guest::boot(&slot);
        for (n, address) in [
            [10, 0, 0, 9],
            [100, 64, 0, 9],
            [169, 254, 169, 254],
            [172, 16, 0, 9],
            [172, 31, 255, 9],
            [192, 168, 1, 9],
            [198, 18, 0, 9],
        ]
        .into_iter()
        .enumerate()
        {
            let address = Ipv4Addr::from(address);
            let lan = Elsewhere::new("lan", Ipv4Addr::new(11, 3, 3, 3), address);
            let listener = lan.run(|| TcpListener::bind("0.0.0.0:80"));
            let service = Service::start(listener, "internal");
            let to = SocketAddrV4::new(address, 80);
            assert_eq!(ask(to), "internal", "the host reaches {address}");
            assert!(guest.is_refused(to), "a private network was reached");
            if n == 0 {
                // The rules refuse, not the path. Masquerading goes with them, so the far side needs a route.
                rules::remove_host(network.slots.naming()).unwrap();
                lan.run(|| {
                    let mut inside = Netlink::open()?;
                    let far = inside.link("far")?.unwrap().index;
                    let back = Ipv4Addr::new(11, 3, 3, 3);
                    inside.add_route(far, ipnet::Ipv4Net::default(), Some(back), None)
                });
                assert_eq!(guest.ask(to), "internal");
                rules::apply_host(network.slots.naming()).unwrap();
            }
            drop(service);
            lan.remove("lan");
        }
        drop(guest);
        tear_down(lab, network, &[0]);
    });
}

#[test]
fn nobody_but_the_host_opens_connections_to_a_sandbox() {
    in_lab(|lab| {
        let network = lab.open(0);
        let slot = ensure(lab, &network, 0, Egress::Internet);
        let guest = Guest::boot(&slot);
        let service = guest.serve(80, "sandbox");
        let lan = Elsewhere::new(
            "lan",
            Ipv4Addr::new(11, 3, 3, 3),
            Ipv4Addr::new(11, 3, 3, 4),
        );
        lan.run(|| {
            let mut inside = Netlink::open()?;
            let far = inside.link("far")?.unwrap().index;
            let back = Ipv4Addr::new(11, 3, 3, 3);
            inside.add_route(far, ipnet::Ipv4Net::default(), Some(back), None)
        });
        let to = SocketAddrV4::new(slot.host_address, 80);
        assert!(
            lan.run(|| Ok(is_refused(to))),
            "a neighbour of the host reached a sandbox"
        );
        assert_eq!(ask(to), "sandbox");
        drop((service, guest));
        lan.remove("lan");
        tear_down(lab, network, &[0]);
    });
}

#[test]
fn inv_42_a_guest_cannot_speak_for_another_address() {
    in_lab(|lab| {
        let network = lab.open(0);
        let slot = ensure(lab, &network, 0, Egress::Internet);
        let guest = Guest::boot(&slot);
        let internet = Elsewhere::new("wan", Ipv4Addr::new(11, 1, 1, 2), INTERNET);
        let socket = internet.run(|| UdpSocket::bind("0.0.0.0:53"));
        let send_as = |source: Ipv4Addr, wait| {
            guest
                .run(|| UdpSocket::bind((source, 0))?.send_to(b"?", (INTERNET, 53)))
                .unwrap();
            receive(&socket, wait)
        };
        assert_eq!(
            send_as(Ipv4Addr::new(169, 254, 0, 21), PATIENCE).unwrap(),
            1
        );
        let forged = Ipv4Addr::new(11, 9, 9, 9);
        guest
            .run(|| {
                let mut inside = Netlink::open()?;
                let link = inside.link("eth0")?.unwrap().index;
                inside.add_address(link, forged, 32)
            })
            .unwrap();
        send_as(forged, DOUBT).expect_err("a forged source went out");
        drop(guest);
        internet.remove("wan");
        tear_down(lab, network, &[0]);
    });
}

#[test]
fn what_is_refused_is_refused_at_once() {
    in_lab(|lab| {
        let network = lab.open(0);
        let slot = ensure(lab, &network, 0, Egress::Deny);
        let other = ensure(lab, &network, 1, Egress::Deny);
        let guest = Guest::boot(&slot);
        let internet = Elsewhere::new("wan", Ipv4Addr::new(11, 1, 1, 2), INTERNET);
        let gateway = Ipv4Addr::from(u32::from(slot.host_address) - 1);
        for address in [INTERNET, gateway, other.host_address] {
            let to = SocketAddr::from((address, 443));
            let error = guest
                .run(|| Ok(TcpStream::connect_timeout(&to, Duration::from_secs(5))))
                .unwrap()
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
        }
        drop(guest);
        internet.remove("wan");
        tear_down(lab, network, &[0, 1]);
    });
}

#[test]
fn inv_37_connections_from_before_a_capture_end_on_both_sides() {
    in_lab(|lab| {
        let network = lab.open(0);
        let slot = ensure(lab, &network, 0, Egress::Deny);
        let mut guest = Guest::boot(&slot);
        let listener = guest.run(|| TcpListener::bind("0.0.0.0:80")).unwrap();
        let connect = || {
            let outside = TcpStream::connect((slot.host_address, 80)).unwrap();
            let (inside, _) = listener.accept().unwrap();
            for end in [&outside, &inside] {
                end.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            }
            (outside, inside)
        };
        let (host_speaks_first, _kept) = connect();
        let (_also_kept, guest_speaks_first) = connect();

        guest.unplug();
        lab.run(network.release(Slot(0))).unwrap();
        assert_eq!(ensure(lab, &network, 0, Egress::Deny), slot);
        guest.plug_in(&slot);

        for mut speaker in [&host_speaks_first, &guest_speaks_first] {
            speaker.write_all(b"are you still there?").unwrap();
            let error = speaker.read(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
        // The same listener goes on serving.
        let (mut outside, mut inside) = connect();
        outside.write_all(b"hello").unwrap();
        inside.read_exact(&mut [0; 5]).unwrap();
        drop(guest);
        tear_down(lab, network, &[0]);
    });
}

#[test]
fn inv_42_a_sandbox_gets_nothing_that_was_meant_for_the_slots_last_user() {
    in_lab(|lab| {
        let network = lab.open(0);
        let internet = Elsewhere::new("wan", Ipv4Addr::new(11, 1, 1, 2), INTERNET);
        let server = internet.run(|| UdpSocket::bind("0.0.0.0:53"));
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let client = |guest: &Guest| guest.run(|| UdpSocket::bind("0.0.0.0:5353")).unwrap();

        let slot = ensure(lab, &network, 0, Egress::Internet);
        let guest = Guest::boot(&slot);
        let first = client(&guest);
        first.send_to(b"?", (INTERNET, 53)).unwrap();
        let (_, peer) = server.recv_from(&mut [0; 8]).unwrap();
        server.send_to(b"for the first", peer).unwrap();
        assert_eq!(receive(&first, PATIENCE).unwrap(), 13);
        drop((first, guest));
        lab.run(network.release(Slot(0))).unwrap();

        let slot = ensure(lab, &network, 0, Egress::Internet);
        let guest = Guest::boot(&slot);
        let second = client(&guest);
        server.send_to(b"more for the first", peer).unwrap();
        receive(&second, DOUBT).expect_err("another sandbox's traffic");
        // It can talk to the same server itself.
        second.send_to(b"!", (INTERNET, 53)).unwrap();
        let (_, peer) = server.recv_from(&mut [0; 8]).unwrap();
        server.send_to(b"for the second", peer).unwrap();
        assert_eq!(receive(&second, PATIENCE).unwrap(), 14);
        drop((second, guest));
        internet.remove("wan");
        tear_down(lab, network, &[0]);
    });
}

#[test]
fn there_is_no_ipv6() {
    if !std::path::Path::new("/proc/sys/net/ipv6").exists() {
        skip_this("this kernel has no IPv6");
        return;
    }
    in_lab(|lab| {
        let network = lab.open(0);
        let slot = ensure(lab, &network, 0, Egress::Internet);
        let namespace = Namespace::open(&slot.namespace).unwrap().unwrap();
        for link in ["eth0", "tap0"] {
            let file = format!("/proc/sys/net/ipv6/conf/{link}/disable_ipv6");
            let disabled = namespace.run(|| std::fs::read_to_string(file)).unwrap();
            assert_eq!(disabled.trim(), "1", "{link}");
        }
        // And should somebody switch it on in there, the host does not listen. Multicast needs no neighbour to be found.
        let everyone = "ff02::1".parse().unwrap();
        let (host_link, uplink) = {
            let name = network.slots.naming().name(Slot(0));
            let link = Netlink::open().unwrap().link(&name).unwrap().unwrap();
            let uplink = namespace.run(|| Netlink::open()?.link("eth0")).unwrap();
            (link.index, uplink.unwrap().index)
        };
        let listener = UdpSocket::bind("[::]:0").unwrap();
        listener.join_multicast_v6(&everyone, host_link).unwrap();
        let port = listener.local_addr().unwrap().port();
        namespace
            .run(|| {
                std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_dad", "0")?;
                std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "0")?;
                let flush = std::process::Command::new("nft")
                    .args(["flush", "ruleset"])
                    .status()?;
                assert!(flush.success());
                Ok(())
            })
            .unwrap();
        let send = |wait| {
            namespace
                .run(|| {
                    let to = std::net::SocketAddrV6::new(everyone, port, 0, uplink);
                    UdpSocket::bind("[::]:0")?.send_to(b"six", to)
                })
                .unwrap();
            receive(&listener, wait)
        };
        send(DOUBT).expect_err("IPv6 from a sandbox");
        rules::remove_host(network.slots.naming()).unwrap();
        assert_eq!(send(PATIENCE).unwrap(), 3);
        tear_down(lab, network, &[0]);
    });
}
