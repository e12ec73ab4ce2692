//! Filling memory: first what is waited for, then what will be.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use icebox_engine::unit::PAGE_SIZE;
use linux_raw_sys::general::{UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::handshake::Region;
use super::state::State;
use super::sys::{self, Filled};
use super::working_set::PAGES_MAX;

const PAGE: u64 = PAGE_SIZE as u64;
/// For so long after its VMM came, what is asked for is the working set.
const RECORDED_FOR: Duration = Duration::from_secs(10);
/// Pages that are loaded ahead at a time, before it is looked for what is missing: 256 KiB.
const AHEAD: usize = 64;
/// `struct uffd_msg` of include/uapi/linux/userfaultfd.h.
const EVENT_BYTES: usize = 32;
const EVENTS: usize = 32;
/// How often events are read before what waits gets its pages.
const READS: usize = 64;
/// How soon a page is tried again that could not be filled since others are being removed.
const AGAIN: Duration = Duration::from_millis(1);

/// Fills the memory of one VMM.
#[derive(Debug)]
pub(super) struct Pager<'a> {
    userfault: &'a OwnedFd,
    memory: &'a File,
    regions: Vec<Region>,
    state: State,
    /// Pages that somebody waits for.
    missing: BTreeSet<u64>,
    /// What is loaded ahead, from the last on.
    ahead: Vec<u32>,
    recorded: Option<Recorded>,
}

/// The working set, while it is recorded.
#[derive(Debug)]
struct Recorded {
    until: Instant,
    pages: Vec<u32>,
    seen: BTreeSet<u32>,
}

/// What became of one page.
enum Outcome {
    Done,
    Later,
    VmmGone,
}

impl<'a> Pager<'a> {
    /// Begins; what is known of the working set is loaded ahead.
    pub(super) fn new(
        userfault: &'a OwnedFd,
        memory: &'a File,
        regions: Vec<Region>,
        state: State,
        known: Option<Vec<u32>>,
    ) -> Self {
        let recorded = known.is_none().then(|| Recorded {
            until: Instant::now() + RECORDED_FOR,
            pages: Vec::new(),
            seen: BTreeSet::new(),
        });
        let mut ahead = known.unwrap_or_default();
        ahead.reverse();
        Self {
            userfault,
            memory,
            regions,
            state,
            missing: BTreeSet::new(),
            ahead,
            recorded,
        }
    }

    /// Fills memory until `end` can be read from. `record` is given the working set, once, if it was not known.
    pub(super) fn serve(
        &mut self,
        end: BorrowedFd<'_>,
        mut record: impl FnMut(&[u32]),
    ) -> io::Result<()> {
        loop {
            let mut ready = [
                PollFd::new(self.userfault, PollFlags::IN),
                PollFd::from_borrowed_fd(end, PollFlags::IN),
            ];
            match poll(&mut ready, self.patience().as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let (userfault, end) = (ready[0].revents(), ready[1].revents());
            let ended = !end.is_empty();
            let is_full = self.recorded.as_ref().is_some_and(Recorded::is_full);
            if (ended || is_full)
                && let Some(recorded) = self.recorded.take()
                && !recorded.pages.is_empty()
            {
                record(&recorded.pages);
            }
            if ended {
                return Ok(());
            }
            if userfault.contains(PollFlags::IN) {
                self.state.step()?;
                self.read_events()?;
                self.state.step()?;
            } else if !userfault.is_empty() {
                return Err(io::Error::other(
                    "what the VMM has passed is not a userfaultfd that can be waited for",
                ));
            }
            let done = self.fill_missing()? && self.fill_ahead()?;
            if !done {
                // Its memory is gone; it ends.
                self.missing.clear();
                self.ahead.clear();
            }
        }
    }

    /// How long there is nothing to do.
    fn patience(&self) -> Option<Timespec> {
        let patience = if !self.missing.is_empty() {
            AGAIN
        } else if !self.ahead.is_empty() {
            Duration::ZERO
        } else {
            let until = self.recorded.as_ref()?.until;
            until.saturating_duration_since(Instant::now())
        };
        Timespec::try_from(patience).ok()
    }

    fn read_events(&mut self) -> io::Result<()> {
        let mut events = [0; EVENT_BYTES * EVENTS];
        for _ in 0..READS {
            let bytes = match rustix::io::read(self.userfault, &mut events) {
                Ok(bytes) => bytes,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            for event in events[..bytes].as_chunks::<EVENT_BYTES>().0 {
                self.event(event)?;
            }
            if bytes < events.len() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn event(&mut self, event: &[u8; EVENT_BYTES]) -> io::Result<()> {
        let word = |at: usize| {
            let bytes = event.get(at..at + 8).and_then(|it| it.try_into().ok());
            u64::from_ne_bytes(bytes.unwrap_or_default())
        };
        match u32::from(event[0]) {
            // Flags, and the address.
            UFFD_EVENT_PAGEFAULT => {
                let address = word(16);
                let page = self.regions.iter().find_map(|region| region.page(address));
                let page = page.ok_or_else(|| {
                    io::Error::other(format!("{address:#x} is missing, and no guest's memory"))
                })?;
                self.missing.insert(page);
                if let Some(recorded) = &mut self.recorded {
                    recorded.note(page);
                }
            }
            // From where to where.
            UFFD_EVENT_REMOVE => {
                let (start, end) = (word(8), word(16));
                for region in &self.regions {
                    let from = start.max(region.address);
                    let to = end.min(region.address + region.bytes);
                    if from < to {
                        let first = (region.offset + (from - region.address)) / PAGE;
                        let last = (region.offset + (to - region.address)).div_ceil(PAGE);
                        self.state.remove(first..last)?;
                    }
                }
            }
            other => {
                let what = format!("the VMM's memory has an event of the unknown kind {other}");
                return Err(io::Error::other(what));
            }
        }
        Ok(())
    }

    /// Where a page is.
    fn address(&self, page: u64) -> Option<u64> {
        let at = page * PAGE;
        let region = self.regions.iter().rev().find(|it| it.offset <= at)?;
        let inside = at - region.offset;
        (inside < region.bytes).then(|| region.address + inside)
    }

    /// Fills what is waited for. `false` if the VMM is gone.
    fn fill_missing(&mut self) -> io::Result<bool> {
        for page in std::mem::take(&mut self.missing) {
            match self.fill(page)? {
                Outcome::Done => {}
                Outcome::Later => drop(self.missing.insert(page)),
                Outcome::VmmGone => return Ok(false),
            }
        }
        Ok(true)
    }

    fn fill(&self, page: u64) -> io::Result<Outcome> {
        let Some(address) = self.address(page) else {
            return Ok(Outcome::Done);
        };
        let mut content = [0; PAGE_SIZE];
        if !self.state.is_removed(page) {
            self.memory.read_exact_at(&mut content, page * PAGE)?;
        }
        let filled = if content == [0; PAGE_SIZE] {
            sys::zero(self.userfault, address)
        } else {
            sys::copy(self.userfault, address, &content)
        };
        match filled {
            Ok(_) => Ok(Outcome::Done),
            Err(Errno::AGAIN) => Ok(Outcome::Later),
            Err(Errno::SRCH) => Ok(Outcome::VmmGone),
            // It is there, since whoever waits began to wait, or is no memory of the guest's any more.
            Err(Errno::EXIST | Errno::NOENT) => match sys::wake(self.userfault, address) {
                Ok(()) => Ok(Outcome::Done),
                Err(Errno::SRCH) => Ok(Outcome::VmmGone),
                Err(error) => Err(error.into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// Fills a batch of what will be asked for, if nothing is waited for. `false` if the VMM is gone.
    fn fill_ahead(&mut self) -> io::Result<bool> {
        if !self.missing.is_empty() {
            return Ok(true);
        }
        let Some(first) = self.ahead.pop().map(u64::from) else {
            return Ok(true);
        };
        let Some(address) = self.address(first) else {
            return Ok(true);
        };
        if self.state.is_removed(first) {
            return Ok(true);
        }
        // What follows it in the list as in memory, at most.
        let mut pages = 1;
        while pages < AHEAD
            && let Some(next) = self.ahead.last().copied().map(u64::from)
            && next == first + pages as u64
            && !self.state.is_removed(next)
            && self.address(next) == Some(address + pages as u64 * PAGE)
        {
            self.ahead.pop();
            pages += 1;
        }
        let mut content = vec![0; pages * PAGE_SIZE];
        self.memory.read_exact_at(&mut content, first * PAGE)?;
        let mut at = 0;
        while at < content.len() {
            match sys::copy(self.userfault, address + at as u64, &content[at..]) {
                Ok(Filled::All) => break,
                Ok(Filled::Part(bytes)) => at += crate::fs::clamp_usize(bytes),
                Err(Errno::EXIST) => at += PAGE_SIZE,
                // Others are being removed, or this is not there: no need to insist.
                Err(Errno::AGAIN | Errno::NOENT) => break,
                Err(Errno::SRCH) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

impl Region {
    /// The page of the memory that an address of the VMM's is in.
    fn page(&self, address: u64) -> Option<u64> {
        let inside = address.checked_sub(self.address)?;
        (inside < self.bytes).then(|| (self.offset + inside) / PAGE)
    }
}

impl Recorded {
    fn note(&mut self, page: u64) {
        if let Ok(page) = u32::try_from(page)
            && !self.is_full()
            && self.seen.insert(page)
        {
            self.pages.push(page);
        }
    }

    fn is_full(&self) -> bool {
        self.pages.len() >= PAGES_MAX || Instant::now() >= self.until
    }
}
