//! What a guest and its VMM print, bounded.
//!
//! Both are under the guest's control, so neither may go straight to a file. A VMM writes into FIFOs, of which it
//! holds a reading end too: while no daemon runs, what it prints waits in the kernel's pipe buffer, and beyond that
//! is dropped. The daemon drains the console into a file of at most [`LOG_BYTES_MAX`] and keeps the end of stderr
//! for error messages.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt, SeekFrom};
use tokio::net::unix::pipe;

use crate::launcher::Process;

/// Largest console log. When it is reached, the older half goes.
pub(crate) const LOG_BYTES_MAX: u64 = 1 << 20;
/// How much of stderr is kept.
const TAIL_BYTES_MAX: usize = 4 << 10;

/// FIFO of the guest's serial console, in the VMM's runtime directory.
pub(crate) const CONSOLE: &str = "console";
/// FIFO of the VMM's stderr.
pub(crate) const STDERR: &str = "stderr";

/// Pipes that a VMM prints into, opened before it starts.
pub(crate) struct Outputs {
    pub(crate) console: pipe::Receiver,
    pub(crate) stderr: pipe::Receiver,
}

impl Outputs {
    /// Makes the FIFOs of a VMM that is about to start, and opens them.
    pub(crate) fn create(runtime: &Path) -> io::Result<Self> {
        make_fifo(&runtime.join(CONSOLE))?;
        make_fifo(&runtime.join(STDERR))?;
        Self::open(runtime)
    }

    /// Opens the FIFOs of a VMM that runs.
    pub(crate) fn open(runtime: &Path) -> io::Result<Self> {
        Ok(Self {
            console: open_fifo(&runtime.join(CONSOLE))?,
            stderr: open_fifo(&runtime.join(STDERR))?,
        })
    }
}

/// Makes a FIFO that only root can open, replacing what an earlier VMM left.
pub(crate) fn make_fifo(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    Ok(())
}

/// Opens the daemon's end of a FIFO. Read-write, so that it has no end of file before QEMU is there.
pub(crate) fn open_fifo(path: &Path) -> io::Result<pipe::Receiver> {
    pipe::OpenOptions::new()
        .read_write(true)
        .open_receiver(path)
}

/// Reads a FIFO until the VMM has ended and nothing is left.
struct Output {
    fifo: pipe::Receiver,
    process: Process,
    has_ended: bool,
    buffer: Vec<u8>,
}

impl Output {
    fn new(fifo: pipe::Receiver, process: Process) -> Self {
        Self {
            fifo,
            process,
            has_ended: false,
            buffer: vec![0; 16 << 10],
        }
    }

    /// The next piece; `None` at the end.
    async fn next(&mut self) -> io::Result<Option<&[u8]>> {
        let mut count = None;
        if !self.has_ended {
            tokio::select! {
                biased;
                read = self.fifo.read(&mut self.buffer) => count = Some(read?),
                _ended = self.process.ended() => self.has_ended = true,
            }
        }
        let count = match count {
            Some(count) => count,
            None => match self.fifo.try_read(&mut self.buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                other => other?,
            },
        };
        Ok((count > 0).then(|| &self.buffer[..count]))
    }
}

/// Keeps the console's log until the VMM ends. A log that cannot be written is given up with a warning; the FIFO is
/// drained all the same.
pub(crate) async fn keep_log(fifo: pipe::Receiver, process: Process, path: PathBuf) {
    let given_up = |error: io::Error| {
        tracing::warn!(path = %path.display(), %error, "console log given up");
    };
    let mut log = Log::open(&path).await.map_err(given_up).ok();
    let mut output = Output::new(fifo, process);
    loop {
        match output.next().await {
            Ok(Some(bytes)) => {
                if let Some(open) = &mut log
                    && let Err(error) = open.append(bytes).await
                {
                    given_up(error);
                    log = None;
                }
            }
            Ok(None) => return,
            Err(error) => return given_up(error),
        }
    }
}

/// Collects the end of stderr until the VMM ends.
pub(crate) async fn keep_tail(fifo: pipe::Receiver, process: Process) -> String {
    let mut tail = Vec::new();
    let mut output = Output::new(fifo, process);
    loop {
        match output.next().await {
            Ok(Some(bytes)) => {
                tail.extend_from_slice(bytes);
                let excess = tail.len().saturating_sub(TAIL_BYTES_MAX);
                tail.drain(..excess);
            }
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(%error, "stderr of the VMM cannot be read");
                break;
            }
        }
    }
    String::from_utf8_lossy(&tail).trim().to_owned()
}

/// A file that forgets its older half when it is full.
struct Log {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Log {
    async fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .await?;
        let length = file.seek(SeekFrom::End(0)).await?;
        Ok(Self {
            path: path.to_owned(),
            file,
            length,
        })
    }

    async fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.length + bytes.len() as u64 > LOG_BYTES_MAX {
            self.halve().await?;
        }
        self.file.write_all(bytes).await?;
        self.file.flush().await?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// By a new file and a rename, so that a reader of the old one sees a whole log.
    async fn halve(&mut self) -> io::Result<()> {
        let keep = LOG_BYTES_MAX / 2;
        self.file
            .seek(SeekFrom::Start(self.length.saturating_sub(keep)))
            .await?;
        let mut tail = Vec::new();
        (&mut self.file).take(keep).read_to_end(&mut tail).await?;
        let next = self.path.with_extension("log.new");
        tokio::fs::write(&next, &tail).await?;
        tokio::fs::rename(&next, &self.path).await?;
        *self = Self::open(&self.path).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_log_keeps_its_newer_half() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let mut log = Log::open(&path).await.unwrap();
        let line = [b'x'; 1024];
        for _ in 0..1024 {
            log.append(&line).await.unwrap();
        }
        log.append(b"the last words").await.unwrap();
        drop(log);
        let text = std::fs::read(&path).unwrap();
        assert!(text.ends_with(b"xthe last words"));
        assert_eq!(text.len() as u64, LOG_BYTES_MAX / 2 + 14);
        // A restarted daemon goes on where the last one stopped.
        Log::open(&path).await.unwrap().append(b"!").await.unwrap();
        assert!(std::fs::read(&path).unwrap().ends_with(b"words!"));
    }

    #[tokio::test]
    async fn nothing_that_was_printed_before_the_end_is_lost() {
        use std::process::{Command, Stdio};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        make_fifo(&path).unwrap();
        let fifo = open_fifo(&path).unwrap();
        let writer = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let child = Command::new("sh")
            .args(["-c", "yes 0123456789 | head -c 20000 >&2; echo last >&2"])
            .stdin(Stdio::null())
            .stderr(writer)
            .spawn()
            .unwrap();
        let process = Process::watch_child(child).unwrap();
        let tail = keep_tail(fifo, process).await;
        assert!(tail.ends_with("last"), "{tail}");
        assert!(tail.len() <= TAIL_BYTES_MAX);
    }
}
