//! Becomes a user's process: the last stretch between the server and the program.
//!
//! The server starts this role with the program's environment, standard streams and arguments in place. It joins the
//! process's control group, opens a session, takes the terminal, drops to the user, changes directory and runs the
//! program. What fails is written to a pipe as `<step> <errno>`; the pipe closes when the program runs, so that the
//! server learns which of the two happened before it reports a start.

use std::{
    ffi::{OsStr, OsString},
    fmt, fs, io,
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    process::{Command, ExitCode},
};

use rustix::{
    fs::Mode,
    process::{Gid, Resource, Uid},
};

use crate::sys;

/// Name of the role.
pub(crate) const ROLE: &str = "launch";

/// What every distribution has.
const SOFT_MAX_FILES: u64 = 1024;

/// How a launch is asked for. Everything else (environment, streams) is inherited.
pub(crate) struct Launch<'a> {
    /// Control group directory to join.
    pub(crate) cgroup: Option<&'a OsStr>,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: &'a [u32],
    /// Whether standard input is a terminal to be taken as the controlling one.
    pub(crate) terminal: bool,
    pub(crate) cwd: &'a OsStr,
    pub(crate) program: &'a OsStr,
    pub(crate) args: &'a [String],
}

impl Launch<'_> {
    /// The arguments that [`run`] reads back. `status` is the number of an inheritable descriptor.
    pub(crate) fn to_args(&self, status: i32) -> Vec<OsString> {
        let groups: Vec<String> = self.groups.iter().map(ToString::to_string).collect();
        let mut args: Vec<OsString> = vec![
            ROLE.into(),
            status.to_string().into(),
            self.cgroup.unwrap_or_default().into(),
            self.uid.to_string().into(),
            self.gid.to_string().into(),
            groups.join(",").into(),
            if self.terminal { "terminal" } else { "" }.into(),
            self.cwd.into(),
            self.program.into(),
        ];
        args.extend(self.args.iter().map(OsString::from));
        args
    }
}

/// The step at which a launch failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Arguments,
    Cgroup,
    Session,
    Terminal,
    User,
    Directory,
    Program,
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Arguments,
        Self::Cgroup,
        Self::Session,
        Self::Terminal,
        Self::User,
        Self::Directory,
        Self::Program,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Arguments => "arguments",
            Self::Cgroup => "cgroup",
            Self::Session => "session",
            Self::Terminal => "terminal",
            Self::User => "user",
            Self::Directory => "directory",
            Self::Program => "program",
        }
    }
}

/// A launch that failed.
#[derive(Debug, thiserror::Error)]
#[error("failed at the step '{step}'")]
pub(crate) struct LaunchError {
    pub(crate) step: Step,
    pub(crate) source: io::Error,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl LaunchError {
    fn to_report(&self) -> String {
        format!("{} {}", self.step, self.source.raw_os_error().unwrap_or(0))
    }

    /// Reads what the launched process wrote before its end of the pipe closed: `None` if the program runs.
    pub(crate) fn from_report(report: &str) -> Option<Self> {
        if report.is_empty() {
            return None;
        }
        let (step, errno) = report.split_once(' ').unwrap_or((report, ""));
        let step = Step::ALL
            .into_iter()
            .find(|known| known.name() == step)
            .unwrap_or(Step::Arguments);
        Some(Self {
            step,
            source: io::Error::from_raw_os_error(errno.parse().unwrap_or(0)),
        })
    }
}

/// Runs the role. Returns only if the program could not be run.
pub(crate) fn run(args: &[OsString]) -> ExitCode {
    let invalid = || eprintln!("icebox-agent: '{ROLE}' is for the server's use only");
    let Some(status) = args.first().and_then(|arg| arg.to_str()?.parse().ok()) else {
        invalid();
        return ExitCode::from(2);
    };
    let Ok(status) = sys::take_inherited(status) else {
        invalid();
        return ExitCode::from(2);
    };
    let error = become_program(&args[1..]);
    report(&status, &error);
    ExitCode::from(127)
}

fn report(status: &OwnedFd, error: &LaunchError) {
    // A server that went away does not read it; then nobody else would either.
    rustix::io::write(status, error.to_report().as_bytes()).ok();
}

fn become_program(args: &[OsString]) -> LaunchError {
    let at = |step| move |source: io::Error| LaunchError { step, source };
    let [cgroup, uid, gid, groups, terminal, cwd, program, args @ ..] = args else {
        return at(Step::Arguments)(io::ErrorKind::InvalidInput.into());
    };
    let prepare = || -> Result<(), LaunchError> {
        if !cgroup.is_empty() {
            let procs = std::path::Path::new(cgroup).join("cgroup.procs");
            fs::write(procs, "0").map_err(at(Step::Cgroup))?;
        }
        sys::reset_signals().map_err(at(Step::Session))?;
        rustix::process::setsid().map_err(|errno| at(Step::Session)(errno.into()))?;
        if !terminal.is_empty() {
            rustix::process::ioctl_tiocsctty(io::stdin())
                .map_err(|errno| at(Step::Terminal)(errno.into()))?;
        }
        // The server is protected from the out-of-memory killer; what it starts is what should go instead. Where
        // that is not allowed, neither was the protection.
        fs::write("/proc/self/oom_score_adj", "0").ok();
        limit_files();
        become_user(uid, gid, groups).map_err(at(Step::User))?;
        rustix::process::umask(Mode::from_raw_mode(0o022));
        std::env::set_current_dir(cwd).map_err(at(Step::Directory))
    };
    match prepare() {
        Err(error) => error,
        Ok(()) => at(Step::Program)(Command::new(program).args(args).exec()),
    }
}

/// Programs that go through all descriptors, or use select(2), expect few; those that need many raise the limit.
fn limit_files() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = Some(SOFT_MAX_FILES.min(limit.maximum.unwrap_or(u64::MAX)));
    // Lowering is always allowed.
    rustix::process::setrlimit(Resource::Nofile, limit).ok();
}

/// This process has one thread, so the calls that change one thread's credentials change the process's.
fn become_user(uid: &OsStr, gid: &OsStr, groups: &OsStr) -> io::Result<()> {
    let number = |text: &OsStr| -> io::Result<u32> {
        text.to_str()
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    };
    let groups = groups.to_str().ok_or(io::ErrorKind::InvalidInput)?;
    let groups = groups
        .split(',')
        .filter(|group| !group.is_empty())
        .map(|group| Ok(Gid::from_raw(number(OsStr::new(group))?)))
        .collect::<io::Result<Vec<_>>>()?;
    rustix::thread::set_thread_groups(&groups)?;
    rustix::thread::set_thread_gid(Gid::from_raw(number(gid)?))?;
    rustix::thread::set_thread_uid(Uid::from_raw(number(uid)?))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_survives_the_pipe() {
        for step in Step::ALL {
            let error = LaunchError {
                step,
                source: io::Error::from_raw_os_error(13),
            };
            let back = LaunchError::from_report(&error.to_report()).unwrap();
            assert_eq!((back.step, back.source.raw_os_error()), (step, Some(13)));
        }
        assert!(LaunchError::from_report("").is_none());
    }
}
