//! Runs the distribution's tools, so that they cannot outlive us, flood us or speak another language.
//!
//! A tool runs under `setpriv --pdeathsig KILL` (util-linux, essential on Debian): it dies with the thread that started
//! it, also when the daemon is killed. Nothing is set between fork and exec by ourselves, which keeps `posix_spawn`.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    io::{self, BufRead, BufReader, Read},
    path::Path,
    process::{Command, ExitStatus, Stdio},
};

use super::ImageError;

/// Lines of stderr kept for the error message.
const TAIL_LINES: usize = 20;
/// Longest line kept; the rest of it is dropped.
const LINE_BYTES: u64 = 1024;
/// Where the tools are, also when the caller's `PATH` has no `sbin`.
const SBIN: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin";

/// One external tool, about to run.
pub(crate) struct Tool {
    name: String,
    command: Command,
}

/// What a tool that ran to its end left behind.
pub(crate) struct Finished {
    pub(super) status: ExitStatus,
    pub(super) stdout: Vec<u8>,
    /// The last lines of stderr, or of stdout where that is what was watched.
    pub(super) tail: String,
    tool: String,
}

/// Which of the tool's streams is read line by line.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Watch {
    Stdout,
    Stderr,
}

impl Tool {
    pub(crate) fn new(name: &str) -> Self {
        Self::wrapped(name, &[])
    }

    /// The tool and everything it starts, in a pid namespace that ends with it. Needs root.
    pub(super) fn with_descendants(name: &str) -> Self {
        Self::wrapped(
            name,
            &["unshare", "--pid", "--fork", "--kill-child=KILL", "--"],
        )
    }

    fn wrapped(name: &str, wrapper: &[&str]) -> Self {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .args(wrapper)
            .arg(name);
        let path = match std::env::var("PATH") {
            Ok(path) if !path.is_empty() => format!("{path}:{SBIN}"),
            _ => SBIN.to_owned(),
        };
        command
            .env("PATH", path)
            .env("LC_ALL", "C")
            .env_remove("LANGUAGE")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null());
        Self {
            name: name.to_owned(),
            command,
        }
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    pub(super) fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    pub(super) fn current_dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Runs to the end and returns what it printed. Blocks.
    pub(crate) fn run(self) -> Result<Finished, ImageError> {
        self.watch(Watch::Stderr, |_| {})
    }

    /// Runs to the end, handing every line of one stream to `line` as it comes. The other stream is collected (stdout)
    /// or kept as the tail (stderr). Blocks.
    pub(super) fn watch(
        mut self,
        watch: Watch,
        mut line: impl FnMut(&str),
    ) -> Result<Finished, ImageError> {
        if !installed(&self.name) {
            return Err(ImageError::ToolMissing { tool: self.name });
        }
        let start = |source| ImageError::ToolStart {
            tool: self.name.clone(),
            source,
        };
        let mut child = self
            .command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(start)?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(start(io::Error::other("its output is not piped")));
        };
        let mut collected = Vec::new();
        let mut tail = Tail::default();
        let read = std::thread::scope(|scope| {
            if watch == Watch::Stderr {
                let other = scope.spawn(|| BufReader::new(stdout).read_to_end(&mut collected));
                let own = lines(stderr, |text| {
                    line(text);
                    tail.push(text);
                });
                own.and(
                    other
                        .join()
                        .unwrap_or_else(|_| Err(io::Error::other("a reader panicked")))
                        .map(drop),
                )
            } else {
                let other = scope.spawn(|| lines(stderr, |text| tail.push(text)));
                let own = lines(stdout, &mut line);
                own.and(
                    other
                        .join()
                        .unwrap_or_else(|_| Err(io::Error::other("a reader panicked"))),
                )
            }
        });
        let status = child.wait().map_err(start)?;
        read.map_err(start)?;
        Ok(Finished {
            status,
            stdout: collected,
            tail: tail.text(),
            tool: self.name,
        })
    }
}

impl Finished {
    /// Turns a status other than 0 into an error.
    pub(crate) fn success(self) -> Result<Self, ImageError> {
        self.success_or(Self::error)
    }

    /// Turns a status other than 0 into the error that `explain` reads out of it.
    pub(super) fn success_or(
        self,
        explain: impl FnOnce(Self) -> ImageError,
    ) -> Result<Self, ImageError> {
        if self.status.success() {
            Ok(self)
        } else {
            Err(explain(self))
        }
    }

    pub(super) fn error(self) -> ImageError {
        ImageError::Tool {
            tool: self.tool,
            status: self.status.to_string(),
            tail: self.tail,
        }
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// Whether the path search finds `name`.
pub(crate) fn installed(name: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(SBIN.split(':'))
        .filter(|dir| !dir.is_empty())
        .any(|dir| Path::new(dir).join(name).is_file())
}

#[derive(Default)]
struct Tail(VecDeque<String>);

impl Tail {
    fn push(&mut self, line: &str) {
        if self.0.len() == TAIL_LINES {
            self.0.pop_front();
        }
        self.0.push_back(line.to_owned());
    }

    fn text(self) -> String {
        Vec::from(self.0).join("\n")
    }
}

/// Calls `each` for every non-empty line, cut at [`LINE_BYTES`], with what is not UTF-8 replaced.
fn lines(from: impl Read, mut each: impl FnMut(&str)) -> io::Result<()> {
    let mut from = BufReader::new(from);
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        if from
            .by_ref()
            .take(LINE_BYTES)
            .read_until(b'\n', &mut buffer)?
            == 0
        {
            return Ok(());
        }
        if buffer.last() != Some(&b'\n') {
            from.skip_until(b'\n')?;
        }
        let line = String::from_utf8_lossy(&buffer);
        let line = line.trim_end();
        if !line.is_empty() {
            each(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_is_cut_and_the_next_one_is_whole() {
        let long = "x".repeat(5000);
        let text = format!("first\n{long}\n\nlast\n");
        let mut seen = Vec::new();
        lines(text.as_bytes(), |line| seen.push(line.to_owned())).unwrap();
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[1].len(), 1024);
        assert_eq!(seen[2], "last");
    }

    #[test]
    fn the_tail_of_a_failing_tool_is_bounded_and_in_its_error() {
        let finished = Tool::new("sh").args([
            "-c",
            "i=0; while [ $i -lt 1000 ]; do echo line $i >&2; i=$((i+1)); done; exit 3",
        ]);
        let error = finished.run().unwrap().success().err().unwrap();
        let text = error.to_string();
        assert!(
            text.starts_with("sh failed (exit status: 3):\nline 980\n"),
            "{text}"
        );
        assert!(text.ends_with("line 999"), "{text}");
    }

    /// What the next test runs as a process of its own, to be killed.
    #[test]
    #[ignore = "started by the_tools_of_a_killed_process_die_with_it"]
    fn run_until_killed() {
        let report = std::env::var_os("ICEBOX_TEST_REPORT").unwrap();
        // The inner shell is a descendant that nobody tells of a death.
        let script = r#"sh -c 'read line < "$ICEBOX_TEST_FIFO"' & wait"#;
        let tool = Tool::with_descendants("sh")
            .args(["-c", script])
            .env("ICEBOX_TEST_FIFO", report);
        drop(tool.run());
    }

    #[test]
    fn the_tools_of_a_killed_process_die_with_it() {
        use std::{fs::File, io::Write};

        if !rustix::process::geteuid().is_root() {
            crate::skip::skip_this("process namespaces need root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        )
        .unwrap();
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "guest_image::command::tests::run_until_killed",
            ])
            .env("ICEBOX_TEST_REPORT", &fifo)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Opening for writing returns when the descendant has opened for reading: it runs.
        let mut pipe = File::options().write(true).open(&fifo).unwrap();
        victim.kill().unwrap();
        victim.wait().unwrap();
        // The descendant holds the only reading end. Writing fails once it is gone; until then it would read a line
        // and end, so nothing is written that completes one.
        let mut poll = [rustix::event::PollFd::new(
            &pipe,
            rustix::event::PollFlags::ERR,
        )];
        let timeout = rustix::event::Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        assert_eq!(
            rustix::event::poll(&mut poll, Some(&timeout)).unwrap(),
            1,
            "the descendant lives on"
        );
        assert_eq!(
            pipe.write(b"x").unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[test]
    fn a_missing_tool_is_named() {
        let error = Tool::new("no-such-tool-anywhere").run().err().unwrap();
        assert!(
            matches!(error, ImageError::ToolMissing { ref tool } if tool == "no-such-tool-anywhere")
        );
    }
}
