//! A panic is a bug, and costs the work it happened in: never the sandbox, and never the task that serves it.
//!
//! Nobody knows how far work came that panicked. But that is what a start does not know either, so whoever catches one
//! does what a start does: it believes the record, and [brings the sandbox back](crate::sandbox::Sandbox::bring_back)
//! to where that says it rests.

use std::any::Any;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;

use crate::error::Error;

/// Runs work that may panic; that is an [`Error::Internal`] then.
pub(crate) async fn caught<T>(
    doing: &'static str,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    // What the work left half-done is in the record, and in nothing else that is looked at afterwards.
    let ended = AssertUnwindSafe(work).catch_unwind().await;
    ended.unwrap_or_else(|panic| Err(internal(doing, &*panic)))
}

/// A panic that was caught, as an error.
pub(crate) fn internal(doing: &'static str, panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    Error::Internal {
        doing,
        detail: text.unwrap_or("a panic without words").to_owned(),
    }
}
