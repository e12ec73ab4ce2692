//! `/run/initctl`: how `poweroff`, `halt`, `reboot` and `shutdown` ask a process 1 that is not systemd.
//!
//! systemd's own commands fall back to it too. A request is the 384 bytes of `struct init_request` (initreq.h of
//! sysvinit): a magic number, a command, a run level and what else we have no use for.

use std::{io, path::Path};

use rustix::fs::{CWD, FileType, Mode};
use tokio::{io::AsyncReadExt as _, net::unix::pipe};

use super::power::After;

const PATH: &str = "/run/initctl";
/// Only root may write; what it asks for it could do without us.
const MODE: u32 = 0o600;
const REQUEST_LEN: usize = 384;
/// `INIT_MAGIC` and `INIT_CMD_RUNLVL`
const MAGIC: u32 = 0x0309_1969;
const CHANGE_RUN_LEVEL: u32 = 1;

/// Where requests come in, if it could be opened and read so far.
pub(super) struct Requests(Option<pipe::Receiver>);

impl Requests {
    /// Makes the FIFO. Without one, the guest can still be powered off by signal.
    pub(super) fn open() -> Self {
        Self(
            open()
                .inspect_err(|error| eprintln!("icebox: failed to open {PATH}: {error}"))
                .ok(),
        )
    }

    /// Waits for a request to power off or reboot. Cancel-safe: a request is read in one piece, being shorter than
    /// what a pipe takes as one.
    pub(super) async fn next(&mut self) -> After {
        let mut request = [0; REQUEST_LEN];
        while let Some(fifo) = &mut self.0 {
            match fifo.read(&mut request).await {
                Ok(length) => {
                    if let Some(after) = request.get(..length).and_then(parse) {
                        return after;
                    }
                }
                Err(error) => {
                    eprintln!("icebox: failed to read {PATH}: {error}");
                    self.0 = None;
                }
            }
        }
        std::future::pending().await
    }
}

fn open() -> io::Result<pipe::Receiver> {
    let path = Path::new(PATH);
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(MODE), 0)?;
    // Open for writing too, so that it does not end with each writer.
    pipe::OpenOptions::new()
        .read_write(true)
        .open_receiver(path)
}

fn parse(request: &[u8]) -> Option<After> {
    let word = |at: usize| {
        Some(u32::from_ne_bytes(
            request.get(at..at + 4)?.try_into().ok()?,
        ))
    };
    if word(0)? != MAGIC || word(4)? != CHANGE_RUN_LEVEL {
        return None;
    }
    match u8::try_from(word(8)?).ok()? {
        b'0' => Some(After::Off),
        b'6' => Some(After::Reboot),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(magic: u32, command: u32, level: u8) -> Vec<u8> {
        let mut bytes: Vec<u8> = [magic, command, level.into(), 0]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        bytes.resize(REQUEST_LEN, 0);
        bytes
    }

    #[test]
    fn only_the_two_last_run_levels_do_anything() {
        assert_eq!(parse(&request(MAGIC, 1, b'0')), Some(After::Off));
        assert_eq!(parse(&request(MAGIC, 1, b'6')), Some(After::Reboot));
        for other in [
            request(MAGIC, 1, b'3'),
            request(MAGIC, 2, b'0'),
            request(1, 1, b'0'),
            vec![0; 3],
        ] {
            assert_eq!(parse(&other), None);
        }
    }
}
