//! The nftables rules, applied by nft(8).
//!
//! There are two rule sets, both static text that a reviewer can read: [`host.nft`](host.nft) for the host and
//! [`slot.nft`](slot.nft) for the inside of a slot. Neither is on a hot path. The host's is applied once per start; a
//! slot's when its namespace is prepared. Taking, changing and releasing a slot need no rule at all, since the host
//! judges a link by its name and its link group.
//!
//! Why a process and not a library: libnftables and libnftnl are GPL, and the pure-Rust netlink crates cannot express
//! these rules yet.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::naming::Naming;

/// Link group of links whose sandbox may reach the internet. Any number that is not 0 (every link's group at first)
/// will do: the rules look at it on our links alone.
pub(super) const EGRESS_GROUP: u32 = 0x001c_eb0c;

const HOST: &str = include_str!("host.nft");
const SLOT: &str = include_str!("slot.nft");

/// Where nft(8) is when it is not on the `PATH`, as with the ones that cron and su give.
const USUAL_PLACES: [&str; 2] = ["/usr/sbin/nft", "/sbin/nft"];

/// Why rules could not be applied.
#[derive(Debug, thiserror::Error)]
pub(super) enum RulesError {
    #[error("nft is not installed")]
    Missing,
    #[error("could not run {}", program.display())]
    Run { program: PathBuf, source: io::Error },
    #[error("nft may not change the rules: {message}")]
    NotPermitted { message: String },
    #[error("nft refused the rules: {message}")]
    Refused { message: String },
}

/// Applies the rules of a slot in the calling thread's network namespace, which must be new.
pub(super) fn apply_slot(naming: &Naming) -> Result<(), RulesError> {
    apply(&SLOT.replace("@PREFIX@", &naming.prefix().to_string()))
}

/// Applies or replaces the rules on the host, in one transaction.
pub(super) fn apply_host(naming: &Naming) -> Result<(), RulesError> {
    apply(&host_rules(naming))
}

/// Ensures that the table on the host is absent.
pub(super) fn remove_host(naming: &Naming) -> Result<(), RulesError> {
    let table = naming.table();
    // Declaring it first makes the deletion succeed when there is none.
    apply(&format!("table inet {table}\ndelete table inet {table}\n"))
}

fn host_rules(naming: &Naming) -> String {
    HOST.replace("@TABLE@", naming.table())
        .replace("@STEM@", naming.stem())
        .replace("@PREFIX@", &naming.prefix().to_string())
        .replace("@EGRESS_GROUP@", &EGRESS_GROUP.to_string())
}

/// Blocks until nft is done: a few milliseconds. Runs it in the network namespace of the calling thread, which a
/// child process inherits.
fn apply(script: &str) -> Result<(), RulesError> {
    let program = find()?;
    let run = |source| RulesError::Run {
        program: program.clone(),
        source,
    };
    let mut child = Command::new(&program)
        .args(["-f", "-"])
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(run)?;
    let written = match child.stdin.take() {
        Some(mut stdin) => stdin.write_all(script.as_bytes()),
        None => Ok(()),
    };
    // Always reaped; what nft has to say explains a failed write better than EPIPE does.
    let output = child.wait_with_output().map_err(run)?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        let message = message
            .lines()
            .find(|line| line.contains("rror"))
            .unwrap_or("it gave no reason");
        let message = message.to_owned();
        return Err(if message.contains("Operation not permitted") {
            RulesError::NotPermitted { message }
        } else {
            RulesError::Refused { message }
        });
    }
    written.map_err(run)
}

fn find() -> Result<PathBuf, RulesError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join("nft"))
        .chain(USUAL_PLACES.map(PathBuf::from))
        .find(|candidate| candidate.is_file())
        .ok_or(RulesError::Missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Instance;
    use std::path::Path;

    #[test]
    fn inv_48_host_rules_speak_of_our_table_and_our_links_alone() {
        let naming = Naming::new(
            &Instance::of_data_directory(Path::new("/var/lib/icebox")),
            "10.213.0.0/16".parse().unwrap(),
            Path::new("/run/netns"),
        );
        let rules = host_rules(&naming);
        let placeholders = rules.matches('@').count();
        assert_eq!(placeholders, rules.matches("@not_public").count());
        // A rule in a chain that the kernel calls decides over everybody's packets, unless it asks for our links first.
        let mut is_base = false;
        for line in rules.lines().map(str::trim) {
            if line.starts_with("table") || line.starts_with("delete") {
                assert!(line.contains("inet icebox_1596b0"), "{line}");
            } else if line.starts_with("chain") {
                is_base = false;
            } else if line.starts_with("type") && line.contains("hook") {
                is_base = true;
                assert!(line.ends_with("policy accept;"), "{line}");
            } else if is_base && !line.is_empty() && !line.starts_with(['#', '}']) {
                let asks = line.starts_with("iifname \"ibx1596b0-*\"")
                    || line.starts_with("oifname \"ibx1596b0-*\"");
                assert!(asks, "{line}");
            }
        }
    }
}
