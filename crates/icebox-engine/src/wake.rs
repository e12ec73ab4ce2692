//! Resuming a paused sandbox for whoever asks for it: once, however many ask at the same time.
//!
//! All who ask while it is being resumed wait for the one attempt, and share its outcome. An attempt that failed is over:
//! who asks after that begins another.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};

use crate::error::Error;
use crate::id::SandboxId;

type Attempt = Shared<BoxFuture<'static, Result<(), Arc<Error>>>>;

/// The attempts that are under way.
#[derive(Clone, Default)]
pub(crate) struct Wakes(Arc<Mutex<BTreeMap<SandboxId, Attempt>>>);

impl Wakes {
    /// Joins the attempt that is under way for this sandbox, or begins one, which ends by itself whoever goes away
    /// meanwhile (INV-20).
    pub(crate) async fn wake<F>(
        &self,
        sandbox: &SandboxId,
        resume: impl FnOnce() -> F,
    ) -> Result<(), Arc<Error>>
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let attempt = {
            let mut attempts = self.attempts();
            match attempts.get(sandbox) {
                Some(attempt) => attempt.clone(),
                None => {
                    let attempt = self.begin(sandbox, resume());
                    attempts.insert(sandbox.clone(), attempt.clone());
                    attempt
                }
            }
        };
        attempt.await
    }

    fn begin(
        &self,
        sandbox: &SandboxId,
        resume: impl Future<Output = Result<(), Error>> + Send + 'static,
    ) -> Attempt {
        let (wakes, of) = (self.clone(), sandbox.clone());
        let resuming = tokio::spawn(async move {
            let resumed = resume.await;
            wakes.attempts().remove(&of);
            resumed
        });
        let attempt = async move {
            match resuming.await {
                Ok(resumed) => resumed.map_err(Arc::new),
                Err(_) => Err(Arc::new(Error::Stopping)),
            }
        };
        attempt.boxed().shared()
    }

    fn attempts(&self) -> std::sync::MutexGuard<'_, BTreeMap<SandboxId, Attempt>> {
        // Single inserts and removes: a panic elsewhere leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
