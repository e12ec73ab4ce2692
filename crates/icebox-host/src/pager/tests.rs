//! Against the kernel's own userfaultfd: this process is the VMM.

use std::fs::File;
use std::io::{self, IoSlice, PipeWriter};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use icebox_engine::unit::PAGE_SIZE;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::handshake::{self, Region};
use super::serve::Pager;
use super::state::{self, State};
use super::sys::vmm::{Memory, userfault};
use crate::launcher::identity_of;
use crate::vmm::memory::{GuestRam, MappedPart, ProcessMemory, save_flat};

const PAGE: u64 = PAGE_SIZE as u64;

/// A memory of so many pages, of which each has its number and one, but for the last, which is a hole.
fn base(pages: usize) -> File {
    let file = tempfile::tempfile().unwrap();
    for page in 0..pages - 1 {
        let byte = u8::try_from(page + 1).unwrap();
        file.write_all_at(&[byte; PAGE_SIZE], page as u64 * PAGE)
            .unwrap();
    }
    file.set_len(pages as u64 * PAGE).unwrap();
    file
}

/// A pager at work on two pieces of this process's memory.
struct Paged {
    pieces: [Memory; 2],
    state: PathBuf,
    recorded: mpsc::Receiver<Vec<u32>>,
    end: Option<PipeWriter>,
    pager: Option<JoinHandle<io::Result<()>>>,
    directory: tempfile::TempDir,
}

impl Paged {
    fn begin(pages: usize, known: Option<Vec<u32>>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        state::create(&path).unwrap();
        let first = pages / 2;
        let pieces = [first, pages - first].map(|pages| Memory::map(pages * PAGE_SIZE));
        let userfault = userfault(&pieces).unwrap();
        let regions = vec![
            Region {
                address: pieces[0].address,
                bytes: pieces[0].bytes as u64,
                offset: 0,
            },
            Region {
                address: pieces[1].address,
                bytes: pieces[1].bytes as u64,
                offset: pieces[0].bytes as u64,
            },
        ];
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let state = State::begin(file, &regions, pages as u64 * PAGE).unwrap();
        let (until, end) = io::pipe().unwrap();
        let (sender, recorded) = mpsc::channel();
        let pager = std::thread::spawn(move || {
            let memory = base(pages);
            Pager::new(&userfault, &memory, regions, state, known)
                .serve(until.as_fd(), |pages| sender.send(pages.to_vec()).unwrap())
        });
        Self {
            pieces,
            state: path,
            recorded,
            end: Some(end),
            pager: Some(pager),
            directory,
        }
    }

    /// The VMM ends.
    fn end(&mut self) {
        drop(self.end.take());
        let pager = self.pager.take().unwrap();
        pager.join().unwrap().unwrap();
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "nothing says when a page is there"
)]
fn soon(what: &str, mut is: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !is() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_pager_fills_what_is_asked_for_and_records_it() {
    let mut paged = Paged::begin(8, None);
    let [low, high] = paged.pieces;
    assert_eq!(high.read(PAGE_SIZE + 5), 6);
    assert_eq!(low.read(7), 1);
    // A hole, which is written to, and another that is written to first.
    high.write(3 * PAGE_SIZE, 9);
    low.write(2 * PAGE_SIZE, 8);
    assert_eq!(
        (high.read(3 * PAGE_SIZE), high.read(3 * PAGE_SIZE + 1)),
        (9, 0)
    );
    assert_eq!(
        (low.read(2 * PAGE_SIZE), low.read(2 * PAGE_SIZE + 1)),
        (8, 3)
    );
    let there: Vec<bool> = (0..4).map(|page| low.has(page)).collect();
    assert_eq!(there, [true, false, true, false]);
    paged.end();
    assert_eq!(paged.recorded.recv().unwrap(), [5, 0, 7, 2]);
}

#[test]
fn a_pager_loads_a_known_working_set_ahead_and_nothing_else() {
    let mut paged = Paged::begin(12, Some(vec![3, 4, 5, 6, 7, 1]));
    let [low, high] = paged.pieces;
    soon("the working set is loaded", || low.has(1));
    let there: Vec<bool> = (0..6).map(|page| low.has(page)).collect();
    assert_eq!(there, [false, true, false, true, true, true]);
    // Over the end of the first piece.
    let there: Vec<bool> = (0..6).map(|page| high.has(page)).collect();
    assert_eq!(there, [true, true, false, false, false, false]);
    for page in 0..6 {
        assert_eq!(usize::from(low.read(page * PAGE_SIZE)), page + 1);
    }
    assert_eq!(high.read(PAGE_SIZE), 8);
    paged.end();
    assert!(paged.recorded.recv().is_err(), "it was known");
}

#[test]
fn inv_08_inv_29_what_was_removed_is_zero_for_the_guest_and_for_saves() {
    let mut paged = Paged::begin(8, None);
    let [low, high] = paged.pieces;
    // There and removed; never there and removed; removed and written since.
    assert_eq!(low.read(PAGE_SIZE), 2);
    low.remove(PAGE_SIZE, 3 * PAGE_SIZE);
    assert_eq!(low.read(PAGE_SIZE), 0);
    low.write(3 * PAGE_SIZE, 9);
    // Changed; read.
    high.write(0, 70);
    assert_eq!(high.read(PAGE_SIZE), 6);

    let bytes = 8 * PAGE;
    let parts = state::read(&paged.state, bytes).unwrap().unwrap();
    let parts: Vec<MappedPart> = parts
        .into_iter()
        .map(|part| MappedPart {
            ram: GuestRam {
                address: part.address,
                bytes: part.bytes,
            },
            offset: part.offset,
            replaced: part.removed,
            is_filled: true,
        })
        .collect();
    let (old, written) = (base(8), tempfile::tempfile().unwrap());
    written.set_len(bytes).unwrap();
    let process = ProcessMemory::open(&identity_of(std::process::id()).unwrap()).unwrap();
    let directory = paged.directory.path().join("save");
    std::fs::create_dir(&directory).unwrap();
    let old = (&old, std::path::Path::new("base"));
    let outcome = save_flat(&process, &parts, old, &written, &directory).unwrap();
    let saved = std::fs::read(directory.join(icebox_engine::layout::MEMORY_BASE)).unwrap();
    let first: Vec<u8> = saved.chunks(PAGE_SIZE).map(|page| page[0]).collect();
    let second: Vec<u8> = saved.chunks(PAGE_SIZE).map(|page| page[1]).collect();
    assert_eq!(first, [1, 0, 0, 9, 70, 6, 7, 0]);
    assert_eq!(second, [1, 0, 0, 0, 5, 6, 7, 0]);
    // What was only read is compared, and not counted.
    assert_eq!((outcome.changed, outcome.zero), (4, 2));
    assert!(!low.has(0) && !high.has(2), "a save loads nothing");
    paged.end();
}

fn send(socket: &UnixStream, said: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    sendmsg(
        socket,
        &[IoSlice::new(said)],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
}

#[test]
fn inv_44_a_vmm_introduces_itself_with_one_descriptor_and_all_of_its_memory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pager.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let memory = Memory::map(4 * PAGE_SIZE);
    let userfault = userfault(&[memory]).unwrap();
    let said = |size: u64| {
        serde_json::json!([{
            "base_host_virt_addr": memory.address, "size": size, "offset": 0,
            "page_size": PAGE, "page_size_kib": PAGE,
        }])
        .to_string()
        .into_bytes()
    };
    let accept = |said: &[u8], descriptors: &[BorrowedFd<'_>]| {
        let socket = UnixStream::connect(&path).unwrap();
        send(&socket, said, descriptors);
        drop(socket);
        handshake::accept(&listener, 4 * PAGE)
    };
    let one = userfault.as_fd();
    for (said, descriptors) in [
        (said(4 * PAGE), &[][..]),
        (said(4 * PAGE), &[one, one][..]),
        (said(8 * PAGE), &[one][..]),
        (vec![b'['; 15 << 10], &[one][..]),
    ] {
        let error = accept(&said, descriptors).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    }
    let met = accept(&said(4 * PAGE), &[one]).unwrap();
    assert_eq!(met.regions[0].address, memory.address);

    // What is no userfaultfd ends the pager, not this process.
    let answers = |wrong: OwnedFd| {
        let path = directory.path().join("state");
        state::create(&path).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let state = State::begin(file, &met.regions, 4 * PAGE).unwrap();
        let (until, _end) = io::pipe().unwrap();
        let memory = base(4);
        Pager::new(&wrong, &memory, met.regions.clone(), state, Some(vec![1]))
            .serve(until.as_fd(), |_| ())
            .unwrap_err()
    };
    answers(File::open("/dev/null").unwrap().into());
    let (reader, writer) = io::pipe().unwrap();
    io::Write::write_all(&mut &writer, &[0; 64]).unwrap();
    answers(reader.into());
}
