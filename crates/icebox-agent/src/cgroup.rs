//! A control group per started process, so that killing a process means everything it started.
//!
//! Only version 2 has `cgroup.kill`. Where there is none (the server outside a sandbox), the process's session and
//! descendants are found in `/proc` instead; what left both is then missed.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::process::{Pid, Signal, kill_process};

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// A process that keeps forking is chased this many times before we give up; `cgroup.kill` needs one.
const KILL_ROUNDS: usize = 16;

/// Makes the groups.
pub(crate) struct Cgroups {
    parent: Option<PathBuf>,
    next: AtomicU64,
    /// Groups whose process has ended while others in them went on; removed when those have ended too.
    leftover: Mutex<Vec<PathBuf>>,
}

/// The group of one started process.
#[derive(Debug)]
pub(crate) struct Tree {
    directory: Option<PathBuf>,
}

impl Cgroups {
    /// Uses the version 2 hierarchy mounted at `mountpoint`, if there is one.
    pub(crate) fn detect(mountpoint: &Path) -> Self {
        let is_v2 = rustix::fs::statfs(mountpoint)
            .is_ok_and(|fs| u64::try_from(fs.f_type) == Ok(CGROUP2_MAGIC));
        let parent = is_v2.then(|| mountpoint.join("icebox"));
        let parent = parent.filter(|parent| match fs::create_dir(parent) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::AlreadyExists,
        });
        Self {
            parent,
            next: AtomicU64::new(0),
            leftover: Mutex::new(Vec::new()),
        }
    }

    /// Makes a group for a process about to start. Without version 2 it is one in name only.
    pub(crate) fn create(&self) -> io::Result<Tree> {
        let Some(parent) = &self.parent else {
            return Ok(Tree { directory: None });
        };
        loop {
            let directory = parent.join(self.next.fetch_add(1, Ordering::Relaxed).to_string());
            match fs::create_dir(&directory) {
                Ok(()) => {
                    return Ok(Tree {
                        directory: Some(directory),
                    });
                }
                // Left by a server that was restarted, with processes that outlived it.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Gives a group back: now if it is empty, else when it is found empty at a later call.
    pub(crate) fn release(&self, tree: &Tree) {
        let mut leftover = self.leftover.lock().unwrap_or_else(PoisonError::into_inner);
        leftover.extend(tree.directory.clone());
        leftover.retain(|directory| match fs::remove_dir(directory) {
            Ok(()) => false,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        });
    }
}

impl Tree {
    /// The directory to join, if any.
    pub(crate) fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// Kills every process of the tree whose first process is `leader`. Those that are gone already do not count.
    pub(crate) fn kill(&self, leader: Pid) {
        if let Some(directory) = &self.directory
            && fs::write(directory.join("cgroup.kill"), "1").is_ok()
        {
            return;
        }
        for _ in 0..KILL_ROUNDS {
            let members = members_by_session(leader);
            if members.is_empty() {
                return;
            }
            for pid in members {
                // It may have ended meanwhile; the next round tells.
                kill_process(pid, Signal::KILL).ok();
            }
        }
    }
}

/// Processes that are not zombies and are in the session of `leader` or descend from it.
fn members_by_session(leader: Pid) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let processes: Vec<Stat> = entries
        .filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            Stat::parse(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
        })
        .collect();
    let leader = leader.as_raw_nonzero().get();
    let mut members: Vec<i32> = processes
        .iter()
        .filter(|p| p.pid == leader || p.session == leader)
        .map(|p| p.pid)
        .collect();
    let mut checked = 0;
    while checked < members.len() {
        let parent = members[checked];
        checked += 1;
        let children = processes
            .iter()
            .filter(|p| p.parent == parent)
            .map(|p| p.pid);
        let new: Vec<i32> = children.filter(|pid| !members.contains(pid)).collect();
        members.extend(new);
    }
    let alive = |pid: &i32| processes.iter().any(|p| p.pid == *pid && p.state != 'Z');
    members
        .into_iter()
        .filter(alive)
        .filter_map(Pid::from_raw)
        .collect()
}

/// What proc_pid_stat(5) tells about kinship.
struct Stat {
    pid: i32,
    state: char,
    parent: i32,
    session: i32,
}

impl Stat {
    fn parse(pid: i32, text: &str) -> Option<Self> {
        // The name, in parentheses, may contain anything, parentheses included.
        let mut fields = text.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        Some(Self {
            pid,
            state,
            parent,
            session,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Stat;

    #[test]
    fn stat_is_read_behind_any_name() {
        let stat = Stat::parse(7, "7 (a) b (c)) S 3 7 5 0 -1 4194560").unwrap();
        assert_eq!((stat.state, stat.parent, stat.session), ('S', 3, 5));
    }
}
