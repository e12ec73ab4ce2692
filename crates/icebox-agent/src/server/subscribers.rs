//! Who follows a process, and what one who is slow may do to the others.
//!
//! Each subscriber has a short queue. Who follows alone may be as slow as it likes, and slows the process down, as a pipe
//! would: nothing is dropped for it. Where several follow, the slowest sets the pace only while it moves at all: one that
//! has taken nothing for [`PATIENCE`] while others wait with empty hands is given up, and is told so after what its queue
//! still holds.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{sync::mpsc, time::timeout};

use super::child::{End, Event};
use super::history::{History, Replay};

/// Pieces that wait for a subscriber before the process has to.
const QUEUE: usize = 4;
/// How long others wait for a subscriber that takes nothing: longer than a network that lost a packet, much shorter than
/// somebody who waits for a result.
const PATIENCE: Duration = Duration::from_secs(3);

/// The subscribers of one process.
pub(super) struct Subscribers(Mutex<State>);

struct State {
    /// What it wrote last.
    history: History,
    who: Who,
}

enum Who {
    Live(Vec<mpsc::Sender<Event>>),
    Ended(End),
}

impl Subscribers {
    /// With a first one.
    pub(super) fn new() -> (Self, mpsc::Receiver<Event>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let state = State {
            history: History::default(),
            who: Who::Live(vec![sender]),
        };
        (Self(Mutex::new(state)), receiver)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows from now on. What has ended already yields its end alone. Without an end, a subscription ends when it is
    /// given up.
    pub(super) fn subscribe(&self) -> mpsc::Receiver<Event> {
        self.subscribe_from(None).1
    }

    /// Follows from now on, and gets what was written from a byte on before that: nothing is in both, and nothing in
    /// neither.
    pub(super) fn subscribe_from(
        &self,
        from: Option<u64>,
    ) -> (Option<Replay>, mpsc::Receiver<Event>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let mut state = self.state();
        match &mut state.who {
            Who::Live(all) => all.push(sender),
            // A new queue has room.
            Who::Ended(end) => {
                sender.try_send(Event::End(*end)).ok();
            }
        }
        (from.map(|from| state.history.since(from)), receiver)
    }

    pub(super) fn have_ended(&self) -> bool {
        matches!(self.state().who, Who::Ended(_))
    }

    /// Tells everybody. Returns when all have taken it who have not been given up or gone away.
    pub(super) async fn publish(&self, event: Event) {
        let all = {
            let mut state = self.state();
            if let Event::Output(stream, bytes) = &event {
                state.history.add(*stream, bytes);
            }
            match &state.who {
                Who::Live(all) => all.clone(),
                Who::Ended(_) => return,
            }
        };
        let mut sending: FuturesUnordered<_> = all
            .iter()
            .map(|subscriber| {
                let told = subscriber.send(event.clone());
                async move { (subscriber, told.await.is_ok()) }
            })
            .collect();
        let mut done: Vec<&mpsc::Sender<Event>> = Vec::new();
        let mut taken = false;
        let mut gone = false;
        loop {
            let next = if taken {
                timeout(PATIENCE, sending.next()).await
            } else {
                Ok(sending.next().await)
            };
            match next {
                Ok(Some((subscriber, has_taken))) => {
                    done.push(subscriber);
                    taken |= has_taken;
                    gone |= !has_taken;
                }
                Ok(None) => break,
                Err(_nobody_moves) => {
                    self.forget(|subscriber| {
                        let slow = !done.iter().any(|other| other.same_channel(subscriber));
                        slow && all.iter().any(|asked| asked.same_channel(subscriber))
                    });
                    break;
                }
            }
        }
        if gone {
            self.forget(mpsc::Sender::is_closed);
        }
    }

    fn forget(&self, which: impl Fn(&mpsc::Sender<Event>) -> bool) {
        if let Who::Live(all) = &mut self.state().who {
            all.retain(|subscriber| !which(subscriber));
        }
    }

    /// Makes the end known to whoever asks from now on. The result, when polled, tells those who asked before, each as
    /// soon as it has room.
    pub(super) fn end(&self, end: End) -> impl Future<Output = ()> + use<> {
        let all = match std::mem::replace(&mut self.state().who, Who::Ended(end)) {
            Who::Live(all) => all,
            Who::Ended(_) => Vec::new(),
        };
        async move {
            // One that went away does not want to know.
            let telling: FuturesUnordered<_> = all
                .iter()
                .map(|subscriber| subscriber.send(Event::End(end)))
                .collect();
            telling.for_each(|_| std::future::ready(())).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use icebox_agent_api::exit::Exit;
    use tokio::time::Instant;

    use super::{super::child::Stream, *};

    const END: End = End {
        exit: Exit::Code(0),
        timed_out: false,
    };

    fn piece() -> Event {
        Event::Output(Stream::Stdout, Bytes::from_static(b"x"))
    }

    async fn count(mut events: mpsc::Receiver<Event>) -> (usize, bool) {
        let mut pieces = 0;
        while let Some(event) = events.recv().await {
            match event {
                Event::Output(..) => pieces += 1,
                Event::End(_) => return (pieces, true),
            }
        }
        (pieces, false)
    }

    #[tokio::test(start_paused = true)]
    async fn who_follows_alone_loses_nothing_however_slow_it_is() {
        let (subscribers, mut events) = Subscribers::new();
        let reading = async {
            for _ in 0..20 {
                tokio::time::sleep(PATIENCE * 100).await;
                assert!(matches!(events.recv().await, Some(Event::Output(..))));
            }
            count(events).await
        };
        let telling = async {
            for _ in 0..20 {
                subscribers.publish(piece()).await;
            }
            subscribers.end(END).await;
        };
        let (rest, ()) = tokio::join!(reading, telling);
        assert_eq!(rest, (0, true));
    }

    #[tokio::test(start_paused = true)]
    async fn who_never_reads_is_given_up_once_and_the_others_get_everything() {
        let (subscribers, never_reads) = Subscribers::new();
        let begun = Instant::now();
        let reader = tokio::spawn(count(subscribers.subscribe()));
        for _ in 0..100 {
            subscribers.publish(piece()).await;
        }
        subscribers.end(END).await;
        assert_eq!(reader.await.unwrap(), (100, true));
        assert_eq!(begun.elapsed(), PATIENCE, "it held the others up once");
        assert_eq!(count(never_reads).await, (QUEUE, false), "and is told");
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_slow_but_moves_is_waited_for() {
        let (subscribers, mut slow) = Subscribers::new();
        let reader = tokio::spawn(count(subscribers.subscribe()));
        let reading = async {
            for _ in 0..20 {
                tokio::time::sleep(PATIENCE * 9 / 10).await;
                assert!(matches!(slow.recv().await, Some(Event::Output(..))));
            }
            count(slow).await
        };
        let telling = async {
            for _ in 0..20 {
                subscribers.publish(piece()).await;
            }
            subscribers.end(END).await;
        };
        let (rest, ()) = tokio::join!(reading, telling);
        assert_eq!(rest, (0, true));
        assert_eq!(reader.await.unwrap(), (20, true));
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_does_not_wait_for_who_never_reads() {
        let (subscribers, full) = Subscribers::new();
        for _ in 0..QUEUE {
            subscribers.publish(piece()).await;
        }
        let reader = subscribers.subscribe();
        let begun = Instant::now();
        let telling = tokio::spawn(subscribers.end(END));
        assert_eq!(count(reader).await, (0, true));
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert!(!telling.is_finished());
        // Late, but told.
        assert_eq!(count(full).await, (QUEUE, true));
        telling.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_back_gets_what_it_missed_and_then_what_follows() {
        let (subscribers, first) = Subscribers::new();
        subscribers.publish(piece()).await;
        drop(first);
        for _ in 0..10 {
            subscribers.publish(piece()).await;
        }
        let (replay, events) = subscribers.subscribe_from(Some(1));
        let replay = replay.unwrap();
        let [Event::Output(Stream::Stdout, missed)] = &replay.events[..] else {
            panic!("one piece, put together");
        };
        assert_eq!((missed.len(), replay.at, replay.missed), (10, 1, 0));
        let reader = tokio::spawn(count(events));
        for _ in 0..5 {
            subscribers.publish(piece()).await;
        }
        subscribers.end(END).await;
        assert_eq!(reader.await.unwrap(), (5, true));
        let (replay, events) = subscribers.subscribe_from(Some(11));
        assert_eq!(replay.unwrap().events.len(), 1, "after its end, too");
        assert_eq!(count(events).await, (0, true));
    }

    #[tokio::test(start_paused = true)]
    async fn who_goes_away_is_forgotten() {
        let (subscribers, first) = Subscribers::new();
        drop(first);
        subscribers.publish(piece()).await;
        assert!(matches!(&subscribers.state().who, Who::Live(all) if all.is_empty()));
        assert!(!subscribers.have_ended());
        subscribers.end(END).await;
        assert!(subscribers.have_ended());
        assert_eq!(count(subscribers.subscribe()).await, (0, true));
    }
}
