//! Whether a publisher's batches follow each other.
//!
//! Batches are numbered from 0 by each process that publishes; newer publishers name themselves besides. A publisher that
//! does not is told from its successor by the last batch that was seen: a successor has another one under that number.
//!
//! Contract: pure.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

/// Bytes of a sequence frame without, and with, the publisher's name.
const NUMBER_BYTES: usize = 8;
const NAMED_BYTES: usize = 24;

/// A batch as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbered {
    /// Its topic; empty where a replay does not repeat it.
    pub topic: Bytes,
    /// Its number.
    pub number: u64,
    /// Who published it, if that is said.
    pub publisher: Option<[u8; 16]>,
    /// The batch.
    pub payload: Bytes,
}

impl Numbered {
    /// Reads the sequence frame; `None` if it is none.
    #[must_use]
    pub fn read(topic: Bytes, frame: &[u8], payload: Bytes) -> Option<Self> {
        let number = u64::from_be_bytes(*frame.first_chunk::<NUMBER_BYTES>()?);
        let publisher = match frame.len() {
            NUMBER_BYTES => None,
            NAMED_BYTES => frame.last_chunk::<16>().copied(),
            _ => return None,
        };
        Some(Self { topic, number, publisher, payload })
    }

    fn print(&self) -> u64 {
        xxh3_64(&self.payload)
    }
}

/// What is known of a publisher's batches.
#[derive(Clone, Debug, Default)]
pub struct Continuity {
    last: Option<Last>,
}

#[derive(Clone, Copy, Debug)]
struct Last {
    number: u64,
    publisher: Option<[u8; 16]>,
    print: u64,
    /// The last one that came live, and not by a replay.
    live: Option<u64>,
}

/// What a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The next one, or the first.
    Next,
    /// One that is known.
    Known,
    /// Some are missing before it.
    Gap,
    /// Its publisher is another one: nothing of the former holds any more.
    Restart,
}

impl Continuity {
    /// Number of the last batch; `None` before the first.
    #[must_use]
    pub fn last(&self) -> Option<u64> {
        self.last.map(|last| last.number)
    }

    /// Forgets the publisher.
    pub fn forget(&mut self) {
        self.last = None;
    }

    /// A connection was made anew: what comes live may be what came before.
    pub fn reconnected(&mut self) {
        if let Some(last) = &mut self.last {
            last.live = None;
        }
    }

    /// Judges a batch that came live.
    #[must_use]
    pub fn live(&self, batch: &Numbered) -> Step {
        let Some(last) = self.last else { return Step::Next };
        if last.is_another(batch) || last.live.is_some_and(|live| batch.number <= live) {
            return Step::Restart;
        }
        if batch.number <= last.number {
            // What a replay brought meanwhile.
            return if batch.number < last.number || batch.print() == last.print { Step::Known } else { Step::Restart };
        }
        if batch.number == last.number + 1 { Step::Next } else { Step::Gap }
    }

    /// Judges the first batch of a replay that was asked for from the last one on; `None` if the replay was empty.
    #[must_use]
    pub fn replayed_first(&self, batch: Option<&Numbered>) -> Step {
        let Some(last) = self.last else { return Step::Next };
        // It must have had its last one at least.
        let Some(batch) = batch else { return Step::Restart };
        if last.is_another(batch) || batch.number < last.number {
            return Step::Restart;
        }
        if batch.number == last.number {
            return if batch.print() == last.print { Step::Known } else { Step::Restart };
        }
        if batch.number == last.number + 1 { Step::Next } else { Step::Gap }
    }

    /// Takes a batch down.
    pub fn took(&mut self, batch: &Numbered, is_live: bool) {
        let live = if is_live { Some(batch.number) } else { self.last.and_then(|last| last.live) };
        self.last = Some(Last { number: batch.number, publisher: batch.publisher, print: batch.print(), live });
    }
}

impl Last {
    fn is_another(&self, batch: &Numbered) -> bool {
        self.publisher.zip(batch.publisher).is_some_and(|(known, said)| known != said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(number: u64, payload: &'static str) -> Numbered {
        Numbered { topic: Bytes::new(), number, publisher: None, payload: Bytes::from_static(payload.as_bytes()) }
    }

    fn after(batches: &[(u64, &'static str)]) -> Continuity {
        let mut continuity = Continuity::default();
        for (number, payload) in batches {
            continuity.took(&batch(*number, payload), true);
        }
        continuity
    }

    #[test]
    fn a_sequence_frame_is_a_number_with_or_without_a_publisher() {
        let mut frame = 7u64.to_be_bytes().to_vec();
        assert_eq!(Numbered::read(Bytes::new(), &frame, Bytes::new()).map(|read| (read.number, read.publisher)), Some((7, None)));
        frame.extend([9; 16]);
        assert_eq!(
            Numbered::read(Bytes::new(), &frame, Bytes::new()).map(|read| (read.number, read.publisher)),
            Some((7, Some([9; 16])))
        );
        assert_eq!(Numbered::read(Bytes::new(), &frame[..20], Bytes::new()), None);
        assert_eq!(Numbered::read(Bytes::new(), &frame[..4], Bytes::new()), None);
    }

    #[test]
    fn live_batches_follow_each_other_or_say_what_is_wrong() {
        assert_eq!(Continuity::default().live(&batch(41, "")), Step::Next);
        let continuity = after(&[(4, "a"), (5, "b")]);
        assert_eq!(continuity.live(&batch(6, "c")), Step::Next);
        assert_eq!(continuity.live(&batch(8, "c")), Step::Gap);
        assert_eq!(continuity.live(&batch(0, "c")), Step::Restart);
        let mut named = batch(6, "c");
        named.publisher = Some([1; 16]);
        assert_eq!(continuity.live(&named), Step::Next);
        let mut continuity = continuity;
        continuity.took(&named, true);
        assert_eq!(continuity.live(&Numbered { publisher: Some([2; 16]), ..batch(7, "d") }), Step::Restart);
    }

    #[test]
    fn what_a_replay_brought_is_known_when_it_comes_live() {
        let mut continuity = after(&[(4, "a")]);
        continuity.took(&batch(5, "b"), false);
        continuity.took(&batch(6, "c"), false);
        assert_eq!(continuity.live(&batch(5, "b")), Step::Known);
        assert_eq!(continuity.live(&batch(6, "c")), Step::Known);
        assert_eq!(continuity.live(&batch(6, "other")), Step::Restart);
    }

    #[test]
    fn a_replay_tells_a_publisher_from_its_successor() {
        let continuity = after(&[(5, "b")]);
        assert_eq!(continuity.replayed_first(Some(&batch(5, "b"))), Step::Known);
        assert_eq!(continuity.replayed_first(Some(&batch(5, "other"))), Step::Restart);
        assert_eq!(continuity.replayed_first(None), Step::Restart);
        assert_eq!(continuity.replayed_first(Some(&batch(9, "x"))), Step::Gap);
        assert_eq!(Continuity::default().replayed_first(None), Step::Next);
    }
}
