//! glibc's allocator, told to give memory back.
#![allow(unsafe_code, reason = "mallopt has no safe wrapper")]

/// Blocking calls run on threads that come and go, and by default each may get an arena of its own, which keeps the most
/// it ever held. Two are enough for two workers.
const ARENAS: i32 = 2;
/// Buffers from this size up are mappings of their own, which go when they are freed. This is glibc's own first value;
/// setting it keeps glibc from raising it to the largest buffer that was freed.
const MAP_FROM: i32 = 128 * 1024;

/// Keeps what the daemon holds near to what it uses. To be called before there are threads.
pub(super) fn bound_malloc() {
    for (parameter, value) in [
        (libc::M_ARENA_MAX, ARENAS),
        (libc::M_MMAP_THRESHOLD, MAP_FROM),
    ] {
        // SAFETY: mallopt takes two integers and refuses what it does not know.
        let set = unsafe { libc::mallopt(parameter, value) };
        if set == 0 {
            tracing::debug!(parameter, value, "mallopt refused");
        }
    }
}
