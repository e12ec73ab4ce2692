//! Turns: what concerns one thing happens in the order in which it was asked for.
//!
//! File system work [runs to its end](crate::blocking) when its caller stops waiting for it. Whoever then asks how far
//! it came must not be answered in the middle of it: a freeze that is late, but will still rename the head, must not be
//! taken for one that never happened. So whatever is asked later waits until it is over.

use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher, Hash};
use std::sync::Arc;

use icebox_engine::host::HostError;
use tokio::sync::Mutex;

use crate::blocking::blocking;

/// How many queues the work is spread over. Two things in one queue only wait for each other.
const QUEUES: usize = 256;

/// The queues. Cheap to clone; all clones are the same queues.
#[derive(Clone, Debug)]
pub(crate) struct Turns(Arc<[Arc<Mutex<()>>]>);

impl Turns {
    pub(crate) fn new() -> Self {
        Self((0..QUEUES).map(|_| Arc::default()).collect())
    }

    /// Runs `work` on a thread that may block, after everything that was asked of `owner` before.
    ///
    /// Cancel-safe: the turn ends when the work does, not when the caller goes away.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        owner: &(impl Hash + ?Sized),
        work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, HostError> {
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(owner);
        let queue = usize::try_from(hash % QUEUES as u64).unwrap_or(0);
        let turn = Arc::clone(&self.0[queue]).lock_owned().await;
        blocking(move || {
            let _turn = turn;
            work()
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::sync::mpsc;
    use std::task::Poll;

    use super::*;

    #[tokio::test]
    async fn work_that_nobody_waits_for_any_more_keeps_its_turn() {
        let turns = Turns::new();
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let (release, released) = mpsc::channel();
        let (done, order) = mpsc::channel();
        let first = {
            let (turns, done) = (turns.clone(), done.clone());
            tokio::spawn(async move {
                let work = move || {
                    begun.send(()).unwrap();
                    released.recv().unwrap();
                    done.send("first").unwrap();
                    Ok(())
                };
                turns.run("head", work).await
            })
        };
        has_begun.await.unwrap();
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());

        let mut second = pin!(turns.run("head", move || {
            done.send("second").unwrap();
            Ok(())
        }));
        let waits = poll_fn(|task| Poll::Ready(second.as_mut().poll(task).is_pending())).await;
        assert!(waits);
        release.send(()).unwrap();
        second.await.unwrap();
        assert_eq!(order.iter().collect::<Vec<_>>(), ["first", "second"]);
    }
}
