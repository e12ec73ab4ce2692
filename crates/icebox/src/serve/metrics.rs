//! What sandboxes use, from the engine's words to the wire's.

use icebox_api::types::{MetricsRange, Resolution, SandboxMetric};
use icebox_api::{ApiError, ErrorCode};
use icebox_engine::manifest::v1::Spec;
use icebox_engine::{Sample, Usage};
use jiff::Timestamp;

/// The beginning of a range.
pub(super) fn start(range: MetricsRange) -> Result<Option<Timestamp>, ApiError> {
    let start = range.start.map(Timestamp::from_second).transpose();
    start.map_err(|error| ApiError::from_error(ErrorCode::Invalid, &error))
}

pub(super) fn resolution(asked: Resolution) -> icebox_engine::Resolution {
    match asked {
        Resolution::Second => icebox_engine::Resolution::Second,
        Resolution::TenSeconds => icebox_engine::Resolution::TenSeconds,
        Resolution::Minute => icebox_engine::Resolution::Minute,
    }
}

/// One sample of a sandbox. What is on its disk is known of this moment only.
pub(super) fn sample(sample: &Sample, spec: &Spec, usage: Option<&Usage>) -> SandboxMetric {
    #[allow(clippy::cast_precision_loss, reason = "a percentage")]
    let permille = sample.cpu_permille as f32;
    let disk_used = usage.and_then(|usage| usage.parts.first());
    SandboxMetric {
        // Seconds of 32 bits are all within the calendar.
        timestamp: Timestamp::from_second(sample.at.into()).unwrap_or_default(),
        timestamp_unix: sample.at.into(),
        seconds: sample.seconds,
        cpu_count: spec.geometry.vcpus,
        cpu_used_pct: permille / 10.0 / f32::from(spec.geometry.vcpus.max(1)),
        mem_used: u64::from(sample.memory_kib) << 10,
        mem_total: spec.geometry.memory().0,
        mem_cache: 0,
        disk_used: disk_used.map_or(0, |part| part.allocated.0),
        disk_total: spec.disk_size.0,
        disk_read_rate: sample.disk_read,
        disk_write_rate: sample.disk_written,
        network_in_rate: sample.network_in,
        network_out_rate: sample.network_out,
    }
}
