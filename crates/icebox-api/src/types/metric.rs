//! What sandboxes use.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How fine samples are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Resolution {
    /// Seconds, of the last ten minutes.
    #[serde(rename = "1s")]
    Second,
    /// Ten seconds, of the last two hours.
    #[serde(rename = "10s")]
    TenSeconds,
    /// Minutes, of the last two days.
    #[serde(rename = "60s")]
    Minute,
}

/// Which samples. E2B has the first two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MetricsRange {
    /// Not before this, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<i64>,
    /// Not after this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<i64>,
    /// Of this resolution only. Absent: as fine as is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolution: Option<Resolution>,
}

/// What a sandbox used for a while. E2B's `SandboxMetric`, with our fields added; seen from the host, so memory is what
/// the guest and its VMM occupy there, and the guest's caches are part of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SandboxMetric {
    /// The end of that while.
    pub timestamp: Timestamp,
    /// The same, in seconds since 1970.
    pub timestamp_unix: i64,
    /// How long that was.
    pub seconds: u32,
    /// Virtual CPUs.
    pub cpu_count: u8,
    /// CPU time of all of them together: 100 is every one of them all the time.
    pub cpu_used_pct: f32,
    /// Bytes of the host's memory.
    pub mem_used: u64,
    /// Bytes of the guest's memory.
    pub mem_total: u64,
    /// Always 0: not seen from the host.
    pub mem_cache: u64,
    /// Allocated bytes of what the guest has written to its disk since its last pause, now.
    pub disk_used: u64,
    /// Bytes of the disk that the guest sees.
    pub disk_total: u64,
    /// Bytes per second, as the three below: read from the host's disks.
    pub disk_read_rate: u32,
    /// Written to the host's disks.
    pub disk_write_rate: u32,
    /// Sent to the guest.
    pub network_in_rate: u32,
    /// Sent by the guest.
    pub network_out_rate: u32,
}
