//! What a VMM says to its pager: where its memory is, and with which userfaultfd it is filled.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use icebox_engine::unit::PAGE_SIZE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg, sockopt,
};
use rustix::process::{PidfdFlags, getuid, pidfd_open};
use serde::Deserialize;

/// A VMM is told to restore as soon as it has started. Longer than that may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// Longest message: some hundred bytes say it.
const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// Memory is in one piece, or in two.
pub(super) const REGIONS_MAX: usize = 8;
const PAGE: u64 = PAGE_SIZE as u64;

/// A piece of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// Where the VMM has it.
    pub(super) address: u64,
    /// Its length.
    pub(super) bytes: u64,
    /// Where it begins in the memory's file.
    pub(super) offset: u64,
}

/// A VMM that has introduced itself.
#[derive(Debug)]
pub(super) struct Met {
    /// Its process, which can be waited for.
    pub(super) vmm: OwnedFd,
    /// What its memory is filled with.
    pub(super) userfault: OwnedFd,
    /// Its memory, in the order of the file.
    pub(super) regions: Vec<Region>,
}

/// As it is sent; there is more in it.
#[derive(Debug, Deserialize)]
struct Said {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    #[serde(default)]
    page_size: Option<u64>,
}

/// Waits for the VMM to introduce itself. Its memory has so many bytes.
pub(super) fn accept(listener: &UnixListener, bytes: u64) -> io::Result<Met> {
    let mut ready = [PollFd::new(listener, PollFlags::IN)];
    let deadline = Timespec {
        tv_sec: i64::try_from(DEADLINE.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: 0,
    };
    if poll(&mut ready, Some(&deadline))? == 0 {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no VMM has asked for its memory within {DEADLINE:?}"),
        ));
    }
    let (socket, _) = listener.accept()?;
    let peer = sockopt::socket_peercred(&socket)?;
    if peer.uid != getuid() {
        return Err(invalid("who asks for a memory is not of its box"));
    }
    let vmm = pidfd_open(peer.pid, PidfdFlags::empty())?;
    socket.set_read_timeout(Some(DEADLINE))?;
    let (said, userfault) = receive(&socket)?;
    Ok(Met {
        vmm,
        userfault,
        regions: parse(&said, bytes)?,
    })
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// One message and the one descriptor with it.
fn receive(socket: &UnixStream) -> io::Result<(Vec<u8>, OwnedFd)> {
    let mut said = vec![0; MESSAGE_BYTES_MAX];
    // With room for one, the kernel passes on no more, and says that there were.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(
        socket.as_fd(),
        &mut [IoSliceMut::new(&mut said)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for ancillary in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = ancillary {
            descriptors.extend(passed);
        }
    }
    let one = descriptors.pop();
    match one {
        Some(fd) if descriptors.is_empty() && !message.flags.contains(ReturnFlags::CTRUNC) => {
            said.truncate(message.bytes);
            Ok((said, fd))
        }
        _ => Err(invalid("the VMM has not passed one descriptor")),
    }
}

/// The pieces of a memory of so many bytes, which are all of it, once.
pub(super) fn parse(said: &[u8], bytes: u64) -> io::Result<Vec<Region>> {
    let said: Vec<Said> = serde_json::from_slice(said).map_err(|error| {
        invalid(format!(
            "where the VMM's memory is, is not understood: {error}"
        ))
    })?;
    if said.len() > REGIONS_MAX {
        return Err(invalid(format!("a memory in {} pieces", said.len())));
    }
    let mut regions: Vec<Region> = Vec::new();
    let mut at = 0;
    for piece in said {
        let region = Region {
            address: piece.base_host_virt_addr,
            bytes: piece.size,
            offset: piece.offset,
        };
        let wrong = |what: &str| invalid(format!("{what}: {region:?} of {bytes} bytes"));
        if piece.page_size.is_some_and(|size| size != PAGE) {
            return Err(wrong("its pages have another size"));
        }
        if region.bytes == 0
            || !region.bytes.is_multiple_of(PAGE)
            || !region.address.is_multiple_of(PAGE)
        {
            return Err(wrong("a piece that is not of pages"));
        }
        let end = region.address.checked_add(region.bytes);
        let end = end.ok_or_else(|| wrong("a piece past the end of all addresses"))?;
        let over = |it: &Region| region.address < it.address + it.bytes && it.address < end;
        if regions.iter().any(over) {
            return Err(wrong("pieces that overlap"));
        }
        if region.offset != at || region.bytes > bytes - at {
            return Err(wrong("a piece that is not the next of the memory"));
        }
        at += region.bytes;
        regions.push(region);
    }
    if at == bytes && at > 0 {
        Ok(regions)
    } else {
        Err(invalid(format!("{at} of the memory's {bytes} bytes")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(pieces: &[(u64, u64, u64)]) -> Vec<u8> {
        let pieces: Vec<_> = pieces
            .iter()
            .map(|(address, size, offset)| {
                serde_json::json!({
                    "base_host_virt_addr": address, "size": size, "offset": offset,
                    "page_size": 4096, "page_size_kib": 4096,
                })
            })
            .collect();
        serde_json::to_vec(&pieces).unwrap()
    }

    #[test]
    fn a_memory_in_two_pieces_is_understood() {
        let regions = parse(
            &said(&[(0x10000, 0x3000, 0), (0x8000, 0x1000, 0x3000)]),
            0x4000,
        );
        let regions = regions.unwrap();
        assert_eq!(regions.len(), 2);
        assert_eq!(
            regions[1],
            Region {
                address: 0x8000,
                bytes: 0x1000,
                offset: 0x3000
            }
        );
    }

    #[test]
    fn inv_44_a_memory_that_cannot_be_is_refused() {
        let whole = 0x4000;
        for (pieces, why) in [
            (vec![], "0 of the memory's"),
            (vec![(0x1000, 0x3000, 0)], "12288 of the memory's"),
            (vec![(0x1000, 0x5000, 0)], "not the next"),
            (vec![(0x1000, 0x4000, 0x1000)], "not the next"),
            (
                vec![(0x1000, 0x2000, 0), (0x9000, 0x2000, 0)],
                "not the next",
            ),
            (
                vec![(0x1000, 0x2000, 0), (0x2000, 0x2000, 0x2000)],
                "overlap",
            ),
            (vec![(0x1001, 0x4000, 0)], "not of pages"),
            (vec![(0x1000, 0x3fff, 0)], "not of pages"),
            (vec![(0x1000, 0, 0)], "not of pages"),
            (vec![(u64::MAX - 0xfff, 0x4000, 0)], "past the end"),
            (vec![(0x1000, u64::MAX - 0xfff, 0)], "past the end"),
            (vec![(0x10000, 0x1000, 0); 9], "in 9 pieces"),
        ] {
            let error = parse(&said(&pieces), whole).unwrap_err().to_string();
            assert!(error.contains(why), "{pieces:?}: {error}");
        }
        for not_json in [&b""[..], b"{}", b"[1]", b"[{\"size\":-1}]", &[0xff; 64]] {
            assert!(parse(not_json, whole).is_err());
        }
        let huge = br#"[{"base_host_virt_addr":0,"size":16384,"offset":0,"page_size":2097152}]"#;
        let error = parse(huge, whole).unwrap_err().to_string();
        assert!(error.contains("another size"), "{error}");
    }
}
