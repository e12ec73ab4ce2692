//! What can go wrong with a slot, by step.

use std::fmt;
use std::io;

use icebox_engine::host::{ErrorKind, HostError};
use icebox_engine::id::Slot;
use ipnet::Ipv4Net;
use rustix::io::Errno;

use super::netlink;
use super::rules::RulesError;

/// One step of setting a slot up or taking it down, in the order of setting up. Tests inject faults by step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    /// Preparation, inside a namespace that only the daemon holds.
    Namespace,
    Sysctls,
    Tap,
    TapAddress,
    Neighbour,
    SlotRules,
    /// Giving a prepared namespace to a slot.
    Forwarding,
    Link,
    LinkForwarding,
    GatewayAddress,
    HostRoute,
    SlotAddress,
    SlotRoute,
    Publish,
    /// Taking down.
    DeleteLink,
    Unpublish,
    Unlink,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Namespace => "make a network namespace",
            Self::Sysctls => "set the namespace's sysctls",
            Self::Tap => "make the tap",
            Self::TapAddress => "give the tap its address",
            Self::Neighbour => "enter the guest as a neighbour",
            Self::SlotRules => "apply the namespace's rules",
            Self::Forwarding => "switch net.ipv4.ip_forward on",
            Self::Link => "link the namespace to the host",
            Self::LinkForwarding => "let the host judge what comes out of the link",
            Self::GatewayAddress => "give the host its address on the link",
            Self::HostRoute => "add the host's route to the slot",
            Self::SlotAddress => "give the namespace the slot's address",
            Self::SlotRoute => "add the namespace's default route",
            Self::Publish => "bind the namespace to its path",
            Self::DeleteLink => "delete the link",
            Self::Unpublish => "unmount the namespace",
            Self::Unlink => "remove the namespace's file",
        })
    }
}

/// What a step failed with.
#[derive(Debug, thiserror::Error)]
pub(super) enum Cause {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Rules(#[from] RulesError),
    #[error("{destination} is routed to {by} already")]
    AddressTaken { destination: Ipv4Net, by: String },
}

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("could not {step}")]
pub(super) struct Failure {
    pub(super) step: Step,
    #[source]
    pub(super) cause: Cause,
}

impl From<io::Error> for Failure {
    /// What fails before any named step: starting a thread, entering a namespace.
    fn from(source: io::Error) -> Self {
        Self {
            step: Step::Namespace,
            cause: Cause::Io(source),
        }
    }
}

/// An operation on a slot that failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetworkError {
    #[error("network slot {slot} does not exist: {prefix} has room for {capacity} slots")]
    OutOfRange {
        slot: Slot,
        prefix: Ipv4Net,
        capacity: u16,
    },
    #[error(
        "set up network slot {slot}{}",
        Listed("; undoing it failed too", unwind)
    )]
    SetUp {
        slot: Slot,
        #[source]
        failure: Failure,
        unwind: Vec<Failure>,
    },
    #[error("remove network slot {slot}{}", Listed("", failures))]
    TakeDown { slot: Slot, failures: Vec<Failure> },
    #[error("list network slots")]
    List(#[source] io::Error),
    #[error("prepare a network namespace")]
    Prepare(#[source] Failure),
    #[error("apply the host's network rules")]
    HostRules(#[source] RulesError),
    #[error("look at the host's network")]
    Look(#[source] io::Error),
    #[error("network prefix {prefix} overlaps with {other}, which is routed to {by}")]
    PrefixTaken {
        prefix: Ipv4Net,
        other: Ipv4Net,
        by: String,
    },
    #[error("make the directory of network namespaces {path}")]
    Directory { path: String, source: io::Error },
}

/// Failures with their causes, in one line.
struct Listed<'a>(&'a str, &'a [Failure]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.1.is_empty() {
            return Ok(());
        }
        f.write_str(self.0)?;
        for (n, failure) in self.1.iter().enumerate() {
            let separator = if n == 0 { ": " } else { "; " };
            write!(f, "{separator}{failure} ({})", failure.cause)?;
        }
        Ok(())
    }
}

const PREFIX_HINT: &str = "choose another prefix for slots (network.prefix in the configuration) that nothing on this \
     host or its networks uses";

const RIGHTS_HINT: &str = "run the daemon as root with CAP_SYS_ADMIN and CAP_NET_ADMIN (a container needs both, and \
     writable /proc/sys/net)";

impl Cause {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Io(error) if netlink::is(error, Errno::PERM) => ErrorKind::Unsupported,
            Self::Io(error) if netlink::is(error, Errno::ACCESS) => ErrorKind::Unsupported,
            Self::Io(error) if netlink::is(error, Errno::OPNOTSUPP) => ErrorKind::Unsupported,
            Self::Io(error) if netlink::is(error, Errno::BUSY) => ErrorKind::Busy,
            Self::Io(error)
                if netlink::is(error, Errno::NOMEM) || netlink::is(error, Errno::NOSPC) =>
            {
                ErrorKind::Exhausted
            }
            Self::Io(_) => ErrorKind::Other,
            Self::Rules(
                RulesError::Missing | RulesError::NotPermitted { .. } | RulesError::Refused { .. },
            ) => ErrorKind::Unsupported,
            Self::Rules(RulesError::Run { .. }) => ErrorKind::Other,
            Self::AddressTaken { .. } => ErrorKind::AlreadyExists,
        }
    }

    fn hint(&self, step: Step) -> Option<&'static str> {
        match self {
            Self::Io(error)
                if netlink::is(error, Errno::PERM) || netlink::is(error, Errno::ACCESS) =>
            {
                Some(RIGHTS_HINT)
            }
            Self::Io(error)
                if step == Step::Tap
                    && (netlink::is(error, Errno::NOENT) || netlink::is(error, Errno::NODEV)) =>
            {
                Some("load the tun module (`modprobe tun`) so that /dev/net/tun exists")
            }
            Self::Io(error) if step == Step::Link && netlink::is(error, Errno::OPNOTSUPP) => {
                Some("load the veth module (`modprobe veth`)")
            }
            Self::Rules(error) => Some(rules_hint(error)),
            Self::AddressTaken { .. } => Some(PREFIX_HINT),
            Self::Io(_) => None,
        }
    }
}

fn rules_hint(error: &RulesError) -> &'static str {
    match error {
        RulesError::Missing => "install nftables (`apt install nftables`)",
        RulesError::NotPermitted { .. } => RIGHTS_HINT,
        RulesError::Run { .. } => "check that nft can be run as root",
        RulesError::Refused { .. } => {
            "the kernel needs nf_tables with nat, masq, ct and fib (nft_chain_nat, nft_masq, nft_ct, nft_fib_inet)"
        }
    }
}

impl From<NetworkError> for HostError {
    fn from(error: NetworkError) -> Self {
        let (kind, hint) = match &error {
            NetworkError::OutOfRange { .. } => (
                ErrorKind::Exhausted,
                Some(
                    "destroy sandboxes that are not needed, or widen the prefix for slots (network.prefix)",
                ),
            ),
            NetworkError::SetUp { failure, .. } | NetworkError::Prepare(failure) => {
                (failure.cause.kind(), failure.cause.hint(failure.step))
            }
            NetworkError::TakeDown { failures, .. } => failures
                .first()
                .map_or((ErrorKind::Other, None), |failure| {
                    (failure.cause.kind(), failure.cause.hint(failure.step))
                }),
            NetworkError::HostRules(error) => (ErrorKind::Unsupported, Some(rules_hint(error))),
            NetworkError::PrefixTaken { .. } => (ErrorKind::AlreadyExists, Some(PREFIX_HINT)),
            NetworkError::List(_) | NetworkError::Look(_) | NetworkError::Directory { .. } => {
                (ErrorKind::Other, None)
            }
        };
        let host = Self::new(kind, error.to_string());
        let host = match hint {
            Some(hint) => host.hint(hint),
            None => host,
        };
        match error.into_cause() {
            Some(cause) => host.caused_by(cause),
            None => host,
        }
    }
}

impl NetworkError {
    /// The cause alone: the message has become the [`HostError`]'s own.
    fn into_cause(self) -> Option<Box<dyn std::error::Error + Send + Sync>> {
        match self {
            Self::SetUp { failure, .. } | Self::Prepare(failure) => Some(failure.into()),
            Self::HostRules(error) => Some(error.into()),
            Self::List(error) | Self::Look(error) | Self::Directory { source: error, .. } => {
                Some(error.into())
            }
            Self::OutOfRange { .. } | Self::TakeDown { .. } | Self::PrefixTaken { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(step: Step, errno: Errno) -> String {
        let cause = Cause::Io(errno.into());
        let error = NetworkError::Prepare(Failure { step, cause });
        let error = HostError::from(error);
        error.hint_text().unwrap_or_default().to_owned()
    }

    #[test]
    fn what_is_missing_has_a_hint_that_names_it() {
        assert!(hint(Step::Tap, Errno::NOENT).contains("modprobe tun"));
        assert!(hint(Step::Link, Errno::OPNOTSUPP).contains("modprobe veth"));
        assert!(hint(Step::Namespace, Errno::PERM).contains("CAP_SYS_ADMIN"));
        let missing = HostError::from(NetworkError::HostRules(RulesError::Missing));
        assert!(missing.hint_text().unwrap().contains("install nftables"));
    }

    #[test]
    fn every_failure_of_a_teardown_is_in_its_message() {
        let failure = |step, errno: Errno| Failure {
            step,
            cause: Cause::Io(errno.into()),
        };
        let error = HostError::from(NetworkError::TakeDown {
            slot: Slot(3),
            failures: vec![
                failure(Step::DeleteLink, Errno::PERM),
                failure(Step::Unpublish, Errno::BUSY),
            ],
        });
        assert_eq!(
            error.to_string(),
            "remove network slot 3: could not delete the link (Operation not permitted (os error 1)); \
             could not unmount the namespace (Device or resource busy (os error 16))"
        );
    }
}
