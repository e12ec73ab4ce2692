//! The calls that only the host makes, as JSON: what a sandbox is told after it booted or was restored, and what it
//! is asked to do before it is captured.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Token;

/// What happened to the guest just before [`Init`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// The kernel started.
    Boot,
    /// The same sandbox came back from a pause.
    Resume,
    /// A new sandbox began from a snapshot.
    Fork,
}

/// Who the sandbox is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Becomes `E2B_SANDBOX_ID`.
    pub sandbox_id: String,
    /// Becomes `E2B_TEMPLATE_ID`.
    pub template_id: String,
    /// At most 64 bytes; also written to `/etc/hostname` and `/etc/hosts`.
    pub hostname: String,
    /// 32 lower-case hex digits (machine-id(5)), unique to the sandbox.
    pub machine_id: String,
}

/// `POST /init`: makes the guest the sandbox it is to be. The first thing after every boot and every restore.
///
/// Authenticated by the token in force: the one of the kernel command line after a boot, the one the captured guest
/// had after a restore. Safe to repeat; a call that failed has changed neither token nor environment, so it can be
/// repeated with the same credentials.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Init {
    pub origin: Origin,
    pub identity: Identity,
    /// The token in force from now on. Without one, everything but the host's calls is open to whoever reaches the
    /// port, and the host's calls keep the token they had.
    pub access_token: Option<Token>,
    /// Environment of every process started from now on. Replaces the previous one.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Nanoseconds since 1970 that the guest's clock is set to.
    pub clock_unix_ns: u64,
    /// Random bytes of the host, mixed into and credited to the guest's pool before it is reseeded; at least 32.
    #[serde(with = "base64_bytes")]
    pub entropy: Vec<u8>,
    /// Runs what names no user itself; when absent, `user` where the guest has one, else `root`.
    #[serde(default)]
    pub default_user: Option<String>,
    /// Where processes start and relative paths begin; the user's home when absent.
    #[serde(default)]
    pub default_workdir: Option<String>,
    /// Close TCP connections to other machines, except the one that carries this call. After a restore their other
    /// ends are gone or belong to someone else. Connections inside the guest stay.
    #[serde(default)]
    pub close_connections: bool,
}

/// Answer to [`Init`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitReport {
    /// The envd version the agent implements.
    pub envd_version: String,
    /// Version of the agent itself.
    pub agent_version: String,
    /// `/proc/sys/kernel/random/boot_id`: changes on boot, not on restore.
    pub boot_id: String,
    /// How far the clock was moved, in nanoseconds; positive is forward.
    pub clock_step_ns: i64,
    /// TCP connections that were closed.
    pub connections_closed: u32,
    /// What could not be done and does not endanger the sandbox, in words.
    pub problems: Vec<String>,
}

/// `POST /clock`: moves the guest's clock, and reads it. What a caller reads lies between the moments at which it asked and
/// got its answer, so the difference to its own clock is known to half of that; the move itself may take as long as it
/// likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// Nanoseconds; positive is forward, zero only reads.
    pub step_ns: i64,
}

/// Answer to [`Clock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockReport {
    /// Nanoseconds since 1970, by the guest's clock, after the move.
    pub unix_ns: u64,
}

/// `POST /prepare`: quiesce the guest before a capture. Best effort: whatever happens, the capture goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// Write all dirty data to the disk.
    pub sync: bool,
    /// Give clean page cache back. It costs the guest re-reads after the capture.
    pub drop_caches: bool,
    /// Tell the disk which blocks of the root filesystem are free.
    pub trim: bool,
    /// Bound of all steps together, in milliseconds. A step that is still under way then is left to finish by itself.
    pub timeout_ms: u32,
}

/// How one step of [`Prepare`] went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum StepOutcome {
    Done {
        micros: u64,
    },
    Failed {
        micros: u64,
        error: String,
    },
    TimedOut,
    /// Not asked for, or no time was left for it.
    Skipped,
}

/// Answer to [`Prepare`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareReport {
    pub sync: StepOutcome,
    pub drop_caches: StepOutcome,
    pub trim: StepOutcome,
    /// Bytes that the trim told the disk about.
    pub trimmed_bytes: u64,
}

/// `GET /metrics`. Field names are envd's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Seconds since 1970.
    pub ts: u64,
    pub cpu_count: u32,
    /// Of all CPUs together, 0 to 100, since the previous call (since boot for the first).
    pub cpu_used_pct: f32,
    /// Bytes, like the five below.
    pub mem_total: u64,
    pub mem_used: u64,
    pub mem_cache: u64,
    pub disk_used: u64,
    pub disk_total: u64,
}

/// Body of every error that is not a Connect error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The HTTP status again; SDKs read it from here.
    pub code: u16,
    pub message: String,
}

/// One uploaded file, as `POST /files` answers it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadedFile {
    pub path: String,
    pub name: String,
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

mod base64_bytes {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        STANDARD
            .decode(String::deserialize(deserializer)?)
            .map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inv_43_debug_of_init_hides_the_token() {
        let init = Init {
            origin: Origin::Boot,
            identity: Identity {
                sandbox_id: "i1".into(),
                template_id: "t1".into(),
                hostname: "h".into(),
                machine_id: "0".repeat(32),
            },
            access_token: Some(Token::new("hunter2")),
            env: BTreeMap::new(),
            clock_unix_ns: 1,
            entropy: vec![0xff; 32],
            default_user: None,
            default_workdir: None,
            close_connections: false,
        };
        assert!(!format!("{init:?}").contains("hunter2"));
        let back: Init = serde_json::from_str(&serde_json::to_string(&init).unwrap()).unwrap();
        assert_eq!(back.entropy, init.entropy);
        assert!(back.access_token.unwrap().matches(b"hunter2"));
    }
}
