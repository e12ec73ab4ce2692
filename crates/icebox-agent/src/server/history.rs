//! The last of what a process wrote, for who follows it again after a break: as much as a few pipes hold, no more.
//!
//! Bytes are counted over all streams of the process from its start, so one number says how far somebody has got, and
//! what came to an end in between is in its place.

use std::collections::VecDeque;

use bytes::Bytes;

use super::child::{Event, Stream};

/// The most that is kept of a process's output, bookkeeping included.
const KEPT: usize = 256 << 10;
/// What a piece costs beside its bytes.
const PIECE: usize = 64;
/// Small writes to one stream are put together up to this size.
const MERGED: usize = 4 << 10;

struct Piece {
    stream: Stream,
    bytes: Vec<u8>,
}

/// What one process wrote last.
#[derive(Default)]
pub(super) struct History {
    pieces: VecDeque<Piece>,
    /// What they cost.
    cost: usize,
    /// How many bytes were written before the first of them, and in all.
    begins: u64,
    ends: u64,
}

/// What somebody has missed.
pub(super) struct Replay {
    /// How many bytes had been written before the first of the events.
    pub(super) at: u64,
    /// How many bytes that were asked for are not kept any more.
    pub(super) missed: u64,
    pub(super) events: Vec<Event>,
}

impl History {
    pub(super) fn add(&mut self, stream: Stream, bytes: &[u8]) {
        self.ends += bytes.len() as u64;
        match self.pieces.back_mut() {
            Some(last) if last.stream == stream && last.bytes.len() + bytes.len() <= MERGED => {
                last.bytes.extend_from_slice(bytes);
                self.cost += bytes.len();
            }
            _ => {
                let bytes = bytes.to_vec();
                self.cost += bytes.len() + PIECE;
                self.pieces.push_back(Piece { stream, bytes });
            }
        }
        while self.cost > KEPT {
            let Some(oldest) = self.pieces.pop_front() else {
                return;
            };
            self.cost -= oldest.bytes.len() + PIECE;
            self.begins += oldest.bytes.len() as u64;
        }
    }

    /// What was written from byte `from` on.
    pub(super) fn since(&self, from: u64) -> Replay {
        let at = from.clamp(self.begins, self.ends);
        let mut skip = at - self.begins;
        let mut events = Vec::new();
        for piece in &self.pieces {
            let length = piece.bytes.len() as u64;
            if skip < length {
                // Less than the piece, and that is in memory.
                let rest = &piece.bytes[usize::try_from(skip).unwrap_or(usize::MAX)..];
                let bytes = Bytes::copy_from_slice(rest);
                events.push(Event::Output(piece.stream, bytes));
            }
            skip = skip.saturating_sub(length);
        }
        Replay {
            at,
            missed: at.saturating_sub(from),
            events,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(replay: &Replay) -> Vec<(Stream, String)> {
        let events = replay.events.iter();
        let outputs = events.filter_map(|event| match event {
            Event::Output(stream, bytes) => {
                Some((*stream, String::from_utf8_lossy(bytes).into_owned()))
            }
            Event::End(_) => None,
        });
        outputs.collect()
    }

    #[test]
    fn what_was_missed_comes_in_order_from_any_byte_on() {
        let mut history = History::default();
        for (stream, bytes) in [
            (Stream::Stdout, "one "),
            (Stream::Stdout, "two "),
            (Stream::Stderr, "three "),
            (Stream::Stdout, "four"),
        ] {
            history.add(stream, bytes.as_bytes());
        }
        let out = |text: &str| (Stream::Stdout, text.to_owned());
        let err = |text: &str| (Stream::Stderr, text.to_owned());
        let all = history.since(0);
        assert_eq!(text(&all), [out("one two "), err("three "), out("four")]);
        let later = history.since(10);
        assert_eq!((later.at, later.missed), (10, 0));
        assert_eq!(text(&later), [err("ree "), out("four")]);
        assert_eq!(text(&history.since(18)), []);
        assert_eq!(history.since(99).at, 18, "nobody has got further");
    }

    #[test]
    fn it_is_bounded_whatever_is_written_and_says_what_it_lost() {
        let mut history = History::default();
        for n in 0..KEPT {
            // The worst: single bytes, in turn.
            let stream = [Stream::Stdout, Stream::Stderr][n % 2];
            history.add(stream, b"x");
        }
        assert!(history.cost <= KEPT && history.pieces.len() <= KEPT / PIECE);
        let replay = history.since(0);
        let kept: usize = text(&replay).iter().map(|(_, text)| text.len()).sum();
        assert_eq!(replay.missed + kept as u64, KEPT as u64);
        assert_eq!(replay.at, replay.missed);
        history.add(Stream::Stdout, &vec![b'y'; KEPT * 2]);
        assert_eq!(history.since(0).missed, 3 * KEPT as u64);
    }
}
