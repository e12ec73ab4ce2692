//! The host's time stamp counter.

#![allow(unsafe_code, reason = "reading the time stamp counter is an intrinsic")]

/// The time stamp counter, if this processor has one that runs at a constant rate.
#[cfg(target_arch = "x86_64")]
pub(super) fn time_stamp() -> Option<u64> {
    // SAFETY: rdtsc is part of x86-64, and user space may execute it on Linux unless prctl(PR_SET_TSC) forbade it,
    // which this program never does.
    Some(unsafe { core::arch::x86_64::_rdtsc() })
}

/// Guests of other architectures have no such counter.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn time_stamp() -> Option<u64> {
    None
}
